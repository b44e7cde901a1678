"""The factors of a Kronecker product: what is kept of one side's second moment.

A factor is a batch over groups: `(G, n, n)`, or `(G, n)` if it is kept by, or is, its diagonal; or
a projection.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuromanifold.layers import Side
from neuromanifold.linalg import memory, psd
from neuromanifold.linalg.projection import Projection

__all__ = [
    "Factor",
    "Full",
    "Projected",
    "RecursiveInverse",
    "apply",
    "diagonal",
    "eigh",
    "nearest_product",
]


class Factor(ABC):
    """What is kept of one side's second moment."""

    widest: int

    def is_diagonal(self, width: int) -> bool:
        """Whether a side of this width is kept by its diagonal."""
        return width > self.widest

    def directions(self, width: int) -> int | None:
        """How many directions of a side are kept apart, at most; None if it is kept otherwise."""
        return None

    def numel(self, width: int) -> int:
        """Numbers kept for a side of this width."""
        if self.is_diagonal(width):
            return width
        rank = self.directions(width)
        return width**2 if rank is None else (width + 1) * rank + 1

    def moment(self, side: Side, width: int, *, reduce: bool) -> Tensor:
        """`(G, n, n)` or `(G, n)`."""
        if self.is_diagonal(width):
            return side.squares(reduce=reduce)
        return side.moment(reduce=reduce)

    def kept(self, moment: Tensor | Projection) -> Tensor | Projection:
        """What is kept of a moment, or of a projection that was found with all directions."""
        return moment


@dataclass(frozen=True)
class Full(Factor):
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
        _check_at_least_one(widest=self.widest)


@dataclass(frozen=True)
class Projected(Factor):
    """Some directions with their eigenvalues, and the mean of the others in all other directions.

    `M ≈ U diag(s) Uᵀ + μ (1 − U Uᵀ)` has the trace of M, and is positive where the damping or μ is.
    A product takes `2 n k` multiplications in place of `n²`, so a side is kept whole where k is not
    below half its width.

    Args:
        rank: number of directions, or their share of the width if below 1.
        energy: if below 1, as few of these directions as hold this share of the trace.
        max_bytes: instead of the rank, what the directions of one side may take in float32, e.g.
            "4 MiB".
        narrowest: sides with fewer numbers are kept whole.
        widest: of a side with more numbers, its diagonal is kept.

    Source: papers.md §4.5.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(200, 3), torch.randn(64, 200)
        >>> structure = nm.Kronecker(inputs=nm.Projected(20))
        >>> F = nm.fisher(model, nm.Categorical(), x, structure)
        >>> F.coverage["weight"].note
        'inputs by 20 of 201 directions'
    """

    rank: float = 0.125
    energy: float = 1.0
    max_bytes: int | str | None = None
    narrowest: int = 64
    widest: int = 8192

    def __post_init__(self) -> None:
        _check_at_least_one(narrowest=self.narrowest, widest=self.widest)
        if not (0 < self.rank < 1 or self.rank == int(self.rank) >= 1):
            raise ValueError(
                f"rank is a number of directions, or a share of the width between 0 and 1; "
                f"got {self.rank!r}."
            )
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy is a share of the trace, in (0, 1]; got {self.energy!r}.")
        if self.max_bytes is not None:
            memory.parse(self.max_bytes)

    def kept(self, moment: Tensor | Projection) -> Tensor | Projection:
        """Its largest eigenvalues, where that saves anything."""
        if not isinstance(moment, Projection):
            rank = None if moment.ndim == 2 else self.directions(moment.shape[-1])
            if rank is None:
                return moment
            moment = Projection.of(moment, rank)
        return moment.cut(self.energy)

    def directions(self, width: int) -> int | None:
        """The rank, where it saves anything."""
        if width < self.narrowest or self.is_diagonal(width):
            return None
        if self.max_bytes is not None:
            rank = memory.parse(self.max_bytes) // (4 * width)
        else:
            rank = int(self.rank * width) if self.rank < 1 else int(self.rank)
        rank = max(rank, 1)
        return rank if 2 * rank < width else None


@dataclass(frozen=True)
class RecursiveInverse(Projected):
    """`Projected`, with an inverse that follows each measurement.

    In an optimizer, each measurement corrects the inverse of the projected factor by its rows, so
    that steps need not wait for the next inversion, in which the directions are renewed and the
    inverse is made anew: the schedule of inversions is the longest that it is only corrected. The
    factors of shared weights, and of `energy` below 1, wait. Elsewhere it is `Projected`.

    Args:
        rows: of a measurement that a correction takes, at most: a random part of them, scaled to
            stand for all. Where the rank is not larger than that and the directions whose damping
            is restored, the inverse is made anew instead, which is cheaper.
        tolerance: on the relative residual for a random vector; beyond it the inverse is made anew.
            Where all rows are taken, it is rounding; where a part of them is, it is mostly beyond.
            The damping of each direction, which rises and falls by a third at most, is part of
            what is inverted.
    """

    rows: int = 128
    tolerance: float = 2e-3


def _check_at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} is a number of entries, at least 1; got {number}.")


def apply(factor: Tensor | Projection, x: Tensor, *, outputs: bool) -> Tensor:
    """Factor times one axis of vectors `(R, G, O, I)`: fan-out if `outputs`, else fan-in."""
    if isinstance(factor, Projection):
        return factor.matmul(x) if outputs else factor.matmul(x.mT).mT
    if factor.ndim == 2:
        return x * (factor[..., None] if outputs else factor[:, None])
    return factor @ x if outputs else x @ factor


def diagonal(factor: Tensor | Projection) -> Tensor:
    """`(G, n)`."""
    if isinstance(factor, Projection):
        return factor.diagonal()
    return factor if factor.ndim == 2 else factor.diagonal(dim1=1, dim2=2)


def full(factor: Tensor | Projection) -> Tensor:
    """`(G, n, n)`."""
    if isinstance(factor, Projection):
        return factor.dense()
    return torch.diag_embed(factor) if factor.ndim == 2 else factor


def whole(factor: Tensor | Projection) -> Tensor:
    """As one tensor."""
    return factor.dense() if isinstance(factor, Projection) else factor


def submatrix(factor: Tensor, indices: Sequence[int]) -> Tensor:
    """Some rows and columns of `(G, n, n)`, or of the diagonal `(G, n)`."""
    keep = torch.tensor(indices, device=factor.device)
    return factor[:, keep] if factor.ndim == 2 else factor[:, keep[:, None], keep]


def joined(parts: Sequence[Tensor | Projection]) -> Tensor | Projection:
    """Along the groups."""
    if len(parts) == 1:
        return parts[0]
    projections = [part for part in parts if isinstance(part, Projection)]
    if len(projections) < len(parts):
        return torch.cat([whole(part) for part in parts])
    return Projection(
        torch.cat([part.values for part in projections]),
        torch.cat([part.vectors for part in projections]),
        torch.cat([part.rest for part in projections]),
    )


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
