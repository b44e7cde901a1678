"""The covariance S of the inputs of a layer, in the three forms that its units can share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from neuromanifold.errors import NotPositiveDefiniteError
from neuromanifold.linalg import psd

__all__ = ["Covariance", "DiagonalCovariance", "FullCovariance", "StandardCovariance"]


class Covariance(ABC):
    """Products and solves with S for vectors `(..., n)`; `a` is `(*U)`, a number per unit."""

    @abstractmethod
    def times(self, v: Tensor) -> Tensor:
        """`S v`, `(..., n)`."""

    @abstractmethod
    def solve(self, v: Tensor, a: Tensor, damping: float) -> Tensor:
        """`(aS + damping·I)⁻¹ v`, `(..., *U, n)`."""

    @abstractmethod
    def logdet(self, a: Tensor, damping: float) -> Tensor:
        """`ln det(aS + damping·I)`, `(*U)`."""

    @abstractmethod
    def trace(self) -> Tensor | int:
        """Sum of the variances."""

    @abstractmethod
    def dense(self, like: Tensor) -> Tensor:
        """The matrix, `(n, n)`."""

    @abstractmethod
    def require_invertible(self) -> None:
        """Raise `NotPositiveDefiniteError` if S is singular."""


@dataclass(frozen=True, eq=False)
class StandardCovariance(Covariance):
    """The identity."""

    size: int

    def times(self, v: Tensor) -> Tensor:
        """`v` itself."""
        return v

    def solve(self, v: Tensor, a: Tensor, damping: float) -> Tensor:
        """A division."""
        return v / (a + damping)[..., None]

    def logdet(self, a: Tensor, damping: float) -> Tensor:
        """Equal factors."""
        return self.size * torch.log(a + damping)

    def trace(self) -> int:
        """Its size."""
        return self.size

    def dense(self, like: Tensor) -> Tensor:
        """The identity."""
        return torch.eye(self.size, dtype=like.dtype, device=like.device)

    def require_invertible(self) -> None:
        """It always is."""


@dataclass(frozen=True, eq=False)
class DiagonalCovariance(Covariance):
    """Uncorrelated inputs.

    Attributes:
        variances: `(n,)`.
    """

    variances: Tensor

    def times(self, v: Tensor) -> Tensor:
        """O(n)."""
        return v * self.variances

    def solve(self, v: Tensor, a: Tensor, damping: float) -> Tensor:
        """O(n)."""
        return v / (a[..., None] * self.variances + damping)

    def logdet(self, a: Tensor, damping: float) -> Tensor:
        """O(n)."""
        return torch.log(a[..., None] * self.variances + damping).sum(-1)

    def trace(self) -> Tensor:
        """Sum of the variances."""
        return self.variances.sum()

    def dense(self, like: Tensor) -> Tensor:
        """The variances on the diagonal."""
        return self.variances.diag()

    def require_invertible(self) -> None:
        """No variance may be zero."""
        if not bool((self.variances > 0).all()):
            constant = int((~(self.variances > 0)).sum())
            raise NotPositiveDefiniteError(
                f"{constant} of {len(self.variances)} inputs have no positive variance, so the "
                f"weights on them cannot be told from the bias. Use a damping > 0 nats/parameter²."
            )


@dataclass(frozen=True, eq=False)
class FullCovariance(Covariance):
    """Correlated inputs: one factorisation, shared by all units of the layer.

    A Cholesky factor serves all units if there is no damping. With damping every unit has its own
    matrix `aS + damping·I`, and only the eigenvectors are the same.

    Attributes:
        matrix: `(n, n)`.
    """

    matrix: Tensor

    @cached_property
    def factor(self) -> Tensor:
        """Lower Cholesky factor, `(n, n)`."""
        return psd.cholesky(self.matrix, 0.0)

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues `(n,)`, eigenvectors `(n, n)` as columns."""
        return psd.eigh(self.matrix)

    def times(self, v: Tensor) -> Tensor:
        """O(n²) per vector."""
        return v @ self.matrix

    def solve(self, v: Tensor, a: Tensor, damping: float) -> Tensor:
        """O(n²) per vector, after the first."""
        if damping == 0:
            rows = v.reshape(-1, v.shape[-1])
            return torch.cholesky_solve(rows.mT, self.factor).mT.reshape(v.shape) / a[..., None]
        values, vectors = self.eigen
        return (v @ vectors / (a[..., None] * values + damping)) @ vectors.mT

    def logdet(self, a: Tensor, damping: float) -> Tensor:
        """O(n) per unit, after the factorisation."""
        if damping == 0:
            return len(self.matrix) * torch.log(a) + 2 * self.factor.diagonal().log().sum()
        return torch.log(a[..., None] * self.eigen[0] + damping).sum(-1)

    def trace(self) -> Tensor:
        """Sum of the variances."""
        return self.matrix.trace()

    def dense(self, like: Tensor) -> Tensor:
        """The matrix."""
        return self.matrix

    def require_invertible(self) -> None:
        """Its Cholesky factor must exist."""
        _ = self.factor
