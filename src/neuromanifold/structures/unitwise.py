"""One matrix per unit, over its incoming weights and bias.

Source: Amari, Karakida and Oizumi, arXiv 1808.07172.
"""

from __future__ import annotations

from neuromanifold.layers import Record
from neuromanifold.linalg import Block
from neuromanifold.operators import Matrices
from neuromanifold.structures._base import AdditiveStructure, Statistics

__all__ = ["UnitWise"]


class UnitWise(AdditiveStructure):
    """Exact blocks `(I, I)`, one for each output unit (or channel) of a layer; G·O·I² numbers.

    Parameters without a layer rule have units of one entry, which is their diagonal.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
        >>> F = nm.fisher(model, nm.Gaussian(), x, nm.UnitWise(), estimator=nm.Exact())
        >>> F.blocks[0].matrices.shape
        torch.Size([2, 4, 4])
    """

    def statistics(self, record: Record) -> Statistics:
        """Outer products of each unit's per-sample gradient."""
        return {"moments": record.unit_moments()}

    def assemble(self, block: Block, statistics: Statistics, normaliser: float) -> Matrices:
        """Their mean, units of all groups in one batch."""
        return Matrices(block, statistics["moments"].flatten(0, 1).div_(normaliser))

    def symmetric(self, block: Block) -> tuple[str, ...]:
        """The blocks."""
        return ("moments",)

    def numel(self, block: Block) -> int:
        """One matrix per unit."""
        return block.num_parameters * block.fan_in

    def represent(self, block: Block) -> tuple[str, bool, str]:
        """A block without inputs is its diagonal."""
        return ("UnitWise" if block.fan_in > 1 else "Diagonal"), True, ""
