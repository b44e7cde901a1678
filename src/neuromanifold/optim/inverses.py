"""Damped inverses of blocks, made once and applied at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Protocol

import torch
from torch import Tensor

from neuromanifold._typing import Params
from neuromanifold.linalg import Block, psd
from neuromanifold.operators import BlockMatrix, Matrices
from neuromanifold.structures.diagonal import DiagonalMatrix
from neuromanifold.structures.eigenkronecker import EigenKroneckerMatrix, in_eigenbasis
from neuromanifold.structures.kronecker import KroneckerMatrix

__all__ = ["Inverse", "from_state", "inverses", "precondition", "to_state"]


class Inverse(Protocol):
    """What a step needs of `(F + damping)⁻¹`."""

    @property
    def block(self) -> Block:
        """Whose inverse this is."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""

    def matmul(self, x: Tensor) -> Tensor:
        """Times vectors `(R, G, O, I)`."""


def inverses(matrices: Sequence[BlockMatrix], damping: float, *, split: bool) -> list[Inverse]:
    """The damped inverse of each block.

    Args:
        matrices: one per block.
        damping: in nats/parameter², positive.
        split: damp the two factors of a Kronecker product each by itself, by `π√damping` and
            `√damping/π` with `π² = mean eigenvalue of the inputs / of the outputs`: their inverses
            are Kronecker factors again, so that a step takes half the products and no
            eigendecomposition (Martens and Grosse, arXiv 1503.05671, §6.3). The damped matrix is
            larger than `F + damping` by `√damping (A ⊗ 1/π + π ⊗ B)`.

    Returns:
        In the order of the matrices.
    """
    return [
        _by_factors(matrix, damping)
        if split and isinstance(matrix, KroneckerMatrix)
        else _inverse(matrix, damping)
        for matrix in matrices
    ]


@dataclass(frozen=True)
class _Solve:
    """For matrices whose solve is as cheap as a product."""

    matrix: BlockMatrix
    damping: float

    @property
    def block(self) -> Block:
        return self.matrix.block

    def matmul(self, x: Tensor) -> Tensor:
        return self.matrix.solve(x, self.damping)


@singledispatch
def _inverse(matrix: BlockMatrix, damping: float) -> Inverse:
    return _Solve(matrix, damping)


@_inverse.register
def _(matrix: DiagonalMatrix, damping: float) -> Inverse:
    return DiagonalMatrix(matrix.block, (matrix.values + damping).reciprocal_())


@_inverse.register
def _(matrix: Matrices, damping: float) -> Inverse:
    return Matrices(matrix.block, _of_matrices(matrix.matrices, damping))


@_inverse.register
def _(matrix: EigenKroneckerMatrix, damping: float) -> Inverse:
    moments = (matrix.moments + damping).reciprocal_()
    return EigenKroneckerMatrix(matrix.block, moments, matrix.outputs, matrix.inputs)


@_inverse.register
def _(matrix: KroneckerMatrix, damping: float) -> Inverse:
    return _inverse(in_eigenbasis(matrix), damping)


def _by_factors(matrix: KroneckerMatrix, damping: float) -> KroneckerMatrix:
    """Each factor damped by itself."""
    of_inputs, of_outputs = _mean_eigenvalue(matrix.inputs), _mean_eigenvalue(matrix.outputs)
    pi = (of_inputs / of_outputs).sqrt()  # (G,)
    # Without information on one side, that of the other is damped by itself.
    pi = torch.where(pi.isfinite() & (pi > 0), pi, 1)
    root = damping**0.5
    inputs = _of_factor(matrix.inputs, pi * root)
    return KroneckerMatrix(matrix.block, inputs, _of_factor(matrix.outputs, root / pi))


def _mean_eigenvalue(factor: Tensor) -> Tensor:
    diagonal = factor if factor.ndim == 2 else factor.diagonal(dim1=1, dim2=2)
    return diagonal.mean(dim=1)


def _of_factor(factor: Tensor, damping: Tensor) -> Tensor:
    """Of `(G, n, n)` or `(G, n)`, each group with its own damping."""
    if factor.ndim == 2:
        return (factor + damping[:, None]).reciprocal_()
    return _of_matrices(factor, damping[:, None])


def _of_matrices(matrices: Tensor, damping: float | Tensor) -> Tensor:
    """`(M + damping)⁻¹` for a batch `(B, n, n)`, by Cholesky; by eigenvalues where that fails."""
    shifted = matrices.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(damping)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    inverse = torch.cholesky_inverse(factor)
    if bool(failed.any()):
        values, vectors = torch.linalg.eigh(shifted)
        # Rounding below the damping: the matrix is positive semi-definite.
        floor = torch.as_tensor(damping, dtype=values.dtype, device=values.device)
        inverse = (vectors / torch.maximum(values, floor)[:, None]) @ vectors.mT
    return inverse


def to_state(inverse: Inverse) -> dict[str, Any]:
    """Plain numbers and tensors."""
    matrix = inverse.matrix if isinstance(inverse, _Solve) else inverse
    assert isinstance(matrix, BlockMatrix)
    return {
        "kind": matrix.kind,
        "block": matrix.block.to_dict(),
        "tensors": matrix.tensors(),
        "damping": inverse.damping if isinstance(inverse, _Solve) else None,
    }


def from_state(entry: Mapping[str, Any], device: torch.device) -> Inverse:
    """The inverse of `to_state`."""
    tensors = {name: value.to(device, copy=True) for name, value in entry["tensors"].items()}
    matrix = BlockMatrix.kinds[entry["kind"]](Block.from_dict(entry["block"]), **tensors)
    return matrix if entry["damping"] is None else _Solve(matrix, entry["damping"])
