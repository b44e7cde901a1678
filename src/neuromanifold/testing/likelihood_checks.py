"""The contract of a likelihood as a callable test-suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neuromanifold._typing import Outputs
from neuromanifold.errors import UnsupportedError
from neuromanifold.likelihoods import Likelihood

__all__ = ["check_likelihood"]

_STANDARD_ERRORS = 5.0
"""A right answer is further off once in two million comparisons."""

_NUM_DIRECTIONS = 3
"""In how many random directions the fourth moment is tested."""


def check_likelihood(
    likelihood: Likelihood,
    outputs: Outputs,
    targets: Tensor,
    *,
    num_draws: int = 20_000,
    generator: torch.Generator | None = None,
) -> None:
    """Check that a likelihood keeps its contract, in float64 on small tensors.

    Log-probability, score, columns, products and signs agree with each other and with automatic
    derivatives; scores of sampled targets have mean zero, the output Fisher as their covariance,
    and the fourth moment that is claimed; each even score has that covariance. Sampled quantities
    agree within five standard errors.

    Args:
        likelihood: what to check.
        outputs: valid outputs `(N, ...)`; a tuple if the likelihood takes one.
        targets: valid targets for them.
        num_draws: draws for the sampled quantities.
        generator: of these draws; seeded with 0 if not given.

    Raises:
        AssertionError: If a part of the contract is broken; the sentence says which.

    Example:
        >>> import torch
        >>> from neuromanifold.likelihoods import Poisson
        >>> check_likelihood(Poisson(), torch.randn(2, 3), torch.tensor([[0, 1, 2], [3, 1, 0]]))
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    outputs = _map(lambda part: part.double(), outputs)
    targets = targets.double() if targets.is_floating_point() else targets
    canonical = likelihood.canonical(outputs)

    likelihood.check(outputs, targets)
    _check_log_prob(likelihood, outputs, targets)
    _check_score(likelihood, canonical, targets)
    _check_mask(likelihood, canonical, targets)
    _check_sample(likelihood, canonical, targets, generator)
    fisher = _check_columns(likelihood, canonical)
    scores = _sampled_scores(likelihood, canonical, num_draws, generator)
    _check_moments(scores, fisher)
    if fisher is not None:
        _check_signs(likelihood, canonical, fisher, num_draws, generator)
        for weighted in (False, True):
            _check_even_scores(likelihood, canonical, fisher, num_draws, weighted, generator)
    _check_fourth_moment(likelihood, canonical, scores, generator)
    if isinstance(outputs, tuple):
        _check_kind(likelihood, outputs, targets)


def _check_log_prob(likelihood: Likelihood, outputs: Outputs, targets: Tensor) -> None:
    log_prob = likelihood.log_prob(outputs, targets)
    num_samples = len(likelihood.canonical(outputs))
    assert log_prob.shape == (num_samples,), (
        f"log_prob must be one number per sample, ({num_samples},); got {tuple(log_prob.shape)}."
    )
    _close("loss", likelihood.loss(outputs, targets), -log_prob.mean(), "mean of −log_prob")
    observed = likelihood.observed(outputs, targets)
    if observed is None or observed.all():
        expected = likelihood.distribution(outputs).log_prob(targets.to(log_prob.dtype))
        expected = expected.reshape(num_samples, -1).sum(1)
        _close("log_prob", log_prob, expected, "log_prob of its distribution")


def _check_score(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> None:
    leaf = outputs.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(likelihood.log_prob(leaf, targets).sum(), leaf)
    score = likelihood.score(leaf, targets)
    _close("score", score, gradient, "gradient of log_prob")
    assert not score.requires_grad, "score must not carry an autograd graph."


def _check_mask(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> None:
    score = likelihood.score(outputs, targets)
    masked = likelihood.mask_cotangent(score.expand(2, *score.shape), outputs, targets)
    for part in masked:
        _close("mask_cotangent", part, score, "score, which is zero where no position counts")
    observed = likelihood.observed(outputs, targets)
    expected = len(outputs) if observed is None else int(observed.sum())
    num_positions = int(likelihood.num_positions(outputs, targets))
    assert num_positions == expected, (
        f"num_positions is {num_positions}, but {expected} positions are observed."
    )


def _check_sample(
    likelihood: Likelihood, outputs: Tensor, targets: Tensor, generator: torch.Generator
) -> None:
    seed = generator.initial_seed()
    before = torch.get_rng_state()
    first, second = (
        likelihood.sample(outputs, 2, generator=torch.Generator().manual_seed(seed))
        for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), before), (
        "sample must draw from its generator only, but it moved the global random state."
    )
    assert torch.equal(first, second), "sample must depend on its generator only."
    assert first.shape == (2, *targets.shape), (
        f"sample(outputs, 2) must have shape {(2, *targets.shape)}, got {tuple(first.shape)}."
    )
    likelihood.check(outputs, first[0])


def _check_columns(likelihood: Likelihood, outputs: Tensor) -> Tensor | None:
    """The output Fisher `(N, E, E)`, or None if the likelihood has no exact form of it."""
    try:
        columns = torch.stack(list(likelihood.fisher_columns(outputs)))
    except UnsupportedError as error:
        _names_alternative(error, "MonteCarlo")
        return None
    assert columns.shape[1:] == outputs.shape, (
        f"Columns must be like the outputs {tuple(outputs.shape)}, got {tuple(columns.shape[1:])}."
    )
    assert likelihood.num_columns(outputs) == len(columns), (
        f"num_columns is {likelihood.num_columns(outputs)}, but there are {len(columns)} columns."
    )
    flat = columns.flatten(2) if columns.ndim > 2 else columns.unsqueeze(-1)  # (columns, N, E)
    fisher = torch.einsum("cni,cnj->nij", flat, flat)
    _, num_samples, num_entries = flat.shape
    basis = torch.eye(num_entries, dtype=outputs.dtype).unsqueeze(1)
    basis = basis.expand(-1, num_samples, -1).reshape(num_entries, *outputs.shape)
    product = likelihood.fisher_product(outputs, basis).reshape(num_entries, num_samples, -1)
    _close("fisher_product", product.transpose(0, 1), fisher, "Σ_c s_c s_cᵀ of its columns")
    return fisher


def _sampled_scores(
    likelihood: Likelihood, outputs: Tensor, num_draws: int, generator: torch.Generator
) -> Tensor:
    """Scores of targets drawn from the model, `(draws, N, E)`; all draws as one long batch."""
    targets = likelihood.sample(outputs, num_draws, generator=generator)
    score = likelihood.score(_tile(outputs, num_draws), targets.flatten(0, 1))
    return score.reshape(num_draws, len(outputs), -1)


def _tile(outputs: Tensor, num: int) -> Tensor:
    """The same samples `num` times over, as one batch."""
    return outputs.repeat(num, *[1] * (outputs.ndim - 1))


def _check_moments(scores: Tensor, fisher: Tensor | None) -> None:
    flat = scores.flatten(1)
    _mean_is("The mean score", flat, torch.zeros_like(flat[0]))
    if fisher is not None:
        _second_moment_is("The covariance of the scores", flat, fisher)


def _check_signs(
    likelihood: Likelihood,
    outputs: Tensor,
    fisher: Tensor,
    num_draws: int,
    generator: torch.Generator,
) -> None:
    tiled = _tile(outputs, num_draws // 2)
    signs = torch.stack(list(likelihood.random_signs(tiled, 2, generator=generator)))
    assert signs.shape == (2, *tiled.shape), (
        f"random_signs(outputs, 2) must yield two tensors like the outputs {tuple(tiled.shape)}; "
        f"together they have shape {tuple(signs.shape)}."
    )
    signs = signs.reshape(-1, outputs.numel())
    _second_moment_is("The second moment of random_signs", signs, fisher)


def _check_even_scores(
    likelihood: Likelihood,
    outputs: Tensor,
    fisher: Tensor,
    num_draws: int,
    weighted: bool,
    generator: torch.Generator,
) -> None:
    tiled = _tile(outputs, num_draws // 2)
    try:
        drawn = list(likelihood.even_scores(tiled, 2, weighted=weighted, generator=generator))
    except UnsupportedError as error:
        _names_alternative(error, "RandomSigns")
        return
    assert [u.shape for u in drawn] == [tiled.shape] * 2, (
        f"even_scores(outputs, 2) must yield 2 tensors like the outputs, {tuple(tiled.shape)}; got "
        f"{[tuple(u.shape) for u in drawn]}."
    )
    for which, u in enumerate(drawn, start=1):
        name = f"The mean of u uᵀ of {'weighted ' * weighted}even scores, number {which},"
        _second_moment_is(name, u.reshape(num_draws // 2, -1), fisher)


def _check_fourth_moment(
    likelihood: Likelihood, outputs: Tensor, scores: Tensor, generator: torch.Generator
) -> None:
    shape = (_NUM_DIRECTIONS, *outputs.shape)
    j = torch.randn(shape, generator=generator, dtype=outputs.dtype)
    try:
        moment = likelihood.score_fourth_moment(outputs, j)
    except UnsupportedError as error:
        _names_alternative(error, "sampl")
        return
    expected_shape = (_NUM_DIRECTIONS, len(outputs))
    assert moment.shape == expected_shape, (
        f"score_fourth_moment must keep leading axes and N, {expected_shape}; "
        f"got {tuple(moment.shape)}."
    )
    along = torch.einsum("mne,rne->mrn", scores, j.reshape(*expected_shape, -1))
    _mean_is("The mean of (j · score)⁴", along**4, moment)
    cumulants = likelihood.column_cumulants(outputs)
    if cumulants is not None:
        columns = torch.stack(list(likelihood.fisher_columns(outputs)))
        columns = columns.reshape(*columns.shape[:2], -1)
        components = torch.einsum("vne,rne->rvn", columns, j.reshape(*expected_shape, -1))
        squares = components.square()
        groups = squares.new_zeros(len(j), cumulants.num_groups, len(outputs))
        groups.index_add_(1, cumulants.group, squares)
        cumulant = (cumulants.quartic * squares.square()).sum(1)
        cumulant += cumulants.squared * groups.square().sum(1)
        by_columns = cumulant + 3 * squares.sum(1).square()
        _close("column_cumulants", by_columns, moment, "score_fourth_moment")


def _check_kind(likelihood: Any, outputs: tuple[Tensor, ...], targets: Tensor) -> None:
    """A tuple in, a tuple out, with the values of the single tensor."""
    canonical = likelihood.canonical(outputs)
    answers: dict[str, Callable[[Any], Any]] = {
        "score": lambda f: likelihood.score(f, targets),
        "fisher_columns": lambda f: next(likelihood.fisher_columns(f)),
        "fisher_product": lambda f: likelihood.fisher_product(f, f),
        "random_signs": lambda f: next(
            likelihood.random_signs(f, 1, generator=torch.Generator().manual_seed(0))
        ),
    }
    for name, answer in answers.items():
        parts = answer(outputs)
        assert isinstance(parts, tuple), (
            f"{name} must answer a tuple for a tuple, got {type(parts).__name__}."
        )
        _close(name, likelihood.canonical(parts), answer(canonical), "answer for one tensor")
    moment = likelihood.score_fourth_moment(outputs, outputs)
    expected = likelihood.score_fourth_moment(canonical, canonical)
    _close("score_fourth_moment", moment, expected, "answer for one tensor")


def _names_alternative(error: UnsupportedError, word: str) -> None:
    assert word in str(error), f"An UnsupportedError must name the alternative, got: {error}"


def _close(name: str, got: Tensor, expected: Tensor, meaning: str) -> None:
    """Equal to rounding: a thousand units in the last place of the largest entry."""
    assert got.shape == expected.shape, (
        f"{name} has shape {tuple(got.shape)}, but the {meaning} has {tuple(expected.shape)}."
    )
    error = (got - expected).abs().max()
    tolerance = _rounding(expected)
    assert error <= tolerance, (
        f"{name} differs from the {meaning} by {error:.3g}, more than rounding ({tolerance:.1g})."
    )


def _mean_is(name: str, draws: Tensor, expected: Tensor) -> None:
    """The mean over axis 0 is as expected, within its standard error."""
    stderr = draws.std(0) / len(draws) ** 0.5
    _within(name, draws.mean(0), expected, stderr)


def _second_moment_is(name: str, draws: Tensor, fisher: Tensor) -> None:
    """`E u uᵀ` of `u (draws, N·E)` is the Fisher `(N, E, E)`, and zero between samples."""
    num_draws = len(draws)
    mean = draws.T @ draws / num_draws
    second = (draws**2).T @ draws**2 / num_draws
    stderr = ((second - mean**2).clamp(min=0) / num_draws).sqrt()
    expected = torch.block_diag(*fisher)
    _within(name, mean, expected, stderr)


def _within(name: str, got: Tensor, expected: Tensor, stderr: Tensor) -> None:
    error = (got - expected).abs()
    excess = (error / (stderr + _rounding(expected))).max()
    assert excess <= _STANDARD_ERRORS, (
        f"{name} is {excess:.1f} standard errors away from what the likelihood claims."
    )


def _rounding(expected: Tensor) -> Tensor:
    return 1e3 * torch.finfo(expected.dtype).eps * (1 + expected.abs().max())


def _map(fn: Callable[[Tensor], Tensor], outputs: Outputs) -> Outputs:
    return tuple(fn(part) for part in outputs) if isinstance(outputs, tuple) else fn(outputs)
