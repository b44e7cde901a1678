"""The contract of an estimator as a callable test-suite."""

from __future__ import annotations

import torch
from torch import Tensor

from neuromanifold.estimators import Estimator
from neuromanifold.likelihoods import Likelihood
from neuromanifold.testing import reference
from neuromanifold.testing._compare import assert_close, assert_mean, rounding

__all__ = ["check_estimator"]


def check_estimator(
    estimator: Estimator,
    likelihood: Likelihood,
    outputs: Tensor,
    targets: Tensor,
    *,
    num_draws: int = 2_000,
    generator: torch.Generator | None = None,
) -> None:
    """Check that an estimator keeps its contract for one likelihood, in float64.

    The outer products of its cotangents sum to the output Fisher, exactly or on average, and are
    zero where the targets mark a position as ignored; products agree with them; their number is as
    announced; randomness comes from the generator alone. An estimator that needs targets does not
    claim the output Fisher, but says so when there are none.

    Args:
        estimator: what to check.
        likelihood: whose output Fisher is estimated.
        outputs: valid outputs `(N, ...)` with few entries per sample.
        targets: valid targets for them.
        num_draws: repetitions over which a random estimator is averaged.
        generator: of these; seeded with 0 if not given.

    Raises:
        AssertionError: If a part of the contract is broken; the sentence says which.

    Example:
        >>> import torch, neuromanifold as nm
        >>> outputs, targets = torch.randn(2, 3), torch.tensor([0, 2])
        >>> check_estimator(nm.MonteCarlo(2), nm.Categorical(), outputs, targets)
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    outputs = outputs.detach().double()
    targets = targets.double() if targets.is_floating_point() else targets
    seed = generator.initial_seed()
    u = _cotangents(estimator, likelihood, outputs, targets, torch.Generator().manual_seed(seed))
    _check_count(estimator, likelihood, outputs, u)
    _check_ignored(likelihood, outputs, targets, u)
    _check_randomness(estimator, likelihood, outputs, targets, u, seed)
    _check_product(estimator, likelihood, outputs, targets, u, seed)
    if estimator.needs_targets:
        _check_needs_targets(estimator, likelihood, outputs)
    else:
        _check_mean(estimator, likelihood, outputs, targets, num_draws, generator)


def _cotangents(
    estimator: Estimator,
    likelihood: Likelihood,
    outputs: Tensor,
    targets: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    """All sweeps, `(V, *outputs.shape)`."""
    return torch.stack(
        list(estimator.cotangents(likelihood, outputs, targets, generator=generator))
    )


def _check_count(estimator: Estimator, likelihood: Likelihood, outputs: Tensor, u: Tensor) -> None:
    sweeps = estimator.num_sweeps(likelihood, outputs)
    assert u.shape == (sweeps, *outputs.shape), (
        f"num_sweeps promises {sweeps} tensors like the outputs {tuple(outputs.shape)}, "
        f"the cotangents stack to {tuple(u.shape)}."
    )
    assert not u.requires_grad, "Cotangents must not carry an autograd graph."


def _check_ignored(likelihood: Likelihood, outputs: Tensor, targets: Tensor, u: Tensor) -> None:
    masked = likelihood.mask_cotangent(u, outputs, targets)
    assert torch.equal(masked, u), "Cotangents must be zero at ignored positions."


def _check_randomness(
    estimator: Estimator,
    likelihood: Likelihood,
    outputs: Tensor,
    targets: Tensor,
    u: Tensor,
    seed: int,
) -> None:
    state = torch.get_rng_state()
    again, other = (
        _cotangents(estimator, likelihood, outputs, targets, torch.Generator().manual_seed(s))
        for s in (seed, seed + 1)
    )
    assert torch.equal(torch.get_rng_state(), state), "The global random state was moved."
    assert torch.equal(again, u), "The same seed must give the same cotangents."
    assert estimator.random != torch.equal(other, u), (
        f"random is {estimator.random}, but another seed gives "
        f"{'the same' if torch.equal(other, u) else 'other'} cotangents."
    )


def _check_product(
    estimator: Estimator,
    likelihood: Likelihood,
    outputs: Tensor,
    targets: Tensor,
    u: Tensor,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed + 1)
    v = torch.randn((2, *outputs.shape), generator=generator, dtype=outputs.dtype)
    product = estimator.output_product(
        likelihood, outputs, targets, v, generator=torch.Generator().manual_seed(seed)
    )
    fisher = _second_moments(u)
    expected = torch.einsum("nef,rnf->rne", fisher, v.reshape(*v.shape[:2], -1)).reshape(v.shape)
    tolerance = rounding(u.numel(), u.dtype) * fisher.norm() * v.norm()
    assert_close("output_product", product, expected, tolerance)


def _check_needs_targets(estimator: Estimator, likelihood: Likelihood, outputs: Tensor) -> None:
    try:
        _cotangents(estimator, likelihood, outputs, None, torch.Generator())
    except ValueError:
        return
    raise AssertionError("needs_targets is true, but cotangents without targets are no ValueError.")


def _check_mean(
    estimator: Estimator,
    likelihood: Likelihood,
    outputs: Tensor,
    targets: Tensor,
    num_draws: int,
    generator: torch.Generator,
) -> None:
    expected = reference.output_fisher(likelihood, outputs, targets)
    num_draws = num_draws if estimator.random else 1
    # All draws as one long batch: samples do not mix.
    tiled = outputs.repeat(num_draws, *[1] * (outputs.ndim - 1))
    labels = targets.repeat(num_draws, *[1] * (targets.ndim - 1))
    u = _cotangents(estimator, likelihood, tiled, labels, generator)
    moments = _second_moments(u).unflatten(0, (num_draws, -1))
    if estimator.random:
        assert_mean("Σ u uᵀ", moments, expected, expected.norm())
    else:
        tolerance = rounding(u.numel(), u.dtype) * expected.norm()
        assert_close("Σ u uᵀ", moments[0], expected, tolerance)


def _second_moments(u: Tensor) -> Tensor:
    """`Σ_v u_v u_vᵀ` of every sample, `(N, E, E)`."""
    flat = u.reshape(*u.shape[:2], -1)
    return torch.einsum("vne,vnf->nef", flat, flat)
