"""Scales agree: every likelihood on every network, in every structure, is the oracle's matrix."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.structures import Structure
from neuromanifold.testing import cases, check_structure, reference
from neuromanifold.testing.cases import Case

RTOL = 1e-9
EIGENVALUE_RTOL = 1e-8

STRUCTURES = {
    "Dense": nm.Dense(),
    "BlockDiagonal": nm.BlockDiagonal(),
    "UnitWise": nm.UnitWise(),
    "Diagonal": nm.Diagonal(),
    "Gram": nm.Gram(),
    "Implicit": nm.Implicit(),
}
WHOLE = ("Gram", "Implicit")  # what they represent is the whole matrix


@pytest.fixture(params=cases.CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@cache
def oracle(case: Case) -> Tensor:
    return reference.dense_fisher(case.model(), case.likelihood, case.data())


@cache
def projected(case: Case, structure: str) -> Tensor:
    kept = "Dense" if structure in WHOLE else structure
    return reference.project(oracle(case), case.model(), kept)


def measure(case: Case, structure: Structure, **options: object) -> nm.FisherOperator:
    options = {"estimator": nm.Exact(), **options}
    return nm.fisher(case.model(), case.likelihood, case.data(), structure, **options)


def assert_same(got: Tensor, expected: Tensor, rtol: float = RTOL) -> None:
    assert got.shape == expected.shape
    assert (got - expected).norm() <= rtol * expected.norm()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_exact_is_the_projected_oracle(case: Case, structure: str) -> None:
    F = measure(case, STRUCTURES[structure])
    assert_same(F.to_dense(), projected(case, structure))
    assert all(entry.exact for entry in F.coverage)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_kronecker_is_its_definition(case: Case, weight_sharing: str) -> None:
    F = measure(case, nm.Kronecker(weight_sharing))
    expected = reference.kronecker(case.model(), case.likelihood, case.data(), weight_sharing)
    assert_same(F.to_dense(), expected)


def test_structures_that_keep_the_diagonal_have_one_trace(case: Case) -> None:
    expected = oracle(case).trace()
    for structure in STRUCTURES.values():
        assert_same(measure(case, structure).trace(), expected)


def test_gram_eigenvalues_are_the_non_zero_ones_of_the_oracle(case: Case) -> None:
    got = measure(case, nm.Gram()).eigenvalues()
    expected = torch.linalg.eigvalsh(oracle(case)).flip(0)
    # Relative to the largest: a relative error of small eigenvalues is beyond any algorithm
    # that sees the matrix only to rounding.
    assert (got - expected[: len(got)]).abs().max() <= EIGENVALUE_RTOL * expected[0]
    assert expected[len(got) :].abs().sum() <= EIGENVALUE_RTOL * expected[0]


@pytest.mark.parametrize("structure", ["Dense", "Gram", "Implicit"])
def test_empirical_is_its_definition(case: Case, structure: str) -> None:
    F = measure(case, STRUCTURES[structure], estimator=nm.Empirical())
    expected = reference.dense_empirical(case.model(), case.likelihood, case.data())
    assert_same(F.to_dense(), expected)


@pytest.mark.parametrize("structure", [*STRUCTURES, "Kronecker"])
def test_uneven_batches_are_one_batch(case: Case, structure: str) -> None:
    chosen = STRUCTURES.get(structure, nm.Kronecker())
    x, y = case.data()
    batches = [(x[i : i + 3], y[i : i + 3]) for i in range(0, len(x), 3)]
    assert [len(part) for part, _ in batches] == [3, 3, 1]
    F = nm.fisher(case.model(), case.likelihood, batches, chosen, estimator=nm.Exact())
    assert F.num_samples == len(x)
    assert_same(F.to_dense(), measure(case, chosen).to_dense())


@pytest.mark.parametrize("structure", ["Diagonal", "Gram", "Implicit"])
def test_per_position_divides_by_the_observed_positions(case: Case, structure: str) -> None:
    F = measure(case, STRUCTURES[structure], per="position")
    expected = reference.dense_fisher(case.model(), case.likelihood, case.data(), "position")
    kept = "Dense" if structure in WHOLE else structure
    assert_same(F.to_dense(), reference.project(expected, case.model(), kept))


# One case per network, each with another likelihood.
VARIED = [
    next(case for case in cases.CASES if case.name == name)
    for name in (
        "mlp-categorical",
        "conv1d-bernoulli",
        "conv2d-gaussian_per_entry",
        "conv2d_circular-poisson",
        "conv2d_positions-categorical_axis1",
        "conv3d-gaussian",
        "sequence_pooled-gaussian_mean_variance",
        "sequence_positions-categorical",
        "reused-distribution_normal",
    )
]


@pytest.mark.filterwarnings("ignore::neuromanifold.operators.NaiveFallbackWarning")
@pytest.mark.parametrize("structure", [*STRUCTURES, "Kronecker", "Kronecker reduce"])
@pytest.mark.parametrize("varied", VARIED, ids=str)
def test_structures_keep_the_contract(varied: Case, structure: str) -> None:
    kronecker = {"Kronecker": nm.Kronecker(), "Kronecker reduce": nm.Kronecker("reduce")}
    check_structure((STRUCTURES | kronecker)[structure], varied)


@pytest.mark.parametrize("structure", [*STRUCTURES, "Kronecker"])
def test_gaussian_fisher_is_inverse_to_the_variance(structure: str) -> None:
    chosen = STRUCTURES.get(structure, nm.Kronecker())
    model, (x, _) = cases.CASES[0].model(), cases.CASES[0].data()
    narrow, wide = (
        nm.fisher(model, nm.Gaussian(variance), x, chosen, estimator=nm.Exact()).to_dense()
        for variance in (0.25, 4.0)
    )
    assert_same(narrow, 16 * wide)


@pytest.mark.parametrize("num_samples", [32, 100, 256])
@pytest.mark.parametrize("structure", [*STRUCTURES, "Kronecker"])
def test_repeating_the_data_changes_nothing(structure: str, num_samples: int) -> None:
    """F is a mean over samples: batch sizes do not enter its scale."""
    chosen = STRUCTURES.get(structure, nm.Kronecker())
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    repeats = -(-num_samples // 4)
    few = nm.fisher(model, nm.Categorical(), x, chosen, estimator=nm.Exact())
    many = nm.fisher(model, nm.Categorical(), x.repeat(repeats, 1), chosen, estimator=nm.Exact())
    assert_same(many.to_dense(), few.to_dense())


def test_sequences_of_different_lengths_in_different_batches() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(n, t, 3, generator=generator, dtype=torch.float64), None)
        for n, t in ((2, 1), (3, 9), (1, 4))
    ]
    total = sum(len(x) * reference.dense_fisher(model, nm.Gaussian(), x) for x, _ in batches)
    expected = total / sum(len(x) for x, _ in batches)
    for name in ("Dense", "Gram", "Implicit"):
        F = nm.fisher(model, nm.Gaussian(), batches, STRUCTURES[name], estimator=nm.Exact())
        assert_same(F.to_dense(), expected)
    gram = nm.fisher(model, nm.Gaussian(), batches, nm.Gram(), estimator=nm.Exact())
    values = gram.eigenvalues()
    assert_same(values, torch.linalg.eigvalsh(expected).flip(0)[: len(values)])


def test_mean_pooling_over_sixteen_positions() -> None:
    """Against the closed form: a mean over positions is one use of the mean input."""
    x = torch.randn(5, 16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    class Pooled(nn.Linear):
        pass

    model = nn.Sequential(Pooled(3, 2).double(), _Mean())
    flat = nn.Linear(3, 2).double()
    assert_same(
        nm.fisher(model, nm.Gaussian(), x, nm.Dense(), estimator=nm.Exact()).to_dense(),
        nm.fisher(flat, nm.Gaussian(), x.mean(1), nm.Dense(), estimator=nm.Exact()).to_dense(),
    )
    reduce = nm.fisher(model, nm.Gaussian(), x, nm.Kronecker("reduce"), estimator=nm.Exact())
    assert_same(reduce.to_dense(), reference.dense_fisher(flat, nm.Gaussian(), x.mean(1)))


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)
