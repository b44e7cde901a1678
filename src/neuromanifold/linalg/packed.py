"""Symmetric matrices in half the memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["WORTH_IT", "pack", "unpack"]

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
    numbers = packed.shape[-1]
    m = math.isqrt(numbers // 2)  # 2 m² numbers for n = 2 m − 1, 2 m² + m for n = 2 m
    n = 2 * m if numbers > 2 * m * m else 2 * m - 1
    rectangle = packed[..., : m * (m + 1)].unflatten(-1, (m, m + 1))
    cross = packed[..., m * (m + 1) :].unflatten(-1, (n - m, m)) if n > m else None
    out = packed.new_empty(*packed.shape[:-1], n, n)
    first = rectangle[..., :m].tril()
    out[..., :m, :m] = first + first.tril(-1).mT
    if cross is not None:
        last = rectangle[..., : n - m, 1 : n - m + 1].triu()
        out[..., m:, m:] = last + last.triu(1).mT
        out[..., m:, :m] = cross
        out[..., :m, m:] = cross.mT
    return out
