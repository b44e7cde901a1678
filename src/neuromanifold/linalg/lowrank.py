"""Low-rank symmetric positive semi-definite matrices `Σ_r λ_r u_r u_rᵀ`.

Vectors are rows, as everywhere inside the library: `U (R, P)` with orthonormal rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuromanifold.linalg import psd

__all__ = ["factorise", "nystrom"]


def factorise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of `XᵀX` for rows `X (R, P)`.

    Returns:
        Values `(r,)`, descending, and orthonormal vectors `(r, P)`, r the smaller of R and P.

    Example:
        >>> values, vectors = factorise(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))
        >>> values
        tensor([25.,  0.])
    """
    # First to a triangle: vectors of small eigenvalues are orthonormal to rounding as well.
    basis, triangle = torch.linalg.qr(rows.T)
    vectors, singular, _ = torch.linalg.svd(triangle, full_matrices=False)
    return singular.square(), (basis @ vectors).T


def nystrom(test: Tensor, image: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A low-rank matrix `Â` from the image `A Ω` of some vectors under a positive matrix A.

    `Â = A Ω (Ωᵀ A Ω)⁻¹ Ωᵀ A`, cut to its largest eigenvalues: between zero and A, so that
    `tr A − tr Â` is the sum of the absolute eigenvalues of what is missing. It is A where A has no
    more than the rank.

    Args:
        test: Ω, orthonormal rows `(S, P)`, random and independent of A.
        image: `A Ω`, rows `(S, P)`.
        rank: at most S.

    Returns:
        Eigenvalues `(rank,)`, descending, and orthonormal eigenvectors `(rank, P)`.

    Source: Tropp, Yurtsever, Udell and Cevher, arXiv 1706.05736.

    Example:
        >>> a = torch.diag(torch.tensor([4.0, 1.0, 0.0, 0.0], dtype=torch.float64))
        >>> test = torch.linalg.qr(torch.randn(4, 3, dtype=torch.float64))[0].T
        >>> values, _ = nystrom(test, test @ a, rank=2)
        >>> torch.allclose(values, a.diagonal()[:2])
        True
    """
    # A is shifted by the rounding of its image, which makes the small matrix regular; what its
    # decomposition finds below the shift is rounding. A shift ν makes eigenvalues too small by
    # about ν P / S, so the factor √P of the source is left out: in float32 it costs all digits.
    limits = torch.finfo(image.dtype)
    shift = (limits.eps * torch.linalg.vector_norm(image, dim=1).norm()).clamp(min=limits.tiny)
    shifted = torch.addcmul(image, test, shift)
    small = shifted @ test.T
    values, vectors = psd.eigh((small + small.T) / 2)
    roots = torch.maximum(values, shift).sqrt()
    found, rows = factorise((vectors.T / roots[:, None]) @ shifted)
    found = found[:rank] - shift
    return torch.where(found > shift, found, 0), rows[:rank]
