"""Kronecker-factored eigenbases with the exact second moment along each of their directions.

Source: George, Laurent, Bouthillier, Ballas and Vincent, arXiv 1806.03884.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from neuromanifold.capture import Plan
from neuromanifold.errors import UnsupportedError
from neuromanifold.layers import Factored, Indexed, Record
from neuromanifold.linalg import Block, memory, psd
from neuromanifold.operators import BlockMatrix, BlockOperator, frobenius
from neuromanifold.structures import factors
from neuromanifold.structures._base import (
    RECORD_NUMEL,
    AdditiveStructure,
    Source,
    Statistics,
    Structure,
)
from neuromanifold.structures.factors import Full
from neuromanifold.structures.kronecker import Kronecker, KroneckerMatrix
from neuromanifold.structures.passes import KeepingSource, sources_of_passes

__all__ = ["EigenKronecker", "EigenKroneckerMatrix", "in_eigenbasis", "squares_along"]


@dataclass(frozen=True, repr=False)
class EigenKronecker(Structure):
    """`Kronecker` with the right eigenvalues: the closest matrix with its eigenvectors.

    A first pass over the data measures the factors A and B, a second one the second moment of the
    gradient along each product of their eigenvectors, `E[(Q_Bᵀ p Q_A)²]`, one number per parameter,
    with the same sampled labels. Of all matrices with these eigenvectors it is the nearest to the
    exact block in Frobenius norm. Its trace is exact, also where a layer is used at several
    positions. The data must be readable twice; of a single batch, the second pass takes what the
    first has kept. Blocks that `Kronecker` keeps in an exact form are kept in that form.

    Args:
        weight_sharing: of the factors, as for `Kronecker`.
        inputs: what is kept of A.
        outputs: what is kept of B. A side that is kept by its diagonal is not rotated.

    Source: George et al., arXiv 1806.03884.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
        >>> measure = lambda s: nm.fisher(model, nm.Categorical(), x, s, estimator=nm.Exact())
        >>> torch.allclose(measure(nm.EigenKronecker()).trace(), measure(nm.Diagonal()).trace())
        True
    """

    weight_sharing: Literal["expand", "reduce"] = "expand"
    inputs: Full = field(default_factory=Full)
    outputs: Full = field(default_factory=Full)

    def __post_init__(self) -> None:
        self._kronecker()  # which checks the options
        for name, kept in (("inputs", self.inputs), ("outputs", self.outputs)):
            if not isinstance(kept, Full):
                raise TypeError(
                    f"The eigenbases of EigenKronecker are whole: {name} is nm.Full(...), got "
                    f"{kept!r}. nm.Kronecker takes projected factors."
                )

    def _kronecker(self) -> Kronecker:
        return Kronecker(self.weight_sharing, self.inputs, self.outputs)

    def constant_numel(self, plan: Plan) -> int:
        """A basis in place of each factor, and the moments."""
        kronecker = self._kronecker()
        rotated = [block for block in plan.blocks if kronecker.form(block) == "Kronecker"]
        return kronecker.constant_numel(plan) + sum(block.num_parameters for block in rotated)

    def build(self, source: Source) -> BlockOperator:
        """Measure the factors, then the moments along their eigenvectors."""
        self.require_fits(source)
        source.require_repeatable("EigenKronecker()")
        if source.estimator.random and source.data.shuffles:
            raise UnsupportedError(
                f"The loader shuffles, so the second pass of EigenKronecker() would draw the "
                f"labels of {source.estimator!r} for other samples than the first. Use "
                f"shuffle=False, nm.Exact(), or nm.Kronecker(), which reads the data once."
            )
        first, second = sources_of_passes(source, 2)
        first = KeepingSource.of(first)
        blocks = self._kronecker().build(first).blocks
        source.num_samples, source.num_positions = first.num_samples, first.num_positions
        if any(isinstance(matrix, KroneckerMatrix) for matrix in blocks):
            blocks = _Moments(self, blocks).build(first.again(second)).blocks
        coverage = source.coverage(self.represent)
        return BlockOperator(source.plan.layout, blocks, coverage, source.origin(self))

    def represent(self, block: Block) -> tuple[str, bool, str]:
        """EigenKronecker where there would be Kronecker."""
        form, exact, note = self._kronecker().represent(block)
        return ("EigenKronecker" if form == "Kronecker" else form), exact, note


class _Moments(AdditiveStructure):
    """The second pass: moments in the eigenbases of Kronecker blocks; other blocks stay."""

    def __init__(self, structure: EigenKronecker, matrices: list[BlockMatrix]) -> None:
        self._structure = structure
        self._matrices = {matrix.block.name: matrix for matrix in matrices}
        self._bases = {
            name: (self._basis(matrix.outputs), self._basis(matrix.inputs))
            for name, matrix in self._matrices.items()
            if isinstance(matrix, KroneckerMatrix)
        }

    def __repr__(self) -> str:
        return repr(self._structure)

    def _basis(self, factor: Tensor) -> Tensor | None:
        """Eigenvectors `(G, n, n)` as columns; None for a diagonal factor."""
        values, vectors = factors.eigh(factor)
        if vectors is None or self._structure.weight_sharing == "expand":
            return vectors  # with "expand", gradients do not reach into the null space
        return _settle_null_space(values, vectors)

    def split(self, record: Record) -> Iterator[Record]:
        """Whole gradients are made of looked-up rows that are rotated."""
        q_out, _ = self._bases.get(record.block.name, (None, None))
        whole = True if record.block.lookup and q_out is not None else None
        return record.split(RECORD_NUMEL, whole=whole)

    def statistics(self, record: Record) -> Statistics:
        """Squared gradients in the eigenbases."""
        bases = self._bases.get(record.block.name)
        return {} if bases is None else {"moments": squares_along(record, *bases)}

    def assemble(self, block: Block, statistics: Statistics, normaliser: float) -> BlockMatrix:
        """Their mean."""
        if "moments" not in statistics:
            return self._matrices[block.name]
        q_out, q_in = self._bases[block.name]
        moments = statistics["moments"].div_(normaliser)
        return EigenKroneckerMatrix(block, moments, outputs=q_out, inputs=q_in)

    def numel(self, block: Block) -> int:
        """Moments; the bases are there already."""
        return block.num_parameters


def _settle_null_space(values: Tensor, vectors: Tensor) -> Tensor:
    """Eigenvectors `(G, n, n)` whose part in the null space does not depend on rounding.

    Any basis of it is as good as another, but the moments of gradients that reach into it depend on
    which one it is. This one makes fixed numbers on the diagonal, projected, diagonal again.
    """
    n = values.shape[-1]
    null = values <= 10 * n * torch.finfo(values.dtype).eps * values[:, -1:]
    projector = (vectors * null[:, None]) @ vectors.mT
    fixed = torch.linspace(1, 2, n, dtype=values.dtype, device=values.device)
    _, settled = psd.eigh(projector * fixed @ projector)
    # Eigenvalues ascend: the null space comes first in the old basis, and last in the new one.
    return torch.where(null[:, None], settled.flip(-1), vectors)


def squares_along(record: Record, q_out: Tensor | None, q_in: Tensor | None) -> Tensor:
    """Sum over samples and sweeps of `(Q_Bᵀ p Q_A)²`, `(G, O, I)`."""
    part = record.single
    if q_out is None and q_in is None:
        return record.squared()
    if isinstance(part, Factored) and part.a is not None and _factors_pay(part):
        a = part.augmented if q_in is None else _rotate(part.augmented, q_in)
        g = part.g if q_out is None else _rotate(part.g, q_out)
        return Factored(a, g, biased=False, groups=part.groups).squared()
    if isinstance(part, Indexed) and q_out is None and q_in is not None:
        return Indexed(part.indices, part.g @ q_in[0], part.num_rows).squared()
    p = record.per_sample()
    if q_in is not None:
        p = _rotate(p, q_in)
    if q_out is not None:
        p = _rotate(p.mT, q_out)
    squares = p.square().sum(dim=(0, 2))
    return squares if q_out is None else squares.mT


def _factors_pay(part: Factored) -> bool:
    """Whether to rotate both factors takes fewer multiplications than to rotate the gradients."""
    sweeps, _, _, positions, fan_out = part.g.shape
    fan_in = part.augmented.shape[-1]
    of_factors = positions * (fan_in**2 + sweeps * fan_out**2)
    return positions == 1 or 0 < of_factors <= sweeps * fan_out * fan_in * (fan_out + fan_in)


def _rotate(x: Tensor, basis: Tensor) -> Tensor:
    """Rows `(..., G, N, T, n)` by `(G, n, n)`, all of a group in one product."""
    return (x.flatten(-3, -2) @ basis).unflatten(-2, x.shape[-3:-1])


class EigenKroneckerMatrix(BlockMatrix):
    """`(Q_B ⊗ Q_A) diag(S) (Q_B ⊗ Q_A)ᵀ` per group: `moments S (G, O, I)` and two bases.

    Bases `inputs Q_A (G, I, I)` and `outputs Q_B (G, O, O)` have eigenvectors as columns; None
    stands for unit vectors. In a principal submatrix Q_A keeps some of its rows, `(G, I', I)`.
    """

    kind = "eigenkronecker"

    def __init__(
        self,
        block: Block,
        moments: Tensor,
        outputs: Tensor | None = None,
        inputs: Tensor | None = None,
    ) -> None:
        super().__init__(block)
        self.moments = moments
        self.outputs = outputs
        self.inputs = inputs

    def matmul(self, x: Tensor) -> Tensor:
        """Into the bases, and back."""
        x = self._to_outputs(x)
        x = x if self.inputs is None else x @ self.inputs
        x = self.moments * x
        x = x if self.inputs is None else x @ self.inputs.mT
        return self._from_outputs(x)

    def function(self, function: psd.Function, x: Tensor) -> Tensor:
        """Of the moments; in a submatrix, by an eigendecomposition for each output direction."""
        if not self._is_part:
            moments = function(self.moments)
            return EigenKroneckerMatrix(self.block, moments, self.outputs, self.inputs).matmul(x)
        values, vectors = self._eigh
        moved = function(values)[..., None] * (vectors.mT @ self._to_outputs(x)[..., None])
        return self._from_outputs((vectors @ moved).squeeze(-1))

    def eigenvalues(self) -> Tensor:
        """The moments."""
        return (self._eigh[0] if self._is_part else self.moments).flatten()

    def diagonal(self) -> Tensor:
        """By the squares of the bases."""
        out = self.moments if self.outputs is None else self.outputs.square() @ self.moments
        return out if self.inputs is None else out @ self.inputs.square().mT

    def norm(self) -> Tensor:
        """Of the moments."""
        if self.inputs is None or not self._is_part:
            return frobenius(self.moments)
        overlaps = (self.inputs.mT @ self.inputs).square()
        return (self.moments @ overlaps * self.moments).sum().sqrt()

    def tensors(self) -> dict[str, Tensor]:
        """Moments and bases."""
        bases = {"outputs": self.outputs, "inputs": self.inputs}
        return {"moments": self.moments} | {k: v for k, v in bases.items() if v is not None}

    def scaled(self, factor: float) -> EigenKroneckerMatrix:
        """A multiple of the moments."""
        return EigenKroneckerMatrix(self.block, self.moments * factor, self.outputs, self.inputs)

    def restrict(self, block: Block, columns: list[int]) -> EigenKroneckerMatrix:
        """Some rows of the input basis."""
        if self.inputs is None:
            return EigenKroneckerMatrix(block, self.moments[..., columns], self.outputs)
        return EigenKroneckerMatrix(block, self.moments, self.outputs, self.inputs[:, columns])

    @property
    def _is_part(self) -> bool:
        """Whether the columns of the input basis are no longer orthonormal."""
        return self.inputs is not None and self.inputs.shape[1] < self.inputs.shape[2]

    def _to_outputs(self, x: Tensor) -> Tensor:
        return x if self.outputs is None else self.outputs.mT @ x

    def _from_outputs(self, x: Tensor) -> Tensor:
        return x if self.outputs is None else self.outputs @ x

    @cached_property
    def _eigh(self) -> tuple[Tensor, Tensor]:
        """Of a submatrix: values `(G, O, I')`, vectors `(G, O, I', I')`."""
        assert self.inputs is not None
        memory.require(
            2 * self.block.num_parameters * self.block.fan_in * self.moments.dtype.itemsize,
            self.moments.device,
            what=f"The eigenvectors of a part of {self.block.name!r} in EigenKronecker()",
            instead="Products, F.trace and F.diagonal do without them, and the whole layer has "
            f"its own: F.block({self.block.name!r}).",
        )
        inputs = self.inputs[:, None]
        return psd.eigh(inputs * self.moments[..., None, :] @ inputs.mT)


def in_eigenbasis(matrix: KroneckerMatrix) -> EigenKroneckerMatrix:
    """The same matrix, by its eigenvectors."""
    values_in, inputs = factors.eigh(matrix.inputs)
    values_out, outputs = factors.eigh(matrix.outputs)
    moments = values_out[:, :, None] * values_in[:, None, :]
    return EigenKroneckerMatrix(matrix.block, moments, outputs, inputs)
