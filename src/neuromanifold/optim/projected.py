"""Kronecker factors that are followed along some directions only.

Of a factor M, what is averaged is its image `M U` of k directions U, and its trace. The image says
what M is along U and where its large eigenvalues lie: at each inversion it gives the best matrix of
rank k, whose eigenvectors are the next directions (papers.md §4.5, with the Nyström matrix of the
image in place of the moments along U alone).
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neuromanifold.layers import Side
from neuromanifold.linalg import Block
from neuromanifold.linalg.projection import Projection
from neuromanifold.linalg.recursive import RecursiveInverse as Recursion
from neuromanifold.operators import BlockMatrix
from neuromanifold.optim.curvature import Curvature
from neuromanifold.structures import Kronecker, RecursiveInverse
from neuromanifold.structures._base import Source, Statistics
from neuromanifold.structures.projected import ProjectedKroneckerMatrix

__all__ = ["ProjectedCurvature"]

Key = tuple[str, str]
"""A block's name, and the side of one place of use, `PLACE.SIDE`."""


@dataclass(frozen=True, repr=False)
class _Images(Kronecker):
    """Images of directions under the factors, and traces, in place of second moments.

    Attributes:
        directions: orthonormal columns `(G, n, k)` by side.
        found: the factor that the image gave last, with all directions.
        along: coordinates of the rows of a measurement, for the sides in it.
    """

    directions: dict[Key, Tensor] = field(default_factory=dict)
    found: dict[Key, Projection] = field(default_factory=dict)
    along: dict[Key, list[Tensor]] = field(default_factory=dict)

    def of_side(self, block: Block, key: str, side: Side) -> Statistics:
        """Of a side that is wide enough."""
        factor, width = self.factor(block, key)
        rank = factor.directions(width)
        if rank is None or block.lookup:
            return super().of_side(block, key, side)
        rows = side.rows(reduce=self.weight_sharing == "reduce")  # (G, R, n)
        shape = (len(rows), width, rank)
        directions = self.directions.get((block.name, key))
        if directions is None or directions.shape != shape:  # or frozen or thawed since
            self.directions[block.name, key] = directions = _at_random(shape, key, rows)
        along = rows @ directions
        if (block.name, key) in self.along:
            self.along[block.name, key].append(along)
        return {f"{key}.image": rows.mT @ along, f"{key}.trace": rows.square().sum(dim=(1, 2))}

    def mean(
        self, block: Block, key: str, statistics: Statistics, count: float | Tensor
    ) -> Tensor | Projection:
        """The best matrix that the image allows."""
        if key in statistics:
            return super().mean(block, key, statistics, count)
        image, trace = statistics[f"{key}.image"] / count, statistics[f"{key}.trace"] / count
        found = Projection.of_image(self.directions[block.name, key], image, trace)
        self.found[block.name, key] = found
        return found.cut(self.factor(block, key)[0].energy)

    def symmetric(self, block: Block) -> tuple[str, ...]:
        """Factors that are kept whole."""
        return "inputs", "outputs", "moments"


def _at_random(shape: tuple[int, int, int], key: str, like: Tensor) -> Tensor:
    """Orthonormal columns, the same in every run and process."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{key}{shape}".encode()))
    drawn = torch.randn(shape, generator=generator).to(like.device, torch.float32)
    return torch.linalg.qr(drawn)[0].to(like)


class ProjectedCurvature(Curvature):
    """Averages of images, directions that are renewed at each inversion, inverses that follow.

    Attributes:
        renewed: how often an inverse that follows was made anew between two inversions, by reason:
            "rows" where a measurement has as many rows as there are directions, "processes" where
            some of its rows are elsewhere, "residual" where rounding had grown.
    """

    structure: _Images

    def __init__(self, kronecker: Kronecker) -> None:
        options = (kronecker.weight_sharing, kronecker.inputs, kronecker.outputs)
        super().__init__(_Images(*options))
        self.renewed: Counter[str] = Counter()
        self._following: dict[Key, Recursion] = {}
        self._generator = torch.Generator().manual_seed(0)
        self._alone = True

    def measure(self, source: Source, decay: float) -> None:
        """Add a measurement, and let the inverses follow it."""
        before = {key: decay * self._count(key) for key in self._following}
        self._alone = source.reducer is None
        self.structure.along.update({key: [] for key in self._following})
        try:
            super().measure(source, decay)
            for key, kept in before.items():
                self._follow(key, kept / self._count(key))
        finally:
            self.structure.along.clear()

    def matrices(self, blocks: Sequence[Block]) -> list[BlockMatrix]:
        """In new directions."""
        self.structure.found.clear()
        matrices = super().matrices(blocks)
        for key, found in self.structure.found.items():
            self.structure.directions[key] = found.vectors
            image = found.vectors * found.values[:, None]
            self.averages.sums[key[0]][f"{key[1]}.image"] = image * self._count(key)
        return matrices

    def _count(self, key: Key) -> float | Tensor:
        """What the sums of a side are divided by."""
        name, side = key
        if side.endswith("inputs"):
            return self.averages.sums[name][f"{side.removesuffix('inputs')}uses"].clamp(min=1)
        return self.averages.counts[name]

    # ---- inverses that follow --------------------------------------------------------------

    def inverted(self, matrices: Sequence[BlockMatrix], inverses: Sequence[Any]) -> None:
        """Begin to follow new inverses."""
        self._following.clear()
        for matrix, inverse in zip(matrices, inverses, strict=True):
            if not isinstance(inverse, ProjectedKroneckerMatrix):
                continue
            for side in ("outputs", "inputs"):
                found, damped = getattr(matrix, side), getattr(inverse, side)
                key = self._followed_as(matrix.block, side)
                if key is not None and isinstance(damped, Projection):
                    damping = 1 / damped.rest - found.rest
                    self._following[key] = Recursion(torch.diag_embed(found.values), damping)

    def _followed_as(self, block: Block, side: str) -> Key | None:
        """The key of a side that is to be followed; None if there is no single one."""
        factor, _ = self.structure.factor(block, side)
        if not isinstance(factor, RecursiveInverse) or factor.energy < 1:
            return None
        keys = [key for key in self.structure.directions if key[0] == block.name]
        keys = [key for key in keys if key[1].endswith(side)]
        return keys[0] if len(keys) == 1 else None

    def _follow(self, key: Key, keep: float | Tensor) -> None:
        recursion, side = self._following[key], key[1]
        factor = getattr(self.structure, side.rpartition(".")[2])
        assert isinstance(factor, RecursiveInverse)
        rows = torch.cat(self.structure.along[key], dim=1)
        moment = self._along_directions(key)
        few = min(rows.shape[1], factor.rows) < rows.shape[2]
        if not (few and self._alone):
            recursion.renew(moment)
            self.renewed["processes" if few else "rows"] += 1
            return
        if rows.shape[1] > factor.rows:
            chosen = torch.randperm(rows.shape[1], generator=self._generator)[: factor.rows]
            rows = rows[:, chosen.to(rows.device)] * (rows.shape[1] / factor.rows) ** 0.5
        recursion.update(rows / self._count(key) ** 0.5, float(keep))
        residual = recursion.residual(moment, self._generator)
        if not bool((residual <= factor.tolerance).all()):
            recursion.renew(moment)
            self.renewed["residual"] += 1

    def _along_directions(self, key: Key) -> Tensor:
        """The factor's moments along its directions, `(G, k, k)`."""
        image = self.averages.sums[key[0]][f"{key[1]}.image"] / self._count(key)
        moment = self.structure.directions[key].mT @ image
        return (moment + moment.mT) / 2

    def followed(self, inverses: list[Any]) -> list[Any]:
        """The inverses as they are after a measurement."""
        if not self._following:
            return inverses
        return [
            self._moved(inverse) if isinstance(inverse, ProjectedKroneckerMatrix) else inverse
            for inverse in inverses
        ]

    def _moved(self, inverse: ProjectedKroneckerMatrix) -> ProjectedKroneckerMatrix:
        sides: dict[str, Tensor | Projection] = {}
        for side in ("outputs", "inputs"):
            key = self._followed_as(inverse.block, side)
            sides[side] = getattr(inverse, side)
            if key is None or key not in self._following:
                continue
            recursion, directions = self._following[key], self.structure.directions[key]
            trace = self.averages.sums[key[0]][f"{key[1]}.trace"] / self._count(key)
            held = self._along_directions(key).diagonal(dim1=1, dim2=2).sum(-1)
            others = directions.shape[1] - directions.shape[2]
            rest = (trace - held).clamp(min=0) / max(others, 1)
            sides[side] = Projection(recursion.matrix, directions, 1 / (rest + recursion.damping))
        return ProjectedKroneckerMatrix.of(inverse.block, **sides)

    # ---- state -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """With directions, and with what the inverses follow by."""
        return {
            **super().state_dict(),
            "directions": {"/".join(key): u for key, u in self.structure.directions.items()},
            "following": {"/".join(key): r.state_dict() for key, r in self._following.items()},
            "generator": self._generator.get_state(),
            "renewed": dict(self.renewed),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state, device)
        self.structure.directions.clear()
        for key, directions in state["directions"].items():
            self.structure.directions[_key(key)] = directions.to(device, copy=True)
        self._following = {
            _key(key): Recursion.from_state(entry, device)
            for key, entry in state["following"].items()
        }
        self._generator.set_state(state["generator"].cpu())
        self.renewed = Counter(state["renewed"])


def _key(joined: str) -> Key:
    name, _, side = joined.rpartition("/")
    return name, side
