"""The contract of a layer rule as a callable test-suite."""

from __future__ import annotations

import copy
from itertools import chain, combinations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from neuromanifold.layers import Call, LayerRule, Record, rule_for
from neuromanifold.linalg import Layout
from neuromanifold.testing._compare import assert_close, rounding

__all__ = ["check_layer_rule"]

_NUM_SWEEPS = 3


def check_layer_rule(
    module: nn.Module, x: Tensor, *, generator: torch.Generator | None = None
) -> None:
    """Check that a module's registered rule gives its per-sample gradients, in float64.

    Compared with `torch.func` for every choice of trainable parameters, several cotangents at once,
    and rows that are samples or pairs of rows that are one sample.

    Args:
        module: of a type that a rule is registered for.
        x: inputs `(rows, ...)`, an even number of rows.
        generator: of the cotangents; seeded with 0 if not given.

    Raises:
        AssertionError: If a part of the contract is broken; the sentence says which.

    Example:
        >>> import torch
        >>> check_layer_rule(torch.nn.Linear(3, 2), torch.randn(4, 3))
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    rule = rule_for(module)
    assert rule is not None, f"No rule is registered for {type(module).__name__}."
    assert len(x) % 2 == 0, f"check_layer_rule needs an even number of rows, got {len(x)}."
    module, x = copy.deepcopy(module).double(), x.double()
    cotangents = torch.randn(
        (_NUM_SWEEPS, *module(x).shape), generator=generator, dtype=torch.float64
    )
    names = [name for name, _ in module.named_parameters(recurse=False)]
    sizes = range(1, len(names) + 1)
    for trainable in chain.from_iterable(combinations(names, size) for size in sizes):
        expected = _gradients(module, trainable, x, cotangents)
        for folded in (1, 2):
            got = _by_rule(rule, module, trainable, x, cotangents, folded)
            per_sample = expected.unflatten(1, (-1, folded)).sum(2)
            tolerance = rounding(x[0].numel() + cotangents[0].numel(), x.dtype) * expected.norm()
            what = f"{rule.name}, {list(trainable)} trainable, {folded} rows per sample: gradients"
            assert_close(what, got, per_sample, tolerance)


def _by_rule(
    rule: LayerRule,
    module: nn.Module,
    trainable: tuple[str, ...],
    x: Tensor,
    cotangents: Tensor,
    folded: int,
) -> Tensor:
    """`(V, N, P)` from the rule's inputs and cotangents."""
    block = rule.block(module, "", frozenset(trainable))
    assert sorted(block.parameters) == sorted(trainable), (
        f"The block holds {block.parameters}, but {trainable} are trainable."
    )
    layout = _layout(module, trainable)
    assert block.num_parameters == layout.num_parameters, (
        f"The block has shape {block.shape}, but the parameters are {dict(layout.shapes)}."
    )
    has_inputs = block.fan_in > block.biased
    call = Call.of_module(rule, module, x if has_inputs else None, cotangents, folded)
    record = Record(block, (call,), len(x) // folded, first=True, dtype=torch.float64)
    gradients = record.per_sample().transpose(1, 2)  # (V, N, G, O, I)
    rows = gradients.new_empty(gradients.shape[0] * gradients.shape[1], layout.num_parameters)
    block.write(gradients.flatten(0, 1), rows, layout)
    return rows.unflatten(0, gradients.shape[:2])


def _gradients(
    module: nn.Module, trainable: tuple[str, ...], x: Tensor, cotangents: Tensor
) -> Tensor:
    """`(V, rows, P)` by automatic differentiation, one row at a time."""
    own = dict(module.named_parameters())
    params = {name: own[name].detach() for name in _layout(module, trainable).names}

    def contracted(params: dict[str, Tensor], x: Tensor, u: Tensor) -> Tensor:
        return (functional_call(module, params, (x[None],))[0] * u).sum()

    per_row = vmap(vmap(grad(contracted), in_dims=(None, 0, 0)), in_dims=(None, None, 0))
    return torch.cat([value.flatten(2) for value in per_row(params, x, cotangents).values()], dim=2)


def _layout(module: nn.Module, trainable: tuple[str, ...]) -> Layout:
    return Layout(
        {
            name: tuple(parameter.shape)
            for name, parameter in module.named_parameters()
            if name in trainable
        }
    )
