"""Full matrices: of the whole model, or of each layer."""

from __future__ import annotations

import torch

from neuromanifold.capture import Plan
from neuromanifold.estimators import Hessian
from neuromanifold.layers import Record
from neuromanifold.linalg import Block, memory
from neuromanifold.operators import BlockOperator, FisherOperator, Matrices
from neuromanifold.structures._base import (
    AdditiveStructure,
    Source,
    Statistics,
    Structure,
    require_finite,
)
from neuromanifold.structures.second_order import (
    Labelled,
    second_order_blocks,
    second_order_matrix,
)

__all__ = ["BlockDiagonal", "Dense"]


class Dense(Structure):
    """The whole matrix `(P, P)`. For models of up to some thousand parameters.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
        >>> F = nm.fisher(model, nm.Gaussian(), x, nm.Dense(), estimator=nm.Exact())
        >>> F.to_dense().shape
        torch.Size([8, 8])
    """

    def constant_numel(self, plan: Plan) -> int:
        """The square of all parameters."""
        return plan.layout.num_parameters**2

    def build(self, source: Source) -> FisherOperator:
        """Sum the outer products of whole per-sample gradients, or second derivatives."""
        if isinstance(source.estimator, Hessian):
            return second_order_matrix(self, source)
        layout = source.plan.layout
        p = layout.num_parameters
        self.require_fits(source)
        total = torch.zeros(p, p, dtype=source.dtype, device=source.device)
        for records in source.sweeps():
            rows = None
            for record in records:
                gradients = record.per_sample().transpose(1, 2).flatten(0, 1)  # (V·N, G, O, I)
                if rows is None:
                    memory.require(
                        len(gradients) * p * source.dtype.itemsize,
                        source.device,
                        what=f"Dense() with {len(gradients)} gradients of {p} parameters at once",
                        instead="Use smaller batches.",
                    )
                    rows = torch.empty(len(gradients), p, dtype=total.dtype, device=total.device)
                record.block.write(gradients, rows, layout)
            assert rows is not None
            total.addmm_(rows.T, rows)
        source.reduce([total])
        squares = total.diagonal()
        require_finite({name: {"squares": squares[s]} for name, s in layout.slices.items()})
        whole = Block.whole(layout)
        matrix = Matrices(whole, total[None].div_(source.normaliser))
        coverage = source.coverage(lambda _: ("Dense", True, ""))
        return BlockOperator(layout, [matrix], coverage, source.origin(self))


class BlockDiagonal(AdditiveStructure):
    """One full matrix per layer, `(G·O·I, G·O·I)`; nothing between layers.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        >>> F = nm.fisher(model, nm.Gaussian(), torch.randn(8, 3), nm.BlockDiagonal())
        >>> F.block("1").shape
        (10, 10)
    """

    whole_gradients = True

    def build(self, source: Source) -> FisherOperator:  # type: ignore[override]
        """Stream over the data; second derivatives are taken where outer products do not do."""
        if isinstance(source.estimator, Hessian):
            return second_order_blocks(self, source, self._of_surprise)
        return super().build(source)

    def statistics(self, record: Record) -> Statistics:
        """Outer products of the layer's per-sample gradient."""
        return {"moment": record.block_moment()}

    def assemble(self, block: Block, statistics: Statistics, normaliser: float) -> Matrices:
        """Their mean."""
        return Matrices(block, statistics["moment"][None].div_(normaliser))

    def symmetric(self, block: Block) -> tuple[str, ...]:
        """The block."""
        return ("moment",)

    def numel(self, block: Block) -> int:
        """The square of the layer's parameters."""
        return block.num_parameters**2

    @staticmethod
    def _of_surprise(labelled: Labelled, record: Record) -> Statistics:
        return {"moment": labelled.block_matrix(record)}
