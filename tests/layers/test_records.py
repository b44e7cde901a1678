"""Contractions of a record are those of its per-sample gradients, however it is split."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from neuromanifold.layers import (
    Call,
    LayerRule,
    Port,
    Record,
    parts,
    record_of_parameter,
    rule_for,
)
from neuromanifold.linalg import Block, Slot

V, N = 3, 6

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(4, 2), (4,)),
    "sequence": (nn.Linear(4, 2), (5, 4)),
    "convolution": (nn.Conv1d(4, 6, 3, groups=2), (4, 7)),
    "transposed convolution": (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (4, 3)),
    "norm": (nn.LayerNorm(4), (4,)),
    "norm sequence": (nn.LayerNorm(4), (5, 4)),
    "shared slope": (nn.PReLU(), (5, 4)),
    "tokens": (nn.Embedding(4, 3), ()),
    "repeated tokens": (nn.Embedding(4, 3, padding_idx=1), (7,)),
}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(), dtype=torch.float64)


def make(
    layer: str,
    trainable: tuple[str, ...] | None = None,
    *,
    calls: int = 1,
    folded: int = 1,
    first: bool = True,
) -> Record:
    """A record of V sweeps and N samples; the calls have different inputs."""
    module, shape = LAYERS[layer]
    module = module.double()
    rule = rule_for(module)
    assert isinstance(rule, LayerRule)
    names = tuple(name for name, _ in module.named_parameters())
    block = rule.block(module, "layer", frozenset(names if trainable is None else trainable))
    port = Port(rule, module)
    rows = N * folded
    if isinstance(module, nn.Embedding):
        xs = torch.randint(4, (calls, rows, *shape), generator=generator())
    else:
        xs = randn(calls, rows, *shape)
    with torch.no_grad():
        gs = randn(calls, V, *module(xs[0]).shape)
    needed = block.fan_in > block.biased
    made = tuple(Call(port, x if needed else None, g, folded) for x, g in zip(xs, gs, strict=True))
    return record_of(block, (port,), made, first=first)


def record_of(
    block: Block, ports: tuple[Port, ...], calls: tuple[Call, ...], *, first: bool = True
) -> Record:
    return Record(
        block, ports, calls, (V, N), first=first, dtype=torch.float64, device=torch.device("cpu")
    )


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> str:
    return request.param


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    eps = torch.finfo(torch.float64).eps
    assert (got - expected).norm() <= 1e3 * eps * expected.norm()


def assert_moments(record: Record) -> None:
    p = record.per_sample()  # (V, G, N, O, I)
    assert p.shape == (V, record.block.groups, N, *record.block.shape[1:])
    assert_same(record.squared(), p.square().sum((0, 2)))
    assert_same(record.unit_moments(), torch.einsum("vgnoi,vgnok->goik", p, p))
    flat = p.transpose(1, 2).flatten(2)
    assert_same(record.block_moment(), torch.einsum("vnp,vnq->pq", flat, flat))


@pytest.mark.parametrize("folded", [1, 2])
def test_moments(layer: str, folded: int) -> None:
    assert_moments(make(layer, folded=folded))


@pytest.mark.parametrize("trainable", ["weight", "bias"])
@pytest.mark.parametrize(
    "layer", [name for name, (module, _) in LAYERS.items() if hasattr(module, "bias")]
)
def test_moments_of_one_parameter(layer: str, trainable: str) -> None:
    assert_moments(make(layer, (trainable,)))


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("layer", ["linear", "sequence", "convolution", "transposed convolution"])
@pytest.mark.parametrize("trainable", [("weight", "bias"), ("weight",)], ids=" ".join)
def test_sides_of_a_layer_with_weights(
    layer: str, trainable: tuple[str, ...], reduce: bool
) -> None:
    """Cotangents and inputs with the bias column, of which inputs are the same in every sweep."""
    (part,) = make(layer, trainable, calls=2).parts
    assert part.sides is not None
    outputs, inputs = part.sides
    a, g = part.augmented, part.g
    if reduce:
        a, g = a.mean(2, keepdim=True), g.sum(3, keepdim=True)
    assert (outputs.once, inputs.once) == (False, True)
    assert_same(inputs.moment(reduce=reduce), torch.einsum("gnti,gntk->gik", a, a))
    assert_same(outputs.moment(reduce=reduce), torch.einsum("vgnto,vgntp->gop", g, g))


def test_sides_of_an_embedding() -> None:
    """Tokens as vectors with a single one, nothing at padding; then the cotangents."""
    record = make("repeated tokens", calls=2)
    (part,) = record.parts
    outputs, inputs = part.sides
    tokens = torch.cat([call.x for call in record.calls], dim=1)  # (N, T)
    seen = nn.functional.one_hot(tokens, 4).double() * (tokens != 1)[..., None]
    counts, frequencies = seen.sum((0, 1)), seen.mean(1)
    assert (outputs.once, inputs.once) == (True, False)
    assert_same(outputs.moment(reduce=False), counts[None])
    assert_same(outputs.moment(reduce=True), (frequencies.mT @ frequencies)[None])
    g = torch.cat([call.g for call in record.calls], dim=2) * (tokens != 1)[..., None]
    assert_same(inputs.moment(reduce=False), torch.einsum("vnti,vntj->ij", g, g)[None])
    assert_same(inputs.moment(reduce=True), torch.einsum("vnsi,vntj->ij", g, g)[None])


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("numel", [1, 60, 10**9])
def test_a_split_record_adds_up(layer: str, numel: int, calls: int) -> None:
    record = make(layer, calls=calls)
    pieces = list(record.split(numel))
    assert sum(piece.num_samples * piece.num_sweeps for piece in pieces) == N * V
    if numel == 1:
        assert {(piece.num_samples, piece.num_sweeps) for piece in pieces} == {(1, 1)}
    if numel == 10**9:
        assert len(pieces) == 1
    assert_same(sum(piece.squared() for piece in pieces), record.squared())
    assert_same(sum(piece.unit_moments() for piece in pieces), record.unit_moments())
    gradients = [p for piece in pieces for p in piece.per_sample().movedim(2, 1).flatten(0, 1)]
    whole = record.per_sample().movedim(2, 1)  # (V, N, G, O, I)
    assert_same(sum(gradients), whole.sum((0, 1)))
    assert len(gradients) == N * V


@pytest.mark.parametrize("layer", ["sequence", "convolution"])
@pytest.mark.parametrize("together", [1, 2, 4, 100])
def test_gradients_are_squared_some_at_a_time(
    layer: str, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = make(layer)
    weights = record.block.num_parameters - record.block.fan_out * record.block.groups
    cached = dict.fromkeys((True, False), weights * together)
    monkeypatch.setattr(parts, "_CACHED_NUMEL", cached)
    expected = record.per_sample().square().sum(dim=(0, 2))
    torch.testing.assert_close(record.squared(), expected, rtol=1e-12, atol=1e-12)


def test_inputs_are_counted_in_the_first_sweep() -> None:
    """However a record is split, one piece per sample has `first` set, if the record has."""
    counted = [piece for piece in make("sequence").split(1) if piece.first]
    assert len(counted) == N
    assert not any(piece.first for piece in make("sequence", first=False).split(1))
    (part,) = make("sequence").parts
    alone = [piece.parts[0].sides[1].moment(reduce=False) for piece in counted]
    assert_same(sum(alone), part.sides[1].moment(reduce=False))


def test_calls_are_added(layer: str) -> None:
    record = make(layer, calls=2)
    alone = [record_of(record.block, record.ports, (call,)) for call in record.calls]
    assert_same(record.per_sample(), sum(one.per_sample() for one in alone))
    assert_moments(record)


def test_positions_of_calls_are_side_by_side() -> None:
    for layer, positions in (("linear", 1), ("sequence", 5), ("repeated tokens", 7)):
        assert make(layer, calls=2).parts[0].num_positions == 2 * positions
        assert make(layer, folded=2).parts[0].num_positions == 2 * positions


def test_places_that_share_a_weight() -> None:
    """An embedding and a linear layer: the gradient is the sum of what each contributes."""
    embedding, linear = make("repeated tokens"), linear_with_the_table()
    both = record_of(
        embedding.block, embedding.ports + linear.ports, embedding.calls + linear.calls
    )
    assert both.single is None
    assert_same(both.per_sample(), embedding.per_sample() + linear.per_sample())
    assert_moments(both)
    assert_same(sum(piece.squared() for piece in both.split(1)), both.squared())
    only = record_of(embedding.block, both.ports, embedding.calls)
    assert_same(only.per_sample(), embedding.per_sample())


def linear_with_the_table() -> Record:
    """Of a linear layer with the weight of the embedding above."""
    module = nn.Linear(3, 4, bias=False).double()
    port = Port(rule_for(module), module)
    call = Call(port, randn(N, 2, 3), randn(V, N, 2, 4), 1)
    block = port.rule.block(module, "layer", frozenset(("weight",)))
    return record_of(block, (port,), (call,))


def test_places_with_groups_of_their_own() -> None:
    """Queries and keys of attention: each place writes the gradient of its group."""
    module = nn.Linear(4, 2).double()
    slots = (Slot.plain("weight", 2, 2, 4), Slot.plain("bias", 2, 2, 1))
    block = Block("layer", 2, 2, slots, biased=True)
    ports = tuple(Port(rule_for(module), module, slice(i, i + 1)) for i in range(2))
    calls = tuple(Call(port, randn(N, 4) + i, randn(V, N, 2), 1) for i, port in enumerate(ports))
    record = record_of(block, ports, calls)
    alone = make("linear").block
    for i, (port, call) in enumerate(zip(ports, calls, strict=True)):
        same = Port(port.rule, module)
        expected = record_of(alone, (same,), (Call(same, call.x, call.g, 1),))
        assert_same(record.per_sample()[:, i : i + 1], expected.per_sample())
    assert_moments(record)
    half = record_of(block, ports, calls[:1])
    assert_same(half.per_sample()[:, :1], record.per_sample()[:, :1])
    assert not half.per_sample()[:, 1].any()


def test_half_precision_is_accumulated_in_float32(layer: str) -> None:
    record = make(layer)
    calls = tuple(
        Call(
            call.port,
            call.x.bfloat16() if call.x.is_floating_point() else call.x,
            call.g.bfloat16(),
            1,
        )
        for call in record.calls
    )
    half = Record(
        record.block,
        record.ports,
        calls,
        (V, N),
        first=True,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert {half.per_sample().dtype, half.squared().dtype} == {torch.float32}


def test_parameters_without_a_rule() -> None:
    gradients = randn(V, N, 5)
    block = Block("scale", 1, 5, (Slot.plain("scale", 1, 5, 1),), biased=True)
    record = record_of_parameter(block, gradients, first=True, dtype=torch.float64)
    assert_same(record.per_sample(), gradients[:, None, :, :, None])
    assert_same(record.squared(), gradients.square().sum((0, 1))[None, :, None])
    assert_same(
        record.unit_moments(), torch.einsum("vnp,vnp->p", gradients, gradients)[None, :, None, None]
    )
