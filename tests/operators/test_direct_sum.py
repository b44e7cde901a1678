"""Matrices of disjoint parameters side by side do what each of them can, and nothing between."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.errors import NotPositiveDefiniteError, UnsupportedError
from neuromanifold.operators import BlockOperator, DirectSum, Sum
from neuromanifold.structures import Structure
from neuromanifold.testing import check_operator

# The first and the last layer share a pattern, so that the parts interleave.
OUTER = ["0.weight", "0.bias", "4.weight", "4.bias"]
INNER = ["2.weight", "2.bias"]
PAIRS = {
    "Gram and Dense": (nm.Gram(), nm.Dense()),
    "Gram and Kronecker": (nm.Gram(), nm.Kronecker()),
    "Gram and Gram": (nm.Gram(), nm.Gram()),
    "Implicit and Diagonal": (nm.Implicit(), nm.Diagonal()),
}


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layers = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3)
        return nn.Sequential(*layers).double()


def inputs(num_samples: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_samples, 3, generator=generator, dtype=torch.float64)


def measure(
    outer: Structure, inner: Structure, model: nn.Module | None = None, num_samples: int = 6
) -> nm.FisherOperator:
    return nm.fisher(
        network() if model is None else model,
        nm.Categorical(),
        inputs(num_samples),
        {"2": inner, "*": outer},
        estimator=nm.Exact(),
    )


def alone(structure: Structure, names: list[str]) -> nm.FisherOperator:
    return nm.fisher(
        network(), nm.Categorical(), inputs(), structure, estimator=nm.Exact(), params=names
    )


@pytest.mark.parametrize("pair", PAIRS)
def test_it_keeps_the_contract(pair: str) -> None:
    F = measure(*PAIRS[pair])
    assert isinstance(F, DirectSum)
    check_operator(F, damping=1e-2)


@pytest.mark.parametrize("pair", PAIRS)
def test_each_part_is_what_is_measured_alone_and_nothing_is_between(pair: str) -> None:
    outer, inner = PAIRS[pair]
    F = measure(outer, inner)
    sizes = [12, 4, 8, 2, 6, 3]
    dense = dict(zip(F.layout.names, F.to_dense().split(sizes), strict=True))
    assert list(dense) == ["0.weight", "0.bias", *INNER, "4.weight", "4.bias"]
    for names, structure in ((OUTER, outer), (INNER, inner)):
        expected = alone(structure, names).to_dense()
        assert torch.allclose(F.restrict(names).to_dense(), expected, rtol=1e-12, atol=1e-14)
    across = torch.cat([dense[name] for name in OUTER])[:, F.layout.slices["2.weight"]]
    assert not across.any()


def test_parts_that_are_all_block_diagonal_make_a_block_diagonal_matrix() -> None:
    F = measure(nm.Dense(), nm.Dense())
    assert isinstance(F, BlockOperator)
    assert len(F.blocks) == 2
    check_operator(F, damping=1e-2)


def test_the_restriction_to_one_part_is_that_part() -> None:
    F = measure(nm.Gram(), nm.Kronecker())
    assert isinstance(F.restrict(INNER), BlockOperator)
    assert F.restrict(OUTER).origin.structure == "Gram()"
    assert isinstance(F.restrict(["0.weight", *INNER]), DirectSum)


def test_a_sum_of_two_keeps_the_form_where_the_parts_do() -> None:
    both = measure(nm.Gram(), nm.Dense()) + measure(nm.Gram(), nm.Dense(), num_samples=4)
    assert isinstance(both, DirectSum)
    assert both.num_samples == both.restrict(OUTER).num_samples == 10
    check_operator(both, damping=1e-2)
    assert isinstance(measure(nm.Gram(), nm.Kronecker()) + measure(nm.Gram(), nm.Kronecker()), Sum)
    assert isinstance(measure(nm.Gram(), nm.Dense()) + measure(nm.Gram(), nm.Gram()), Sum)


def test_parts_of_different_precision_are_brought_to_the_wider_one() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 4)
            self.last = nn.Linear(4, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).double())

    structure = {"first": nm.Dense(), "last": nm.Dense()}
    F = nm.fisher(Mixed(), nm.Gaussian(), inputs().float(), structure, estimator=nm.Exact())
    assert isinstance(F, DirectSum)
    assert F.dtype == F.to_dense().dtype == F.eigenvalues().dtype == torch.float64
    assert [part.dtype for part in F.parts] == [torch.float32, torch.float64]
    v = torch.linspace(-1, 1, F.num_parameters, dtype=torch.float64)
    # The products of the first part are rounded to float32.
    tolerance = 100 * torch.finfo(torch.float32).eps * float(F.norm() * v.norm())
    assert torch.allclose(F @ v, F.to_dense() @ v, rtol=0, atol=tolerance)


def test_without_damping_a_singular_part_is_refused() -> None:
    F = measure(nm.Gram(), nm.Dense())
    with pytest.raises(NotPositiveDefiniteError):
        F.solve(torch.ones(F.num_parameters, dtype=F.dtype), damping=0)


def test_what_a_part_cannot_do_is_refused_in_its_name(tmp_path: Path) -> None:
    F = measure(nm.Implicit(), nm.Diagonal())
    with pytest.raises(UnsupportedError, match=r"Implicit\(\) has no exact eigenvalues"):
        F.eigenvalues()
    with pytest.raises(UnsupportedError, match=r"Implicit\(\) has no exact stored form"):
        F.save(tmp_path / "fisher.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_loaded_one_keeps_its_parts(tmp_path: Path) -> None:
    F = measure(nm.Gram(), nm.Kronecker())
    F.save(tmp_path / "fisher.safetensors")
    loaded = nm.load(tmp_path / "fisher.safetensors")
    assert isinstance(loaded, DirectSum)
    assert isinstance(F, DirectSum)
    assert [type(part) for part in loaded.parts] == [type(part) for part in F.parts]
    assert [part.origin for part in loaded.parts] == [part.origin for part in F.parts]
    v = torch.ones(F.num_parameters, dtype=F.dtype)
    assert torch.allclose(loaded.solve(v, damping=0.1), F.solve(v, damping=0.1), rtol=1e-10)
