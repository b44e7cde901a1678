"""The contract of a layer rule as a callable test-suite."""

from __future__ import annotations

import copy
from itertools import chain, combinations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from neuromanifold.layers import Call, LayerRule, Port, Record, Side, rule_for
from neuromanifold.linalg import Layout
from neuromanifold.testing._compare import assert_close, rounding

__all__ = ["check_layer_rule"]

_NAME = "layer"
_NUM_SWEEPS = 3


def check_layer_rule(
    module: nn.Module,
    x: Tensor,
    *,
    precision: torch.dtype = torch.float64,
    generator: torch.Generator | None = None,
) -> None:
    """Check that a module's registered rule gives its per-sample gradients, in float64.

    Compared with `torch.func` for every choice of trainable parameters, several cotangents at once,
    and rows that are samples or pairs of rows that are one sample. Then its sums over samples,
    sweeps and positions are compared with those of the per-sample gradients.

    Args:
        module: of a type that a rule is registered for, in the mode (`eval`) in which it is used;
            no composite one.
        x: inputs `(rows, ...)`, an even number of rows; integers where the module takes indices.
        precision: to which the module's gradients are right, if it casts what it is given.
        generator: of the cotangents; seeded with 0 if not given.

    Raises:
        AssertionError: If a part of the contract is broken; the sentence says which.

    Example:
        >>> import torch
        >>> check_layer_rule(torch.nn.Linear(3, 2), torch.randn(4, 3))
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    rule = rule_for(module)
    assert isinstance(rule, LayerRule), f"No rule is registered for {type(module).__name__}."
    assert len(x) % 2 == 0, f"check_layer_rule needs an even number of rows, got {len(x)}."
    module, x = copy.deepcopy(module).double(), x.double() if x.is_floating_point() else x
    cotangents = torch.randn(
        (_NUM_SWEEPS, *module(x).shape), generator=generator, dtype=torch.float64
    )
    names = [name for name, _ in module.named_parameters(recurse=False)]
    sizes = range(1, len(names) + 1)
    for trainable in chain.from_iterable(combinations(names, size) for size in sizes):
        expected = _gradients(module, trainable, x, cotangents)
        numel = x[0].numel() + cotangents[0].numel()
        tolerance = rounding(numel, precision) * expected.norm()
        for folded in (1, 2):
            what = f"{rule.name}, {list(trainable)} trainable, {folded} rows per sample:"
            record = _record(rule, module, trainable, x, cotangents, folded)
            per_sample = expected.unflatten(1, (-1, folded)).sum(2)
            got = _flattened(record, module, trainable)
            assert_close(f"{what} gradients", got, per_sample, tolerance)
            _check_sums(what, record, rounding(numel, torch.float64))
            _check_absent(what, record)


def _record(
    rule: LayerRule,
    module: nn.Module,
    trainable: tuple[str, ...],
    x: Tensor,
    cotangents: Tensor,
    folded: int,
) -> Record:
    """Of one call of the module."""
    pieces = rule.pieces(module, _NAME, frozenset(trainable))
    assert len(pieces) == 1, f"A layer rule makes one block, but there are {len(pieces)}."
    block = pieces[0].block
    assert sorted(block.parameters) == sorted(f"{_NAME}.{name}" for name in trainable), (
        f"The block of module {_NAME!r} holds {block.parameters}, but {trainable} are trainable."
    )
    layout = _layout(module, trainable)
    assert block.num_parameters == layout.num_parameters, (
        f"The block has shape {block.shape}, but the parameters are {dict(layout.shapes)}."
    )
    port = Port(rule, module)
    call = Call(port, x if block.fan_in > block.biased else None, cotangents, folded)
    return Record(
        block,
        (port,),
        (call,),
        (len(cotangents), len(x) // folded),
        first=True,
        dtype=torch.float64,
        device=x.device,
    )


def _flattened(record: Record, module: nn.Module, trainable: tuple[str, ...]) -> Tensor:
    """Per-sample gradients `(V, N, P)` in the module's own order."""
    layout = _layout(module, trainable)
    gradients = record.per_sample().transpose(1, 2)  # (V, N, G, O, I)
    rows = gradients.new_empty(gradients.shape[0] * gradients.shape[1], layout.num_parameters)
    record.block.write(gradients.flatten(0, 1), rows, layout)
    return rows.unflatten(0, gradients.shape[:2])


def _check_sums(what: str, record: Record, eps: float) -> None:
    """What is summed without per-sample gradients is their sum, however the record is split."""
    p = record.per_sample()  # (V, G, N, O, I)
    (part,) = record.parts
    cells = [
        [record.samples(n, n + 1).sweeps(v, v + 1) for n in range(record.num_samples)]
        for v in range(record.num_sweeps)
    ]
    alone = torch.cat([torch.cat([cell.per_sample() for cell in row], dim=2) for row in cells])
    assert_close(f"{what} gradients, one by one", alone, p, eps * p.norm())
    expected = {
        "squared": p.square().sum(dim=(0, 2)),
        "unit_moments": torch.einsum("vgnoi,vgnoj->goij", p, p),
    }
    for name, value in expected.items():
        total = sum(getattr(some, name)() for some in record.split(1))
        for how, got in (("", getattr(part, name)()), (", split", total)):
            assert_close(f"{what} {name}{how}", got, value, eps * p.square().sum())
    if part.sides is None:
        return
    for index, side in enumerate(part.sides):
        some = cells[:1] if side.once else cells
        _check_side(f"{what} sides[{index}]", side, [_side(c, index) for c in chain(*some)], eps)
    for cell in chain(*cells):
        _check_one_position(what, cell, eps)
    if record.block.biased:
        bias = p[..., -1].transpose(0, 1).flatten(1, 2)  # (G, V·N, O)
        moment = _moment(part.sides[0], reduce=True)
        assert_close(f"{what} summed cotangents", moment, bias.mT @ bias, eps * moment.norm())


def _check_side(what: str, side: Side, alone: list[Side], eps: float) -> None:
    """Moments are sums over samples, and over sweeps if the vectors differ between them."""
    for reduce in (False, True):
        moment = _moment(side, reduce=reduce)
        total = torch.stack([_moment(one, reduce=reduce) for one in alone]).sum(0)
        tolerance = eps * moment.norm()
        assert_close(f"{what}.moment, reduce={reduce}, one by one", total, moment, tolerance)
        squares, diagonal = side.squares(reduce=reduce), moment.diagonal(dim1=-2, dim2=-1)
        assert_close(f"{what}.squares, reduce={reduce}", squares, diagonal, tolerance)


def _check_one_position(what: str, cell: Record, eps: float) -> None:
    """Of one sample and sweep: there, the outer product of the gradient is that of its sides."""
    (part,) = cell.parts
    if part.num_positions != 1 or part.sides is None:
        return
    p = part.per_sample()[0, :, 0]  # (G, O, I)
    expected = torch.einsum("goi,gpj->goipj", p, p)
    for reduce in (False, True):
        outputs, inputs = (_moment(side, reduce=reduce) for side in part.sides)
        got = torch.einsum("gop,gij->goipj", outputs, inputs)
        assert_close(f"{what} sides at one position", got, expected, eps * p.square().sum())


def _side(record: Record, index: int) -> Side:
    sides = record.parts[0].sides
    assert sides is not None
    return sides[index]


def _moment(side: Side, *, reduce: bool) -> Tensor:
    """`(G, n, n)`, also where it is known to be diagonal."""
    moment = side.moment(reduce=reduce)
    return moment if moment.ndim == 3 else moment.diag_embed()


def _check_absent(what: str, record: Record) -> None:
    """A layer that is not called has a gradient of zero."""
    shape = (record.num_sweeps, record.num_samples)
    unused = Record(
        record.block,
        record.ports,
        (),
        shape,
        first=True,
        dtype=record.dtype,
        device=record.device,
    )
    for name, value in (("per_sample", record.per_sample()), ("squared", record.squared())):
        got = getattr(unused, name)()
        assert_close(f"{what} {name} without a call", got, torch.zeros_like(value), 0.0)


def _gradients(
    module: nn.Module, trainable: tuple[str, ...], x: Tensor, cotangents: Tensor
) -> Tensor:
    """`(V, rows, P)` by automatic differentiation, one row at a time."""
    own = dict(module.named_parameters())
    params = {name: p.detach() for name, p in own.items() if name in trainable}

    def contracted(params: dict[str, Tensor], x: Tensor, u: Tensor) -> Tensor:
        return (functional_call(module, params, (x[None],))[0] * u).sum()

    per_row = vmap(vmap(grad(contracted), in_dims=(None, 0, 0)), in_dims=(None, None, 0))
    return torch.cat([value.flatten(2) for value in per_row(params, x, cotangents).values()], dim=2)


def _layout(module: nn.Module, trainable: tuple[str, ...]) -> Layout:
    return Layout(
        {
            f"{_NAME}.{name}": tuple(parameter.shape)
            for name, parameter in module.named_parameters()
            if name in trainable
        }
    )
