"""The Fisher matrix in sample space: `F = U Uᵀ`, with everything exact through `K = Uᵀ U`.

Column r of U, `(P, R)`, is the scaled gradient of one sample and one sweep. U is never formed where
its factors (inputs and cotangents) are smaller. The R eigenvalues of K are all non-zero eigenvalues
of F (the dual matrix of Karakida et al., arXiv 1806.01316).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from neuromanifold.errors import UnsupportedError
from neuromanifold.layers.parts import TEMPORARY_NUMEL
from neuromanifold.linalg import Block, Layout, memory, psd
from neuromanifold.operators import Coverage, FisherOperator, Origin
from neuromanifold.operators.storage import storable
from neuromanifold.structures._base import Source, Structure, require_finite, unsupported_reducer
from neuromanifold.structures.rows import FactoredRows, IndexedRows, Rows, WholeRows, rows_of

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
        num_rows = first = counted = 0
        for records in source.sweeps():
            if source.num_samples > counted:  # not just further sweeps of the same batch
                first, counted = counted, source.num_samples
            chunk = [rows_of(record) for record in records]
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
            chunks.append(_Chunk(1.0, chunk, first, counted - first))
        weight = 1 / source.normaliser
        return GramOperator(
            source.plan.layout,
            source.plan.blocks,
            [replace(chunk, weight=weight) for chunk in chunks],
            source.coverage(lambda _: ("Gram", True, "")),
            source.origin(self),
        )


@dataclass(frozen=True)
class _Chunk:
    """The rows of every block for one group of sweeps of one batch, and their weight in F.

    Attributes:
        weight: of each row.
        rows: of every block, `(V·N,)`.
        first: number of the first sample; None if the samples are not those of one measurement.
        num_samples: N of the batch.
    """

    weight: float
    rows: list[Rows]
    first: int | None
    num_samples: int


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
    def sample_of_row(self) -> Tensor:
        """Which of the N samples each row belongs to, `(R,)` integers.

        Raises:
            UnsupportedError: If F is a sum of measurements.
        """
        parts = []
        for chunk in self._chunks:
            if chunk.first is None:
                raise UnsupportedError(
                    "This Fisher matrix is a sum of several, whose samples are not known to be "
                    "different. Ask each of them."
                )
            sweeps = chunk.rows[0].num_rows // chunk.num_samples
            samples = torch.arange(chunk.num_samples, device=self.device) + chunk.first
            parts.append(samples.repeat(sweeps))
        return torch.cat(parts)

    @cached_property
    def gram(self) -> Tensor:
        """`K (R, R)`, whose non-zero eigenvalues are those of F."""
        gram = torch.zeros(self.num_rows, self.num_rows, dtype=self.dtype, device=self.device)
        sizes = [chunk.rows[0].num_rows for chunk in self._chunks]
        for i, (left, strip) in enumerate(zip(self._chunks, gram.split(sizes), strict=True)):
            parts = strip.split(sizes, dim=1)
            for j, right in enumerate(self._chunks[i:], start=i):
                weight = math.sqrt(left.weight * right.weight)
                for mine, theirs in zip(left.rows, right.rows, strict=True):
                    mine.add_gram(theirs, parts[j], weight, half=j == i)
        return psd.mirrored(gram)

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
        step = max(TEMPORARY_NUMEL // self.num_parameters, 1)
        for start in range(0, self.num_rows, step):
            some = torch.zeros(
                self.num_rows,
                min(step, self.num_rows - start),
                dtype=self.dtype,
                device=self.device,
            )
            some[start : start + step].fill_diagonal_(1)
            gradients = self._combine(some)
            total += (gradients * other._matmat(gradients.to(other.dtype))).sum()
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
            replace(
                chunk,
                rows=[
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
        chunks = [replace(chunk, weight=chunk.weight * factor) for chunk in self._chunks]
        return GramOperator(self.layout, self._blocks, chunks, self.coverage, self.origin)

    def _plus(self, other: FisherOperator) -> FisherOperator | None:
        if not isinstance(other, GramOperator) or other._blocks != self._blocks:
            return None
        chunks = [replace(chunk, first=None) for chunk in self._chunks + other._chunks]
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
            "chunks": [(chunk.weight, chunk.first, chunk.num_samples) for chunk in self._chunks],
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
        def rows(prefix: str) -> Rows:
            if f"{prefix}.gradients" in tensors:
                return WholeRows(tensors[f"{prefix}.gradients"])
            if f"{prefix}.indices" in tensors:
                g, indices, table = (
                    tensors[f"{prefix}.{name}"] for name in ("g", "indices", "table")
                )
                return IndexedRows(g, indices, int(table))
            a, g, biased = (tensors[f"{prefix}.{name}"] for name in ("a", "g", "biased"))
            return FactoredRows(a, g, bool(biased))

        blocks = [Block.from_dict(entry) for entry in state["blocks"]]
        chunks = [
            _Chunk(weight, [rows(f"{i}.{j}") for j in range(len(blocks))], first, num_samples)
            for i, (weight, first, num_samples) in enumerate(state["chunks"])
        ]
        return cls(layout, blocks, chunks, coverage, origin)


def _total(parts: Iterable[Tensor]) -> Tensor:
    """Sum without a first zero."""
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
