"""The contract of a composite rule as a callable test-suite."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_map

from neuromanifold.layers import Call, CompositeRule, Piece, Port, rule_for
from neuromanifold.linalg import Layout
from neuromanifold.testing._compare import assert_close, rounding

__all__ = ["check_composite_rule"]

_Reports = dict[str, list[tuple[Tensor | None, Tensor]]]
"""Inputs and outputs of what was reported, by port."""


def check_composite_rule(
    module: nn.Module, *args: Any, kwargs: Mapping[str, Any] | None = None
) -> None:
    """Check that a module's composite rule does what the module does and reports all of it.

    Outputs and their gradients are compared with the module's own in float64, in training mode with
    the same random numbers. Then the gradients of the parameters are put together from the inputs
    and outputs that were reported, for all parameters and for each one alone.

    Args:
        module: of a type that a composite rule is registered for.
        *args: what its forward takes, in a form for which the rule has a forward of its own.
        kwargs: keywords of its forward.

    Raises:
        AssertionError: If a part of the contract is broken; the sentence says which.

    Example:
        >>> check_composite_rule(nn.GRUCell(3, 2), torch.randn(4, 3))
    """
    rule = rule_for(module)
    assert isinstance(rule, CompositeRule), f"{type(module).__name__} has no composite rule."
    module = copy.deepcopy(module).double()
    args, kwargs = tree_map(_leaf, (args, dict(kwargs or {})))
    inputs = [x for x in tree_flatten((args, kwargs))[0] if _trains(x)]
    parameters = dict(module.named_parameters())
    reports: _Reports = {}

    def use(port: str, x: Tensor | None, output: Tensor) -> Tensor:
        reports.setdefault(port, []).append((x, output))
        return output

    expected = _seeded(module, *args, **kwargs)
    got = _seeded(rule.forward, module, use, *args, **kwargs)
    assert reports, "Nothing was reported: the rule left these arguments to the module."
    assert tree_flatten(expected)[1] == tree_flatten(got)[1], "Outputs have another form."
    size = sum(x.numel() for x in (*inputs, *parameters.values()))
    of = [*parameters.values(), *inputs]
    native, written = (
        [torch.zeros_like(x) if g is None else g for x, g in zip(of, found, strict=True)]
        for found in (_gradients(expected, of), _gradients(got, of))
    )
    tolerance = rounding(size, torch.float64)
    for i, (mine, own) in enumerate(zip(_tensors(got), _tensors(expected), strict=True)):
        assert_close(f"output {i}", mine, own, tolerance * own.norm())
    scale = torch.cat([g.flatten() for g in native]).norm()
    names = [*parameters, *(f"input {i}" for i in range(len(inputs)))]
    for name, mine, own in zip(names, written, native, strict=True):
        assert_close(f"the gradient of {name}", mine, own, tolerance * scale)

    local = [name for name, _ in module.named_parameters(recurse=False)]
    by_name = dict(zip(names, native, strict=True))
    for trainable in (local, *([name] for name in local)):
        pieces = rule.pieces(module, "", frozenset(trainable))
        held = [name for piece in pieces for name in piece.block.parameters]
        assert sorted(held) == sorted(trainable), f"Blocks hold {held}; trainable: {trainable}."
        layout = Layout({name: tuple(parameters[name].shape) for name in trainable})
        rows = torch.zeros(1, layout.num_parameters, dtype=torch.float64)
        for piece in pieces:
            piece.block.write(_by_reports(piece, module, reports, got)[None], rows, layout)
        for name, gradient in layout.unflatten(rows[0]).items():
            what = f"the gradient of {name} by its reports, {trainable} trainable,"
            assert_close(what, gradient, by_name[name], tolerance * scale)


def _by_reports(piece: Piece, module: nn.Module, reports: _Reports, outputs: Any) -> Tensor:
    """A block's gradient `(G, O, I)`, summed over the rows of everything reported."""
    block = piece.block
    total = torch.zeros(block.shape, dtype=torch.float64)
    for use in piece.uses:
        port = Port(use.rule, module, use.groups)
        found = reports.get(use.port, [])
        edges = [get_gradient_edge(output) for _, output in found]
        for (x, output), g in zip(found, _gradients(outputs, edges), strict=True):
            if g is None:  # it was reported and thrown away
                continue
            x = x.detach() if x is not None and block.fan_in > block.biased else None
            call = Call(port, x, g.reshape(1, *output.shape), folded=1)
            part = use.rule.part(block, (call,), len(output), torch.float64)
            total[part.groups] += part.per_sample().sum(dim=(0, 2))
    return total


def _gradients(outputs: Any, of: list[Any]) -> tuple[Tensor | None, ...]:
    """Of a sum over all entries of the outputs with unequal coefficients; None for no path."""
    flat = torch.cat([output.flatten() for output in _tensors(outputs)])
    coefficients = torch.linspace(1, 9, flat.numel(), dtype=flat.dtype).cos()
    return torch.autograd.grad(flat, of, coefficients, retain_graph=True, allow_unused=True)


def _seeded(function: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return function(*args, **kwargs)


def _tensors(outputs: Any) -> list[Tensor]:
    return [x for x in tree_flatten(outputs)[0] if isinstance(x, Tensor)]


def _leaf(value: Any) -> Any:
    """Floating-point tensors as leaves of a graph of their own, in float64."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_()


def _trains(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
