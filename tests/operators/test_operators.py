"""Operators of every structure and their combinations keep the contract and refuse nonsense."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.errors import NotPositiveDefiniteError, UnsupportedError
from neuromanifold.operators import NaiveFallbackWarning, Origin, Sum
from neuromanifold.structures import Structure
from neuromanifold.testing import check_operator

STRUCTURES = {
    "Dense": nm.Dense(),
    "BlockDiagonal": nm.BlockDiagonal(),
    "UnitWise": nm.UnitWise(),
    "QuasiDiagonal": nm.QuasiDiagonal(),
    "Diagonal": nm.Diagonal(),
    "Kronecker": nm.Kronecker(),
    "Kronecker of diagonals": nm.Kronecker(inputs=nm.Full(widest=2), outputs=nm.Full(widest=1)),
    "EigenKronecker": nm.EigenKronecker(),
    "LowRank": nm.LowRank(),
    "Gram": nm.Gram(),
    "Implicit": nm.Implicit(),
}
HOLDING_NUMBERS = [name for name in STRUCTURES if name != "Implicit"]
REGULAR = ("Diagonal", "Kronecker of diagonals")
"""Their matrices of one sample are not singular: all entries of the diagonal are positive."""


class Network(nn.Module):
    """A convolution in groups, a raw parameter and a bias alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 2, groups=2)
        self.head = nn.Linear(8, 2)
        self.last = nn.Linear(2, 2)
        self.last.weight.requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.head(self.conv(x).tanh().flatten(1)) * self.scale)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Network().double()


def inputs(num_samples: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_samples, 2, 3, generator=generator, dtype=torch.float64)


def measure(
    structure: str | Structure, num_samples: int = 6, per: str = "sample"
) -> nm.FisherOperator:
    chosen = STRUCTURES[structure] if isinstance(structure, str) else structure
    return nm.fisher(
        network(),
        nm.Categorical(),
        inputs(num_samples),
        chosen,
        estimator=nm.Exact(),
        per=per,
    )


def vector(F: nm.FisherOperator) -> Tensor:
    return torch.linspace(-1, 1, F.num_parameters, dtype=torch.float64)


@pytest.mark.parametrize("damping", [1e-4, 1.0])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure(structure: str, damping: float) -> None:
    check_operator(measure(structure), damping=damping)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_multiples_and_zero(structure: str) -> None:
    check_operator(3.0 * measure(structure), damping=0.1)
    check_operator(0 * measure(structure), damping=0.1)


@pytest.mark.parametrize("right", STRUCTURES)
@pytest.mark.parametrize("left", STRUCTURES)
def test_sums_of_any_two(left: str, right: str) -> None:
    F = measure(left) + 0.5 * measure(right, num_samples=4)
    expected = measure(left).to_dense() + 0.5 * measure(right, num_samples=4).to_dense()
    assert torch.allclose(F.to_dense(), expected, rtol=1e-12, atol=1e-12)
    assert F.num_samples == 10
    check_operator(F, damping=0.1)


@pytest.mark.parametrize(
    "structure", ["Dense", "BlockDiagonal", "UnitWise", "Diagonal", "LowRank", "Gram"]
)
def test_structures_closed_under_sums_can_still_solve(structure: str) -> None:
    F = measure(structure) + measure(structure, num_samples=3)
    v = vector(F)
    solution = F.solve(v, damping=0.1)
    assert torch.allclose(F @ solution + 0.1 * solution, v, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("names", [["conv.bias", "head.weight"], ["conv.weight", "scale"]])
def test_restrictions(structure: str, names: list[str]) -> None:
    F = measure(structure)
    part = F.restrict(iter(names))
    check_operator(part, damping=0.1)
    check_operator((F + F).restrict(iter(names)), damping=0.1)
    with pytest.raises(ValueError, match="at least one parameter name"):
        F.restrict([])


def test_blocks_are_named_after_modules() -> None:
    F = measure("Kronecker")
    assert F.block("conv").layout.names == ("conv.weight", "conv.bias")
    assert F.block("last").layout.names == ("last.bias",)
    assert F.block("scale").shape == (1, 1)
    with pytest.raises(ValueError, match=r"no block 'body'.*'conv', 'head', 'last'"):
        F.block("body")


def test_a_sum_says_what_to_do_instead() -> None:
    total = measure("Kronecker") + measure("Kronecker")
    for method in (
        lambda: total.eigenvalues(),
        lambda: total.solve(vector(total), damping=0.1),
        lambda: total.save("unused"),
    ):
        with pytest.raises(UnsupportedError, match=r"not closed under sums.*nm.Gram\(\)"):
            method()


def test_the_coverage_of_a_sum_is_that_of_both_terms() -> None:
    exact, product = measure("Diagonal"), measure("Kronecker")
    for total in (exact + product, product + exact):
        assert not total.coverage["head.weight"].exact
        assert set(total.coverage["head.weight"].structure.split(" + ")) == {
            "Diagonal",
            "Kronecker",
        }
        assert total.coverage["last.bias"].exact
    assert (exact + exact).coverage == exact.coverage
    one, other = measure(nm.LowRank(3)), measure(nm.LowRank(4))
    (first,), (second,) = one.origin.notes, other.origin.notes
    both = one + other
    assert both.origin.notes == (first, second)
    assert both.coverage["head.weight"].note == f"{first}; {second}"


def test_terms_of_a_sum_have_the_same_parameters_in_the_same_order() -> None:
    def of(names: str) -> nm.FisherOperator:
        layers = {name: nn.Linear(2, 2) for name in names}
        model = nn.ModuleDict(layers)

        def forward(_: nn.Module, x: Tensor) -> Tensor:
            return layers["b"](layers["a"](x))

        x = torch.ones(3, 2)
        return nm.fisher(model, nm.Gaussian(), x, nm.Diagonal(), forward=forward)

    with pytest.raises(ValueError, match="differ in their order"):
        of("ab") + of("ba")
    with pytest.raises(ValueError, match="differ in"):
        of("ab") + of("ab").restrict(["a.bias"])


@pytest.mark.parametrize("structure", [name for name in HOLDING_NUMBERS if name not in REGULAR])
def test_without_damping_a_singular_matrix_is_refused(structure: str) -> None:
    F = measure(structure, num_samples=1)  # the two logits move along one direction only
    for method in (
        lambda: F.solve(vector(F), damping=0.0),
        lambda: F.logdet(damping=0.0),
        lambda: F.inv_sqrt_matvec(vector(F), damping=0.0),
        lambda: F.sample(1, damping=0.0),
    ):
        with pytest.raises(NotPositiveDefiniteError, match="damping"):
            method()


@pytest.mark.parametrize("structure", HOLDING_NUMBERS)
def test_without_damping_a_regular_matrix_is_inverted(structure: str) -> None:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = nn.Linear(3, 2).double()
    F = nm.fisher(model, nm.Gaussian(), x, STRUCTURES[structure], estimator=nm.Exact())
    v = vector(F)
    # Forty Gaussian inputs: the condition number is far below a thousand.
    close = {"rtol": 1e-11, "atol": 1e-11}
    assert torch.allclose(F @ F.solve(v, damping=0.0), v, **close)
    root = F.inv_sqrt_matvec(v, damping=0)
    assert torch.allclose(F.inv_sqrt_matvec(root, damping=0), F.solve(v, damping=0), **close)
    assert torch.allclose(F.logdet(damping=0), torch.logdet(F.to_dense()), **close)


@pytest.mark.parametrize("damping", [-1e-3, float("nan"), float("inf"), "1e-3", None])
def test_bad_damping(damping: object) -> None:
    F = measure("Diagonal")
    for method in (
        lambda: F.solve(vector(F), damping=damping),
        lambda: F.logdet(damping=damping),
        lambda: F.inv_sqrt_matvec(vector(F), damping=damping),
        lambda: F.sample(1, damping=damping),
    ):
        with pytest.raises(ValueError, match="damping is a finite number >= 0"):
            method()


def test_bad_arguments() -> None:
    F = measure("Diagonal")
    v = vector(F)
    with pytest.raises(ValueError, match=r"takes a \(P, R\) tensor"):
        F.matmat(v)
    with pytest.raises(ValueError, match="single vectors"):
        F.inner(v, v[:, None] * torch.ones(2, dtype=v.dtype))
    with pytest.raises(ValueError, match="at least 1 vector, got num=0"):
        F.sample(0, damping=1.0)
    with pytest.raises(ValueError, match="finite number >= 0, got -2"):
        -2 * F
    with pytest.raises(TypeError):
        "2" * F
    with pytest.raises(TypeError):
        F + 1


def test_samples_follow_the_generator() -> None:
    F = measure("Kronecker")
    first, second, other = (
        F.sample(2, damping=1.0, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.shape == (2, F.num_parameters)


def test_description() -> None:
    F = measure("Kronecker", per="position")
    assert repr(F) == (
        "<Fisher matrix 33 x 33: Kronecker(), "
        f"{nm.Categorical()!r}, Exact(), N=6, per position, float64 on cpu>"
    )
    assert F.coverage["scale"].rule == "generic"
    assert F.coverage["last.bias"].structure == "Diagonal"
    assert not F.coverage["head.weight"].exact
    with pytest.raises(KeyError):
        F.coverage["last.weight"]
    table = str(F.coverage).splitlines()
    assert len(table) == 1 + len(F.layout.names)
    assert table[0].split() == ["parameter", "block", "rule", "structure", "exact", "note"]


class OnlyProducts(nm.FisherOperator):
    """The least that an operator has to write."""

    def __init__(self, matrix: Tensor, like: nm.FisherOperator) -> None:
        super().__init__(
            like.layout,
            like.coverage,
            Origin(1, "OnlyProducts()", "none", "none"),
            dtype=matrix.dtype,
            device=matrix.device,
        )
        self.matrix = matrix

    def _matmat(self, rows: Tensor) -> Tensor:
        return rows @ self.matrix


def test_products_alone_make_an_operator() -> None:
    like = measure("Dense")
    F = OnlyProducts(like.to_dense(), like)
    with pytest.warns(NaiveFallbackWarning, match="33 products"):
        assert torch.allclose(F.trace(), like.trace())
    with pytest.warns(NaiveFallbackWarning):
        check_operator(F, damping=0.1)
    assert isinstance(F + F, Sum)


def test_a_wrong_operator_is_found() -> None:
    """The checks can fail: each deviation is named."""

    class Biased(OnlyProducts):
        def _diagonal(self) -> Tensor:
            return 1.01 * self.matrix.diagonal()

    class Asymmetric(OnlyProducts):
        def _matmat(self, rows: Tensor) -> Tensor:
            return rows @ self.matrix.triu()

    like = measure("Dense")
    with pytest.raises(AssertionError, match="trace is off"):
        check_operator(Biased(like.to_dense(), like), damping=0.1)
    with pytest.raises(AssertionError, match="transpose"):
        check_operator(Asymmetric(like.to_dense(), like), damping=0.1)
    with pytest.raises(AssertionError, match="negative eigenvalue"):
        check_operator(Biased(-like.to_dense(), like), damping=0.1)


def test_overlap_is_the_inner_product_of_matrices() -> None:
    gram, other = measure("Gram"), measure("Kronecker")
    expected = (gram.to_dense() * other.to_dense()).sum()
    assert torch.allclose(gram.overlap(other), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="same parameters"):
        gram.overlap(other.restrict(["scale"]))


def test_a_gram_matrix_can_be_added_to_itself() -> None:
    gram = measure("Gram")
    assert torch.allclose((gram + gram).norm(), 2 * gram.norm(), rtol=1e-12)
