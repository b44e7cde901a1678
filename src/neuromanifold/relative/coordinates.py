"""A component in other coordinates: changed parameters that compute the same function.

A metric is a tensor if squared lengths do not depend on coordinates: `dθᵀ G dθ = dθ′ᵀ G′ dθ′` for
parameter changes that correspond, `dθ′ = T dθ`. The changes here are linear, so that one function
takes parameters and their changes alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from neuromanifold._typing import Params

__all__ = ["Change", "Use", "input_changed", "observed", "units_permuted", "with_parameters"]

Matrix: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
"""Layers that multiply features by a matrix, at each position and each place of a kernel alike."""

Draw = Callable[..., Tensor]
"""`draw(*sizes)`: standard normal numbers in float64."""


@dataclass(frozen=True)
class Change:
    """Other coordinates.

    Attributes:
        data: of the features: the tensor that is read or returned, in its new coordinates.
        parameters: of all the component's parameters, or of changes of them, by name; linear.
        words: what was changed.
    """

    data: Callable[[Tensor], Tensor]
    parameters: Callable[[Params], Params]
    words: str


@dataclass(frozen=True)
class Use:
    """A call of a layer: its name, the layer, and what it was given."""

    name: str
    layer: Matrix
    x: Tensor

    @property
    def axis(self) -> int:
        """Where features are."""
        return -1 if isinstance(self.layer, nn.Linear) else 1

    @property
    def groups(self) -> int:
        """How many sets of features are read apart."""
        return 1 if isinstance(self.layer, nn.Linear) else self.layer.groups

    @property
    def trains_bias(self) -> bool:
        """Whether there is a bias that can make up for an offset."""
        return self.layer.bias is not None and self.layer.bias.requires_grad

    @property
    def pads_with_zeros(self) -> bool:
        """Whether there are entries without the offset of all others."""
        layer = self.layer
        if isinstance(layer, nn.Linear) or layer.padding_mode != "zeros":
            return False
        padding = layer.padding
        return padding != "valid" if isinstance(padding, str) else any(padding)


@contextmanager
def observed(component: nn.Module) -> Iterator[list[Use]]:
    """The uses of matrix layers inside it, in the order of their calls."""
    uses: list[Use] = []

    def observer(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: Any, kwargs: Any) -> None:
            x = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            uses.append(Use(name, layer, x))

        return hook

    with ExitStack() as hooks:
        for name, layer in component.named_modules():
            # What is parametrised has no weight of its own to be changed.
            if isinstance(layer, Matrix) and layer._parameters.get("weight") is not None:
                handle = layer.register_forward_pre_hook(observer(name), with_kwargs=True)
                hooks.callback(handle.remove)
        yield uses


def with_parameters(component: nn.Module, parameters: Params) -> nn.Module:
    """A copy that has them."""
    other = copy.deepcopy(component)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(parameters[name])
    return other


def input_changed(component: nn.Module, uses: Sequence[Use], draw: Draw) -> Change:
    """`x → M x + c`, made up for by the layers that read x: `W → W M⁻¹` and `b → b − W M⁻¹ c`.

    There is no offset c where no bias can make up for it, and where x is padded with zeros.

    Args:
        component: whose input is changed.
        uses: of layers that read one and the same x, features on the same axis.
        draw: source of M and c.
    """
    first = uses[0]
    p = first.layer.weight
    size = p.shape[1]  # features of a group
    mixing = torch.stack([_well_conditioned(size, draw) for _ in range(first.groups)]).to(p)
    inverse = mixing.double().inverse().to(p)
    offset = draw(first.groups, size).to(p)
    offsets = all(use.trains_bias and not use.pads_with_zeros for use in uses)
    if not offsets:
        offset = torch.zeros_like(offset)
    names = {id(p): name for name, p in component.named_parameters()}
    layers = list({id(use.layer): use.layer for use in uses}.values())

    def data(x: Tensor) -> Tensor:
        grouped = x.movedim(first.axis, -1).unflatten(-1, (first.groups, size))
        mixed = torch.einsum("...gi,gji->...gj", grouped, mixing.to(x)) + offset.to(x)
        return mixed.flatten(-2).movedim(-1, first.axis)

    def parameters(params: Params) -> Params:
        new = {**params}
        for layer in layers:
            weight = names[id(layer.weight)]
            grouped = params[weight].unflatten(0, (first.groups, -1))
            turned = torch.einsum("goi...,gij->goj...", grouped, inverse.to(grouped))
            new[weight] = turned.flatten(0, 1)
            if offsets:
                bias = names[id(layer.bias)]
                over_kernel = turned.reshape(*turned.shape[:3], -1).sum(-1)
                reached = torch.einsum("goj,gj->go", over_kernel, offset.to(grouped))
                new[bias] = params[bias] - reached.flatten()
        return new

    where = ", ".join(use.name or "the component itself" for use in uses)
    return Change(data, parameters, f"x → Mx{' + c' if offsets else ''} at {where}")


def units_permuted(component: nn.Module, last: Use, draw: Draw) -> Change:
    """The units of the last matrix layer in another order."""
    p = last.layer.weight
    order = draw(len(p)).argsort().to(p.device)
    names = {id(p): name for name, p in component.named_parameters()}
    own = [names[id(p)] for p in (last.layer.weight, last.layer.bias) if p is not None]

    def parameters(params: Params) -> Params:
        return {**params, **{name: params[name][order] for name in own}}

    def data(y: Tensor) -> Tensor:
        return y.index_select(last.axis, order)

    where = last.name or "the component itself"
    return Change(data, parameters, f"{len(p)} units of {where} in another order")


def _well_conditioned(size: int, draw: Draw) -> Tensor:
    """A random square matrix with singular values from ½ to 2."""
    left, right = torch.linalg.qr(draw(2, size, size)).Q
    return left * torch.linspace(0.5, 2, size, dtype=left.dtype) @ right
