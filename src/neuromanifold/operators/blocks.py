"""Block-diagonal Fisher matrices, and the kinds of blocks that several structures share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from neuromanifold.linalg import Block, Layout, psd
from neuromanifold.operators._base import FisherOperator, Origin
from neuromanifold.operators.coverage import Coverage
from neuromanifold.operators.storage import storable, under

__all__ = ["BlockMatrix", "BlockOperator", "Matrices", "frobenius"]


class BlockMatrix(ABC):
    """The matrix of one block; vectors are `(R, G, O, I)`, eigenvalues `(G·O·I,)` in any order.

    Attributes:
        block: whose matrix this is.
        kind: name under which it is saved.
    """

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[BlockMatrix]]] = {}

    def __init_subclass__(cls) -> None:
        BlockMatrix.kinds[cls.kind] = cls

    def __init__(self, block: Block) -> None:
        self.block = block

    @abstractmethod
    def matmul(self, x: Tensor) -> Tensor:
        """Matrix times vectors."""

    @abstractmethod
    def function(self, function: psd.Function, x: Tensor) -> Tensor:
        """A function of the matrix times vectors."""

    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """All eigenvalues."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """`(G, O, I)`."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The numbers, by argument name of the constructor."""

    @abstractmethod
    def scaled(self, factor: float) -> BlockMatrix:
        """A multiple."""

    @abstractmethod
    def restrict(self, block: Block, columns: list[int]) -> BlockMatrix:
        """The part of some fan-in columns, for the smaller `block`."""

    @abstractmethod
    def norm(self) -> Tensor:
        """Frobenius norm."""

    def plus(self, other: BlockMatrix) -> BlockMatrix | None:
        """The sum, if it has the same kind."""
        return None

    def solve(self, x: Tensor, damping: float | Tensor) -> Tensor:
        """Damped inverse times vectors."""
        return self.function(lambda values: (values + damping).reciprocal_(), x)

    def solver(self, damping: float | Tensor) -> Callable[[Tensor], Tensor]:
        """`solve` with one damping, for many vectors."""
        return lambda x: self.solve(x, damping)

    def dense(self) -> Tensor:
        """`(p, p)`, unit-major."""
        p = self.block.num_parameters
        some = next(iter(self.tensors().values()))
        eye = torch.eye(p, dtype=some.dtype, device=some.device)
        return self.matmul(eye.unflatten(1, self.block.shape)).flatten(1)


def frobenius(entries: Tensor) -> Tensor:
    """The norm over all entries, row by row: one sum over millions loses digits in float32."""
    return torch.linalg.vector_norm(torch.linalg.vector_norm(entries, dim=-1))


class Matrices(BlockMatrix):
    """Full matrices `(B, n, n)` along a block's parameters: one per unit, or one for the block."""

    kind = "matrices"

    def __init__(self, block: Block, matrices: Tensor) -> None:
        super().__init__(block)
        self.matrices = matrices

    def matmul(self, x: Tensor) -> Tensor:
        """Batched matrix product, from the left of symmetric matrices, which torch does faster."""
        rows = self._columns(x).mT
        return self._vectors((rows @ self.matrices).mT, x)

    def function(self, function: psd.Function, x: Tensor) -> Tensor:
        """By eigendecomposition, computed once."""
        values, vectors = self._eigh
        moved = function(values)[..., None] * (vectors.mT @ self._columns(x))
        return self._vectors(vectors @ moved, x)

    def solve(self, x: Tensor, damping: float | Tensor) -> Tensor:
        """By Cholesky decomposition."""
        factor = psd.cholesky(self.matrices, damping)
        return self._vectors(torch.cholesky_solve(self._columns(x), factor), x)

    def eigenvalues(self) -> Tensor:
        """Of all matrices."""
        return psd.eigenvalues(self.matrices).flatten()

    def diagonal(self) -> Tensor:
        """Of all matrices."""
        return self.matrices.diagonal(dim1=-2, dim2=-1).reshape(self.block.shape)

    def norm(self) -> Tensor:
        """Over all entries."""
        return frobenius(self.matrices)

    def tensors(self) -> dict[str, Tensor]:
        """The matrices."""
        return {"matrices": self.matrices}

    def scaled(self, factor: float) -> Matrices:
        """Entrywise."""
        return Matrices(self.block, self.matrices * factor)

    def plus(self, other: BlockMatrix) -> Matrices | None:
        """Entrywise, for the same partition into matrices."""
        if isinstance(other, Matrices) and other.matrices.shape == self.matrices.shape:
            return Matrices(self.block, self.matrices + other.matrices)
        return None

    def restrict(self, block: Block, columns: list[int]) -> Matrices:
        """Principal submatrices."""
        n = self.matrices.shape[-1]
        keep = torch.arange(n, device=self.matrices.device)
        keep = keep.reshape(-1, self.block.fan_in)[:, columns].flatten()
        return Matrices(block, self.matrices[:, keep[:, None], keep])

    def dense(self) -> Tensor:
        """The matrices along the diagonal."""
        return torch.block_diag(*self.matrices)

    def _columns(self, x: Tensor) -> Tensor:
        """Vectors `(R, G, O, I)` as `(B, n, R)`."""
        return x.reshape(x.shape[0], *self.matrices.shape[:2]).permute(1, 2, 0)

    @staticmethod
    def _vectors(columns: Tensor, like: Tensor) -> Tensor:
        """The inverse."""
        return columns.permute(2, 0, 1).reshape(like.shape)

    @cached_property
    def _eigh(self) -> tuple[Tensor, Tensor]:
        return psd.eigh(self.matrices)


@storable("blocks")
class BlockOperator(FisherOperator):
    """A block-diagonal Fisher matrix; every parameter belongs to one block."""

    def __init__(
        self,
        layout: Layout,
        blocks: list[BlockMatrix],
        coverage: Coverage,
        origin: Origin,
    ) -> None:
        some = next(iter(blocks[0].tensors().values()))
        super().__init__(layout, coverage, origin, dtype=some.dtype, device=some.device)
        self.blocks = blocks

    def _map(self, rows: Tensor, function: Any) -> Tensor:
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for matrix in self.blocks:
            x = matrix.block.read(rows, self.layout)
            matrix.block.write(function(matrix, x), out, self.layout)
        return out

    def _matmat(self, rows: Tensor) -> Tensor:
        return self._map(rows, lambda matrix, x: matrix.matmul(x))

    def _function(self, function: psd.Function, rows: Tensor) -> Tensor:
        return self._map(rows, lambda matrix, x: matrix.function(function, x))

    def _solve(self, rows: Tensor, damping: float) -> Tensor:
        if damping == 0:
            self._require_regular()
        return self._map(rows, lambda matrix, x: matrix.solve(x, damping))

    def _eigenvalues(self) -> Tensor:
        values = torch.cat([matrix.eigenvalues() for matrix in self.blocks])
        return values.sort(descending=True).values

    def trace(self) -> Tensor:
        """Sum of the diagonal, a scalar tensor in nats/parameter²."""
        return torch.stack([matrix.diagonal().sum() for matrix in self.blocks]).sum()

    def norm(self) -> Tensor:
        """Frobenius norm, a scalar tensor in nats/parameter²."""
        return torch.linalg.vector_norm(torch.stack([matrix.norm() for matrix in self.blocks]))

    def _diagonal(self) -> Tensor:
        out = torch.empty(1, self.num_parameters, dtype=self.dtype, device=self.device)
        for matrix in self.blocks:
            matrix.block.write(matrix.diagonal()[None], out, self.layout)
        return out[0]

    def to_dense(self) -> Tensor:
        """The matrix `(P, P)`, zero between blocks."""
        self._require_dense_fits()
        positions = torch.arange(self.num_parameters, device=self.device)[None]
        out = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for matrix in self.blocks:
            index = matrix.block.read(positions, self.layout).flatten()
            out[index[:, None], index] = matrix.dense()
        return out

    def restrict(self, names: Any) -> BlockOperator:
        """The principal submatrix of some parameters, in the same structure."""
        layout = self.layout.restrict(names)
        blocks = [
            matrix.restrict(*part)
            for matrix in self.blocks
            if (part := matrix.block.restrict(layout.names)) is not None
        ]
        return BlockOperator(layout, blocks, self.coverage.restrict(layout.names), self.origin)

    def _scaled(self, factor: float) -> BlockOperator:
        blocks = [matrix.scaled(factor) for matrix in self.blocks]
        return BlockOperator(self.layout, blocks, self.coverage, self.origin)

    def _plus(self, other: FisherOperator) -> FisherOperator | None:
        if not isinstance(other, BlockOperator) or len(other.blocks) != len(self.blocks):
            return None
        sums = []
        for mine, theirs in zip(self.blocks, other.blocks, strict=True):
            total = mine.plus(theirs) if mine.block == theirs.block else None
            if total is None:
                return None
            sums.append(total)
        return BlockOperator(self.layout, sums, self.coverage, self.origin)

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        description = [
            {"kind": matrix.kind, "block": matrix.block.to_dict()} for matrix in self.blocks
        ]
        tensors = {
            f"{i}.{name}": tensor
            for i, matrix in enumerate(self.blocks)
            for name, tensor in matrix.tensors().items()
        }
        return {"blocks": description}, tensors

    @classmethod
    def _restore(
        cls,
        layout: Layout,
        coverage: Coverage,
        origin: Origin,
        state: dict[str, Any],
        tensors: dict[str, Tensor],
    ) -> BlockOperator:
        blocks = []
        for i, entry in enumerate(state["blocks"]):
            block = Block.from_dict(entry["block"])
            blocks.append(BlockMatrix.kinds[entry["kind"]](block, **under(str(i), tensors)))
        return cls(layout, blocks, coverage, origin)
