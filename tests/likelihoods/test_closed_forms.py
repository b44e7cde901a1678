"""Closed forms against sums over all targets, quadrature, and textbook formulas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import distributions as td

from neuromanifold.errors import UnsupportedError
from neuromanifold.likelihoods import (
    Bernoulli,
    Categorical,
    FromDistribution,
    Gaussian,
    GaussianMeanVariance,
    Likelihood,
    Poisson,
)

TOLERANCE = 1e-12
NUM_DIRECTIONS = 2


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


def all_targets(num_values: int, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Every assignment of 0 … num_values − 1 to a tensor."""
    for values in itertools.product(range(num_values), repeat=math.prod(shape)):
        yield torch.tensor(values).reshape(shape)


def dense_fisher(likelihood: Likelihood, outputs: Tensor) -> Tensor:
    """Output Fisher `(N, E, E)` from the product with the basis vectors."""
    num_samples, num_entries = len(outputs), outputs[0].numel()
    basis = torch.eye(num_entries, dtype=outputs.dtype).unsqueeze(1).expand(-1, num_samples, -1)
    product = likelihood.fisher_product(outputs, basis.reshape(num_entries, *outputs.shape))
    return product.reshape(num_entries, num_samples, num_entries).transpose(0, 1)


def check_moments(
    likelihood: Likelihood, outputs: Tensor, weighted_targets: list[tuple[Tensor, Tensor]]
) -> None:
    """Moments of the score from targets `(N, …)` and their probabilities `(N,)`."""
    j = randn(NUM_DIRECTIONS, *outputs.shape)
    num_samples = len(outputs)
    mean: Tensor = torch.zeros(num_samples, outputs[0].numel(), dtype=outputs.dtype)
    covariance: Tensor = torch.zeros_like(dense_fisher(likelihood, outputs))
    fourth: Tensor = torch.zeros(NUM_DIRECTIONS, num_samples, dtype=outputs.dtype)
    for targets, weight in weighted_targets:
        score = likelihood.score(outputs, targets).reshape(num_samples, -1)
        mean += weight[:, None] * score
        covariance += weight[:, None, None] * score[:, :, None] * score[:, None, :]
        along = (j.reshape(NUM_DIRECTIONS, num_samples, -1) * score).sum(-1)
        fourth += weight * along**4
    close(mean, torch.zeros_like(mean))
    close(covariance, dense_fisher(likelihood, outputs))
    close(fourth, likelihood.score_fourth_moment(outputs, j))


@pytest.mark.parametrize(
    ("likelihood", "outputs", "target_shape", "num_values"),
    [
        (Categorical(), 2 * randn(3, 4), (), 4),
        (Categorical(), 2 * randn(2, 3, 3), (3,), 3),
        (Categorical(class_axis=1), randn(2, 3, 2, 2), (2, 2), 3),
        (Bernoulli(), 3 * randn(4), (), 2),
        (Bernoulli(), 3 * randn(2, 3), (3,), 2),
        (FromDistribution(lambda f: td.Categorical(logits=f)), randn(3, 4), (), 4),
        (FromDistribution(lambda f: td.Categorical(logits=f)), randn(2, 3, 3), (3,), 3),
        (
            FromDistribution(lambda f: td.Independent(td.Categorical(logits=f), 2)),
            randn(2, 2, 2, 2),
            (2, 2),
            2,
        ),
    ],
)
def test_moments_by_enumeration(
    likelihood: Likelihood, outputs: Tensor, target_shape: tuple[int, ...], num_values: int
) -> None:
    targets = [y.expand(len(outputs), *y.shape) for y in all_targets(num_values, target_shape)]
    check_moments(
        likelihood, outputs, [(y, likelihood.log_prob(outputs, y).exp()) for y in targets]
    )


def test_poisson_moments_by_summation() -> None:
    rates = torch.tensor([0.2, 1.0, 2.5], dtype=torch.float64)
    # P(y > 60) is below 1e-40 at these rates.
    counts = [torch.full((3,), y, dtype=torch.float64) for y in range(60)]
    outputs = rates.log()
    check_moments(Poisson(), outputs, [(y, Poisson().log_prob(outputs, y).exp()) for y in counts])


def hermite(num_nodes: int, mean: Tensor, scale: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Targets and weights that are exact for polynomials of degree 2 · nodes − 1 per entry."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    weights = weights / weights.sum()
    points = []
    for index in itertools.product(range(num_nodes), repeat=mean[0].numel()):
        z = torch.tensor(nodes[list(index)]).reshape(mean.shape[1:])
        weight = torch.tensor(float(np.prod(weights[list(index)])), dtype=torch.float64)
        points.append((mean + scale * z, weight.expand(len(mean))))
    return points


@pytest.mark.parametrize(
    ("likelihood", "variance"),
    [
        (Gaussian(0.3), torch.full((2,), 0.3, dtype=torch.float64)),
        (Gaussian(torch.tensor([0.5, 2.0])), torch.tensor([0.5, 2.0], dtype=torch.float64)),
        (Gaussian(0.5, per_event=True), torch.ones(2, dtype=torch.float64)),
    ],
)
def test_gaussian_moments_by_quadrature(likelihood: Likelihood, variance: Tensor) -> None:
    outputs = randn(3, 2)
    check_moments(likelihood, outputs, hermite(6, outputs, variance.sqrt()))


@pytest.mark.parametrize("log_variance", [True, False])
def test_mean_variance_moments_by_quadrature(log_variance: bool) -> None:
    mean, log_var = randn(2, 2, 2).unbind(1)
    outputs = torch.stack((mean, log_var if log_variance else log_var.exp()), dim=1)
    likelihood = GaussianMeanVariance(log_variance=log_variance)
    check_moments(likelihood, outputs, hermite(6, mean, (log_var / 2).exp()))


def test_fisher_of_a_normal_with_a_learned_scale() -> None:
    outputs = randn(3, 2)
    likelihood = FromDistribution(lambda f: td.Normal(f[:, 0], f[:, 1].exp()))
    diagonal = torch.stack(((-2 * outputs[:, 1]).exp(), torch.full((3,), 2.0)), 1)
    close(dense_fisher(likelihood, outputs), torch.diag_embed(diagonal))


def test_fisher_of_a_gamma_in_its_concentration_and_rate() -> None:
    outputs = randn(3, 2).exp()
    concentration, rate = outputs.unbind(1)
    likelihood = FromDistribution(lambda f: td.Gamma(f[:, 0], f[:, 1]))
    expected = torch.stack(
        (
            torch.special.polygamma(1, concentration),
            -1 / rate,
            -1 / rate,
            concentration / rate**2,
        ),
        1,
    ).reshape(3, 2, 2)
    # Eigenvalues spread over some decades; the square root is squared again.
    torch.testing.assert_close(dense_fisher(likelihood, outputs), expected, rtol=1e-9, atol=1e-9)


def test_positions_and_supports_agree_with_the_closed_forms() -> None:
    outputs, j = randn(2, 3, 4), randn(2, 2, 3, 4)
    positions = FromDistribution(lambda f: td.Independent(td.Categorical(logits=f), 1))
    close(dense_fisher(positions, outputs), dense_fisher(Categorical(), outputs))
    single = FromDistribution(lambda f: td.Categorical(logits=f))
    close(
        single.score_fourth_moment(outputs[:, 0], j[:, :, 0]),
        Categorical().score_fourth_moment(outputs[:, 0], j[:, :, 0]),
    )


def test_singular_fisher_has_no_spurious_columns() -> None:
    """Four outputs that have but one sum: three eigenvalues of the KL Hessian are zero."""
    likelihood = FromDistribution(lambda f: td.Normal(f.sum(-1), 0.7))
    columns = torch.stack(list(likelihood.fisher_columns(randn(2, 4))))
    assert (columns.flatten(1).abs().amax(1) > 0).sum() == 1


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda f: td.Laplace(f, 1.0), "kink"),
        (lambda f: td.Uniform(f, f + 1), "support moves"),
        (lambda f: td.Pareto(f.exp(), 2.0), "support moves"),
        (lambda f: td.StudentT(3.0, f), "no KL divergence"),
        (
            lambda f: td.TransformedDistribution(
                td.Normal(0 * f.detach(), 1.0), td.AffineTransform(f, 2.0)
            ),
            "transforms depend on the outputs",
        ),
        (
            lambda f: td.TransformedDistribution(td.Normal(f, 1.0), td.transforms.AbsTransform()),
            "not one-to-one",
        ),
        (
            lambda f: td.Independent(td.Laplace(f.unsqueeze(1), 1.0), 1),
            "kink",
        ),
    ],
)
def test_no_exact_output_fisher_is_said(fn: Callable[[Tensor], td.Distribution], reason: str):
    likelihood, outputs = FromDistribution(fn), randn(3)
    for ask in (
        lambda: list(likelihood.fisher_columns(outputs)),
        lambda: likelihood.fisher_product(outputs, outputs),
        lambda: list(likelihood.random_signs(outputs, 1)),
    ):
        with pytest.raises(UnsupportedError, match=f"{reason}.*MonteCarlo"):
            ask()


def test_impossible_classes_are_harmless() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0, -math.inf]], dtype=torch.float64)
    j = randn(1, 4)
    possible = [0, 2]
    close(
        Categorical().score_fourth_moment(logits, j),
        Categorical().score_fourth_moment(logits[:, possible], j[:, possible]),
    )
    assert torch.isfinite(dense_fisher(Categorical(), logits)).all()
    draws = Categorical().sample(logits, 1000, generator=torch.Generator().manual_seed(0))
    assert set(draws.flatten().tolist()) == set(possible)


def test_information_of_a_certain_label_does_not_round_to_zero() -> None:
    logits = torch.tensor([30.0])
    information = Bernoulli().fisher_product(logits, torch.ones(1))
    torch.testing.assert_close(information, torch.tensor([-30.0]).exp())


def test_ignored_positions_have_no_score() -> None:
    logits, targets = randn(2, 3, 4), torch.tensor([[0, -100, 2], [-100, -100, 1]])
    likelihood = Categorical()
    ignored = targets == -100
    assert (likelihood.score(logits, targets)[ignored] == 0).all()
    assert int(likelihood.num_positions(logits, targets)) == 3
    assert int(likelihood.num_positions(logits, None)) == 6
    assert likelihood.observed(logits, None) is None
    sampled = likelihood.score(logits, likelihood.sample(logits, 1)[0])
    assert (sampled[ignored] != 0).all()
    masked = likelihood.mask_cotangent(sampled, logits, targets)
    assert (masked[ignored] == 0).all()
    assert torch.equal(masked[~ignored], sampled[~ignored])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    logits, targets = randn(3, 4), torch.tensor([3, 0, 1], dtype=dtype)
    Categorical().check(logits, targets)
    close(Categorical().score(logits, targets), Categorical().score(logits, targets.long()))
    close(Categorical().log_prob(logits, targets), Categorical().log_prob(logits, targets.long()))
