"""What is estimated: numbers that each input and each draw has a value of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from neuromanifold._estimate import Quantity
from neuromanifold.capture import Plan
from neuromanifold.layers import Factored, Record
from neuromanifold.linalg import Vector
from neuromanifold.structures._base import RECORD_NUMEL

__all__ = ["Entries", "Numbers", "Quadratic", "Traces", "Wanted", "checked_share"]

Wanted: TypeAlias = Literal["trace", "layers", "diagonal", "entries", "quadratic", "eigenvalue"]


def checked_share(quantity: Wanted, quantile: float | None) -> float | None:
    """The share of entries that has to be known, for the one quantity that has it."""
    if quantity != "entries":
        if quantile is not None:
            raise ValueError('quantile goes with quantity="entries" alone.')
        return None
    share = 0.5 if quantile is None else quantile
    if not 0 < share <= 1:
        raise ValueError(
            f"quantile is the share of the entries that is known well enough, above 0 and at most "
            f"1; got {share}."
        )
    return share


class Numbers(ABC):
    """What is estimated: K numbers for each input and draw.

    Attributes:
        numel: K.
        fixed: variances by source, `(K,)` each, that no draws change.
    """

    numel: int
    fixed: Mapping[str, Tensor] = MappingProxyType({})

    @abstractmethod
    def sums(self, records: Iterator[Record], draws: int) -> Tensor:
        """Of the numbers, of their squares, of squared sums over draws, `(3, K)`."""

    @abstractmethod
    def named(self, flat: Tensor) -> Quantity:
        """K numbers as the caller wants them."""


class Traces(Numbers):
    """Squared norm of each sample's score, in all or by layer."""

    def __init__(self, plan: Plan, *, by_layer: bool) -> None:
        self._index = {block.name: i if by_layer else 0 for i, block in enumerate(plan.blocks)}
        self._by_layer = by_layer
        self.numel = len(self._index) if by_layer else 1

    def sums(self, records: Iterator[Record], draws: int) -> Tensor:
        values: dict[int, Tensor] = {}
        for record in records:
            norms = torch.cat([_squared_norms(part) for part in _split(record)], dim=1)
            key = self._index[record.block.name]
            values[key] = values[key] + norms if key in values else norms
        drawn = torch.stack([values[key] for key in range(self.numel)], dim=2)
        return _powers(drawn.unflatten(0, (draws, -1)).sum(dim=1)).sum(dim=1)

    def named(self, flat: Tensor) -> Quantity:
        return dict(zip(self._index, flat, strict=True)) if self._by_layer else flat[0]


class Quadratic(Numbers):
    """Square of each sample's score along a vector.

    Args:
        plan: which parameters.
        vector: over them.
        fixed: variances that no draws change.
    """

    numel = 1

    def __init__(
        self, plan: Plan, vector: Vector, fixed: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        self.fixed = fixed
        rows, _ = plan.layout.rows(vector)
        if len(rows) != 1:
            raise ValueError(f"vector is one vector, flat (P,); got {len(rows)} of them.")
        rows = rows.to(plan.device, plan.dtype)
        self._weights = {block.name: block.read(rows, plan.layout)[0] for block in plan.blocks}

    def sums(self, records: Iterator[Record], draws: int) -> Tensor:
        inner: Tensor | float = 0.0
        for record in records:
            weights = self._weights[record.block.name]
            inner = inner + torch.cat([_along(part, weights) for part in _split(record)], dim=1)
        assert isinstance(inner, Tensor)
        return _powers(inner.square().unflatten(0, (draws, -1)).sum(dim=1)).sum(dim=1)[:, None]

    def named(self, flat: Tensor) -> Quantity:
        return flat[0]


class Entries(Numbers):
    """Squares of the entries of each sample's score."""

    def __init__(self, plan: Plan) -> None:
        self._layout = plan.layout
        self.numel = plan.layout.num_parameters

    def sums(self, records: Iterator[Record], draws: int) -> Tensor:
        rows: Tensor | None = None
        for record in records:
            total = sum(_entry_sums(part, draws) for part in _split(record))
            assert isinstance(total, Tensor)
            if rows is None:
                rows = total.new_empty(3, self.numel)
            record.block.write(total, rows, self._layout)
        assert rows is not None
        return rows

    def named(self, flat: Tensor) -> Quantity:
        return self._layout.unflatten(flat)


def _split(record: Record) -> Iterator[Record]:
    """Parts that stay in the cache; the draws of an input are in the same part."""
    return record.split(RECORD_NUMEL, across_sweeps=False)


def _powers(values: Tensor) -> Tensor:
    """Numbers `(draws, N, ...)` to what is summed over samples, `(3, N, ...)`."""
    total = values.sum(dim=0)
    return torch.stack([total, values.square().sum(dim=0), total.square()])


def _squared_norms(record: Record) -> Tensor:
    """`‖p‖²` of the per-sample gradients, `(V, N)`."""
    part = record.single
    if isinstance(part, Factored) and part.num_positions == 1:  # ‖g aᵀ‖² = ‖g‖² ‖a‖²
        g, a = (x.double().square().sum(dim=(-1, -2)) for x in (part.g, part.augmented))
        return (g * a).sum(dim=1)
    return record.per_sample().double().square_().sum(dim=(1, 3, 4))


def _along(record: Record, weights: Tensor) -> Tensor:
    """Inner products of the per-sample gradients with a vector `(G, O, I)`, `(V, N)`."""
    inner: list[Tensor] = []
    for part in record.parts:
        along = weights[part.groups]
        if isinstance(part, Factored):
            # Through the inputs, which all sweeps share: Σ_t g_t · (W ã_t).
            pushed = _pushed(part, along).unflatten(1, part.g.shape[2:4])  # (G, N, T, O)
            products = part.g * pushed
        else:
            products = part.per_sample() * along[:, None]
        inner.append(products.sum(dim=(1, 3, 4), dtype=torch.float64))
    return torch.stack(inner).sum(dim=0)


def _pushed(part: Factored, along: Tensor) -> Tensor:
    """The inputs times a weight matrix `(G, O, I)` with the bias as last column, `(G, N·T, O)`."""
    bias = along[..., -1][:, None] if part.biased else None
    if part.a is None:
        assert bias is not None
        return bias.expand(-1, part.g.shape[2] * part.g.shape[3], -1)
    inputs, weight = part.a.flatten(1, 2), along[..., : part.a.shape[-1]].mT
    return inputs @ weight if bias is None else torch.baddbmm(bias, inputs, weight)


def _entry_sums(record: Record, draws: int) -> Tensor:
    """Sums over the samples of a record, `(3, G, O, I)`."""
    part = record.single
    if isinstance(part, Factored) and part.num_positions == 1:
        # (g a)² = g² a²: powers of either side apart, so that sums are matrix products.
        inputs = part.augmented.squeeze(2).double().square()  # (G, N, I)
        squares = part.g.squeeze(3).double().square()
        total, *higher = _powers(squares.unflatten(0, (draws, -1)).sum(dim=1))
        fourth = inputs.square()
        return torch.stack([total.mT @ inputs, *(power.mT @ fourth for power in higher)])
    squares = record.per_sample().double().square_()  # (V, G, N, O, I)
    return _powers(squares.unflatten(0, (draws, -1)).sum(dim=1)).sum(dim=2)
