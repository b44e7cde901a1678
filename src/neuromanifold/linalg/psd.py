"""Symmetric positive semi-definite matrices, in batches `(..., n, n)`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from neuromanifold.errors import NotPositiveDefiniteError

__all__ = [
    "Function",
    "cholesky",
    "eigenvalues",
    "eigh",
    "inverse_square_root",
    "second_moment",
    "square_root",
]

Function = Callable[[Tensor], Tensor]
"""Acts on eigenvalues, elementwise."""


def square_root(eigenvalues: Tensor) -> Tensor:
    """λ ↦ √λ, with rounding below zero taken as zero."""
    return eigenvalues.clamp(min=0).sqrt()


def inverse_square_root(damping: float) -> Function:
    """λ ↦ 1/√(λ + damping)."""
    return lambda eigenvalues: (eigenvalues.clamp(min=0) + damping).rsqrt()


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending, rounding below zero taken as zero) and eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp(min=0), vectors


def eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues in ascending order, rounding below zero taken as zero."""
    return torch.linalg.eigvalsh(matrix).clamp(min=0)


def cholesky(matrix: Tensor, damping: float) -> Tensor:
    """Lower Cholesky factor of `matrix + damping · I`.

    Raises:
        NotPositiveDefiniteError: If the sum is singular to working precision.
    """
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(damping)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if bool(info.any()):
        raise NotPositiveDefiniteError(
            f"The Fisher matrix plus damping {damping:g} is not positive definite to working "
            f"precision ({matrix.dtype}). Use a larger damping: about "
            f"{matrix.shape[-1] * torch.finfo(matrix.dtype).eps:.0e} times the largest eigenvalue "
            f"is the least that this precision can see."
        )
    return factor


def second_moment(x: Tensor) -> Tensor:
    """`xᵀ x` for `x (..., M, n)`.

    Only blocks on and above the diagonal are multiplied: up to half the work, since BLAS as torch
    calls it does not use the symmetry.
    """
    n = x.shape[-1]
    if n < 2 * _BLOCK:
        return x.mT @ x
    out = x.new_empty(*x.shape[:-2], n, n)
    for start in range(0, n, _BLOCK):
        part = x[..., start : start + _BLOCK].mT @ x[..., start:]
        out[..., start : start + _BLOCK, start:] = part
        out[..., start:, start : start + _BLOCK] = part.mT
    return out


_BLOCK = 128
