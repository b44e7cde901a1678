"""Fisher matrices of disjoint sets of parameters, side by side: zero between the sets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from neuromanifold.linalg import Layout, psd
from neuromanifold.operators._base import FisherOperator, Origin
from neuromanifold.operators.algebra import Sum
from neuromanifold.operators.blocks import BlockOperator
from neuromanifold.operators.coverage import Coverage
from neuromanifold.operators.storage import restore, storable, under

__all__ = ["DirectSum", "direct_sum"]


def direct_sum(parts: Sequence[FisherOperator], layout: Layout, origin: Origin) -> FisherOperator:
    """Join matrices of disjoint sets of parameters.

    Args:
        parts: one matrix for each set.
        layout: of all parameters.
        origin: of the whole; the parts' notes are added to its own.

    Returns:
        A block-diagonal matrix if all parts are, else a `DirectSum`.
    """
    assert sorted(name for part in parts for name in part.layout.names) == sorted(layout.names)
    entries = {entry.parameter: entry for part in parts for entry in part.coverage}
    coverage = Coverage(tuple(entries[name] for name in layout.names))
    notes = (*origin.notes, *(note for part in parts for note in part.origin.notes))
    origin = replace(origin, notes=tuple(dict.fromkeys(notes)))
    if len({part.dtype for part in parts}) == 1 and all(
        isinstance(part, BlockOperator) for part in parts
    ):
        order = {name: i for i, name in enumerate(layout.names)}
        blocks = [matrix for part in parts for matrix in part.blocks]  # type: ignore[attr-defined]
        blocks.sort(key=lambda matrix: min(order[name] for name in matrix.block.parameters))
        return BlockOperator(layout, blocks, coverage, origin)
    return DirectSum(parts, layout, coverage, origin)


@storable("direct sum")
class DirectSum(FisherOperator):
    """`F₁ ⊕ F₂ ⊕ …`: each part acts on its own parameters, and can do what its structure can."""

    def __init__(
        self,
        parts: Sequence[FisherOperator],
        layout: Layout,
        coverage: Coverage,
        origin: Origin,
    ) -> None:
        dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
        super().__init__(layout, coverage, origin, dtype=dtype, device=parts[0].device)
        self.parts = list(parts)

    def _map(self, rows: Tensor, function: Callable[[FisherOperator, Tensor], Tensor]) -> Tensor:
        """Apply a function part by part to rows `(R, P)`."""
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for part in self.parts:
            names = part.layout.names
            own = torch.cat([rows[:, self.layout.slices[name]] for name in names], dim=1)
            moved = function(part, own.to(part.dtype))
            for name in names:
                out[:, self.layout.slices[name]] = moved[:, part.layout.slices[name]]
        return out

    def _matmat(self, rows: Tensor) -> Tensor:
        return self._map(rows, lambda part, own: part._matmat(own))

    def _function(self, function: psd.Function, rows: Tensor) -> Tensor:
        return self._map(rows, lambda part, own: part._function(function, own))

    def _solve(self, rows: Tensor, damping: float) -> Tensor:
        if damping == 0:
            self._require_regular()
        return self._map(rows, lambda part, own: part._solve(own, damping))

    def _eigenvalues(self) -> Tensor:
        values = torch.cat([part._eigenvalues().to(self.dtype) for part in self.parts])
        return values.sort(descending=True).values

    def trace(self) -> Tensor:
        """Sum of the parts' traces, a scalar tensor in nats/parameter²."""
        return torch.stack([part.trace().to(self.dtype) for part in self.parts]).sum()

    def norm(self) -> Tensor:
        """Frobenius norm, a scalar tensor in nats/parameter²."""
        norms = [part.norm().to(self.dtype) for part in self.parts]
        return torch.linalg.vector_norm(torch.stack(norms))

    def _diagonal(self) -> Tensor:
        ones = torch.ones(1, self.num_parameters, dtype=self.dtype, device=self.device)
        return self._map(ones, lambda part, _: part._diagonal()[None])[0]

    def to_dense(self) -> Tensor:
        """The matrix `(P, P)`, zero between the parts."""
        self._require_dense_fits()
        positions = torch.arange(self.num_parameters, device=self.device)
        out = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for part in self.parts:
            index = torch.cat([positions[self.layout.slices[name]] for name in part.layout.names])
            out[index[:, None], index] = part.to_dense().to(self.dtype)
        return out

    def restrict(self, names: Iterable[str]) -> FisherOperator:
        """The principal submatrix of some parameters, part by part."""
        layout = self.layout.restrict(names)
        kept = [
            part.restrict(own)
            for part in self.parts
            if (own := [name for name in part.layout.names if name in layout.shapes])
        ]
        return kept[0] if len(kept) == 1 else direct_sum(kept, layout, self.origin)

    def _scaled(self, factor: float) -> DirectSum:
        return self._with([part._scaled(factor) for part in self.parts])

    def _plus(self, other: FisherOperator) -> FisherOperator | None:
        if not isinstance(other, DirectSum) or len(other.parts) != len(self.parts):
            return None
        sums = []
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            if mine.layout != theirs.layout:
                return None
            total = mine + theirs
            if isinstance(total, Sum):
                return None
            sums.append(total)
        return self._with(sums)

    def _with(self, parts: Sequence[FisherOperator]) -> DirectSum:
        return DirectSum(parts, self.layout, self.coverage, self.origin)

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        descriptions, tensors = [], {}
        for i, part in enumerate(self.parts):
            state, own = part._state()
            tensors.update({f"{i}.{name}": tensor for name, tensor in own.items()})
            descriptions.append(
                {
                    "kind": part.storage_kind,  # type: ignore[attr-defined]
                    "order": list(part.layout.names),
                    "origin": asdict(part.origin),
                    "state": state,
                }
            )
        return {"parts": descriptions}, tensors

    @classmethod
    def _restore(
        cls,
        layout: Layout,
        coverage: Coverage,
        origin: Origin,
        state: dict[str, Any],
        tensors: dict[str, Tensor],
    ) -> DirectSum:
        parts = []
        for i, entry in enumerate(state["parts"]):
            names = tuple(entry["order"])
            parts.append(
                restore(
                    entry["kind"],
                    Layout({name: layout.shapes[name] for name in names}),
                    coverage.restrict(names),
                    entry["origin"],
                    entry["state"],
                    under(str(i), tensors),
                )
            )
        return cls(parts, layout, coverage, origin)
