"""Bases that diagonalise the Kronecker factors, and the exact moments along them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.errors import TooLargeError, UnsupportedError
from neuromanifold.linalg import memory
from neuromanifold.structures._base import SWEEP_BYTES, Source
from neuromanifold.structures.eigenkronecker import EigenKroneckerMatrix
from neuromanifold.structures.kronecker import KroneckerMatrix
from neuromanifold.testing import check_structure, reference
from neuromanifold.testing.cases import CASES, Case
from neuromanifold.testing.layer_cases import LAYERS

ROUNDING = 1e-12
"""Relative, in float64: sums of some dozen terms."""

VARIANTS = (
    nm.EigenKronecker(),
    nm.EigenKronecker("reduce"),
    nm.EigenKronecker(inputs=nm.Full(widest=3)),
    nm.EigenKronecker(outputs=nm.Full(widest=3)),
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_close(got: Tensor, expected: Tensor, relative: float = ROUNDING) -> None:
    assert got.shape == expected.shape
    assert torch.linalg.vector_norm(got - expected) <= relative * torch.linalg.vector_norm(expected)


def basis(matrix: EigenKroneckerMatrix) -> Tensor:
    """All eigenvectors of a block as columns, unit-major; groups along the diagonal."""
    groups, fan_out, fan_in = matrix.block.shape

    def of(q: Tensor | None, n: int) -> Tensor:
        return torch.eye(n).double().expand(groups, n, n) if q is None else q

    pairs = zip(of(matrix.outputs, fan_out), of(matrix.inputs, fan_in), strict=True)
    return torch.block_diag(*(torch.kron(b.contiguous(), a.contiguous()) for b, a in pairs))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("structure", VARIANTS[:2], ids=repr)
def test_contract(structure: nm.EigenKronecker, case: Case) -> None:
    check_structure(structure, case)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("structure", VARIANTS, ids=repr)
def test_definition(structure: nm.EigenKronecker, case: Case) -> None:
    model, data = case.model(), case.data()
    measure = partial(nm.fisher, model, case.likelihood, data, estimator=nm.Exact())
    F = measure(structure)
    factors = measure(nm.Kronecker(structure.weight_sharing, structure.inputs, structure.outputs))
    oracle = reference.dense_fisher(model, case.likelihood, data)
    assert_close(F.trace(), oracle.trace())
    position = torch.arange(F.num_parameters)[None]
    for mine, kronecker in zip(F.blocks, factors.blocks, strict=True):
        if not isinstance(mine, EigenKroneckerMatrix):
            assert type(mine) is type(kronecker)
            continue
        assert isinstance(kronecker, KroneckerMatrix)
        q = basis(mine)
        assert_close(q.T @ q, torch.eye(len(q)).double())
        rotated = q.T @ kronecker.dense() @ q
        assert_close(rotated, rotated.diagonal().diag())
        where = mine.block.read(position, F.layout).flatten()
        exact = q.T @ oracle[where[:, None], where] @ q
        assert_close(mine.moments.flatten(), exact.diagonal())


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_trace_for_every_layer_type(case: Case) -> None:
    model, data = case.model(), case.data()
    trace = reference.dense_fisher(model, case.likelihood, data).trace()
    for structure in VARIANTS:
        F = nm.fisher(model, case.likelihood, data, structure, estimator=nm.Exact())
        assert_close(F.trace(), trace)


def test_nearer_than_kronecker() -> None:
    for case in CASES:
        measure = partial(
            nm.fisher, case.model(), case.likelihood, case.data(), estimator=nm.Exact()
        )
        exact = measure(nm.BlockDiagonal()).to_dense()
        for sharing in ("expand", "reduce"):
            errors = [
                torch.linalg.matrix_norm(measure(structure).to_dense() - exact)
                for structure in (nm.EigenKronecker(sharing), nm.Kronecker(sharing))
            ]
            assert errors[0] <= (1 + ROUNDING) * errors[1], f"{case}, {sharing}"


class Tied(nn.Module):
    """An embedding, a normalisation, a layer used twice, and a head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        for p in self.double().parameters():
            p.data = torch.randn(p.shape, generator=seeded(p.numel()), dtype=p.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens))
        return self.head(self.linear(self.linear(x).tanh()))


@pytest.mark.parametrize("structure", VARIANTS, ids=repr)
def test_tied_weights_and_lookups(structure: nm.EigenKronecker) -> None:
    tokens = torch.randint(6, (5, 3), generator=seeded(0))
    oracle = reference.dense_fisher(Tied(), nm.Categorical(), tokens)
    F = nm.fisher(Tied(), nm.Categorical(), tokens, structure, estimator=nm.Exact())
    assert_close(F.trace(), oracle.trace())
    position = torch.arange(F.num_parameters)[None]
    for matrix in F.blocks:
        where = matrix.block.read(position, F.layout).flatten()
        exact = oracle[where[:, None], where]
        if not isinstance(matrix, EigenKroneckerMatrix):
            assert_close(matrix.diagonal().flatten(), exact.diagonal())
            continue
        q = basis(matrix)
        assert_close(matrix.moments.flatten(), (q.T @ exact @ q).diagonal())


def test_an_embedding_of_its_own() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(12, 2)).double()
    tokens = torch.tensor([[0, 1, 1], [2, 0, 5], [1, 1, 1]])
    for structure in VARIANTS:
        F = nm.fisher(model, nm.Categorical(), tokens, structure, estimator=nm.Exact())
        assert F.coverage["0.weight"].structure == "EigenKronecker"
        exact = nm.fisher(model, nm.Categorical(), tokens, nm.BlockDiagonal(), estimator=nm.Exact())
        assert_close(F.trace(), exact.trace())


def model_and_inputs() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=seeded(p.numel()), dtype=p.dtype)
    return model, torch.randn(11, 4, generator=seeded(1), dtype=torch.float64)


def test_both_passes_see_the_same_labels() -> None:
    model, x = model_and_inputs()
    used, expected = seeded(7), seeded(7)
    measure = partial(nm.fisher, model, nm.Categorical(), [(part, None) for part in x.split(4)])
    F = measure(nm.EigenKronecker(), estimator=nm.MonteCarlo(2), generator=used)
    exact = measure(nm.BlockDiagonal(), estimator=nm.MonteCarlo(2), generator=expected).to_dense()
    factors = measure(nm.Kronecker(), estimator=nm.MonteCarlo(2), generator=seeded(7))
    assert_close(F.trace(), exact.trace())
    for mine, kronecker in zip(F.blocks, factors.blocks, strict=True):
        rotated = basis(mine).T @ kronecker.dense() @ basis(mine)
        assert_close(rotated, rotated.diagonal().diag())
    # One measurement takes from the generator what one pass takes.
    assert torch.equal(used.get_state(), expected.get_state())
    again = measure(nm.EigenKronecker(), estimator=nm.MonteCarlo(2), generator=used)
    assert not torch.allclose(again.trace(), F.trace())


@pytest.mark.parametrize(
    ("size", "sweep_bytes", "calls"),
    [(11, SWEEP_BYTES, 1), (11, 1, 2), (4, SWEEP_BYTES, 6)],  # at once, sweep by sweep, in batches
)
def test_a_batch_is_read_once_if_its_sweeps_travel_together(
    size: int, sweep_bytes: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = model_and_inputs()
    seen: list[int] = []
    told: list[tuple[int, int | None]] = []
    model.register_forward_hook(lambda *_: seen.append(1))
    monkeypatch.setattr(
        Source, "sweeps_together", lambda _, numel: max(sweep_bytes // (4 * numel + 1), 1)
    )
    measure = partial(nm.fisher, model, nm.Categorical(), estimator=nm.Exact())
    batches = [(part, None) for part in x.split(size)]
    moments = measure(batches, nm.BlockDiagonal())
    measure(batches, nm.Kronecker())  # the plan of a model is known from here on
    seen.clear()
    F = measure(
        batches, nm.EigenKronecker(), progress=lambda done, total: told.append((done, total))
    )
    assert len(seen) == calls
    assert told == [(i, 2 * len(batches)) for i in range(1, 2 * len(batches) + 1)]
    assert F.num_samples == 11
    for mine, exact in zip(F.blocks, moments.blocks, strict=True):
        q = basis(mine)
        assert_close(mine.moments.flatten(), (q.T @ exact.dense() @ q).diagonal())


def test_without_a_generator() -> None:
    model, x = model_and_inputs()
    F = nm.fisher(model, nm.Categorical(), x, nm.EigenKronecker())
    assert torch.isfinite(F.to_dense()).all()
    assert F.num_samples == 11


def test_progress_counts_both_passes() -> None:
    model, x = model_and_inputs()
    told: list[tuple[int, int | None]] = []
    measure = partial(
        nm.fisher,
        model,
        nm.Gaussian(),
        structure=nm.EigenKronecker(),
        progress=lambda done, total: told.append((done, total)),
    )
    measure([(part, None) for part in x.split(4)])
    assert told == [(1, 6), (2, 6), (3, 6), (4, 6), (5, 6), (6, 6)]


def test_nothing_to_rotate() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 1)).double()
    _, x = model_and_inputs()
    rng = seeded(3)
    F = nm.fisher(model, nm.Gaussian(), x, nm.EigenKronecker(), generator=rng)
    expected = nm.fisher(model, nm.Gaussian(), x, nm.UnitWise(), generator=seeded(3))
    assert_close(F.to_dense(), expected.to_dense())
    assert F.num_samples == 11


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = model_and_inputs()
    measure = partial(nm.fisher, model, nm.Categorical(), structure=nm.EigenKronecker())
    with pytest.raises(UnsupportedError, match="reads the data more than once"):
        measure(iter([(x, None)]))
    shuffled = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, torch.arange(11) % 3), batch_size=4, shuffle=True
    )
    with pytest.raises(UnsupportedError, match=r"shuffles.*nm\.Exact.*nm\.Kronecker"):
        measure(shuffled)
    assert measure(shuffled, estimator=nm.Exact()).num_samples == 11
    with pytest.raises(ValueError, match='"expand" or "reduce", got \'both\''):
        nm.EigenKronecker("both")
    wide = nm.fisher(nn.Linear(600, 8), nm.Gaussian(), torch.randn(3, 600), nm.EigenKronecker())
    part = wide.restrict(["weight"])
    monkeypatch.setattr(memory, "available", lambda _: 2**20)
    with pytest.raises(TooLargeError, match=r"part of .* in EigenKronecker.*F\.block"):
        part.eigenvalues()
    assert torch.isfinite(part @ torch.ones(4800)).all()
