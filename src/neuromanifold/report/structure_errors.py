"""Numbers of the structures: how far each is from the exact matrix, layer by layer and whole."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neuromanifold.operators import FisherOperator
from neuromanifold.report.known import finite
from neuromanifold.structures.gram import GramOperator
from neuromanifold.variance.approximation_errors import (
    LeftOut,
    jackknife_error,
    overlaps_left,
    projection_error,
    quadratic,
)

__all__ = ["Candidate", "Error", "is_part_of_it"]


@dataclass(frozen=True)
class Error:
    """`‖F − S‖ / ‖F‖` in Frobenius norm.

    Attributes:
        value: None if F is zero.
        stderr: None if it was not measured.
    """

    value: float | None
    stderr: float | None


def is_part_of_it(S: FisherOperator) -> bool:
    """Whether all entries that S keeps are those of F: its diagonal, or blocks of it."""
    return all(entry.exact for entry in S.coverage)


@dataclass
class Candidate:
    """A block-diagonal approximation S of the exact matrix F, seen block by block.

    Attributes:
        S: the approximation.
        whole_blocks: whether S is F but for what couples blocks.
        left_out: S without groups of samples; None if S is a part of F, or that takes too long.
        overlap: `⟨F, S⟩` over the blocks seen.
        kept: `û_rᵀ S û_r`, `(R,)`, over the blocks seen; None if unknown of one of them.
        overlaps: `overlaps_left` over the blocks seen, likewise.
    """

    S: FisherOperator
    whole_blocks: bool = False
    left_out: LeftOut | None = None
    overlap: float = 0.0
    kept: Tensor | None = field(default_factory=lambda: torch.zeros(()))
    overlaps: list[Tensor] | None = field(default_factory=list)

    def see(
        self, name: str, F: GramOperator, gradients: Tensor | None, dense: Tensor | None
    ) -> Error:
        """Compare a block, and add it to the whole.

        Args:
            name: of the block.
            F: the block of the exact matrix.
            gradients: its rows, `(R, P)`; None if they are too many.
            dense: the block itself, `(P, P)`; None if it is too large.
        """
        S = self.S.block(name)
        kept = self._kept(F, S, gradients)
        part = is_part_of_it(S)
        # What is a part of F is orthogonal to the rest of it.
        overlap = float(S.norm().double() ** 2) if part else _overlap(F, S, gradients, dense)
        left_out = None if self.left_out is None else self.left_out.block(name)
        overlaps = None
        if left_out is not None and (gradients is not None):
            overlaps = overlaps_left(F, gradients, left_out, dense)
        self.overlap += overlap
        self.kept = None if kept is None or self.kept is None else self.kept + kept
        self._add(overlaps)
        return _error(F, S, overlap, kept if part else None, left_out, overlaps)

    def whole(self, F: GramOperator) -> Error:
        """Compare the whole matrices, once all blocks were seen."""
        kept = self.kept if is_part_of_it(self.S) else None
        return _error(F, self.S, self.overlap, kept, self.left_out, self.overlaps)

    def _kept(self, F: GramOperator, S: FisherOperator, gradients: Tensor | None) -> Tensor | None:
        if self.whole_blocks:
            return F.gram.square().sum(dim=1)
        if gradients is None or not is_part_of_it(self.S):
            return None
        return quadratic(gradients, S)

    def _add(self, overlaps: list[Tensor] | None) -> None:
        if overlaps is None or self.overlaps is None:
            self.overlaps = None
        elif self.overlaps:
            self.overlaps = [a + b for a, b in zip(self.overlaps, overlaps, strict=True)]
        else:
            self.overlaps = overlaps


def _overlap(
    F: GramOperator, S: FisherOperator, gradients: Tensor | None, dense: Tensor | None
) -> float:
    """`⟨F, S⟩` in the cheapest way there is."""
    if dense is not None:
        return float((dense * S.to_dense()).sum())
    if gradients is not None:
        return float(quadratic(gradients, S).sum())
    return float(F.overlap(S))


def _error(
    F: GramOperator,
    S: FisherOperator,
    overlap: float,
    kept: Tensor | None,
    left_out: LeftOut | None,
    overlaps: list[Tensor] | None,
) -> Error:
    norm = float(F.norm())
    if norm == 0:
        return Error(None, None)
    squared = norm**2 - 2 * overlap + float(S.norm()) ** 2
    value = math.sqrt(max(squared, 0.0)) / norm
    if F.num_samples == 1:
        return Error(value, None)
    if left_out is not None and overlaps is not None:
        norms = [without.norm() for without in left_out.operators]
        return Error(value, finite(jackknife_error(F, overlaps, norms, left_out.groups)))
    if kept is not None:
        return Error(value, finite(projection_error(F, F.gram.square().sum(dim=1), kept)))
    return Error(value, None)
