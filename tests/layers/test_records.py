"""Contractions of a record are those of its per-sample gradients, however it is split."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from neuromanifold.layers import Call, ConvRule, LinearRule, Record

V, N = 3, 6

LINEAR = (LinearRule(), nn.Linear(4, 2).double(), (N, 4), (V, N, 2))
SEQUENCE = (LinearRule(), nn.Linear(4, 2).double(), (N, 5, 4), (V, N, 5, 2))
CONVOLUTION = (ConvRule(), nn.Conv1d(4, 6, 3, groups=2).double(), (N, 4, 7), (V, N, 6, 5))
LAYERS = {"linear": LINEAR, "sequence": SEQUENCE, "convolution": CONVOLUTION}


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[("weight", "bias"), ("weight",), ("bias",)], ids=" ".join)
def record(request: pytest.FixtureRequest, layer: str) -> Record:
    return make(layer, request.param)


def make(layer: str, trainable: tuple[str, ...] = ("weight", "bias"), calls: int = 1) -> Record:
    rule, module, x_shape, g_shape = LAYERS[layer]
    x = randn(*x_shape) if "weight" in trainable else None
    call = Call.of_module(rule, module, x, randn(*g_shape), folded=1)
    block = rule.block(module, "layer", frozenset(trainable))
    return Record(block, (call,) * calls, N, first=True, dtype=torch.float64)


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    eps = torch.finfo(torch.float64).eps
    assert (got - expected).norm() <= 1e3 * eps * expected.norm()


def test_moments(record: Record) -> None:
    p = record.per_sample()  # (V, G, N, O, I)
    assert p.shape == (V, record.block.groups, N, *record.block.shape[1:])
    assert_same(record.squared(), p.square().sum((0, 2)))
    assert_same(record.unit_moments(), torch.einsum("vgnoi,vgnok->goik", p, p))
    flat = p.transpose(1, 2).flatten(2)
    assert_same(record.block_moment(), torch.einsum("vnp,vnq->pq", flat, flat))


@pytest.mark.parametrize("reduce", [False, True])
def test_kronecker_moments(record: Record, reduce: bool) -> None:
    a, g = record.augmented, record.g
    if reduce:
        a, g = a.mean(2, keepdim=True), g.sum(3, keepdim=True)
    assert_same(record.input_moment(reduce=reduce), torch.einsum("gnti,gntk->gik", a, a))
    assert_same(record.output_moment(reduce=reduce), torch.einsum("vgnto,vgntp->gop", g, g))


@pytest.mark.parametrize("numel", [1, 60, 10**9])
def test_parts_add_up(record: Record, numel: int) -> None:
    parts = list(record.split(numel))
    assert sum(part.num_samples for part in parts) == N
    assert len(parts) == (1 if numel == 10**9 else len(parts))
    if numel == 1:
        assert [part.num_samples for part in parts] == [1] * N
    assert_same(sum(part.squared() for part in parts), record.squared())
    assert_same(torch.cat([part.per_sample() for part in parts], dim=2), record.per_sample())
    assert_same(
        sum(part.input_moment(reduce=False) for part in parts), record.input_moment(reduce=False)
    )


def test_calls_are_concatenated_along_positions(layer: str) -> None:
    once, twice = make(layer), make(layer, calls=2)
    assert twice.num_positions == 2 * once.num_positions
    assert_same(twice.per_sample(), 2 * once.per_sample())
    assert_same(twice.squared(), 4 * once.squared())


def test_half_precision_is_accumulated_in_float32() -> None:
    module = nn.Linear(4, 2).bfloat16()
    x, g = randn(N, 4).bfloat16(), randn(V, N, 2).bfloat16()
    rule = LinearRule()
    block = rule.block(module, "", frozenset(("weight", "bias")))
    call = Call.of_module(rule, module, x, g, 1)
    record = Record(block, (call,), N, first=True, dtype=torch.float32)
    assert {record.per_sample().dtype, record.squared().dtype} == {torch.float32}


def test_parameters_without_a_rule() -> None:
    gradients = randn(V, N, 5)
    block = LinearRule().block(nn.Linear(1, 5), "layer", frozenset({"bias"}))
    call = Call.of_parameter(gradients)
    record = Record(block, (call,), N, first=True, dtype=torch.float64)
    assert_same(record.per_sample(), gradients[:, None, :, :, None])
    assert_same(record.squared(), gradients.square().sum((0, 1))[None, :, None])
