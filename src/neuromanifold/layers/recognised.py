"""Norms and layer scales that are classes of their own in each model, found by what they compute.

Nearly every language model brings its own root-mean-square norm, and some of them scale by
`1 + w`. All are affine in their parameters, unit by unit, `y = w n(x) + b + c(x)`, so that
`n(x) = y(w=1) - y(w=0)`; a probe makes sure of it before a module is read that way.
"""

from __future__ import annotations

import copy
import inspect
import re
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from neuromanifold.errors import UnsupportedError
from neuromanifold.layers._base import recognise
from neuromanifold.layers.norm import Axes, ScaleRule

__all__ = ["recognised_scale"]

_CALLED = re.compile(r"(Norm|Scale)(\w{2})?$")  # perhaps with 2d behind it
_FOUND: WeakKeyDictionary[nn.Module, dict[bool, Axes | None]] = WeakKeyDictionary()
"""Where the units are, if the probe found any, per module and whether it was in training mode."""


@recognise
def recognised_scale(module: nn.Module) -> ScaleRule | None:
    """The rule of a module that scales, and may shift, the units of its one input.

    Units are the last axes, or the channels of images `(N, C, H, W)`. Candidates are modules
    without children, called `...Norm` or `...Scale`, that hold a scale and perhaps a shift of the
    same shape. An axis of length one could be broadcast: not those.

    Args:
        module: of any class without a registered rule.

    Returns:
        None if it is no candidate, or does not compute what one does.

    Example:
        >>> class UnitRMSNorm(nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.zeros(width))
        ...
        ...     def forward(self, x):
        ...         return x * x.square().mean(-1, keepdim=True).rsqrt() * (1 + self.weight)
        >>> recognised_scale(UnitRMSNorm(4)).name
        'norm'
    """
    called = _CALLED.search(type(module).__name__)
    parameters = list(module.named_parameters(recurse=False))
    if not called or any(module.children()) or len(parameters) not in (1, 2):
        return None
    shape = parameters[0][1].shape
    if any(p.shape != shape for _, p in parameters) or min(shape, default=1) < 2:
        return None
    found = _FOUND.setdefault(module, {})
    if module.training not in found:
        found[module.training] = _axes(module, shape) if _takes_one_input(module) else None
    axes = found[module.training]
    if axes is None:
        return None
    names = [name for name, _ in parameters]
    parts = (names[0], names[1] if len(names) == 2 else "")
    return ScaleRule(called.group(1).lower(), _difference, axes, parts)


def _takes_one_input(module: nn.Module) -> bool:
    """A second input, as the gate of a gated norm, would not be seen."""
    parameters = inspect.signature(module.forward).parameters.values()
    kinds = [parameter.kind for parameter in parameters]
    return kinds == [inspect.Parameter.POSITIONAL_OR_KEYWORD]


def _axes(module: nn.Module, shape: torch.Size) -> Axes | None:
    """Where the units are, by trying."""
    if _is_scale(module, (2, 3, *shape), shape):
        return lambda _, ndim: range(ndim - len(shape), ndim)
    if len(shape) == 1 and _is_scale(module, (2, *shape, 3, 2), (*shape, 1, 1)):
        return _channels_of_images
    return None


def _channels_of_images(module: nn.Module, ndim: int) -> range:
    """Axis 1; with another number of axes, the parameters may be broadcast differently."""
    if ndim != 4:
        raise UnsupportedError(
            f"{type(module).__name__} is known to scale the channels of images (N, C, H, W), but "
            f"took an input of {ndim} axes. Leave its parameters out by params=..."
        )
    return range(1, 2)


def _is_scale(module: nn.Module, x_shape: tuple[int, ...], view: tuple[int, ...]) -> bool:
    """Whether `y(w, b) = w n(x) + b + y(0, 0)` for random numbers, in each row alone.

    `view` is the shape in which parameters are broadcast.
    """
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(x_shape, generator=generator).to(device)
    values = [torch.randn(p.shape, generator=generator).to(device) for p in module.parameters()]
    scale, *shift = (value.view(view) for value in values)
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            at_zero = _output(module, x, [torch.zeros_like(value) for value in values])
            expected = scale * _difference(module, x) + sum(shift, at_zero)
            together, alone = _output(module, x, values), _output(module, x[:1], values)
            error = torch.maximum((together - expected).abs(), (alone - expected[:1]).abs()).max()
    except Exception:
        return False  # it is made for other inputs
    return bool(error <= 1e3 * torch.finfo(x.dtype).eps * expected.abs().max())


def _difference(module: nn.Module, x: Tensor) -> Tensor:
    """`n(x) = y(1, 0) - y(0, 0)`."""
    zeros = [torch.zeros_like(p, dtype=x.dtype) for p in module.parameters()]
    ones = [torch.ones_like(zeros[0]), *zeros[1:]]
    return _output(module, x, ones) - _output(module, x, zeros)


def _output(module: nn.Module, x: Tensor, values: list[Tensor]) -> Tensor:
    """What the module's class computes with other parameters: without hooks, without a trace."""
    bare = copy.copy(module)
    names = [name for name, _ in module.named_parameters()]
    parameters = {**module._parameters, **dict(zip(names, values, strict=True))}
    buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    vars(bare).update(_parameters=parameters, _buffers=buffers)
    output: Tensor = type(module).forward(bare, x)
    return output
