"""Kronecker factors that are followed along some directions only.

Of a factor M, what is averaged is its image `M U` of k directions U, and its trace. The image says
what M is along U, and where its large eigenvalues lie: at each inversion the directions turn there
(papers.md §4.5). The first ones are random; from their image the best matrix of rank k is made.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neuromanifold.errors import NonFiniteError
from neuromanifold.layers import Side
from neuromanifold.linalg import Block
from neuromanifold.linalg.projection import Projection
from neuromanifold.linalg.recursive import RecursiveInverse as Recursion
from neuromanifold.operators import BlockMatrix
from neuromanifold.optim.curvature import Curvature
from neuromanifold.optim.inverses import dampings_of_factors
from neuromanifold.structures import Kronecker, RecursiveInverse, factors
from neuromanifold.structures._base import Source, Statistics
from neuromanifold.structures.projected import ProjectedKroneckerMatrix

__all__ = ["ProjectedCurvature"]

Key = tuple[str, str]
"""A block's name, and the side of one place of use, `PLACE.SIDE`."""

SIDES = "inputs", "outputs"


@dataclass(frozen=True, repr=False)
class _Images(Kronecker):
    """Images of directions under the factors, and traces, in place of second moments.

    Attributes:
        directions: orthonormal columns `(G, n, k)` by side.
        unseen: sides whose directions are random, and not renewed yet.
        found: the factors that the images gave when matrices were made, with all directions.
        along: coordinates of the rows of a measurement, for the sides in it.
    """

    directions: dict[Key, Tensor] = field(default_factory=dict)
    unseen: set[Key] = field(default_factory=set)
    found: dict[Key, Projection] = field(default_factory=dict)
    along: dict[Key, list[Tensor]] = field(default_factory=dict)

    def of_side(self, block: Block, key: str, side: Side) -> Statistics:
        """Of a side that is wide enough; the units of a lookup are few at a time."""
        factor, width = self.factor(block, key)
        rank = factor.directions(width)
        if rank is None or (block.lookup and key.endswith("outputs")):
            return super().of_side(block, key, side)
        rows = side.rows(reduce=self.weight_sharing == "reduce")  # (G, R, n)
        shape = (len(rows), width, rank)
        directions = self.directions.get((block.name, key))
        if directions is None or directions.shape != shape:  # or frozen or thawed since
            self.directions[block.name, key] = directions = _at_random(shape, key, rows)
            self.unseen.add((block.name, key))
        along = rows @ directions
        if (block.name, key) in self.along:
            self.along[block.name, key].append(along)
        return {f"{key}.image": rows.mT @ along, f"{key}.trace": rows.square().sum(dim=(1, 2))}

    def mean(
        self, block: Block, key: str, statistics: Statistics, count: float | Tensor
    ) -> Tensor | Projection:
        """What the image allows: at first the best matrix of that rank, later by turning."""
        if key in statistics:
            return super().mean(block, key, statistics, count)
        image, trace = (statistics[f"{key}.{part}"].div_(count) for part in ("image", "trace"))
        look = Projection.of_image if (block.name, key) in self.unseen else Projection.turned
        found = look(self.directions[block.name, key], image, trace)
        self.found[block.name, key] = found
        return found


def _at_random(shape: tuple[int, int, int], key: str, like: Tensor) -> Tensor:
    """Orthonormal columns, the same in every run and process."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{key}{shape}".encode()))
    drawn = torch.randn(shape, generator=generator)
    return torch.linalg.qr(drawn.to(like))[0].contiguous()


class ProjectedCurvature(Curvature):
    """Averages of images, directions that are renewed at each inversion, inverses that follow.

    Attributes:
        renewed: how often an inverse that follows was made anew between two inversions, by reason:
            "rows" where there are as many rows as directions, counting those that restore the
            damping, "processes" where some of its rows are elsewhere, "residual" beyond tolerance.
    """

    structure: _Images

    def __init__(self, kronecker: Kronecker) -> None:
        options = (kronecker.weight_sharing, kronecker.inputs, kronecker.outputs)
        super().__init__(_Images(*options))
        self.renewed = dict.fromkeys(("rows", "processes", "residual"), 0)
        self._follows = any(
            isinstance(getattr(kronecker, side), RecursiveInverse) for side in SIDES
        )
        self._following: dict[Key, Recursion] = {}
        self._generator = torch.Generator().manual_seed(0)

    def measure(self, source: Source, decay: float) -> None:
        """Add a measurement, and let the inverses follow it."""
        directions, along = self.structure.directions, self.structure.along
        before, sums = dict(directions), dict(self.averages.sums)
        kept = {key: decay * self._count(key) for key in self._following}
        along.update({key: [] for key in self._following})
        try:
            super().measure(source, decay)
        except NonFiniteError:
            directions.clear()
            directions.update(before)  # those that the averages are along
            raise
        else:
            measured = {block.name for block in source.plan.blocks}
            for key in [key for key in directions if key[0] not in measured]:  # frozen since
                del directions[key]
            for key in list(self._following):
                if self.averages.sums.get(key[0]) is sums[key[0]]:
                    alone = source.reducer is None
                    self._follow(key, torch.cat(along[key], dim=1), kept[key], alone=alone)
                else:  # the averages begin anew, or have ended
                    del self._following[key]
        finally:
            along.clear()

    def matrices(self, blocks: Sequence[Block]) -> list[BlockMatrix]:
        """In new directions."""
        matrices = super().averages_of(blocks)
        for key, found in self.structure.found.items():
            self.structure.directions[key] = found.vectors
            image = found.vectors * found.values[:, None]
            self.averages.sums[key[0]][f"{key[1]}.image"] = image.mul_(self._count(key))
            self.structure.unseen.discard(key)
        self.structure.found.clear()
        return matrices

    def averages_of(self, blocks: Sequence[Block]) -> list[BlockMatrix]:
        """In the directions that there are."""
        matrices = super().averages_of(blocks)
        self.structure.found.clear()
        return matrices

    def _count(self, key: Key) -> float | Tensor:
        """What the sums of a side are divided by."""
        name, side = key
        if side.endswith("inputs"):
            return self.averages.sums[name][f"{side.removesuffix('inputs')}uses"].clamp(min=1)
        return self.averages.counts[name]

    @property
    def events(self) -> dict[str, int]:
        """Of inverses that follow, if they do."""
        if not self._follows:
            return {}
        return {f"renewed/{reason}": count for reason, count in self.renewed.items()}

    # ---- inverses that follow --------------------------------------------------------------

    def inverted(
        self, matrices: Sequence[BlockMatrix], added: Sequence[Tensor], inverses: Sequence[Any]
    ) -> None:
        """Begin to follow new inverses."""
        self._following.clear()
        for matrix, damping, inverse in zip(matrices, added, inverses, strict=True):
            if not isinstance(matrix, ProjectedKroneckerMatrix):
                continue
            if not isinstance(inverse, ProjectedKroneckerMatrix):  # not damped by factors
                continue
            dampings = dict(zip(SIDES, dampings_of_factors(matrix, damping), strict=True))
            for side in SIDES:
                keys = self._followed_as(matrix.block, side)
                sizes = [len(self.structure.directions[key]) for key in keys]
                if not keys:
                    continue
                values = getattr(matrix, side).values.split(sizes)
                for key, s, own in zip(keys, values, dampings[side].split(sizes), strict=True):
                    self._following[key] = Recursion(torch.diag_embed(s), own)

    def _followed_as(self, block: Block, side: str) -> list[Key]:
        """The places of a side that is followed, in the order of groups; none where they share."""
        factor = getattr(self.structure, side)
        if not isinstance(factor, RecursiveInverse) or factor.energy < 1:
            return []
        places = {
            key: int(key[1].partition(".")[0])
            for key in self.structure.directions
            if key[0] == block.name and key[1].endswith(side)
        }
        if len(set(places.values())) < len(places):  # several uses of one weight
            return []
        return sorted(places, key=places.__getitem__)

    def _follow(self, key: Key, rows: Tensor, kept: float | Tensor, *, alone: bool) -> None:
        """By the coordinates `(G, R, k)` of the rows of a measurement."""
        factor = getattr(self.structure, key[1].rpartition(".")[2])
        recursion, moment, most = self._following[key], self._along_directions(key), factor.rows
        count = self._count(key)
        keep = float(kept / count)
        few = min(rows.shape[1], most) + recursion.restored(keep) < rows.shape[2]
        if not (few and alone):
            recursion.renew(moment)
            self.renewed["processes" if few else "rows"] += 1
            return
        if rows.shape[1] > most:
            chosen = torch.randperm(rows.shape[1], generator=self._generator)[:most]
            rows = rows[:, chosen.to(rows.device)] * (rows.shape[1] / most) ** 0.5
        recursion.update(rows / count**0.5, keep)
        residual = recursion.residual(moment, self._generator)
        if not bool((residual <= factor.tolerance).all()):
            recursion.renew(moment)
            self.renewed["residual"] += 1

    def _image(self, key: Key) -> Tensor:
        return self.averages.sums[key[0]][f"{key[1]}.image"] / self._count(key)

    def _along_directions(self, key: Key) -> Tensor:
        """The factor's moments along its directions, `(G, k, k)`."""
        moment = self.structure.directions[key].mT @ self._image(key)
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
        for side in SIDES:
            keys = [k for k in self._followed_as(inverse.block, side) if k in self._following]
            parts = [self._inverse(key) for key in keys]
            sides[side] = factors.joined(parts) if parts else getattr(inverse, side)
        return ProjectedKroneckerMatrix.of(inverse.block, **sides)

    def _inverse(self, key: Key) -> Projection:
        recursion, directions = self._following[key], self.structure.directions[key]
        trace = self.averages.sums[key[0]][f"{key[1]}.trace"] / self._count(key)
        # As the directions were turned last, their moments take the place of eigenvalues.
        moments = (directions * self._image(key)).sum(dim=1)
        average = Projection.completed(moments, directions, trace)
        rest = average.rest_of_inverse(recursion.damping)
        return Projection(recursion.matrix, directions, rest)

    # ---- state -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """With directions, and with what the inverses follow by."""
        return {
            **super().state_dict(),
            "directions": {"/".join(key): u for key, u in self.structure.directions.items()},
            "unseen": ["/".join(key) for key in sorted(self.structure.unseen)],
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
        self.structure.unseen.clear()
        self.structure.unseen.update(map(_key, state["unseen"]))
        self._following = {
            _key(key): Recursion.from_state(entry, device)
            for key, entry in state["following"].items()
        }
        self._generator.set_state(state["generator"].cpu())
        self.renewed = dict(state["renewed"])


def _key(joined: str) -> Key:
    name, _, side = joined.rpartition("/")
    return name, side
