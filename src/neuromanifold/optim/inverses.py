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
from neuromanifold.linalg.packed import WORTH_IT, pack, unpack
from neuromanifold.linalg.projection import Projection
from neuromanifold.operators import BlockMatrix, Matrices
from neuromanifold.structures.diagonal import DiagonalMatrix
from neuromanifold.structures.eigenkronecker import EigenKroneckerMatrix, in_eigenbasis
from neuromanifold.structures.kronecker import KroneckerMatrix
from neuromanifold.structures.meanfield import MeanFieldMatrix
from neuromanifold.structures.projected import ProjectedKroneckerMatrix

__all__ = [
    "Inverse",
    "dampings",
    "dampings_of_factors",
    "from_state",
    "inverses",
    "precondition",
    "to_state",
]


class Inverse(Protocol):
    """What a step needs of `(F + damping)⁻¹`."""

    @property
    def block(self) -> Block:
        """Whose inverse this is."""

    def matmul(self, x: Tensor) -> Tensor:
        """Times vectors `(R, G, O, I)`."""


def dampings(matrices: Sequence[BlockMatrix], damping: float, relative: float) -> list[Tensor]:
    """What is added to each block: `damping` and `relative` times its mean eigenvalue."""
    return [damping + relative * matrix.diagonal().mean() for matrix in matrices]


def inverses(
    matrices: Sequence[BlockMatrix], added: Sequence[Tensor], *, split: bool
) -> list[Inverse]:
    """The damped inverse of each block.

    Args:
        matrices: one per block.
        added: to each, in nats/parameter², positive scalars.
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
        if split and isinstance(matrix, (KroneckerMatrix, ProjectedKroneckerMatrix))
        else _inverse(matrix, damping)
        for matrix, damping in zip(matrices, added, strict=True)
    ]


class _Solve:
    """For matrices whose solve is as cheap as a product."""

    def __init__(self, matrix: BlockMatrix, damping: Tensor) -> None:
        self.matrix = matrix
        self.damping = damping
        self._solver = matrix.solver(damping)

    @property
    def block(self) -> Block:
        return self.matrix.block

    def matmul(self, x: Tensor) -> Tensor:
        return self._solver(x)

    def __reduce__(self) -> tuple[type[_Solve], tuple[BlockMatrix, Tensor]]:
        return _Solve, (self.matrix, self.damping)


@dataclass(frozen=True)
class _Halved:
    """A Kronecker product of which a factor with twice the numbers of the block is kept by a half.

    The wide side of a layer that is far from square takes most of the memory. To put it together
    again in each step costs little beside the rest.
    """

    block: Block
    inputs: Tensor
    outputs: Tensor
    halved: tuple[bool, bool]

    @classmethod
    def of(cls, matrix: KroneckerMatrix) -> _Halved | KroneckerMatrix:
        """Nothing is halved if no factor is wide."""
        block, factors = matrix.block, (matrix.inputs, matrix.outputs)
        wide = [
            f.ndim == 3 and f.shape[-1] >= WORTH_IT and f.numel() > 2 * block.num_parameters
            for f in factors
        ]
        if not any(wide):
            return matrix
        inputs, outputs = (pack(f) if w else f for f, w in zip(factors, wide, strict=True))
        return cls(block, inputs, outputs, halved=(wide[0], wide[1]))

    def whole(self) -> KroneckerMatrix:
        factors = (
            _aligned(unpack(kept)) if halved else kept
            for kept, halved in zip((self.inputs, self.outputs), self.halved, strict=True)
        )
        return KroneckerMatrix(self.block, *factors)

    def matmul(self, x: Tensor) -> Tensor:
        return self.whole().matmul(x)


@singledispatch
def _inverse(matrix: BlockMatrix, damping: Tensor) -> Inverse:
    return _Solve(matrix, damping)


@_inverse.register
def _(matrix: DiagonalMatrix, damping: Tensor) -> Inverse:
    return DiagonalMatrix(matrix.block, (matrix.values + damping).reciprocal_())


@_inverse.register
def _(matrix: Matrices, damping: Tensor) -> Inverse:
    return Matrices(matrix.block, psd.inverse(matrix.matrices, damping))


@_inverse.register
def _(matrix: EigenKroneckerMatrix, damping: Tensor) -> Inverse:
    moments = (matrix.moments + damping).reciprocal_()
    bases = (None if q is None else _aligned(q) for q in (matrix.outputs, matrix.inputs))
    return EigenKroneckerMatrix(matrix.block, moments, *bases)


@_inverse.register
def _(matrix: MeanFieldMatrix, damping: Tensor) -> Inverse:
    """Weights in half precision: they say in which direction the inputs matter, to 0.2 %."""
    return _Solve(matrix.with_weight(matrix.weight.bfloat16()), damping)


@_inverse.register
def _(matrix: KroneckerMatrix, damping: Tensor) -> Inverse:
    return _inverse(in_eigenbasis(matrix), damping)


def _by_factors(matrix: KroneckerMatrix | ProjectedKroneckerMatrix, damping: Tensor) -> Inverse:
    """Each factor damped by itself."""
    of_inputs, of_outputs = dampings_of_factors(matrix, damping)
    inputs = _of_factor(matrix.inputs, of_inputs)
    outputs = _of_factor(matrix.outputs, of_outputs)
    if isinstance(inputs, Projection) or isinstance(outputs, Projection):
        return ProjectedKroneckerMatrix.of(matrix.block, inputs, outputs)
    return _Halved.of(KroneckerMatrix(matrix.block, _aligned(inputs), _aligned(outputs)))


def dampings_of_factors(
    matrix: KroneckerMatrix | ProjectedKroneckerMatrix, damping: Tensor
) -> tuple[Tensor, Tensor]:
    """What is added to the inputs' and to the outputs' factor of each group, `(G,)`."""
    pi = (_mean_eigenvalue(matrix.inputs) / _mean_eigenvalue(matrix.outputs)).sqrt()
    # Without information on one side, that of the other is damped by itself.
    pi = torch.where(pi.isfinite() & (pi > 0), pi, 1)
    root = damping**0.5
    return pi * root, root / pi


def _mean_eigenvalue(factor: Tensor | Projection) -> Tensor:
    if isinstance(factor, Projection):
        return factor.trace() / factor.width
    diagonal = factor if factor.ndim == 2 else factor.diagonal(dim1=1, dim2=2)
    return diagonal.mean(dim=1)


def _of_factor(factor: Tensor | Projection, damping: Tensor) -> Tensor | Projection:
    """Of `(G, n, n)` or `(G, n)`, each group with its own damping."""
    if isinstance(factor, Projection):
        return factor.damped_inverse(damping)
    if factor.ndim == 2:
        return (factor + damping[:, None]).reciprocal_()
    return psd.inverse(factor, damping[:, None])


def precondition(inverse: Inverse, gradients: Params) -> Params:
    """Times the gradients of all parameters of the block, by name."""
    block = inverse.block
    parts = block.columns(gradients)
    like = _some_numbers(inverse)
    if block.fan_in < _WIDE and parts[0].dtype == like.dtype:
        joined = parts[0].clone() if len(parts) == 1 else torch.cat(parts, dim=-1)
    else:  # one copy joins the parameters, casts them and aligns their rows
        joined = psd.aligned_empty(like, 1, *block.shape)
        own = joined.split_with_sizes([slot.columns for slot in block.slots], dim=-1)
        torch._foreach_copy_(own, parts)
    return block.divide(_times(inverse, joined), gradients)


# ---- products ------------------------------------------------------------------------------------
# A bias makes widths odd. Rows that start on cache lines save a fifth of wide products.

_WIDE = 256


def _product(left: Tensor, right: Tensor) -> Tensor:
    """For batches of matrices `(G, ...)`."""
    if right.shape[-1] < _WIDE:
        return torch.mm(left[0], right[0])[None] if len(left) == 1 else left @ right
    out = psd.aligned_empty(right, *left.shape[:-1], right.shape[-1])
    return psd.product(left, right, out)


@singledispatch
def _times(inverse: Inverse, x: Tensor) -> Tensor:
    """Times one vector `(1, G, O, I)`, which may be written over."""
    return inverse.matmul(x)


@_times.register
def _(inverse: KroneckerMatrix, x: Tensor) -> Tensor:
    x = _along_outputs(inverse.outputs, x[0])
    return _along_inputs(inverse.inputs, x)[None]


@_times.register
def _(inverse: _Halved, x: Tensor) -> Tensor:
    return _times(inverse.whole(), x)


@_times.register
def _(inverse: ProjectedKroneckerMatrix, x: Tensor) -> Tensor:
    x = x[0]
    if isinstance(inverse.outputs, Projection):
        x = _projected(inverse.outputs, x)
    else:
        x = _along_outputs(inverse.outputs, x)
    if isinstance(inverse.inputs, Projection):
        return _projected(inverse.inputs, x.mT).mT[None]
    return _along_inputs(inverse.inputs, x)[None]


def _projected(inverse: Projection, x: Tensor) -> Tensor:
    """Times columns `(G, n, m)`, which are written over."""
    along = inverse.vectors.mT @ x
    rest = inverse.rest[:, None, None]
    return x.mul_(rest).baddbmm_(inverse.vectors, inverse.weighted(along) - rest * along)


@_times.register
def _(inverse: EigenKroneckerMatrix, x: Tensor) -> Tensor:
    outputs, inputs = inverse.outputs, inverse.inputs
    x = x[0] if outputs is None else _along_outputs(outputs.mT, x[0])
    x = x if inputs is None else _along_inputs(inputs, x)
    x = x.mul_(inverse.moments)
    x = x if inputs is None else _along_inputs(inputs.mT, x)
    return (x if outputs is None else _along_outputs(outputs, x))[None]


def _along_outputs(factor: Tensor, x: Tensor) -> Tensor:
    """A factor `(G, O, O)`, or its diagonal, times `(G, O, I)`."""
    if factor.ndim == 2:
        return factor[..., None] * x
    return _product(factor, x)


def _along_inputs(factor: Tensor, x: Tensor) -> Tensor:
    """`(G, O, I)` times a symmetric factor, or a basis, `(G, I, I)`; or times a diagonal."""
    if factor.ndim == 2:
        return x * factor[:, None]
    return _product(x, factor)


def _aligned(factor: Tensor) -> Tensor:
    """A copy whose rows start on cache lines, if it is wide."""
    if factor.shape[-1] < _WIDE:
        return factor.contiguous()
    return psd.aligned_empty(factor, *factor.shape).zero_().copy_(factor)


# ---- state ---------------------------------------------------------------------------------------


def _some_numbers(inverse: Inverse) -> Tensor:
    if isinstance(inverse, _Halved):
        return inverse.inputs
    return next(iter(_matrix(inverse).tensors().values()))


def _matrix(inverse: Inverse) -> BlockMatrix:
    matrix = inverse.matrix if isinstance(inverse, _Solve) else inverse
    assert isinstance(matrix, BlockMatrix)
    return matrix


def to_state(inverse: Inverse) -> dict[str, Any]:
    """Plain numbers and tensors."""
    if isinstance(inverse, _Halved):
        kind, damping, halved = KroneckerMatrix.kind, None, inverse.halved
        tensors = {"inputs": inverse.inputs, "outputs": inverse.outputs}
    else:
        matrix = _matrix(inverse)
        kind, tensors, halved = matrix.kind, matrix.tensors(), (False, False)
        damping = inverse.damping if isinstance(inverse, _Solve) else None
    return {
        "kind": kind,
        "block": inverse.block.to_dict(),
        "tensors": tensors,
        "damping": damping,
        "halved": list(halved),
    }


def from_state(entry: Mapping[str, Any], device: torch.device) -> Inverse:
    """The inverse of `to_state`."""
    block, tensors = Block.from_dict(entry["block"]), entry["tensors"]
    if any(entry["halved"]):
        inputs, outputs = (
            kept.to(device, copy=True) if halved else _aligned(kept.to(device))
            for kept, halved in zip(
                (tensors["inputs"], tensors["outputs"]), entry["halved"], strict=True
            )
        )
        return _Halved(block, inputs, outputs, halved=(entry["halved"][0], entry["halved"][1]))
    tensors = {
        # In the same places of memory as before, so that products round the same.
        name: _aligned(value.to(device)) if name in _FACTORS else value.to(device, copy=True)
        for name, value in tensors.items()
    }
    matrix = BlockMatrix.kinds[entry["kind"]](block, **tensors)
    damping = entry["damping"]
    return matrix if damping is None else _Solve(matrix, damping.to(device, copy=True))


_FACTORS = ("inputs", "outputs")
