"""Convolutions in one, two and three dimensions: every output position is a linear layer's use."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuromanifold.errors import UnsupportedError
from neuromanifold.layers._base import WeightRule, register
from neuromanifold.layers.parts import Factored
from neuromanifold.layers.record import Call
from neuromanifold.linalg import Block

__all__ = ["ConvRule", "ConvTransposeRule"]

Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
ConvTranspose: TypeAlias = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class ConvRule(WeightRule):
    """`s_t = W a_t + b` at every output position t, per group; `a_t` the patch under the kernel."""

    name = "convolution"

    def block(self, module: nn.Module, name: str, trainable: frozenset[str]) -> Block:
        """`weight (G·O, C_in/G, *k)` and `bias (G·O,)`; fan-in is channel-major, then kernel."""
        assert isinstance(module, Conv)
        fan_out = module.out_channels // module.groups
        fan_in = math.prod(module.weight.shape[1:])
        return Block.of_layer(name, module.groups, fan_out, fan_in, trainable)

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """`(rows, C, *spatial)` to patches `(G, rows, T, C/G·∏k)`."""
        assert isinstance(module, Conv)
        _require_samples(module, x.ndim)
        padding = _padding(module)
        if any(padding):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x = F.pad(x, padding, mode=mode)
        return _patches(x, module, module.stride)

    def cotangents(self, module: nn.Module, g: Tensor) -> Tensor:
        """`(V, rows, G·O, *out)` to `(V, G, rows, T, O)`."""
        assert isinstance(module, Conv)
        _require_samples(module, g.ndim - 1)
        return _by_group(g, module.groups)


class ConvTransposeRule(WeightRule):
    """The same for transposed convolutions: `a_t` are the inputs that reach output position t.

    They lie under the mirrored kernel once the input's entries are `stride` apart, zeros between.
    The input is mirrored instead, so that positions run from the last to the first.
    """

    name = "transposed convolution"

    def block(self, module: nn.Module, name: str, trainable: frozenset[str]) -> Block:
        """`weight (C_in, O, *k)` and `bias (G·O,)`; fan-in is channel-major, then kernel."""
        assert isinstance(module, ConvTranspose)
        groups, kernel = module.groups, math.prod(module.kernel_size)
        channels, fan_out = module.in_channels // groups, module.out_channels // groups
        block = Block.of_layer(name, groups, fan_out, channels * kernel, trainable)
        if "weight" not in trainable:
            return block
        view = (groups, channels, fan_out, kernel)
        weight = replace(block.slots[0], view=view, order=(0, 2, 1, 3))
        return replace(block, slots=(weight, *block.slots[1:]))

    def part(
        self, block: Block, calls: tuple[Call, ...], num_samples: int, dtype: torch.dtype
    ) -> Factored:
        """Calls side by side along T, their inputs spread out to what the output's size needs."""
        spread = tuple(
            replace(call, x=_spread(call.x, call.port.module, call.g.shape[3:]))
            if call.x is not None
            else call
            for call in calls
        )
        return super().part(block, spread, num_samples, dtype)

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """Inputs `(rows, C, *spatial)`, spread out, to patches `(G, rows, T, C/G·∏k)`."""
        assert isinstance(module, ConvTranspose)
        _require_samples(module, x.ndim)
        return _patches(x, module, (1,) * len(module.kernel_size))

    def cotangents(self, module: nn.Module, g: Tensor) -> Tensor:
        """`(V, rows, G·O, *out)` to `(V, G, rows, T, O)`, the last position first."""
        assert isinstance(module, ConvTranspose)
        _require_samples(module, g.ndim - 1)
        return _by_group(g, module.groups).flip(3)


def _require_samples(module: Conv | ConvTranspose, ndim: int) -> None:
    expected = 2 + len(module.kernel_size)
    if ndim < expected:
        raise UnsupportedError(
            f"{type(module).__name__} takes an input of {ndim} axes for one sample without a batch "
            f"axis, so that the rows of the batch became its channels. Give it {expected} axes: "
            f"samples, channels, positions."
        )


def _by_group(g: Tensor, groups: int) -> Tensor:
    """`(V, rows, G·O, *out)` to `(V, G, rows, T, O)`."""
    return g.flatten(3).unflatten(2, (groups, -1)).permute(0, 2, 1, 4, 3)


def _padding(module: Conv) -> list[int]:
    """Padding as F.pad takes it: last axis first, both ends of each."""
    if module.padding_mode != "zeros":
        return list(module._reversed_padding_repeated_twice)  # what the forward pass takes, too
    # As the forward pass reads it: it may have been changed after the module was built.
    if module.padding == "same":
        kernels = zip(module.kernel_size, module.dilation, strict=True)
        totals = [dilation * (kernel - 1) for kernel, dilation in kernels]
        return [end for total in reversed(totals) for end in (total // 2, total - total // 2)]
    sizes = () if isinstance(module.padding, str) else module.padding  # "valid" is none
    return [size for size in reversed(sizes) for _ in range(2)]


def _spread(x: Tensor, module: nn.Module, out: torch.Size) -> Tensor:
    """Mirrored inputs, `stride` apart, with the zeros that every output position needs around."""
    assert isinstance(module, ConvTranspose)
    x = F.pad(x, (0, 1) * len(out))  # zeros at index L of each axis
    for axis, size in enumerate(out, start=2):
        i = axis - 2
        reach = module.dilation[i] * (module.kernel_size[i] - 1)
        # Input q is seen first by output position q · stride - padding.
        padding, stride, last = int(module.padding[i]), module.stride[i], x.shape[axis] - 1
        at = torch.arange(size - 1, -reach - 1, -1, device=x.device) + padding
        source = at.div(stride, rounding_mode="floor")
        inside = (at % stride == 0) & (source >= 0) & (source < last)
        x = x.index_select(axis, torch.where(inside, source, last))
    return x


def _patches(x: Tensor, module: Conv | ConvTranspose, stride: tuple[int, ...]) -> Tensor:
    """Patches of a padded input under the kernel, `(G, rows, T, C/G·∏k)`.

    In memory positions are last: rows of an image are longer than those of a kernel to copy.
    """
    sizes, strides = list(x.shape[:2]), list(x.stride()[:2])
    kernel_sizes, kernel_strides = [], []
    for axis, (k, step, gap) in enumerate(
        zip(module.kernel_size, stride, module.dilation, strict=True), start=2
    ):
        sizes.append((x.shape[axis] - gap * (k - 1) - 1) // step + 1)
        strides.append(x.stride(axis) * step)
        kernel_sizes.append(k)
        kernel_strides.append(x.stride(axis) * gap)
    patches = x.as_strided(sizes + kernel_sizes, strides + kernel_strides, x.storage_offset())
    # (rows, G, C/G, *out, *k) -> (G, C/G, *k, rows, *out)
    d = len(stride)
    out, kernel = range(3, 3 + d), range(3 + d, 3 + 2 * d)
    patches = patches.unflatten(1, (module.groups, -1)).permute(1, 2, *kernel, 0, *out)
    return patches.reshape(module.groups, -1, len(x), math.prod(sizes[2:])).permute(0, 2, 3, 1)


for _module_type in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register(_module_type, ConvRule())
for _transposed_type in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register(_transposed_type, ConvTransposeRule())
