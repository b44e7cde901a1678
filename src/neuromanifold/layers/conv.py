"""Convolutions in one, two and three dimensions: every output position is a linear layer's use."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from neuromanifold.layers._base import LayerRule, register
from neuromanifold.linalg import Block

__all__ = ["ConvRule"]

Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d


class ConvRule(LayerRule):
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
        padding = _padding(module)
        if any(padding):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x = F.pad(x, padding, mode=mode)
        patches = _patches(x, module).unflatten(1, (module.groups, -1))
        # (rows, G, C/G, *out, *k) -> (G, rows, *out, C/G, *k)
        d = len(module.kernel_size)
        out, kernel = range(3, 3 + d), range(3 + d, 3 + 2 * d)
        patches = patches.permute(1, 0, *out, 2, *kernel)
        positions = math.prod(patches.shape[2 : 2 + d])
        return patches.reshape(module.groups, x.shape[0], positions, -1)

    def cotangents(self, module: nn.Module, g: Tensor) -> Tensor:
        """`(V, rows, G·O, *out)` to `(V, G, rows, T, O)`."""
        assert isinstance(module, Conv)
        g = g.flatten(3).unflatten(2, (module.groups, -1))  # (V, rows, G, O, T)
        return g.permute(0, 2, 1, 4, 3)


def _padding(module: Conv) -> list[int]:
    """Padding as F.pad takes it: last axis first, both ends of each."""
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        # As the forward pass reads it: it may have been changed after the module was built.
        return [size for size in reversed(module.padding) for _ in range(2)]
    # The module keeps "same", and the padding of other modes, resolved.
    return list(module._reversed_padding_repeated_twice)


def _patches(x: Tensor, module: Conv) -> Tensor:
    """Patches under the kernel as a view `(rows, C, *out, *k)` of a padded input: no copy."""
    sizes, strides = list(x.shape[:2]), list(x.stride()[:2])
    kernel_sizes, kernel_strides = [], []
    for axis, (k, step, gap) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        sizes.append((x.shape[axis] - gap * (k - 1) - 1) // step + 1)
        strides.append(x.stride(axis) * step)
        kernel_sizes.append(k)
        kernel_strides.append(x.stride(axis) * gap)
    return x.as_strided(sizes + kernel_sizes, strides + kernel_strides, x.storage_offset())


for _module_type in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register(_module_type, ConvRule())
