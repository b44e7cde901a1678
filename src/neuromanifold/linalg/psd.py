"""Symmetric positive semi-definite matrices, in batches `(..., n, n)`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from neuromanifold.errors import NotPositiveDefiniteError

__all__ = [
    "Function",
    "aligned_empty",
    "cholesky",
    "eigenvalues",
    "eigh",
    "inverse",
    "inverse_square_root",
    "mirrored",
    "product",
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
    shifted, shift = _shifted(matrix)
    values, vectors = torch.linalg.eigh(shifted)
    return (values - shift).clamp(min=0), vectors


def eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues in ascending order, rounding below zero taken as zero."""
    shifted, shift = _shifted(matrix)
    return (torch.linalg.eigvalsh(shifted) - shift).clamp(min=0)


def _shifted(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix plus rounding on its diagonal, `(..., n, n)`, and how much that is, `(..., 1)`.

    Where many eigenvalues are zero, as with inputs or units that are never active, LAPACK in
    float32 may not converge, or return NaN without an error.
    """
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    shift = torch.finfo(matrix.dtype).eps * diagonal.sum(dim=-1, keepdim=True)
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(shift)
    return shifted, shift


def cholesky(matrix: Tensor, damping: float | Tensor) -> Tensor:
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


def inverse(matrices: Tensor, damping: float | Tensor) -> Tensor:
    """`(M + damping)⁻¹` for a batch `(B, n, n)`, by Cholesky; by eigenvalues where that fails.

    Args:
        matrices: positive semi-definite, but for rounding.
        damping: positive; a number, or `(B, 1)`.
    """
    shifted = matrices.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(damping)
    inverse, failed = _definite_inverse(shifted)
    if bool(failed.any()):
        values, vectors = torch.linalg.eigh(shifted)
        # Rounding below the damping: the matrix is positive semi-definite.
        floor = torch.as_tensor(damping, dtype=values.dtype, device=values.device)
        inverse = (vectors / torch.maximum(values, floor)[:, None]) @ vectors.mT
    return inverse


def _definite_inverse(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """`M⁻¹` of a batch `(B, n, n)`, and which of them are not positive definite, `(B,)`.

    LAPACK takes matrices one by one, and most of its time goes to calls if they are small: where
    there are many, all but small corners is products of whole batches, by Schur complements.
    """
    batch, n, _ = matrices.shape
    if batch < _MANY or n <= _CORNER:
        factor, failed = torch.linalg.cholesky_ex(matrices)
        return torch.cholesky_inverse(factor), failed != 0
    m = n // 2
    first, cross = matrices[:, :m, :m], matrices[:, m:, :m]
    of_first, failed = _definite_inverse(first)
    along = cross @ of_first
    of_rest, failed_too = _definite_inverse(matrices[:, m:, m:] - along @ cross.mT)
    out = torch.empty_like(matrices)
    out[:, m:, m:] = of_rest
    out[:, m:, :m] = (of_rest @ along).neg_()
    out[:, :m, m:] = out[:, m:, :m].mT
    out[:, :m, :m] = of_first - along.mT @ out[:, m:, :m]
    return out, failed | failed_too


def aligned_empty(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised, with rows that start on cache lines: BLAS writes such a view faster."""
    width = -(-shape[-1] // _ALIGNMENT) * _ALIGNMENT
    return like.new_empty(*shape[:-1], width)[..., : shape[-1]]


def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """`left @ right` for batches of matrices, written into a strided view without a copy.

    `torch.bmm` goes through a temporary when `out` is strided; `torch.mm` does not.
    """
    if len(out) == 1:
        torch.mm(left[0], right[0], out=out[0])
    else:
        out.copy_(left @ right)
    return out


def second_moment(x: Tensor, out: Tensor | None = None) -> Tensor:
    """`xᵀ x` for `x (B, M, n)`, written into `out (B, n, n)` if given.

    Only blocks on and above the diagonal are multiplied: up to half the work, since BLAS as torch
    calls it does not use the symmetry.
    """
    batch, _, n = x.shape
    if out is None:
        out = x.new_empty(batch, n, n)
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        product(x[..., start:stop].mT, x[..., start:], out[:, start:stop, start:])
        if stop < n:
            out[:, stop:, start:stop] = out[:, start:stop, stop:].mT
    return out


def mirrored(matrix: Tensor) -> Tensor:
    """A symmetric matrix `(n, n)` of what is above its diagonal, in place."""
    n = len(matrix)
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        own = matrix[start:stop, start:stop]
        own.copy_(own.triu() + own.triu(1).T)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
    return matrix


_BLOCK = 128
_MANY = 32
"""Matrices in a batch from which on LAPACK is kept to corners."""
_CORNER = 24
"""Their width."""
_ALIGNMENT = 16
