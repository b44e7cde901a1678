"""Symmetric matrices with some directions kept apart, and one number for all the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuromanifold.linalg import lowrank, psd

__all__ = ["Projection"]


@dataclass(frozen=True)
class Projection:
    """`U diag(s) Uᵀ + μ (1 − U Uᵀ)`, for a batch of G matrices of width n.

    Attributes:
        values: s `(G, k)`, the largest first; or a symmetric matrix along U `(G, k, k)` in place of
            `diag(s)`, which only products are taken with.
        vectors: U `(G, n, k)`, orthonormal columns.
        rest: μ `(G,)`.
    """

    values: Tensor
    vectors: Tensor
    rest: Tensor

    @classmethod
    def of(cls, moment: Tensor, rank: int) -> Projection:
        """The nearest one to a matrix: its largest eigenvalues, the mean of the rest.

        Args:
            moment: positive semi-definite `(G, n, n)`.
            rank: k.
        """
        values, vectors = psd.eigh(moment)  # ascending
        trace = moment.diagonal(dim1=-2, dim2=-1).sum(-1)
        found = values[:, -rank:].flip(-1), vectors[..., -rank:].flip(-1)
        return cls.completed(*found, trace)

    @classmethod
    def of_image(cls, test: Tensor, image: Tensor, trace: Tensor) -> Projection:
        """From the images of k directions alone: what they say about M in a single look.

        Args:
            test: orthonormal columns Ω `(G, n, k)`.
            image: `M Ω`.
            trace: of M, `(G,)`.
        """
        found = [
            lowrank.nystrom(omega.mT, y.mT, omega.shape[-1])
            for omega, y in zip(test, image, strict=True)
        ]
        values, rows = (torch.stack(parts) for parts in zip(*found, strict=True))
        return cls.completed(values, rows.mT.contiguous(), trace)

    @classmethod
    def turned(cls, directions: Tensor, image: Tensor, trace: Tensor) -> Projection:
        """From the images of k directions that have been followed: turned to where M is large.

        That is a step of subspace iteration. M is taken to be what was seen along the directions,
        and μ along all others: where new directions leave the old ones, `of_image` would be too
        small again and again (papers.md §4.5, rebase).

        Args:
            directions: orthonormal columns U `(G, n, k)`.
            image: `M U`.
            trace: of M, `(G,)`.
        """
        width, rank = directions.shape[-2:]
        moment = directions.mT @ image
        held = moment.diagonal(dim1=-2, dim2=-1).sum(-1)
        rest = ((trace - held).clamp(min=0) / max(width - rank, 1))[:, None, None]
        # Where the image is zero, the old directions stay.
        rounding = torch.finfo(image.dtype).eps * trace[:, None, None]
        basis = torch.linalg.qr(image + rounding * directions)[0]
        cosines = basis.mT @ directions
        eye = torch.eye(rank, dtype=image.dtype, device=image.device)
        along = cosines @ ((moment + moment.mT) / 2 - rest * eye) @ cosines.mT + rest * eye
        values, vectors = psd.eigh((along + along.mT) / 2)
        return cls.completed(values.flip(-1), (basis @ vectors.flip(-1)).contiguous(), trace)

    @classmethod
    def completed(cls, values: Tensor, vectors: Tensor, trace: Tensor) -> Projection:
        """With what is missing of the trace spread evenly over the other directions.

        Of all numbers, their mean eigenvalue is nearest in Frobenius norm.
        """
        others = vectors.shape[-2] - vectors.shape[-1]
        rest = (trace - values.sum(-1)).clamp(min=0) / max(others, 1)
        return cls(values, vectors, rest)

    def cut(self, energy: float) -> Projection:
        """With as few directions as hold a share of the trace, in all of the batch."""
        if energy >= 1:
            return self
        trace = self.trace()[:, None]
        held = self.values.cumsum(-1) / trace.clamp(min=torch.finfo(trace.dtype).tiny)
        rank = int((held < energy).sum(-1).amax()) + 1  # those that are not enough, and one more
        if rank >= self.values.shape[-1]:
            return self
        values, vectors = self.values[:, :rank], self.vectors[..., :rank].contiguous()
        return self.completed(values, vectors, trace.squeeze(-1))

    @property
    def width(self) -> int:
        """Of each matrix."""
        return self.vectors.shape[-2]

    def damped_inverse(self, damping: Tensor) -> Projection:
        """`(M + damping)⁻¹`, with `damping` `(G,)`, of the matrix M that this stands for.

        Along U it is that of the projection; in all other directions, the mean of what the inverse
        is there. That is larger than the inverse of the mean, μ, by as much as the eigenvalues
        spread, see `spread_of_rest`: a step by the inverse of the mean is too short in most of the
        directions.
        """
        values = (self.values + damping[:, None]).reciprocal()
        return Projection(values, self.vectors, self.rest_of_inverse(damping))

    def rest_of_inverse(self, damping: Tensor) -> Tensor:
        """Mean eigenvalue of `(M + damping)⁻¹` in the other directions, `(G,)`."""
        return (self.spread_of_rest() + damping[:, None]).reciprocal().mean(-1)

    def spread_of_rest(self) -> Tensor:
        """Eigenvalues that M may have in the other directions, `(G, n − k)`, ascending.

        They fall off to zero by the power law that has the mean μ, from the mean of the lower half
        of the values: directions that follow a changing matrix have not all found the largest
        eigenvalues, and the last values come out too small.
        """
        lower = self.values[:, self.values.shape[-1] // 2 :].mean(-1)
        first = torch.maximum(lower, self.rest)[:, None]
        mean = self.rest[:, None].clamp(min=torch.finfo(first.dtype).tiny)
        places = torch.arange(self._others, dtype=first.dtype, device=first.device) + 0.5
        # ∫ uᵖ du = 1 / (p + 1) over [0, 1]
        return first * (places / self._others) ** (first / mean - 1).clamp(min=0)

    def function(self, function: psd.Function) -> Projection:
        """Of the eigenvalues."""
        return Projection(function(self.values), self.vectors, function(self.rest))

    def matmul(self, x: Tensor) -> Tensor:
        """Times columns `(..., G, n, m)`."""
        along = self.vectors.mT @ x
        rest = self.rest[:, None, None]
        return rest * x + self.vectors @ (self.weighted(along) - rest * along)

    def weighted(self, along: Tensor) -> Tensor:
        """Times columns `(..., G, k, m)` of coordinates along U."""
        return self.values @ along if self.values.ndim == 3 else self.values[..., None] * along

    def diagonal(self) -> Tensor:
        """`(G, n)`."""
        weights = (self.values - self.rest[:, None])[..., None]
        return self.rest[:, None] + (self.vectors.square() @ weights).squeeze(-1)

    def dense(self) -> Tensor:
        """`(G, n, n)`."""
        eye = torch.eye(self.width, dtype=self.vectors.dtype, device=self.vectors.device)
        return self.matmul(eye)

    def eigenvalues(self) -> Tensor:
        """All n of each, `(G, n)`: first those that are kept apart."""
        return torch.cat([self.values, self.rest[:, None].expand(-1, self._others)], dim=-1)

    @property
    def _others(self) -> int:
        """How many directions share μ."""
        return self.width - self.vectors.shape[-1]

    def trace(self) -> Tensor:
        """`(G,)`."""
        return self.values.sum(-1) + self._others * self.rest

    def norm(self) -> Tensor:
        """Frobenius norms `(G,)`."""
        return torch.linalg.vector_norm(self.eigenvalues(), dim=-1)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates of columns `(..., G, n, m)` along U, and what is left over."""
        along = self.vectors.mT @ x
        return along, x - self.vectors @ along
