"""What a preconditioner keeps of the Fisher matrix: moving averages, structure by structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neuromanifold.errors import NonFiniteError
from neuromanifold.layers import Record
from neuromanifold.linalg import Block
from neuromanifold.operators import BlockMatrix
from neuromanifold.optim.averages import RunningSums
from neuromanifold.structures import EigenKronecker, Kronecker
from neuromanifold.structures._base import AdditiveStructure, Source, Statistics
from neuromanifold.structures.eigenkronecker import (
    EigenKroneckerMatrix,
    in_eigenbasis,
    squares_along,
)
from neuromanifold.structures.kronecker import KroneckerMatrix

__all__ = ["Curvature", "InEigenbases"]


class Curvature:
    """Averages over measurements, from which the matrix is made when it is inverted."""

    def __init__(self, structure: AdditiveStructure) -> None:
        self.structure = structure
        self.averages = RunningSums()

    def measure(self, source: Source, decay: float) -> None:
        """Add a measurement, and let the earlier ones decay.

        Raises:
            NonFiniteError: If it holds NaN or infinity, or no position counts; then nothing is
                added.
        """
        sums = self.structure.collect(source)
        if source.per == "position" and source.num_positions == 0:
            raise NonFiniteError("All targets are ignored, and the mean over no position is NaN.")
        symmetric = {block.name: self.structure.symmetric(block) for block in source.plan.blocks}
        self.averages.add(sums, source.normaliser, decay, symmetric)

    def matrices(self, blocks: Sequence[Block]) -> list[BlockMatrix]:
        """What is inverted, one matrix per block."""
        return self.averages_of(blocks)

    def inverted(
        self, matrices: Sequence[BlockMatrix], added: Sequence[Tensor], inverses: Sequence[Any]
    ) -> None:
        """Matrices were just inverted, with this damping of each."""

    def followed(self, inverses: list[Any]) -> list[Any]:
        """The inverses after a measurement that is not followed by an inversion."""
        return inverses

    @property
    def events(self) -> dict[str, int]:
        """How often what happened, by name."""
        return {}

    def averages_of(self, blocks: Sequence[Block]) -> list[BlockMatrix]:
        """The average, one matrix per block."""
        return [self._assemble(block) for block in blocks]

    def _assemble(self, block: Block) -> BlockMatrix:
        # A copy: structures divide their statistics in place.
        sums = self.averages.copy(block.name)
        return self.structure.assemble(block, sums, self.averages.counts[block.name])

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, by name."""
        return {"averages": self.averages.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """The inverse of `state_dict`."""
        self.averages.load_state_dict(state["averages"], device)


Bases = dict[str, tuple[Tensor | None, Tensor | None]]
"""By block, eigenvectors of the factors of outputs and inputs as columns; None for unit vectors."""

ALONG = "along"
"""Statistic: squared gradients along the bases."""


class InEigenbases(Curvature):
    """Kronecker factors, and squared gradients along the eigenvectors that they had last time.

    When the bases are renewed, the squares along the old ones, spread over the new ones by the
    squared cosines between them, stand in for what was not measured. The first are the products of
    the factors' eigenvalues.
    """

    structure: _Along

    def __init__(self, structure: EigenKronecker) -> None:
        kronecker = Kronecker(structure.weight_sharing, structure.inputs, structure.outputs)
        super().__init__(_Along(kronecker))

    def matrices(self, blocks: Sequence[Block]) -> list[BlockMatrix]:
        """In new bases."""
        return [self._renewed(self._assemble(block)) for block in blocks]

    def _renewed(self, matrix: BlockMatrix) -> BlockMatrix:
        if not isinstance(matrix, KroneckerMatrix):
            return matrix
        name, bases, new = matrix.block.name, self.structure.bases, in_eigenbasis(matrix)
        sums, count = self.averages.sums[name], self.averages.counts[name]
        moments = new.moments
        if name in bases and ALONG in sums:
            moments = sums[ALONG] / count
            for old, basis, side in zip(
                bases[name], (new.outputs, new.inputs), (0, 1), strict=True
            ):
                if old is not None and basis is not None:
                    cosines = (basis.mT @ old).square()
                    moments = moments @ cosines.mT if side else cosines @ moments
        bases[name] = new.outputs, new.inputs
        sums[ALONG] = moments * count
        return EigenKroneckerMatrix(matrix.block, moments, new.outputs, new.inputs)

    def state_dict(self) -> dict[str, Any]:
        """With the bases."""
        return {**super().state_dict(), "bases": dict(self.structure.bases)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """With the bases."""
        super().load_state_dict(state, device)
        self.structure.bases = {
            name: tuple(q if q is None else q.to(device, copy=True) for q in pair)  # type: ignore[misc]
            for name, pair in state["bases"].items()
        }


class _Along(AdditiveStructure):
    """Kronecker factors, and squares along given bases, in one pass."""

    def __init__(self, kronecker: Kronecker) -> None:
        self._kronecker = kronecker
        self.bases: Bases = {}

    def __repr__(self) -> str:
        return "EigenKronecker()"

    def statistics(self, record: Record) -> Statistics:
        found = self._kronecker.statistics(record)
        bases = self.bases.get(record.block.name)
        if bases is None or not _fit(bases, record.block):  # a parameter was frozen or thawed
            return found
        return {**found, ALONG: squares_along(record, *bases)}

    def assemble(self, block: Block, statistics: Statistics, normaliser: float) -> BlockMatrix:
        factors = {key: value for key, value in statistics.items() if key != ALONG}
        return self._kronecker.assemble(block, factors, normaliser)

    def symmetric(self, block: Block) -> tuple[str, ...]:
        return self._kronecker.symmetric(block)

    def numel(self, block: Block) -> int:
        return self._kronecker.numel(block) + block.num_parameters


def _fit(bases: tuple[Tensor | None, Tensor | None], block: Block) -> bool:
    sides = zip(bases, (block.fan_out, block.fan_in), strict=True)
    return all(basis is None or basis.shape[-1] == width for basis, width in sides)
