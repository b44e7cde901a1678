"""Records of units that respond by themselves: what a layer's output is turned into, unit by unit.

Between a layer and the first activation function behind it, each unit runs by itself: frozen
normalisation, dropout, scaling, activation. The slope of that chain is what a change of the unit's
input does to its response, whatever the rest of the network makes of it (papers.md §1.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from neuromanifold.capture.arrangement import Use
from neuromanifold.capture.layout import Place
from neuromanifold.capture.tape import Tape
from neuromanifold.layers import Record

__all__ = ["ACTIVATIONS", "UnitTape", "function_name"]

Information = Callable[[Place, Tensor], Tensor]
"""`(place, responses) -> Fisher information of each response`, like the responses."""

# fmt: off
ACTIVATIONS = frozenset([
    "celu", "clamp", "clip", "cos", "elu", "erf", "exp", "expit", "gelu", "hardshrink",
    "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish", "relu", "relu6",
    "rrelu", "selu", "sigmoid", "silu", "sin", "softplus", "softshrink", "softsign", "square",
    "tanh", "tanhshrink", "threshold",
])
"""Names of functions that act entry by entry, and bend; `prelu` does too, with weights."""

_AFFINE = frozenset([
    "add", "alpha_dropout", "batch_norm", "bfloat16", "clone", "contiguous", "div", "double",
    "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout", "float", "half",
    "mul", "neg", "radd", "rmul", "rsub", "sub", "to", "true_divide", "type",
])
"""Names of functions that act entry by entry, given constants, and do not bend."""
# fmt: on


@dataclass
class _Unit:
    """One use of a layer, and what its output became.

    Attributes:
        output: of the layer.
        response: behind the activation function; None if there is none.
    """

    output: Tensor
    response: Tensor | None = None


class _Follow(TorchFunctionMode):
    """Follows the outputs of layers through functions that act unit by unit."""

    def __init__(self) -> None:
        super().__init__()
        self.underway: dict[int, tuple[Tensor, list[_Unit]]] = {}
        """By identity of a tensor, which is kept alive: the units that it is a state of."""

    def begin(self, output: Tensor) -> _Unit:
        """Of a layer that was just called."""
        unit = _Unit(output)
        _, units = self.underway.setdefault(id(output), (output, []))
        units.append(unit)
        return unit

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor):
            return result
        found = [self.underway[id(a)] for a in args[:2] if id(a) in self.underway]
        if len(found) != 1:  # a sum of two units' outputs is no response of one of them
            return result
        name = function_name(func)
        ((before, units),) = found
        if result.shape != before.shape:
            return result
        if name in ACTIVATIONS or name == "prelu":
            for unit in units:
                if unit.response is None:
                    unit.response = result
            self.underway.pop(id(before), None)
        elif name in _AFFINE and self._is_by_unit(name, args, kwargs or {}):
            _, known = self.underway.setdefault(id(result), (result, []))
            known.extend(unit for unit in units if not any(unit is other for other in known))
        return result

    def _is_by_unit(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Not by statistics of the batch, and not with what other layers computed."""
        if name == "batch_norm" and kwargs.get("training", args[5] if len(args) > 5 else False):
            return False
        others = [a for a in args if isinstance(a, Tensor) and id(a) not in self.underway]
        return all(a.is_leaf for a in others)


def function_name(func: Callable[..., Any]) -> str:
    """Without the module, and without the marks of in-place and special methods."""
    name = (resolve_name(func) or getattr(func, "__name__", "")).rpartition(".")[2]
    return name.strip("_").removesuffix("_")


class UnitTape(Tape):
    """A tape that also knows the response of each unit.

    Used as any tape; `respond` gives the records of a batch as if each unit of each layer had drawn
    its response by itself.
    """

    _information: Information | None = None

    def respond(
        self, information: Information, at_outputs: Tensor, signs: Callable[[Tensor], Tensor]
    ) -> Iterator[Record]:
        """Records of one sweep, whose squared cotangents are the information of the units.

        `ν = slope² · information of the response`, at each position by itself.

        Args:
            information: of responses behind an activation function, and of the outputs of layers
                that have none.
            at_outputs: the information at the model's outputs, for the layer that they come from.
            signs: random ±1 like a tensor. Units and positions are independent, which the signs
                make them in sums of products.
        """
        self._information, self._at_outputs, self._signs = information, at_outputs, signs
        try:
            yield from self.records(at_outputs[None])
        finally:
            self._information = None

    def without_response(self) -> list[str]:
        """Modules whose outputs meet no activation function, and are not those of the model."""
        found = set()
        for place, uses in self._uses.items():
            units = [self._units[id(use)] for use in uses]
            if any(u.response is None and not self._is_final(u.output) for u in units):
                found.add(place[0])
        return sorted(found)

    def _run(self) -> Tensor:
        self._units: dict[int, _Unit] = {}
        with _Follow() as self._follow:
            return super()._run()

    def _report(self, place: Place, x: Tensor | None, output: Tensor) -> None:
        known = len(self._uses.get(place, ()))
        super()._report(place, x, output)
        if len(self._uses.get(place, ())) > known:
            self._units[id(self._uses[place][-1])] = self._follow.begin(output)

    def _is_final(self, output: Tensor) -> bool:
        """Whether this is what the model returns."""
        return output is self._outputs or output.grad_fn is self._outputs.grad_fn

    def _sweep(self, uses: list[Use], cotangents: Tensor) -> list[Tensor | None]:
        """Roots of the information, `(1, *output.shape)`, in place of gradients."""
        if self._information is None:
            return super()._sweep(uses, cotangents)
        places = [place for place, found in self._uses.items() for _ in found]
        return [self._root(*used)[None] for used in zip(places, uses, strict=True)]

    def _root(self, place: Place, use: Use) -> Tensor:
        assert self._information is not None
        unit = self._units[id(use)]
        if unit.response is not None:
            response = unit.response
            ones = torch.ones_like(response)
            (slope,) = torch.autograd.grad(response, use.edge, ones, retain_graph=True)
            root = slope.reshape(use.shape) * self._information(place, response.detach()).sqrt()
        elif self._is_final(unit.output):
            root = self._at_outputs.reshape(use.shape).sqrt()
        else:
            root = self._information(place, unit.output.detach()).sqrt()
        return root * self._signs(root)
