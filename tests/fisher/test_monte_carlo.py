"""Sampled Fisher matrices: unbiased in every case, and the same labels for every structure."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import neuromanifold as nm
from neuromanifold.estimators import Estimator
from neuromanifold.structures import Structure
from neuromanifold.testing import cases, reference
from neuromanifold.testing.cases import Case

NUM_SEEDS = 200
# Copies of the data in each measurement: 1000 independent draws per sample. A measurement is then
# nearly Gaussian, so that its spread over seeds is a trustworthy standard error also where single
# draws are skewed, such as squares of Gaussian labels.
COPIES = 5
STANDARD_ERRORS = 4.0
RTOL = 1e-9

ESTIMATORS = {"MonteCarlo": nm.MonteCarlo(1), "RandomSigns": nm.RandomSigns(1)}
STRUCTURES = {
    "BlockDiagonal": nm.BlockDiagonal(),
    "UnitWise": nm.UnitWise(),
    "Diagonal": nm.Diagonal(),
    "Gram": nm.Gram(),
    "Implicit": nm.Implicit(),
}


@pytest.fixture(params=cases.CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def named(*names: str) -> list[Case]:
    return [case for case in cases.CASES if case.name in names]


SOME = named("mlp-categorical", "conv2d-poisson", "sequence_positions-categorical")


@cache
def oracle(case: Case) -> Tensor:
    return reference.dense_fisher(case.model(), case.likelihood, case.data())


@cache
def mask(case: Case, structure: str) -> Tensor:
    """One where the structure keeps an entry, zero elsewhere."""
    ones = torch.ones_like(oracle(case))
    if structure in ("Gram", "Implicit"):
        return ones
    return reference.project(ones, case.model(), structure)


def draws(
    case: Case, structure: Structure, estimator: Estimator, num_seeds: int = NUM_SEEDS
) -> list[nm.FisherOperator]:
    model, data = case.model(), tuple(part.repeat_interleave(COPIES, 0) for part in case.data())
    return [
        nm.fisher(
            model,
            case.likelihood,
            data,
            structure,
            estimator=estimator,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in range(num_seeds)
    ]


def numbers(matrices: Tensor, layout: nm.linalg.Layout) -> Tensor:
    """Trace, a quadratic form and each parameter's part of the trace, `(..., 2 + names)`."""
    generator = torch.Generator().manual_seed(99)
    v = torch.randn(layout.num_parameters, generator=generator, dtype=torch.float64)
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)
    shares = [diagonal[..., s].sum(-1) for s in layout.slices.values()]
    return torch.stack([diagonal.sum(-1), matrices @ v @ v, *shares], dim=-1)


def assert_unbiased(values: Tensor, expected: Tensor) -> None:
    """`values (seeds, n)` have the expected means, within their standard errors."""
    stderr = values.std(0) / len(values) ** 0.5
    # Rounding counts where an estimator has no variance, as the Gaussian bias under random signs.
    assert ((values.mean(0) - expected).abs() <= STANDARD_ERRORS * stderr + RTOL * expected).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_mean_over_seeds_is_the_oracle(case: Case, estimator: str) -> None:
    operators = draws(case, nm.Dense(), ESTIMATORS[estimator])
    layout = operators[0].layout
    values = numbers(torch.stack([F.to_dense() for F in operators]), layout)
    assert_unbiased(values, numbers(oracle(case), layout))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_structures_see_the_same_labels(case: Case, estimator: str) -> None:
    """With one seed, every structure is the dense matrix less what it does not keep."""
    chosen = ESTIMATORS[estimator]
    (dense,) = draws(case, nm.Dense(), chosen, num_seeds=1)
    for name, structure in STRUCTURES.items():
        (kept,) = draws(case, structure, chosen, num_seeds=1)
        expected = dense.to_dense() * mask(case, name)
        assert (kept.to_dense() - expected).norm() <= RTOL * expected.norm()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("some", SOME, ids=str)
def test_the_mean_of_kronecker_is_the_exact_kronecker(some: Case, estimator: str) -> None:
    """Its input factor has no noise, so the product with a mean output factor is unbiased."""
    operators = draws(some, nm.Kronecker(), ESTIMATORS[estimator])
    layout = operators[0].layout
    values = numbers(torch.stack([F.to_dense() for F in operators]), layout)
    expected = reference.kronecker(some.model(), some.likelihood, some.data())
    assert_unbiased(values, numbers(expected, layout))


@pytest.mark.parametrize("estimator", [nm.MonteCarlo(4), nm.RandomSigns(4)], ids=repr)
@pytest.mark.parametrize("some", SOME, ids=str)
def test_more_draws_are_averaged(some: Case, estimator: Estimator) -> None:
    operators = draws(some, nm.Gram(), estimator)
    layout = operators[0].layout
    values = numbers(torch.stack([F.to_dense() for F in operators]), layout)
    assert_unbiased(values, numbers(oracle(some), layout))


@pytest.mark.parametrize("kind", [nm.MonteCarlo, nm.RandomSigns])
def test_four_draws_have_a_quarter_of_the_variance(kind: type[Estimator]) -> None:
    some = SOME[0]
    one, four = (
        torch.stack([F.trace() for F in draws(some, nm.Diagonal(), kind(draw_count))])
        for draw_count in (1, 4)
    )
    # The variance of a log variance is (kurtosis - 1) / num for each of the two.
    spread = sum((((x - x.mean()) / x.std(correction=0)) ** 4).mean() - 1 for x in (one, four))
    stderr = (spread / NUM_SEEDS).sqrt()
    ratio = (one.var() / four.var()).log() - torch.tensor(4.0).log()
    assert ratio.abs() <= STANDARD_ERRORS * stderr


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_seeds(estimator: str) -> None:
    first, second = draws(SOME[0], nm.Kronecker(), ESTIMATORS[estimator], num_seeds=2)
    again, _ = draws(SOME[0], nm.Kronecker(), ESTIMATORS[estimator], num_seeds=2)
    assert torch.equal(first.to_dense(), again.to_dense())
    assert not torch.equal(first.to_dense(), second.to_dense())


def test_without_a_generator_draws_differ_and_follow_the_global_seed() -> None:
    some = SOME[0]

    def draw() -> Tensor:
        return nm.fisher(some.model(), some.likelihood, some.data(), nm.Diagonal()).trace()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = draw(), draw()
        torch.manual_seed(0)
        assert torch.equal(draw(), first)
    assert not torch.equal(first, second)


def test_products_of_an_implicit_operator_see_one_set_of_labels() -> None:
    some = SOME[0]
    F = nm.fisher(some.model(), some.likelihood, some.data(), nm.Implicit())
    v = torch.ones(F.num_parameters, dtype=torch.float64)
    first, second, third = (F @ v for _ in range(3))
    assert (first - second).norm() <= RTOL * first.norm()  # the second one goes another way
    assert torch.equal(second, third)
    dense = F.to_dense()
    assert (F.trace() - dense.trace()).abs() <= RTOL * dense.trace()
