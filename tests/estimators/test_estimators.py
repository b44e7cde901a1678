from __future__ import annotations

import pytest
import torch
from torch import Tensor

import neuromanifold as nm
from neuromanifold.estimators import Estimator
from neuromanifold.likelihoods import Likelihood
from neuromanifold.testing import check_estimator

ESTIMATORS = [
    nm.Exact(),
    nm.MonteCarlo(1),
    nm.MonteCarlo(3),
    nm.RandomSigns(1),
    nm.RandomSigns(3),
    nm.Empirical(),
]


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def normal(outputs: Tensor) -> torch.distributions.Distribution:
    return torch.distributions.Normal(outputs[:, 0], outputs[:, 1].exp())


PROBLEMS: dict[str, tuple[Likelihood, Tensor, Tensor]] = {
    "categorical": (nm.Categorical(), randn(2, 4), torch.tensor([3, 0])),
    "categorical ignores": (
        nm.Categorical(),
        randn(2, 3, 3),
        torch.tensor([[0, -100, 2], [-100, -100, -100]]),
    ),
    "categorical class axis": (
        nm.Categorical(class_axis=1),
        randn(2, 3, 2),
        torch.tensor([[0, -100], [1, 2]]),
    ),
    "bernoulli": (nm.Bernoulli(), randn(2, 3), torch.tensor([[0.0, 1, 1], [1, 0, 0]])),
    "gaussian": (nm.Gaussian(0.3), randn(2, 3), randn(2, 3)),
    "gaussian scalar": (nm.Gaussian(), randn(3), randn(3)),
    "gaussian mean variance": (nm.GaussianMeanVariance(), randn(2, 2, 2), randn(2, 2)),
    "poisson": (nm.Poisson(), randn(2, 3), torch.tensor([[0.0, 2, 1], [1, 0, 4]])),
    "distribution": (nm.FromDistribution(normal), randn(3, 2), randn(3)),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_contract(estimator: Estimator, problem: str) -> None:
    check_estimator(estimator, *PROBLEMS[problem])


def test_a_wrong_estimator_is_found() -> None:
    """The checks can fail: a factor, a forgotten mask and a wrong count are named."""

    class Doubled(nm.Exact):
        def cotangents(self, *args: object, **kwargs: object) -> object:
            return (2 * u for u in super().cotangents(*args, **kwargs))

        output_product = Estimator.output_product

    class Unmasked(nm.Exact):
        def cotangents(self, likelihood: Likelihood, outputs: Tensor, *_: object, **__: object):
            return likelihood.fisher_columns(outputs)

    class Miscounted(nm.Exact):
        def num_sweeps(self, likelihood: Likelihood, outputs: Tensor) -> int:
            return 1

    with pytest.raises(AssertionError, match="Σ u uᵀ is off"):
        check_estimator(Doubled(), *PROBLEMS["categorical"])
    with pytest.raises(AssertionError, match="zero at ignored positions"):
        check_estimator(Unmasked(), *PROBLEMS["categorical ignores"])
    with pytest.raises(AssertionError, match="num_sweeps promises 1"):
        check_estimator(Miscounted(), *PROBLEMS["categorical"])


def test_a_biased_random_estimator_is_found() -> None:
    class Shrunk(nm.MonteCarlo):
        def cotangents(self, *args: object, **kwargs: object) -> object:
            return (0.9 * u for u in super().cotangents(*args, **kwargs))

    with pytest.raises(AssertionError, match="standard errors off"):
        check_estimator(Shrunk(), *PROBLEMS["categorical"])


@pytest.mark.parametrize("kind", [nm.MonteCarlo, nm.RandomSigns])
@pytest.mark.parametrize("count", [0, -2])
def test_no_draws(kind: type[Estimator], count: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1 .*got {count}"):
        kind(count)


def test_empirical_without_labels() -> None:
    model, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"\(inputs, targets\).*MonteCarlo"):
        nm.fisher(model, nm.Categorical(), x, estimator=nm.Empirical())


def test_empirical_is_the_score_at_the_labels() -> None:
    likelihood, outputs, targets = PROBLEMS["categorical ignores"]
    (u,) = nm.Empirical().cotangents(likelihood, outputs, targets)
    assert torch.equal(u, likelihood.score(outputs, targets))


def test_random_signs_have_no_variance_for_a_single_gaussian_output() -> None:
    """One column per sample: its sign squares away."""
    model = torch.nn.Linear(3, 1).double()
    x = randn(5, 3)
    exact = nm.fisher(model, nm.Gaussian(), x, nm.Dense(), estimator=nm.Exact())
    signs = nm.fisher(model, nm.Gaussian(), x, nm.Dense(), estimator=nm.RandomSigns())
    eps = torch.finfo(torch.float64).eps
    assert (signs.to_dense() - exact.to_dense()).norm() <= 10 * eps * exact.to_dense().norm()
