"""Kronecker factors: wide sides, shared weights, layers of single units."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.structures import factors
from neuromanifold.testing import reference

N, T, VOCABULARY, WIDTH = 6, 5, 11, 4
RTOL = 1e-10


pytestmark = pytest.mark.usefixtures("float64")


class LanguageModel(nn.Module):
    """Embedding, one layer, a head that may share the embedding's weight."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        if shared:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(self.embedding(tokens))))


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (N, T))


def exact(model: nn.Module, x: Tensor, structure: object) -> nm.FisherOperator:
    return nm.fisher(model, nm.Categorical(), x, structure, estimator=nm.Exact())


def close(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).norm() <= RTOL * expected.norm())


def psd(n: int, groups: int = 2) -> Tensor:
    x = torch.randn(groups, n, n + 1)
    return x @ x.mT


# ---- the nearest product ------------------------------------------------------------------------


def rearranged(outputs: list[Tensor], inputs: list[Tensor]) -> Tensor:
    return sum(
        b.flatten(1)[:, :, None] * a.flatten(1)[:, None]
        for b, a in zip(outputs, inputs, strict=True)
    )


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_nearest_product_is_the_best_approximation_of_rank_one(terms: int) -> None:
    outputs, inputs = [psd(3) for _ in range(terms)], [psd(4) for _ in range(terms)]
    b, a = factors.nearest_product(outputs, inputs)
    u, s, vh = torch.linalg.svd(rearranged(outputs, inputs), full_matrices=False)
    best = s[:, :1, None] * u[:, :, :1] * vh[:, :1]
    assert close(rearranged([b], [a]), best)
    assert torch.linalg.eigvalsh(b).min() >= 0
    assert torch.linalg.eigvalsh(a).min() >= 0


def test_nearest_product_of_terms_that_are_almost_orthogonal_and_equally_large() -> None:
    first, second = torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.01, 1.0]))
    outputs = inputs = [first[None], 1.001 * second[None]]
    b, a = factors.nearest_product(outputs, inputs)
    u, s, vh = torch.linalg.svd(rearranged(outputs, inputs), full_matrices=False)
    assert close(rearranged([b], [a]), s[:, :1, None] * u[:, :, :1] * vh[:, :1])


def test_nearest_product_of_proportional_terms_is_their_sum() -> None:
    b, a = psd(3), psd(4)
    got = factors.nearest_product([b, 2 * b], [a, 0.5 * a])
    assert close(rearranged([got[0]], [got[1]]), 2 * rearranged([b], [a]))


def test_nearest_product_with_absent_terms() -> None:
    b, a = psd(3), psd(4)
    got = factors.nearest_product([b, 0 * b], [a, 0 * a])
    assert close(rearranged([got[0]], [got[1]]), rearranged([b], [a]))
    zero = factors.nearest_product([0 * b, 0 * b], [a, a])
    assert not rearranged([zero[0]], [zero[1]]).any()


def test_nearest_product_of_diagonal_and_full_factors() -> None:
    diagonals, full = torch.rand(2, 3), psd(3)
    a, other = psd(4), psd(4)
    got = factors.nearest_product([diagonals, full], [a, other])
    expected = factors.nearest_product([torch.diag_embed(diagonals), full], [a, other])
    assert close(got[0], expected[0])
    assert close(got[1], expected[1])


# ---- shared weights -----------------------------------------------------------------------------


def test_a_shared_weight_has_the_product_nearest_to_its_uses() -> None:
    x = tokens()
    shared, apart = LanguageModel(shared=True), LanguageModel(shared=False)
    apart.load_state_dict({**shared.state_dict()})
    one = exact(shared, x, nm.Kronecker()).block("embedding.weight")
    two = exact(apart, x, nm.Kronecker())
    # Each use as if it were alone; the head's without its bias column.
    outputs = [torch.diag_embed(two.blocks[0].outputs), two.blocks[2].outputs]
    inputs = [two.blocks[0].inputs, two.blocks[2].inputs[:, :-1, :-1]]
    b, a = factors.nearest_product(outputs, inputs)
    assert close(one.to_dense(), torch.kron(b[0], a[0]))


def test_a_weight_shared_by_layers_that_see_the_same_is_exact() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a(x), self.b(x)], dim=1)

    model, x = Twins(), torch.randn(N, 3)
    got = nm.fisher(model, nm.Gaussian(), x, nm.Kronecker(), estimator=nm.Exact())
    whole = reference.dense_fisher(model, nm.Gaussian(), x)
    weight = got.layout.slices["a.weight"]
    assert close(got.block("a.weight").to_dense(), whole[weight, weight])
    assert got.coverage["a.weight"].rule == "linear"
    assert got.coverage["b.bias"].exact


def test_a_weight_shared_by_unlike_layers_is_read_sample_by_sample() -> None:
    class Unlike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 4, 3)
            self.norm = nn.LayerNorm(4)
            self.norm.weight = self.conv.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x).mean(-1))

    model, x = Unlike(), torch.randn(N, 2, 5)
    got = exact(model, x, nm.Dense())
    assert close(got.to_dense(), reference.dense_fisher(model, nm.Categorical(), x))
    assert got.coverage["conv.bias"].rule == "generic"
    assert got.coverage["conv.bias"].note.startswith("shared by")


# ---- wide sides ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_wide_sides_are_the_diagonals_of_the_full_ones(weight_sharing: str) -> None:
    model, x = LanguageModel(shared=False), tokens()
    full = exact(model, x, nm.Kronecker(weight_sharing))
    wide = exact(
        model, x, nm.Kronecker(weight_sharing, inputs=nm.Full(4), outputs=nm.Full(widest=10))
    )
    for whole, kept in zip(full.blocks, wide.blocks, strict=True):
        for side, limit in (("inputs", 4), ("outputs", 10)):
            mine, theirs = getattr(kept, side), getattr(whole, side)
            if theirs.shape[1] > limit:
                assert mine.ndim == 2
                assert close(mine, factors.diagonal(theirs))
            else:
                assert torch.equal(mine, theirs)
    assert wide.coverage["head.weight"].note == (
        "inputs by their diagonal: 5 wide; outputs by their diagonal: 11 wide"
    )
    # What an operator can do agrees with its matrix.
    dense, damping = wide.to_dense(), 1e-2
    v = torch.randn(wide.num_parameters)
    shifted = dense + damping * torch.eye(len(dense))
    assert close(wide @ v, dense @ v)
    assert close(wide.solve(v, damping=damping), torch.linalg.solve(shifted, v))
    assert close(wide.sqrt_matvec(wide.sqrt_matvec(v)), dense @ v)
    assert close(wide.logdet(damping=damping), torch.logdet(shifted))
    assert close(wide.norm(), torch.linalg.matrix_norm(dense))


def test_wide_factors_survive_a_file(tmp_path: Path) -> None:
    measured = exact(LanguageModel(shared=False), tokens(), nm.Kronecker(outputs=nm.Full(10)))
    measured.save(tmp_path / "fisher.nm")
    assert torch.equal(nm.load(tmp_path / "fisher.nm").to_dense(), measured.to_dense())


def test_an_embedding_keeps_how_often_each_row_is_looked_up() -> None:
    model, x = LanguageModel(shared=False), tokens()
    outputs = exact(model, x, nm.Kronecker()).blocks[0].outputs
    counts = torch.bincount(x.flatten(), minlength=VOCABULARY)
    assert outputs.shape == (1, VOCABULARY)
    assert close(outputs[0] / outputs.sum(), counts / counts.sum())


def test_widest_is_checked() -> None:
    with pytest.raises(ValueError, match="at least 1; got 0"):
        nm.Full(widest=0)


# ---- single units -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 4, 3, groups=4), (4, 6)),
        (nn.Linear(4, 1), (4,)),
        (nn.LayerNorm(4), (3, 4)),
    ],
    ids=["depthwise", "one output", "norm"],
)
def test_one_unit_per_group_is_kept_exactly(layer: nn.Module, shape: tuple[int, ...]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer.double()

        def forward(self, x: Tensor) -> Tensor:
            return F.softplus(self.layer(x)).flatten(1)

    model, x = Model(), torch.randn(N, *shape)
    got = nm.fisher(model, nm.Gaussian(), x, nm.Kronecker(), estimator=nm.Exact())
    unit_wise = nm.fisher(model, nm.Gaussian(), x, nm.UnitWise(), estimator=nm.Exact())
    assert close(got.to_dense(), unit_wise.to_dense())
    assert all(entry.exact and entry.structure == "UnitWise" for entry in got.coverage)


# ---- uses that a batch lacks --------------------------------------------------------------------


def test_batches_that_do_not_use_a_layer_leave_its_inputs_alone() -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if bool((x[:, 0] > 0).all()) else self.a(x) + self.b(x)

    model, x = Switch(), torch.randn(N, 3)
    x[:, 0] = x[:, 0].abs()
    other = x.clone()
    other[:, 0] *= -1
    both = nm.fisher(model, nm.Gaussian(), [(other,), (x,)], nm.Kronecker(), estimator=nm.Exact())
    alone = nm.fisher(model, nm.Gaussian(), other, nm.Kronecker(), estimator=nm.Exact())
    inputs, expected = both.blocks[1].inputs, alone.blocks[1].inputs
    assert close(inputs, expected)
    assert close(both.blocks[1].outputs, alone.blocks[1].outputs / 2)
