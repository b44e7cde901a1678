"""The Fisher matrix in sample space: `F = U Uᵀ`, with everything exact through `K = Uᵀ U`.

Column r of U, `(P, R)`, is the scaled gradient of one sample and one sweep. U is never formed where
its factors (inputs and cotangents) are smaller. The R eigenvalues of K are all non-zero eigenvalues
of F (the dual matrix of Karakida et al., arXiv 1806.01316).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from neuromanifold.layers import Record
from neuromanifold.linalg import Block, Layout, memory, psd
from neuromanifold.operators import Coverage, FisherOperator, Origin
from neuromanifold.operators.storage import storable
from neuromanifold.structures._base import Source, Structure, require_finite, unsupported_reducer

__all__ = ["Gram", "GramOperator"]


class Gram(Structure):
    """Keeps the records of all samples: exact spectra, solves and samples for any P.

    Memory grows with the number of samples times sweeps, R; one eigendecomposition of `(R, R)`
    serves everything that needs an inverse.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(300, 2), torch.randn(8, 300)
        >>> F = nm.fisher(model, nm.Gaussian(), x, nm.Gram(), estimator=nm.Exact())
        >>> F.eigenvalues().shape  # all others of the 602 are zero
        torch.Size([16])
    """

    def build(self, source: Source) -> GramOperator:
        """Gather the records of every batch and sweep."""
        if source.reducer is not None:
            raise unsupported_reducer("Gram()")
        chunks: list[_Chunk] = []
        num_rows = 0
        for records in source.sweeps():
            chunk = [_rows(record) for record in records]
            blocks = zip(source.plan.blocks, chunk, strict=True)
            require_finite({block.name: rows.tensors() for block, rows in blocks})
            num_rows += chunk[0].num_rows
            memory.require(
                num_rows * num_rows * source.dtype.itemsize,
                source.device,
                what=f"The Gram matrix of {num_rows} samples times sweeps",
                instead="Use fewer samples or sweeps (nm.MonteCarlo(1) instead of nm.Exact()), or "
                "a structure whose memory does not grow with them, such as nm.Kronecker().",
            )
            chunks.append(_Chunk(1.0, chunk))
        weight = 1 / source.normaliser
        return GramOperator(
            source.plan.layout,
            source.plan.blocks,
            [_Chunk(weight, chunk.rows) for chunk in chunks],
            source.coverage(lambda _: ("Gram", True, "")),
            source.origin(self),
        )


class _Rows(ABC):
    """Columns of U for one block and the V·N sweeps and samples of one chunk."""

    num_rows: int

    @abstractmethod
    def gram(self, other: _Rows) -> Tensor:
        """`Uᵀ U'` with the rows of another chunk, `(V·N, V'·N')`."""

    @abstractmethod
    def project(self, x: list[Tensor]) -> Tensor:
        """`Uᵀ x` for `x (R, G, O, I)` given slot by slot, `(V·N, R)`."""

    @abstractmethod
    def combine(self, c: Tensor) -> list[Tensor]:
        """`U c` for `c (V·N, R)`, `(R, G, O, I)` in parts along the last axis."""

    @abstractmethod
    def squares(self) -> Tensor:
        """Sum over V·N of the squared entries, `(G, O, I)`."""

    @abstractmethod
    def restrict(self, columns: list[int]) -> _Rows:
        """Some fan-in columns."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The numbers, by argument name of the constructor."""


class _Whole(_Rows):
    """Gradients as they are, `(V·N, G, O, I)`."""

    def __init__(self, gradients: Tensor) -> None:
        self.gradients = gradients
        self.num_rows = len(gradients)

    def gram(self, other: _Rows) -> Tensor:
        if isinstance(other, _Factored):
            other = _Whole(other.per_sample())
        assert isinstance(other, _Whole)
        return self.gradients.flatten(1) @ other.gradients.flatten(1).T

    def project(self, x: list[Tensor]) -> Tensor:
        return self.gradients.flatten(1) @ torch.cat(x, dim=-1).flatten(1).T

    def combine(self, c: Tensor) -> list[Tensor]:
        return [(c.T @ self.gradients.flatten(1)).unflatten(1, self.gradients.shape[1:])]

    def squares(self) -> Tensor:
        return self.gradients.square().sum(dim=0)

    def restrict(self, columns: list[int]) -> _Whole:
        return _Whole(self.gradients[..., columns])

    def tensors(self) -> dict[str, Tensor]:
        return {"gradients": self.gradients}


class _Factored(_Rows):
    """Gradients `Σ_t g ãᵀ` by their factors: `a (G, N, T, I)` without bias, `g (V, G, N, T, O)`."""

    def __init__(self, a: Tensor, g: Tensor, biased: bool) -> None:
        self.a = a
        self.g = g
        self.biased = biased
        self.num_rows = g.shape[0] * g.shape[2]

    def gram(self, other: _Rows) -> Tensor:
        if isinstance(other, _Whole):
            return _Whole(self.per_sample()).gram(other)
        assert isinstance(other, _Factored)
        positions = self.g.shape[3]
        # Temporaries are V·N·T by V'·N'·T'; some samples at a time keep them in bounds.
        per_sample = self.g.shape[0] * positions * other.g[..., 0].numel()
        step = max(_TEMPORARY_NUMEL // per_sample, 1)
        strips = [
            self._gram_strip(other, slice(start, start + step))
            for start in range(0, self.g.shape[2], step)
        ]
        gram = strips[0] if len(strips) == 1 else torch.cat(strips, dim=1)
        return gram.flatten(2).flatten(0, 1)

    def _gram_strip(self, other: _Factored, samples: slice) -> Tensor:
        """The Gram matrix of some samples, `(V, n, V', N')`."""
        a, g = self.a[:, samples], self.g[:, :, samples]
        n, positions = a.shape[1:3]
        itself = other is self and n == other.a.shape[1]
        inputs = _inner(a.flatten(1, 2), other.a.flatten(1, 2), itself)  # (G, n·T, N'·T')
        if self.biased:
            inputs += 1
        left = g.transpose(0, 1).flatten(1, 3)  # (G, V·n·T, O)
        right = other.g.transpose(0, 1).flatten(1, 3)
        products = _inner(left, right, itself)
        products = products.unflatten(2, other.g.shape[:1] + other.g.shape[2:4])
        products = products.unflatten(1, (-1, n, positions))  # (G, V, n, T, V', N', T')
        inputs = inputs.unflatten(2, other.a.shape[1:3]).unflatten(1, (n, positions))
        products *= inputs[:, None, :, :, None]
        if products.shape[0] == positions == other.a.shape[2] == 1:
            return products[0, :, :, 0, :, :, 0]
        return products.sum(dim=(0, 3, 6))

    def project(self, x: list[Tensor]) -> Tensor:
        n, t = self.a.shape[1:3]
        s = (self.a.flatten(1, 2) @ x[0].mT).unflatten(2, (n, t))  # (R, G, N, T, O)
        inner = torch.einsum("vgnto,rgnto->vnr", self.g, s)
        if self.biased:
            inner += torch.einsum("vgnto,rgo->vnr", self.g, x[1].squeeze(-1))
        return inner.flatten(0, 1)

    def combine(self, c: Tensor) -> list[Tensor]:
        c = c.unflatten(0, (self.g.shape[0], -1))
        weighted = torch.einsum("vnr,vgnto->rgnto", c, self.g).flatten(2, 3)  # (R, G, N·T, O)
        parts = [weighted.mT @ self.a.flatten(1, 2)]
        if self.biased:
            parts.append(weighted.sum(dim=2)[..., None])
        return parts

    def squares(self) -> Tensor:
        if self.g.shape[3] > 1:
            return self.per_sample().square().sum(dim=0)
        weights = self.g.squeeze(3).square().sum(dim=0)  # (G, N, O)
        parts = [weights.mT @ self.a.squeeze(2).square()]
        if self.biased:
            parts.append(weights.sum(dim=1)[..., None])
        return torch.cat(parts, dim=-1)

    def per_sample(self) -> Tensor:
        """`(V·N, G, O, I)`."""
        a = self.a
        if self.biased:
            a = torch.cat([a, a.new_ones(*a.shape[:3], 1)], dim=-1)
        return (self.g.mT @ a).transpose(1, 2).flatten(0, 1)

    def restrict(self, columns: list[int]) -> _Rows:
        width = self.a.shape[-1]
        if columns == list(range(width)):
            return _Factored(self.a, self.g, biased=False)
        if len(columns) > width:
            return self
        return _Whole(self.g.sum(dim=3).transpose(1, 2).flatten(0, 1)[..., None])

    def tensors(self) -> dict[str, Tensor]:
        return {"a": self.a, "g": self.g, "biased": torch.tensor(self.biased)}


def _inner(left: Tensor, right: Tensor, itself: bool) -> Tensor:
    """`left rightᵀ`, by its symmetry where both are the same."""
    return psd.second_moment(left.mT) if itself else left @ right.mT


_TEMPORARY_NUMEL = 2**24


def _rows(record: Record) -> _Rows:
    """Keep whole gradients or their factors, whichever is smaller or multiplies faster."""
    groups, fan_out, fan_in = record.block.shape
    sweeps, positions = record.g.shape[0], record.num_positions
    whole = sweeps * fan_out * fan_in
    factored = positions * (fan_in + sweeps * fan_out)
    # Multiplications for one pair of samples in the Gram matrix.
    whole_cost = sweeps * whole
    factored_cost = positions**2 * (fan_in + sweeps**2 * (fan_out + 1))
    if record.a is None or whole < factored or (positions > 1 and whole_cost < factored_cost):
        memory.require(
            record.num_samples * groups * whole * record.g.dtype.itemsize,
            record.g.device,
            what=f"The gradients of {record.block.name!r} for {record.num_samples} samples",
            instead="Use fewer samples, or params=[...] without this layer.",
        )
        parts = [part.per_sample() for part in record.split(_TEMPORARY_NUMEL)]
        return _Whole(torch.cat(parts, dim=2).transpose(1, 2).flatten(0, 1))
    # A copy: the first layer's input is the user's own tensor, which may change later.
    return _Factored(record.a.clone(), record.g, record.block.biased)


@dataclass(frozen=True)
class _Chunk:
    """The rows of every block for one group of sweeps of one batch, and their weight in F."""

    weight: float
    rows: list[_Rows]


@storable("gram")
class GramOperator(FisherOperator):
    """`F = Σ_r w_r u_r u_rᵀ`, by the factors of the `u_r`."""

    def __init__(
        self,
        layout: Layout,
        blocks: list[Block],
        chunks: list[_Chunk],
        coverage: Coverage,
        origin: Origin,
    ) -> None:
        some = next(iter(chunks[0].rows[0].tensors().values()))
        super().__init__(layout, coverage, origin, dtype=some.dtype, device=some.device)
        self._blocks = blocks
        self._chunks = chunks

    @property
    def num_rows(self) -> int:
        """R, samples times sweeps."""
        return sum(chunk.rows[0].num_rows for chunk in self._chunks)

    @cached_property
    def gram(self) -> Tensor:
        """`K (R, R)`, whose non-zero eigenvalues are those of F."""
        gram = torch.empty(self.num_rows, self.num_rows, dtype=self.dtype, device=self.device)
        row = 0
        for i, left in enumerate(self._chunks):
            rows = slice(row, row := row + left.rows[0].num_rows)
            column = 0
            for right in self._chunks[: i + 1]:
                columns = slice(column, column := column + right.rows[0].num_rows)
                pairs = zip(left.rows, right.rows, strict=True)
                part = _total(mine.gram(theirs) for mine, theirs in pairs)
                part *= math.sqrt(left.weight * right.weight)
                gram[rows, columns] = part
                if left is not right:
                    gram[columns, rows] = part.T
        return gram

    def _project(self, rows: Tensor) -> Tensor:
        """`Ûᵀ x`, `(R, vectors)`, with the weights' square roots in Û."""
        blocks = [block.read_slots(rows, self.layout) for block in self._blocks]
        parts = []
        for chunk in self._chunks:
            pairs = zip(chunk.rows, blocks, strict=True)
            total = _total(mine.project(x) for mine, x in pairs)
            parts.append(total * math.sqrt(chunk.weight))
        return torch.cat(parts)

    def _combine(self, c: Tensor) -> Tensor:
        """`Û c`, rows `(vectors, P)`."""
        out = torch.empty(c.shape[1], self.num_parameters, dtype=self.dtype, device=self.device)
        parts = c.split([chunk.rows[0].num_rows for chunk in self._chunks])
        weighted = [
            part * math.sqrt(chunk.weight) for part, chunk in zip(parts, self._chunks, strict=True)
        ]
        for i, block in enumerate(self._blocks):
            combined = [
                chunk.rows[i].combine(c) for chunk, c in zip(self._chunks, weighted, strict=True)
            ]
            if len({len(parts) for parts in combined}) > 1:  # chunks kept in different forms
                combined = [[torch.cat(parts, dim=-1)] for parts in combined]
            slots = [_total(parts) for parts in zip(*combined, strict=True)]
            if len(slots) == len(block.slots):
                block.write_slots(slots, out, self.layout)
            else:
                block.write(slots[0], out, self.layout)
        return out

    def _matmat(self, rows: Tensor) -> Tensor:
        return self._combine(self._project(rows))

    @cached_property
    def _eigh(self) -> tuple[Tensor, Tensor]:
        return psd.eigh(self.gram)

    @property
    def _cutoff(self) -> float:
        """Eigenvalues of K below this, relative to the largest, are rounding."""
        return self.num_rows * torch.finfo(self.dtype).eps

    def _eigenvalues(self) -> Tensor:
        return self._values.flip(0)[: self.num_parameters]

    @cached_property
    def _values(self) -> Tensor:
        if "_eigh" in self.__dict__:
            return self._eigh[0]
        return psd.eigenvalues(self.gram)

    def _function(self, function: psd.Function, rows: Tensor) -> Tensor:
        # f(F) = f(0) + Û Q [(f(k) − f(0)) / k] Qᵀ Ûᵀ, since Û Q k^{-1/2} are eigenvectors of F.
        values, vectors = self._eigh
        at_zero = function(values.new_zeros(()))
        regular = bool(torch.isfinite(at_zero))
        if not regular:  # only asked for when F has full rank: f(0) acts on nothing
            at_zero = torch.zeros_like(at_zero)
        seen = values > self._cutoff * values[-1]
        safe = torch.where(seen, values, torch.ones_like(values))
        factors = torch.where(seen, (function(safe) - at_zero) / safe, torch.zeros_like(values))
        moved = vectors @ (factors[:, None] * (vectors.T @ self._project(rows)))
        return at_zero * rows + self._combine(moved)

    def _solve(self, rows: Tensor, damping: float) -> Tensor:
        if damping == 0:
            self._require_regular()
            return self._function(torch.reciprocal, rows)
        # Woodbury: (F + λ)⁻¹ = (1 − Û (K + λ)⁻¹ Ûᵀ) / λ.
        inner = torch.cholesky_solve(self._project(rows), self._factor(damping))
        return (rows - self._combine(inner)) / damping

    def _factor(self, damping: float) -> Tensor:
        if self._last_factor is None or self._last_factor[0] != damping:
            self._last_factor = (damping, psd.cholesky(self.gram, damping))
        return self._last_factor[1]

    _last_factor: tuple[float, Tensor] | None = None

    def norm(self) -> Tensor:
        """Frobenius norm, a scalar tensor in nats/parameter²."""
        return torch.linalg.matrix_norm(self.gram)

    def overlap(self, other: FisherOperator) -> Tensor:
        """`⟨F, S⟩ = Σ_r û_rᵀ S û_r` with another Fisher matrix, a scalar tensor.

        With the two Frobenius norms it gives `‖F − S‖` without either matrix.
        """
        if other.layout != self.layout:
            raise ValueError("overlap needs two Fisher matrices over the same parameters.")
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        step = max(_TEMPORARY_NUMEL // self.num_parameters, 1)
        for start in range(0, self.num_rows, step):
            some = torch.zeros(
                self.num_rows,
                min(step, self.num_rows - start),
                dtype=self.dtype,
                device=self.device,
            )
            some[start : start + step].fill_diagonal_(1)
            gradients = self._combine(some)
            total += (gradients * other._matmat(gradients)).sum()
        return total

    def _diagonal(self) -> Tensor:
        out = torch.empty(1, self.num_parameters, dtype=self.dtype, device=self.device)
        for i, block in enumerate(self._blocks):
            total = _total(chunk.rows[i].squares() * chunk.weight for chunk in self._chunks)
            block.write(total[None], out, self.layout)
        return out[0]

    def restrict(self, names: Any) -> GramOperator:
        """The principal submatrix of some parameters."""
        layout = self.layout.restrict(names)
        parts = [block.restrict(layout.names) for block in self._blocks]
        chunks = [
            _Chunk(
                chunk.weight,
                [
                    mine.restrict(part[1])
                    for mine, part in zip(chunk.rows, parts, strict=True)
                    if part is not None
                ],
            )
            for chunk in self._chunks
        ]
        blocks = [part[0] for part in parts if part is not None]
        return GramOperator(
            layout, blocks, chunks, self.coverage.restrict(layout.names), self.origin
        )

    def _scaled(self, factor: float) -> GramOperator:
        chunks = [_Chunk(chunk.weight * factor, chunk.rows) for chunk in self._chunks]
        return GramOperator(self.layout, self._blocks, chunks, self.coverage, self.origin)

    def _plus(self, other: FisherOperator) -> FisherOperator | None:
        if not isinstance(other, GramOperator) or other._blocks != self._blocks:
            return None
        chunks = self._chunks + other._chunks
        return GramOperator(self.layout, self._blocks, chunks, self.coverage, self.origin)

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {
            f"{i}.{j}.{name}": tensor
            for i, chunk in enumerate(self._chunks)
            for j, rows in enumerate(chunk.rows)
            for name, tensor in rows.tensors().items()
        }
        state = {
            "blocks": [block.to_dict() for block in self._blocks],
            "weights": [chunk.weight for chunk in self._chunks],
        }
        return state, tensors

    @classmethod
    def _restore(
        cls,
        layout: Layout,
        coverage: Coverage,
        origin: Origin,
        state: dict[str, Any],
        tensors: dict[str, Tensor],
    ) -> GramOperator:
        def rows(prefix: str) -> _Rows:
            if f"{prefix}.gradients" in tensors:
                return _Whole(tensors[f"{prefix}.gradients"])
            a, g, biased = (tensors[f"{prefix}.{name}"] for name in ("a", "g", "biased"))
            return _Factored(a, g, bool(biased))

        blocks = [Block.from_dict(entry) for entry in state["blocks"]]
        chunks = [
            _Chunk(weight, [rows(f"{i}.{j}") for j in range(len(blocks))])
            for i, weight in enumerate(state["weights"])
        ]
        return cls(layout, blocks, chunks, coverage, origin)


def _total(parts: Iterable[Tensor]) -> Tensor:
    """Sum without a first zero."""
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
