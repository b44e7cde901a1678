"""Kronecker factors along some directions, measured by `nm.fisher`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.linalg.projection import Projection
from neuromanifold.structures.kronecker import KroneckerMatrix
from neuromanifold.structures.projected import ProjectedKroneckerMatrix
from neuromanifold.testing import check_operator

RANK, DAMPING = 2, 0.3
FEW = nm.Projected(RANK, narrowest=1)
BOTH = nm.Kronecker(inputs=FEW, outputs=FEW)
TIGHT: dict[str, float] = {"rtol": 1e-10, "atol": 1e-12}

pytestmark = pytest.mark.usefixtures("float64")


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (4, 3)),
        nn.Conv1d(4, 12, 2, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 6), nn.Linear(6, 9)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))


class Attention(nn.Module):
    """A weight that three projections share row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 2, 6)
        return self.head(self.attention(x, x, x, need_weights=False)[0].sum(dim=1))


def measured(build: Any, structure: nm.Kronecker) -> nm.FisherOperator:
    torch.manual_seed(0)
    model = build()
    x = torch.randint(9, (16, 4)) if build is Tied else torch.randn(16, 12)
    return nm.fisher(model, nm.Categorical(), x, structure, estimator=nm.Exact())


def projected(matrix: Tensor, rank: int = RANK) -> Tensor:
    """The largest eigenvalues, and the mean of the others, by hand."""
    values, vectors = torch.linalg.eigh(matrix)
    values[:-rank] = values[:-rank].mean()
    return vectors @ torch.diag(values) @ vectors.T


def by_hand(matrix: Any, kept: tuple[nm.Projected | nm.Full, ...]) -> Tensor:
    """Dense, from a block of K-FAC."""
    if not isinstance(matrix, KroneckerMatrix):  # a bias alone
        return matrix.dense()
    sides = []
    for factor, own in zip((matrix.outputs, matrix.inputs), kept, strict=True):
        whole = isinstance(own, nm.Full) or factor.ndim == 2 or factor.shape[-1] <= 2 * RANK
        dense = factor.diag_embed() if factor.ndim == 2 else factor
        sides.append(dense if whole else torch.stack([projected(group) for group in dense]))
    return torch.block_diag(*(torch.kron(b, a) for b, a in zip(*sides, strict=True)))


@pytest.mark.parametrize("build", [grouped, Tied, Attention])
@pytest.mark.parametrize(("outputs", "inputs"), [(FEW, FEW), (FEW, nm.Full()), (nm.Full(), FEW)])
def test_it_is_kfac_with_the_nearest_factors(build: Any, outputs: Any, inputs: Any) -> None:
    F, whole = (
        measured(build, structure)
        for structure in (nm.Kronecker(inputs=inputs, outputs=outputs), nm.Kronecker())
    )
    kinds = set()
    for block, reference in zip(F.blocks, whole.blocks, strict=True):
        kinds.add(block.kind)
        found = block.dense()
        torch.testing.assert_close(found, by_hand(reference, (outputs, inputs)), **TIGHT)
    assert "projected_kronecker" in kinds
    torch.testing.assert_close(F.trace(), whole.trace())


@pytest.mark.parametrize("build", [grouped, Tied, Attention])
def test_the_contract_of_an_operator(build: Any) -> None:
    check_operator(measured(build, BOTH), damping=DAMPING)


def test_functions_are_those_of_the_dense_matrix() -> None:
    for matrix in measured(grouped, BOTH).blocks:
        x = torch.randn(3, *matrix.block.shape)
        values, vectors = torch.linalg.eigh(matrix.dense())
        expected = x.flatten(1) @ (vectors * (values + DAMPING).rsqrt()) @ vectors.T
        found = matrix.function(lambda value: (value + DAMPING).rsqrt(), x)
        torch.testing.assert_close(found.flatten(1), expected, **TIGHT)
        scaled = matrix.scaled(2.5)
        torch.testing.assert_close(scaled.dense(), 2.5 * matrix.dense(), **TIGHT)
        torch.testing.assert_close(matrix.norm(), matrix.dense().norm(), **TIGHT)


def test_the_rank_that_saves_nothing_is_kfac() -> None:
    whole, found = (
        measured(grouped, structure)
        for structure in (
            nm.Kronecker(),
            nm.Kronecker(inputs=nm.Projected(13, narrowest=1), outputs=nm.Projected(3)),
        )
    )
    assert torch.equal(whole.to_dense(), found.to_dense())
    assert all(not entry.note for entry in found.coverage)


def test_the_rank_follows_the_width_or_the_memory() -> None:
    assert nm.Projected().directions(2048) == 256
    assert nm.Projected(0.001).directions(2048) == 2
    assert nm.Projected(0.001).directions(64) == 1
    assert nm.Projected(100).directions(2048) == 100
    assert nm.Projected(100).directions(200) is None  # no products saved
    assert nm.Projected().directions(63) is None
    assert nm.Projected().directions(9000) is None  # kept by its diagonal
    assert nm.Projected(max_bytes="1 MiB").directions(2048) == 128
    assert nm.Projected(2).numel(100) == 202 + 1


def test_energy_takes_as_few_directions_as_hold_it() -> None:
    # Four equal directions, of which three hold 75 % of the trace and four all.
    model, x = nn.Linear(10, 3, bias=False), torch.eye(10)[:4].repeat(3, 1)
    for energy, rank in ((0.5, 2), (0.7, 3), (0.9, 4), (1.0, 4)):
        inputs = nm.Projected(4, energy, narrowest=1)
        (matrix,) = nm.fisher(model, nm.Gaussian(), x, nm.Kronecker(inputs=inputs)).blocks
        assert isinstance(matrix, ProjectedKroneckerMatrix)
        assert isinstance(matrix.inputs, Projection)
        assert matrix.inputs.values.shape == (1, rank)


def test_it_is_stored_and_says_what_is_kept(tmp_path: Path) -> None:
    F = measured(grouped, BOTH)
    F.save(tmp_path / "fisher")
    assert torch.equal(nm.load(tmp_path / "fisher").to_dense(), F.to_dense())
    assert (
        F.coverage["4.weight"].note == "inputs by 2 of 25 directions; outputs by 2 of 5 directions"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is a number of directions, or a share"),
        ({"rank": 2.5}, "rank is a number of directions, or a share"),
        ({"energy": 0.0}, r"energy is a share of the trace, in \(0, 1\]; got 0.0"),
        ({"narrowest": 0}, "narrowest is a number of entries, at least 1; got 0"),
        ({"max_bytes": "much"}, "much"),
    ],
)
def test_arguments_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nm.Projected(**options)
