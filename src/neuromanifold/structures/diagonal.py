"""One number per parameter: `F_ii = E[(∂_i log p)²]`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from neuromanifold.estimators import Hessian
from neuromanifold.layers import Record
from neuromanifold.linalg import Block, psd
from neuromanifold.operators import BlockMatrix, FisherOperator, frobenius
from neuromanifold.structures._base import AdditiveStructure, Source, Statistics
from neuromanifold.structures.second_order import Labelled, second_order_blocks

__all__ = ["Diagonal", "DiagonalMatrix"]


class Diagonal(AdditiveStructure):
    """The diagonal of the Fisher matrix. Cheapest; exact entries, no interactions.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
        >>> F = nm.fisher(model, nm.Gaussian(), x, nm.Diagonal(), estimator=nm.Exact())
        >>> F.diagonal()["bias"]
        tensor([1., 1.])
    """

    def build(self, source: Source) -> FisherOperator:  # type: ignore[override]
        """Stream over the data; second derivatives are taken where squares do not do."""
        if isinstance(source.estimator, Hessian):
            return second_order_blocks(self, source, self._of_surprise)
        return super().build(source)

    def split(self, record: Record) -> Iterator[Record]:
        """Gradients are squared some at a time as it is, unless they are sums over ports."""
        return record.split(self._part(record.block), whole=len(record.ports) > 1)

    @staticmethod
    def _of_surprise(labelled: Labelled, record: Record) -> Statistics:
        return {"squares": labelled.block_diagonal(record)}

    def statistics(self, record: Record) -> Statistics:
        """Squared per-sample gradients."""
        return {"squares": record.squared()}

    def assemble(self, block: Block, statistics: Statistics, normaliser: float) -> DiagonalMatrix:
        """Their mean."""
        return DiagonalMatrix(block, statistics["squares"].div_(normaliser))

    def numel(self, block: Block) -> int:
        """One per parameter."""
        return block.num_parameters


class DiagonalMatrix(BlockMatrix):
    """A diagonal matrix, `(G, O, I)` numbers."""

    kind = "diagonal"

    def __init__(self, block: Block, values: Tensor) -> None:
        super().__init__(block)
        self.values = values

    def matmul(self, x: Tensor) -> Tensor:
        """Entrywise."""
        return self.values * x

    def function(self, function: psd.Function, x: Tensor) -> Tensor:
        """Entrywise."""
        return function(self.values) * x

    def eigenvalues(self) -> Tensor:
        """The entries."""
        return self.values.flatten()

    def diagonal(self) -> Tensor:
        """The entries."""
        return self.values

    def norm(self) -> Tensor:
        """Over all entries."""
        return frobenius(self.values)

    def tensors(self) -> dict[str, Tensor]:
        """The entries."""
        return {"values": self.values}

    def scaled(self, factor: float) -> DiagonalMatrix:
        """Entrywise."""
        return DiagonalMatrix(self.block, self.values * factor)

    def plus(self, other: BlockMatrix) -> DiagonalMatrix | None:
        """Entrywise."""
        if isinstance(other, DiagonalMatrix):
            return DiagonalMatrix(self.block, self.values + other.values)
        return None

    def restrict(self, block: Block, columns: list[int]) -> DiagonalMatrix:
        """Some columns."""
        return DiagonalMatrix(block, self.values[..., columns])
