"""Columns of U in `F = U Uᵀ`: per-sample gradients of one block, whole or by their factors."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from neuromanifold.layers import Factored, Indexed, Record
from neuromanifold.layers.parts import TEMPORARY_NUMEL
from neuromanifold.linalg import memory, psd

__all__ = ["FactoredRows", "IndexedRows", "Rows", "WholeRows", "rows_of"]

_STRIP = 128
"""Samples (with their positions) at a time: fewer make narrow products, more waste the symmetry."""


class Rows(ABC):
    """Columns of U for one block and the V·N sweeps and samples of one chunk."""

    num_rows: int

    def gram(self, other: Rows) -> Tensor:
        """`Uᵀ U'` with the rows of another chunk, `(V·N, V'·N')`."""
        some = next(iter(self.tensors().values()))
        out = some.new_zeros(self.num_rows, other.num_rows)
        self.add_gram(other, out, half=other is self)
        return psd.mirrored(out) if other is self else out

    @abstractmethod
    def add_gram(
        self, other: Rows, out: Tensor, weight: float = 1.0, *, half: bool = False
    ) -> None:
        """Add `weight Uᵀ U'` to `out (V·N, V'·N')`; with `half`, not always below its diagonal."""

    @abstractmethod
    def project(self, x: list[Tensor]) -> Tensor:
        """`Uᵀ x` for `x (R, G, O, I)` given slot by slot, `(V·N, R)`."""

    @abstractmethod
    def combine(self, c: Tensor) -> list[Tensor]:
        """`U c` for `c (V·N, R)`, `(R, G, O, I)` in parts along the last axis."""

    @abstractmethod
    def per_sample(self) -> Tensor:
        """The gradients themselves, `(V·N, G, O, I)`."""

    @abstractmethod
    def squares(self) -> Tensor:
        """Sum over V·N of the squared entries, `(G, O, I)`."""

    @abstractmethod
    def restrict(self, columns: list[int]) -> Rows:
        """Some fan-in columns."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The numbers, by argument name of the constructor; the first has the rows' dtype."""


class WholeRows(Rows):
    """Gradients as they are, `(V·N, G, O, I)`."""

    def __init__(self, gradients: Tensor) -> None:
        self.gradients = gradients
        self.num_rows = len(gradients)

    def add_gram(
        self, other: Rows, out: Tensor, weight: float = 1.0, *, half: bool = False
    ) -> None:
        """A matrix product, in strips where half of it is enough."""
        mine, theirs = self.gradients.flatten(1), other.per_sample().flatten(1)
        for start in range(0, self.num_rows, _STRIP):
            first = start if half else 0
            strip = slice(start, start + _STRIP)
            out[strip, first:].addmm_(mine[strip], theirs[first:].T, alpha=weight)

    def project(self, x: list[Tensor]) -> Tensor:
        """One matrix product."""
        return self.gradients.flatten(1) @ torch.cat(x, dim=-1).flatten(1).T

    def combine(self, c: Tensor) -> list[Tensor]:
        """One matrix product."""
        return [(c.T @ self.gradients.flatten(1)).unflatten(1, self.gradients.shape[1:])]

    def per_sample(self) -> Tensor:
        """As they are."""
        return self.gradients

    def squares(self) -> Tensor:
        """Entry by entry."""
        return self.gradients.square().sum(dim=0)

    def restrict(self, columns: list[int]) -> WholeRows:
        """Some columns."""
        return WholeRows(self.gradients[..., columns])

    def tensors(self) -> dict[str, Tensor]:
        """The gradients."""
        return {"gradients": self.gradients}


class FactoredRows(Rows):
    """Gradients `Σ_t g ãᵀ` by their factors: `a (G, N, T, I)` without bias, `g (V, G, N, T, O)`."""

    def __init__(self, a: Tensor, g: Tensor, biased: bool) -> None:
        self.a = a
        self.g = g
        self.biased = biased
        self.num_rows = g.shape[0] * g.shape[2]

    def add_gram(
        self, other: Rows, out: Tensor, weight: float = 1.0, *, half: bool = False
    ) -> None:
        """Inner products of inputs times those of cotangents, summed over pairs of positions."""
        if not isinstance(other, FactoredRows):
            WholeRows(self.per_sample()).add_gram(other, out, weight, half=half)
            return
        sweeps, groups, num_samples, positions = self.g.shape[:4]
        pairs = out.unflatten(1, (-1, other.g.shape[2])).unflatten(0, (sweeps, -1))
        # Few samples at a time, and one sweep of the others: temporaries that stay in the cache.
        strip = min(_STRIP, TEMPORARY_NUMEL // (sweeps * other.a[..., 0].numel()))
        step = max(strip // positions, 1)
        for start in range(0, num_samples, step):
            samples = slice(start, start + step)
            first = start if half and sweeps == 1 else 0
            inputs = self.a[:, samples].flatten(1, 2) @ other.a[:, first:].flatten(1, 2).mT
            if self.biased:
                inputs += 1
            inputs *= weight  # (G, n·T, N'·T')
            for v, theirs in enumerate(other.g[:, :, first:]):
                mine = self.g[: v + 1 if half else None, :, samples]
                left = mine.transpose(0, 1).flatten(1, 3)  # (G, V·n·T, O)
                products = (left @ theirs.flatten(1, 2).mT).unflatten(1, (len(mine), -1))
                part = pairs[: len(mine), samples, v, first:]  # (V, n, N')
                if groups == positions == theirs.shape[2] == 1:
                    part.addcmul_(products[0], inputs)
                else:
                    products *= inputs[:, None]
                    products = products.unflatten(3, theirs.shape[1:3])
                    part += products.unflatten(2, (-1, positions)).sum(dim=(0, 3, 5))

    def project(self, x: list[Tensor]) -> Tensor:
        """Two products per layer: through the inputs, then against the cotangents."""
        n, t = self.a.shape[1:3]
        s = (self.a.flatten(1, 2) @ x[0].mT).unflatten(2, (n, t))  # (R, G, N, T, O)
        inner = torch.einsum("vgnto,rgnto->vnr", self.g, s)
        if self.biased:
            inner += torch.einsum("vgnto,rgo->vnr", self.g, x[1].squeeze(-1))
        return inner.flatten(0, 1)

    def combine(self, c: Tensor) -> list[Tensor]:
        """The same backwards."""
        c = c.unflatten(0, (self.g.shape[0], -1))
        weighted = torch.einsum("vnr,vgnto->rgnto", c, self.g).flatten(2, 3)  # (R, G, N·T, O)
        parts = [weighted.mT @ self.a.flatten(1, 2)]
        if self.biased:
            parts.append(weighted.sum(dim=2)[..., None])
        return parts

    def per_sample(self) -> Tensor:
        """As the record's part does it."""
        return _flat(self._part(slice(None)).per_sample())

    def squares(self) -> Tensor:
        """As the record's part does it, some samples at a time where that makes gradients."""
        num_samples, step = self.a.shape[1], self.a.shape[1]
        if self.g.shape[3] > 1:
            numel = self.g[:, :, 0, 0].numel() * (self.a.shape[-1] + self.biased)
            step = max(TEMPORARY_NUMEL // numel, 1)
        total = self._part(slice(0, step)).squared()
        for start in range(step, num_samples, step):
            total += self._part(slice(start, start + step)).squared()
        return total

    def restrict(self, columns: list[int]) -> Rows:
        """Weights or bias alone."""
        width = self.a.shape[-1]
        if columns == list(range(width)):
            return FactoredRows(self.a, self.g, biased=False)
        if len(columns) > width:
            return self
        return WholeRows(self.g.sum(dim=3).transpose(1, 2).flatten(0, 1)[..., None])

    def tensors(self) -> dict[str, Tensor]:
        """The factors."""
        return {"a": self.a, "g": self.g, "biased": torch.tensor(self.biased, device=self.g.device)}

    def _part(self, samples: slice) -> Factored:
        a, g = self.a[:, samples], self.g[:, :, samples]
        return Factored(a, g, self.biased, slice(0, len(a)))


class IndexedRows(Rows):
    """Gradients of rows of a table: which `indices (N, T)`, −1 for none, and `g (V, N, T, D)`."""

    def __init__(self, g: Tensor, indices: Tensor, table: int) -> None:
        self.indices = indices
        self.g = g
        self.table = table
        self.num_rows = g.shape[0] * g.shape[1]

    def add_gram(
        self, other: Rows, out: Tensor, weight: float = 1.0, *, half: bool = False
    ) -> None:
        """Inner products of cotangents, over pairs of positions with the same index."""
        if not isinstance(other, IndexedRows):
            WholeRows(self.per_sample()).add_gram(other, out, weight, half=half)
            return
        pairs = out.unflatten(1, other.g.shape[:2]).unflatten(0, self.g.shape[:2])
        per_sample = self.g.shape[0] * self.g.shape[2] * other.g[..., 0].numel()
        step = max(TEMPORARY_NUMEL // per_sample, 1)
        for start in range(0, self.g.shape[1], step):
            samples = slice(start, start + step)
            same = self.indices[samples, :, None, None] == other.indices
            products = torch.einsum("vntd,wmsd->vntwms", self.g[:, samples], other.g)
            found = (products * same[None, :, :, None]).sum(dim=(2, 5))
            pairs[:, samples].add_(found, alpha=weight)

    def project(self, x: list[Tensor]) -> Tensor:
        """Looks up."""
        found = x[0][:, 0, self.indices.clamp(min=0)]  # (R, N, T, D)
        return torch.einsum("vntd,rntd->vnr", self.g, found).flatten(0, 1)

    def combine(self, c: Tensor) -> list[Tensor]:
        """Adds up."""
        c = c.unflatten(0, (self.g.shape[0], -1))
        weighted = torch.einsum("vnr,vntd->rntd", c, self.g).flatten(1, 2)
        out = weighted.new_zeros(len(weighted), self.table, weighted.shape[-1])
        return [out.index_add_(1, self.indices.clamp(min=0).flatten(), weighted)[:, None]]

    def per_sample(self) -> Tensor:
        """As the record's part does it."""
        return _flat(self._part().per_sample())

    def squares(self) -> Tensor:
        """As the record's part does it."""
        return self._part().squared()

    def restrict(self, columns: list[int]) -> IndexedRows:
        """There is one parameter."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Indices, cotangents, and the length of the table."""
        table = torch.tensor(self.table, device=self.g.device)
        return {"g": self.g, "indices": self.indices, "table": table}

    def _part(self) -> Indexed:
        return Indexed(self.indices, self.g, self.table)


def rows_of(record: Record) -> Rows:
    """Keep whole gradients or their factors, whichever is smaller or multiplies faster."""
    part = record.single
    if isinstance(part, Indexed) and _smaller(part.g[0, 0], record):
        return IndexedRows(part.g, part.indices, part.num_rows)
    if isinstance(part, Factored) and part.a is not None and _factors_pay(part):
        # A copy: the first layer's input is the user's own tensor, which may change later.
        return FactoredRows(part.a.clone(), part.g, part.biased)
    memory.require(
        record.num_sweeps
        * record.num_samples
        * record.block.num_parameters
        * record.dtype.itemsize,
        record.device,
        what=f"The gradients of {record.block.name!r} for {record.num_samples} samples",
        instead="Use fewer samples, or params=[...] without this layer.",
    )
    if isinstance(part, Factored):
        return WholeRows(_flat(part.per_sample()))
    parts = [some.per_sample() for some in record.split(TEMPORARY_NUMEL, across_sweeps=False)]
    return WholeRows(_flat(torch.cat(parts, dim=2)))


def _flat(gradients: Tensor) -> Tensor:
    """`(V, G, N, O, I)` to `(V·N, G, O, I)`."""
    return gradients.transpose(1, 2).flatten(0, 1)


def _smaller(of_sample: Tensor, record: Record) -> bool:
    return of_sample.numel() < record.block.num_parameters


def _factors_pay(part: Factored) -> bool:
    """Whether factors are smaller than gradients, and multiply as fast in a Gram matrix."""
    assert part.a is not None
    sweeps, _, _, positions, fan_out = part.g.shape
    fan_in = part.a.shape[-1] + part.biased
    whole = sweeps * fan_out * fan_in
    if positions == 0 or whole < positions * (fan_in + sweeps * fan_out):
        return False
    # Multiplications for one pair of samples.
    whole_cost = sweeps * whole
    factored_cost = positions**2 * (fan_in + sweeps**2 * (fan_out + 1))
    return positions == 1 or factored_cost <= whole_cost
