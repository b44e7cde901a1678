"""Two processes with unequal parts of the data measure what one process measures on all of it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.errors import CaptureError, UnsupportedError
from neuromanifold.testing.harness import run_ranks

STRUCTURES = (
    nm.Diagonal(),
    nm.QuasiDiagonal(),
    nm.UnitWise(),
    nm.BlockDiagonal(),
    nm.Dense(),
    nm.Kronecker("expand"),
    nm.Kronecker("reduce"),
    nm.EigenKronecker("expand"),
    nm.EigenKronecker("reduce"),
    nm.LowRank(),
    nm.auto("4 KiB"),
    nm.structures.per_layer({"conv": nm.UnitWise(), "*": nm.Kronecker()}),
    nm.structures.per_layer({"conv": nm.LowRank(), "lin*": nm.EigenKronecker(), "*": nm.Dense()}),
)
ROUNDING = 1e-12
"""Relative, in float64: the same sums in another order."""
OF_VECTORS = 1e-10
"""The same for eigenvectors, which rounding turns the more the nearer two eigenvalues are."""


class Model(nn.Module):
    """A convolution, a reused layer, and parameters without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 2)
        self.linear = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        rng = torch.Generator().manual_seed(0)
        for p in self.double().parameters():
            p.data = torch.randn(p.shape, generator=rng, dtype=p.dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).tanh().mT
        return self.norm(self.linear(self.linear(h).tanh())).mean(1)


def data() -> list[tuple[Tensor, Tensor]]:
    """Eleven samples in batches of 4, 3, 2 and 2."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(11, 2, 5, generator=rng, dtype=torch.float64)
    y = torch.randint(3, (11,), generator=rng)
    return list(zip(x.split([4, 3, 2, 2]), y.split([4, 3, 2, 2]), strict=True))


def shards() -> list[list[tuple[Tensor, Tensor]]]:
    """Nine samples in three batches, and two in one."""
    batches = data()
    return [batches[:3], batches[3:]]


measure = partial(nm.fisher, Model(), nm.Categorical(), estimator=nm.Empirical())


def _measure_shard() -> list[tuple[int, Tensor]]:
    found = []
    for structure in STRUCTURES:
        shard = shards()[dist.get_rank()]
        F = measure(shard, structure, reducer=nm.distributed.sum_over_ranks)
        found.append((F.num_samples, F.to_dense()))
    return found


@pytest.fixture(scope="module")
def by_ranks() -> list[list[tuple[int, Tensor]]]:
    return run_ranks(_measure_shard, 2)


@pytest.mark.parametrize("i", range(len(STRUCTURES)), ids=map(repr, STRUCTURES))
def test_two_ranks_equal_one_process(by_ranks, i) -> None:
    expected = measure(data(), STRUCTURES[i]).to_dense()
    for rank in by_ranks:
        num_samples, matrix = rank[i]
        assert num_samples == 11
        error = torch.linalg.matrix_norm(matrix - expected)
        decomposed = "EigenKronecker" in repr(STRUCTURES[i])
        relative = OF_VECTORS if decomposed else ROUNDING
        assert error <= relative * torch.linalg.matrix_norm(expected)
    assert torch.equal(by_ranks[0][i][1], by_ranks[1][i][1])


def test_positions_are_counted_over_ranks() -> None:
    model = nn.Linear(3, 2).double()
    x = torch.ones(4, 3, 3, dtype=torch.float64)
    y = torch.tensor([[0, 1, -100], [-100, -100, 0], [1, 1, 1], [0, -100, -100]])
    options = {"per": "position", "estimator": nm.Exact()}

    def shard() -> Tensor:
        part = slice(0, 3) if dist.get_rank() == 0 else slice(3, 4)
        return nm.fisher(
            model,
            nm.Categorical(),
            (x[part], y[part]),
            nm.Dense(),
            reducer=nm.distributed.sum_over_ranks,
            **options,
        ).to_dense()

    expected = nm.fisher(model, nm.Categorical(), (x, y), nm.Dense(), **options).to_dense()
    for matrix in run_ranks(shard, 2):
        torch.testing.assert_close(matrix, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("structure", [nm.Gram(), nm.Implicit()], ids=repr)
def test_structures_that_keep_every_sample_refuse(structure) -> None:
    with pytest.raises(UnsupportedError, match=r"cannot be summed over processes.*nm\.Kronecker"):
        measure(data(), structure, reducer=nm.distributed.sum_over_ranks)


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"needs a process group: call torch.distributed.init"):
        measure(data(), nm.Diagonal(), reducer=nm.distributed.sum_over_ranks)


class Switch(nn.Module):
    """A layer that the first sample's sign turns into a bypassed one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if bool(x[0, 0] > 0):
            return self.b(h)
        return h @ self.b.weight.T + self.b.bias


def test_ranks_that_read_the_model_differently_are_told() -> None:
    def shard() -> str:
        sign = 1.0 if dist.get_rank() == 0 else -1.0
        x = sign * torch.ones(2, 3)
        try:
            nm.fisher(
                Switch(),
                nm.Gaussian(),
                x,
                nm.Kronecker(),
                reducer=nm.distributed.sum_over_ranks,
            )
        except CaptureError as error:
            return str(error)
        return ""

    said = run_ranks(shard, 2)
    assert all("processes read the model's parameters differently" in text for text in said)
