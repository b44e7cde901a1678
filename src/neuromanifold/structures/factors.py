"""The factors of a Kronecker product: what is kept of one side's second moment.

A factor is a batch over groups: `(G, n, n)`, or `(G, n)` if it is kept by, or is, its diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuromanifold.layers import Side
from neuromanifold.linalg import psd

__all__ = ["Full", "apply", "diagonal", "eigh", "nearest_product"]


@dataclass(frozen=True)
class Full:
    """The whole second moment; of a side wider than `widest`, its diagonal.

    Args:
        widest: numbers in a vector up to which the square is kept; a side of 8,192 needs 256 MiB.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, tokens = torch.nn.Linear(4, 300), torch.randn(8, 4)
        >>> structure = nm.Kronecker(outputs=nm.Full(widest=256))
        >>> F = nm.fisher(model, nm.Categorical(), tokens, structure)
        >>> F.coverage["weight"].note
        'outputs by their diagonal: 300 wide'
    """

    widest: int = 8192

    def __post_init__(self) -> None:
        if self.widest < 1:
            raise ValueError(f"widest is a number of entries, at least 1; got {self.widest}.")

    def is_diagonal(self, width: int) -> bool:
        """Whether a side of this width is kept by its diagonal."""
        return width > self.widest

    def numel(self, width: int) -> int:
        """Numbers kept for a side of this width."""
        return width if self.is_diagonal(width) else width**2

    def moment(self, side: Side, width: int, *, reduce: bool) -> Tensor:
        """`(G, n, n)` or `(G, n)`."""
        if self.is_diagonal(width):
            return side.squares(reduce=reduce)
        return side.moment(reduce=reduce)


def apply(factor: Tensor, x: Tensor, *, outputs: bool) -> Tensor:
    """Factor times one axis of vectors `(R, G, O, I)`: fan-out if `outputs`, else fan-in."""
    if factor.ndim == 2:
        return x * (factor[..., None] if outputs else factor[:, None])
    return factor @ x if outputs else x @ factor


def diagonal(factor: Tensor) -> Tensor:
    """`(G, n)`."""
    return factor if factor.ndim == 2 else factor.diagonal(dim1=1, dim2=2)


def full(factor: Tensor) -> Tensor:
    """`(G, n, n)`."""
    return torch.diag_embed(factor) if factor.ndim == 2 else factor


def eigh(factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues `(G, n)`, and eigenvectors `(G, n, n)` as columns; None for unit vectors."""
    return (factor, None) if factor.ndim == 2 else psd.eigh(factor)


def nearest_product(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The Kronecker product nearest to `Σ_r B_r ⊗ A_r` in Frobenius norm, group by group.

    Rearranged, the sum is a matrix of rank at most R, whose best approximation of rank one lies in
    the span of the terms (Van Loan and Pitsianis, 1993). Inner products of positive semi-definite
    matrices are not negative, so the coefficients are not either (Perron), and the factors are
    positive semi-definite.

    Args:
        outputs: R factors B.
        inputs: R factors A.

    Returns:
        B and A.
    """
    if len(outputs) == 1:
        return outputs[0], inputs[0]
    b, a = _stacked(outputs), _stacked(inputs)
    gram_b, gram_a = _gram(b), _gram(a)  # (G, R, R)
    # The coefficients are the leading eigenvector of gram_a gram_b, which is not symmetric.
    values, vectors = psd.eigh(gram_b)
    root = vectors * psd.square_root(values)[:, None] @ vectors.mT
    leading = psd.eigh(root @ gram_a @ root)[1][..., -1:]
    coefficients = (gram_a @ root @ leading).abs()
    of_inputs = gram_b @ coefficients
    norm = (coefficients.mT @ of_inputs).squeeze(-1)  # (G, 1), squared norm of B
    of_inputs = of_inputs / torch.where(norm > 0, norm, 1)[..., None]
    return _combination(coefficients, b), _combination(of_inputs, a)


def _stacked(factors: Sequence[Tensor]) -> Tensor:
    """`(R, G, ...)`, all of one kind."""
    if len({factor.ndim for factor in factors}) > 1:
        factors = [full(factor) for factor in factors]
    return torch.stack(list(factors))


def _gram(factors: Tensor) -> Tensor:
    rows = factors.flatten(2).transpose(0, 1)
    return rows @ rows.mT


def _combination(coefficients: Tensor, factors: Tensor) -> Tensor:
    """`(G, R, 1)` times `(R, G, ...)`."""
    rows = factors.flatten(2).transpose(0, 1)  # (G, R, n·n)
    return (coefficients.mT @ rows).reshape(factors.shape[1:])
