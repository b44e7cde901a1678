"""Layers that scale and shift each unit: normalisation, layer scale, PReLU.

Their output is affine in the parameters, `y_d = w_d n_d(x) + b_d + c_d(x)`, so the gradient of a
sample is `Σ_t g_td n_d(x_t)` for a scale and `Σ_t g_td` for a shift. What n is matters to nobody
else: mean and variance are functions of the input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from neuromanifold.errors import UnsupportedError
from neuromanifold.layers._base import ElementwiseRule, register
from neuromanifold.linalg import Block, Slot

__all__ = ["Axes", "ScaleRule"]

Axes: TypeAlias = Callable[[nn.Module, int], range]
"""`(module, ndim) ->` which axes of its input are units; the others, but axis 0, are positions."""


class ScaleRule(ElementwiseRule):
    """`y_d = w_d n_d(x) + b_d`: one scale and one shift for each unit d, a group of its own.

    Args:
        name: what the coverage table calls this rule.
        factor: `(module, x) -> n(x)`, shaped like the output.
        axes: where the units are.
        parameters: local names of scale and shift.
    """

    def __init__(
        self,
        name: str,
        factor: Callable[[nn.Module, Tensor], Tensor],
        axes: Axes,
        parameters: tuple[str, str] = ("weight", "bias"),
    ) -> None:
        self.name = name
        self._factor = factor
        self._axes = axes
        self._parameters = parameters

    def block(self, module: nn.Module, name: str, trainable: frozenset[str]) -> Block:
        """A group for each unit, `(D, 1, 2)`."""
        prefix = f"{name}." if name else ""
        local = [parameter for parameter in self._parameters if parameter in trainable]
        units = getattr(module, local[0]).numel() if local else 0
        slots = tuple(Slot.plain(prefix + parameter, units, 1, 1) for parameter in local)
        return Block(name, units, 1, slots, biased=self._parameters[1] in local)

    def gradients(self, module: nn.Module, x: Tensor | None, g: Tensor, block: Block) -> Tensor:
        """`(V, D, rows, 1, I)`."""
        units = self._axes(module, g.ndim - 1)
        columns = [] if x is None else [_over_positions(g * self._factor(module, x), units)]
        if block.biased:
            columns.append(_over_positions(g, units))
        return torch.stack(columns, dim=-1).transpose(1, 2).unsqueeze(3)


def _over_positions(z: Tensor, units: range) -> Tensor:
    """Sum `(V, rows, ...)` over positions, and join the axes of units to one: `(V, rows, D)`."""
    positions = [1 + axis for axis in range(1, z.ndim - 1) if axis not in units]
    summed = z.sum(dim=positions) if positions else z
    return summed.flatten(2) if len(units) else summed.unsqueeze(2)


def _channels(_: nn.Module, ndim: int) -> range:  # noqa: ARG001
    """Axis 1, behind the samples."""
    return range(1, 2)


def _normalised_axes(module: nn.Module, ndim: int) -> range:
    """The last ones."""
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    first = ndim - len(module.normalized_shape)
    if first < 1:
        raise UnsupportedError(
            f"{module} took an input of {ndim} axes, so that it normalises over the samples, which "
            f"couples them. Give it {ndim + 1 - first} axes at least, the samples first."
        )
    return range(first, ndim)


def _layer_norm(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, nn.LayerNorm)
    return F.layer_norm(x, module.normalized_shape, eps=module.eps)


def _rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, nn.RMSNorm)
    eps = module.eps
    if eps is None:  # the rounding of what the layer computes in, perhaps not that of statistics
        eps = torch.finfo(torch.promote_types(module.weight.dtype, torch.float32)).eps
    return F.rms_norm(x, module.normalized_shape, eps=eps)


def _group_norm(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, nn.GroupNorm)
    return F.group_norm(x, module.num_groups, eps=module.eps)


def _batch_norm(module: nn.Module, x: Tensor) -> Tensor:
    """By running statistics: those of a batch couple the samples, and a plan refuses them."""
    assert isinstance(module, _BatchNorm)
    assert not module.training
    return F.batch_norm(x, *_running_statistics(module, x), eps=module.eps)


def _instance_norm(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, _InstanceNorm)
    if module.training or not module.track_running_stats:
        return F.instance_norm(x, eps=module.eps)
    mean, var = _running_statistics(module, x)
    return F.instance_norm(x, mean, var, use_input_stats=False, eps=module.eps)


def _running_statistics(module: _NormBase, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance `(C,)`."""
    assert module.running_mean is not None
    assert module.running_var is not None
    return module.running_mean.to(x.dtype), module.running_var.to(x.dtype)


def _instance_channels(module: nn.Module, ndim: int) -> range:
    """Axis 1, if the first is samples."""
    assert isinstance(module, _InstanceNorm)
    if ndim == module._get_no_batch_dim():
        raise UnsupportedError(
            f"{type(module).__name__} takes an input of {ndim} axes for one sample without a batch "
            f"axis, so that the rows of the batch became its channels. Give it {ndim + 1} axes: "
            f"samples, channels, positions."
        )
    return range(1, 2)


def _negative_part(_: nn.Module, x: Tensor) -> Tensor:
    return x.clamp(max=0)


def _slopes(module: nn.Module, ndim: int) -> range:  # noqa: ARG001
    """A slope for each channel, or one for all."""
    assert isinstance(module, nn.PReLU)
    return range(1, 2) if module.num_parameters > 1 else range(0)


register(nn.LayerNorm, ScaleRule("norm", _layer_norm, _normalised_axes))
register(nn.RMSNorm, ScaleRule("norm", _rms_norm, _normalised_axes))
register(nn.GroupNorm, ScaleRule("norm", _group_norm, _channels))
for _batch_type in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
    register(_batch_type, ScaleRule("norm", _batch_norm, _channels))
for _instance_type in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d):
    register(_instance_type, ScaleRule("norm", _instance_norm, _instance_channels))
register(nn.PReLU, ScaleRule("prelu", _negative_part, _slopes))
