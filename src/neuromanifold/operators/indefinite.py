"""Block-diagonal matrices that are a Fisher matrix on average only, and may be indefinite."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from neuromanifold._typing import Params
from neuromanifold.errors import NotPositiveDefiniteError
from neuromanifold.linalg import Layout, psd
from neuromanifold.operators._base import FisherOperator, Origin
from neuromanifold.operators.blocks import BlockMatrix, BlockOperator, Matrices
from neuromanifold.operators.coverage import Coverage
from neuromanifold.operators.storage import storable

__all__ = ["IndefiniteOperator"]


@storable("indefinite blocks")
class IndefiniteOperator(FisherOperator):
    """A symmetric block-diagonal matrix whose eigenvalues may be negative.

    Products, norms and the diagonal are those of the blocks; a solve, a determinant, a root or a
    sample is given where the matrix allows it, and refused where it does not.
    """

    def __init__(self, blocks: BlockOperator) -> None:
        super().__init__(
            blocks.layout, blocks.coverage, blocks.origin, dtype=blocks.dtype, device=blocks.device
        )
        self._blocks = blocks

    def _matmat(self, rows: Tensor) -> Tensor:
        return self._blocks._matmat(rows)

    def _function(self, function: psd.Function, rows: Tensor) -> Tensor:
        self._require_above(0, "roots, and draws with any damping, need it to be positive")
        return self._blocks._function(function, rows)

    def _solve(self, rows: Tensor, damping: float) -> Tensor:
        self._require_above(damping, f"the damping, {damping:g}, does not outweigh it")
        return self._blocks._solve(rows, damping)

    def logdet(self, *, damping: float) -> Tensor:
        """`log det(F + damping · I)`, a scalar tensor, where that matrix is positive definite."""
        self._require_above(damping, f"the damping, {damping:g}, does not outweigh it")
        return super().logdet(damping=damping)

    def _eigenvalues(self) -> Tensor:
        return self._spectrum

    @cached_property
    def _spectrum(self) -> Tensor:
        values = torch.cat([_eigenvalues(matrix) for matrix in self._blocks.blocks])
        return values.sort(descending=True).values

    def _require_above(self, damping: float, reason: str) -> None:
        """Refuse what does not exist, if an eigenvalue plus the damping is negative."""
        lowest = self._spectrum[-1]
        rounding = torch.finfo(self.dtype).eps * self._spectrum.abs().sum()
        if bool(lowest + damping < -rounding):
            raise NotPositiveDefiniteError(
                f"This estimate of the Fisher matrix, by {self.origin.estimator}, is indefinite: "
                f"its lowest eigenvalue is {lowest.item():.3g} nats/parameter², and {reason}. "
                f"More labels or inputs bring it closer to the Fisher matrix, which "
                f"is positive semi-definite; F.solve and F.logdet take a damping above "
                f"{-lowest.item():.3g}; nm.Exact() and nm.MonteCarlo() are never indefinite."
            )

    def trace(self) -> Tensor:
        """Sum of the diagonal, a scalar tensor in nats/parameter²."""
        return self._blocks.trace()

    def norm(self) -> Tensor:
        """Frobenius norm, a scalar tensor in nats/parameter²."""
        return self._blocks.norm()

    def diagonal(self) -> Params:
        """The diagonal, shaped like the parameters; entries may be negative."""
        return self._blocks.diagonal()

    def _diagonal(self) -> Tensor:
        return self._blocks._diagonal()

    def to_dense(self) -> Tensor:
        """The matrix `(P, P)`, zero between blocks."""
        return self._blocks.to_dense()

    def restrict(self, names: Iterable[str]) -> IndefiniteOperator:
        """The principal submatrix of some parameters, in the same structure."""
        return IndefiniteOperator(self._blocks.restrict(names))

    def _scaled(self, factor: float) -> IndefiniteOperator:
        return IndefiniteOperator(self._blocks._scaled(factor))

    def _plus(self, other: FisherOperator) -> FisherOperator | None:
        blocks = other._blocks if isinstance(other, IndefiniteOperator) else other
        total = self._blocks._plus(blocks)
        return IndefiniteOperator(total) if isinstance(total, BlockOperator) else None

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return self._blocks._state()

    @classmethod
    def _restore(
        cls,
        layout: Layout,
        coverage: Coverage,
        origin: Origin,
        state: dict[str, Any],
        tensors: dict[str, Tensor],
    ) -> IndefiniteOperator:
        return cls(BlockOperator._restore(layout, coverage, origin, state, tensors))


def _eigenvalues(matrix: BlockMatrix) -> Tensor:
    """Of a block; those of `Matrices` itself take what is below zero for rounding."""
    if isinstance(matrix, Matrices):
        return torch.linalg.eigvalsh(matrix.matrices).flatten()
    return matrix.eigenvalues()
