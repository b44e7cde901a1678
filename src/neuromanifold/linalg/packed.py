"""Symmetric matrices in half the memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neuromanifold.linalg import psd

__all__ = ["WORTH_IT", "pack", "product", "unpack"]

WORTH_IT = 128
"""Width from which on the memory saved is worth the time."""


def pack(matrices: Tensor) -> Tensor:
    """The n (n + 1)/2 numbers that differ, and up to n/2 more, of symmetric `(..., n, n)`.

    With the matrix in four blocks, the lower triangle of the first and the upper triangle of the
    last fill one rectangle; of the two others one is kept.

    Returns:
        `(..., numbers)`, which sums and multiples may be taken of.

    Example:
        >>> import torch
        >>> x = torch.randn(3, 5)
        >>> torch.equal(unpack(pack(x @ x.T)), x @ x.T)
        True
    """
    n = matrices.shape[-1]
    m = (n + 1) // 2
    rectangle = matrices.new_zeros(*matrices.shape[:-2], m, m + 1)
    rectangle[..., :m] += matrices[..., :m, :m].tril()
    rectangle[..., : n - m, 1 : n - m + 1] += matrices[..., m:, m:].triu()
    return torch.cat([rectangle.flatten(-2), matrices[..., m:, :m].flatten(-2)], dim=-1)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    first, cross, last = _blocks(packed)
    m = first.shape[-1]
    n = m + last.shape[-1]
    out = packed.new_empty(*packed.shape[:-1], n, n)
    out[..., :m, :m] = first
    out[..., m:, m:] = last
    out[..., m:, :m] = cross
    out[..., :m, m:] = cross.mT
    return out


def product(packed: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Matrices `(B, n, n)` that are packed times `x (B, n, k)`, written into `out`.

    By blocks, of which those on the diagonal alone are put together.
    """
    first, cross, last = _blocks(packed)
    m = first.shape[-1]
    psd.product(first, x[:, :m], out[:, :m]).baddbmm_(cross.mT, x[:, m:])
    psd.product(last, x[:, m:], out[:, m:]).baddbmm_(cross, x[:, :m])
    return out


def _blocks(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first, the one below it, and the last."""
    numbers = packed.shape[-1]
    m = math.isqrt(numbers // 2)  # 2 m² numbers for n = 2 m − 1, 2 m² + m for n = 2 m
    rest = m if numbers > 2 * m * m else m - 1
    rectangle, cross = packed.split_with_sizes([m * (m + 1), rest * m], dim=-1)
    rectangle = rectangle.unflatten(-1, (m, m + 1))
    first, last = rectangle[..., :m], rectangle[..., :rest, 1 : rest + 1]
    lower = torch.ones(m, m, dtype=torch.bool, device=packed.device).tril_()
    return (
        torch.where(lower, first, first.mT),
        cross.reshape(*packed.shape[:-1], rest, m),
        torch.where(lower[:rest, :rest], last.mT, last),
    )
