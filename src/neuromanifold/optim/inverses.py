"""Damped inverses of blocks, made once and applied at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from neuromanifold._typing import Params
from neuromanifold.linalg import Block, packed, psd
from neuromanifold.linalg.projection import Projection
from neuromanifold.operators import BlockMatrix, Matrices
from neuromanifold.structures.diagonal import DiagonalMatrix
from neuromanifold.structures.eigenkronecker import EigenKroneckerMatrix, in_eigenbasis
from neuromanifold.structures.kronecker import KroneckerMatrix
from neuromanifold.structures.meanfield import MeanFieldMatrix
from neuromanifold.structures.projected import ProjectedKroneckerMatrix
from neuromanifold.structures.quasidiagonal import QuasiDiagonalMatrix

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
        self._solver = _solver(matrix, damping)

    @property
    def block(self) -> Block:
        return self.matrix.block

    def matmul(self, x: Tensor) -> Tensor:
        """Times vectors `(R, G, O, I)`, which may be written over."""
        return self._solver(x)

    def __reduce__(self) -> tuple[type[_Solve], tuple[BlockMatrix, Tensor]]:
        return _Solve, (self.matrix, self.damping)


@singledispatch
def _solver(matrix: BlockMatrix, damping: Tensor) -> Callable[[Tensor], Tensor]:
    """`solve`, which may write over what it is given."""
    return matrix.solver(damping)


@_solver.register
def _(matrix: QuasiDiagonalMatrix, damping: Tensor) -> Callable[[Tensor], Tensor]:
    return _BiasEliminated(matrix, damping)


class _BiasEliminated:
    """`(diag(d) + r rᵀ + damping)⁻¹` of each unit.

    The bias is eliminated first, by hand: what is left of its diagonal may be the damping alone.
    """

    def __init__(self, matrix: QuasiDiagonalMatrix, damping: Tensor) -> None:
        self._matrix = matrix
        self._damping = damping
        self._row, self._of_bias = matrix.row[..., :-1], matrix.row[..., -1:]
        weights = (self._row.square() / self._diagonal()).sum(dim=-1, keepdim=True)
        self._bias = matrix.rest[..., -1:] + damping
        self._one = 1 + weights
        self._determinant = self._bias * self._one + self._of_bias.square()

    def _diagonal(self) -> Tensor:
        return self._matrix.rest[..., :-1] + self._damping

    def __call__(self, x: Tensor) -> Tensor:
        """Times vectors `(R, G, O, I)`, which are written over."""
        weights, bias = x[..., :-1], x[..., -1:]
        diagonal = self._diagonal()
        weights.div_(diagonal)
        seen = (self._row * weights).sum(dim=-1, keepdim=True)
        along = (self._bias * seen + self._of_bias * bias) / self._determinant
        bias.copy_((self._one * bias - self._of_bias * seen) / self._determinant)
        weights.addcmul_(torch.div(self._row, diagonal, out=diagonal), along, value=-1)
        return x


@dataclass(frozen=True)
class _Half:
    """Symmetric matrices by the numbers that differ, as `packed.pack` gives them."""

    numbers: Tensor


@dataclass(frozen=True)
class _Halved:
    """A Kronecker product of which a factor with twice the numbers of the block is kept by a half.

    The wide side of a layer that is far from square takes most of the memory.
    """

    kind: ClassVar[str] = KroneckerMatrix.kind

    block: Block
    inputs: Tensor | _Half
    outputs: Tensor | _Half

    @classmethod
    def of(cls, matrix: KroneckerMatrix) -> _Halved | KroneckerMatrix:
        """Nothing is halved if no factor is wide."""
        block, factors = matrix.block, (matrix.inputs, matrix.outputs)
        wide = [
            f.ndim == 3 and f.shape[-1] >= packed.WORTH_IT and f.numel() > 2 * block.num_parameters
            for f in factors
        ]
        if not any(wide):
            return matrix
        kept = (_Half(packed.pack(f)) if w else f for f, w in zip(factors, wide, strict=True))
        return cls(block, *kept)

    @property
    def halved(self) -> list[bool]:
        """Whether inputs are, and outputs."""
        return [isinstance(side, _Half) for side in (self.inputs, self.outputs)]

    def tensors(self) -> dict[str, Tensor]:
        """The numbers of both sides."""
        sides = {"inputs": self.inputs, "outputs": self.outputs}
        return {name: s.numbers if isinstance(s, _Half) else s for name, s in sides.items()}


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
    # One copy joins the parameters, casts them and aligns their rows.
    joined = _empty(_some_numbers(inverse), 1, *block.shape)
    own = joined.split_with_sizes([slot.columns for slot in block.slots], dim=-1)
    torch._foreach_copy_(own, block.columns(gradients))
    return block.divide(_times(inverse, joined), gradients)


# ---- products ------------------------------------------------------------------------------------
# Fresh memory costs more than a pass over memory that is there, so that vectors are written over.
# A bias makes widths odd. Rows that start on cache lines save a fifth of wide products.

_WIDE = 256


def _empty(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised; rows start on cache lines, if they are wide."""
    return like.new_empty(shape) if shape[-1] < _WIDE else psd.aligned_empty(like, *shape)


@singledispatch
def _times(inverse: Inverse, x: Tensor) -> Tensor:
    """Times one vector `(1, G, O, I)`, which may be written over."""
    assert isinstance(inverse, (_Solve, BlockMatrix))
    return inverse.matmul(x)


@_times.register
def _(inverse: DiagonalMatrix, x: Tensor) -> Tensor:
    return x.mul_(inverse.values)


@_times.register
def _(inverse: KroneckerMatrix | ProjectedKroneckerMatrix | _Halved, x: Tensor) -> Tensor:
    return _in_turn(x, (_along_outputs, inverse.outputs), (_along_inputs, inverse.inputs))


@_times.register
def _(inverse: EigenKroneckerMatrix, x: Tensor) -> Tensor:
    outputs, inputs = inverse.outputs, inverse.inputs
    return _in_turn(
        x,
        (_along_outputs, None if outputs is None else outputs.mT),
        (_along_inputs, inputs),
        (_entrywise, inverse.moments),
        (_along_inputs, None if inputs is None else inputs.mT),
        (_along_outputs, outputs),
    )


Factor = Tensor | Projection | _Half
Places = tuple[Tensor, Tensor]
"""Where `(G, O, I)` is, and as much memory that is free."""


def _in_turn(x: Tensor, *products: tuple[Callable[[Any, Places], Places], Factor | None]) -> Tensor:
    """Products of `(1, G, O, I)` one after the other, to and fro between two places."""
    places = x[0], _empty(x, *x.shape[1:])
    for times, factor in products:
        if factor is not None:
            places = times(factor, places)
    return places[0][None]


def _along_outputs(factor: Factor, places: Places) -> Places:
    """A symmetric factor, or a basis, `(G, O, O)`, or a diagonal, times `(G, O, I)`."""
    x, free = places
    if isinstance(factor, Projection):
        along = factor.vectors.mT @ x
        rest = factor.rest[:, None, None]
        weights = factor.weighted(along) - rest * along
        return x.mul_(rest).baddbmm_(factor.vectors, weights), free
    if isinstance(factor, _Half):
        return packed.product(factor.numbers, x, free), x
    if factor.ndim == 2:
        return x.mul_(factor[..., None]), free
    return psd.product(factor, x, free), x


def _along_inputs(factor: Factor, places: Places) -> Places:
    """`(G, O, I)` times a symmetric factor, or a basis, `(G, I, I)`, or a diagonal."""
    x, free = places
    if isinstance(factor, Tensor) and factor.ndim == 3:
        return psd.product(x, factor, free), x
    x, free = _along_outputs(factor, (x.mT, free.mT))
    return x.mT, free.mT


def _entrywise(factor: Tensor, places: Places) -> Places:
    x, free = places
    return x.mul_(factor), free


def _aligned(factor: Tensor) -> Tensor:
    """A copy whose rows start on cache lines, if it is wide."""
    if factor.shape[-1] < _WIDE:
        return factor.contiguous()
    return psd.aligned_empty(factor, *factor.shape).zero_().copy_(factor)


# ---- state ---------------------------------------------------------------------------------------


def _some_numbers(inverse: Inverse) -> Tensor:
    return next(iter(_kept(inverse).tensors().values()))


def _kept(inverse: Inverse) -> BlockMatrix | _Halved:
    kept = inverse.matrix if isinstance(inverse, _Solve) else inverse
    assert isinstance(kept, (BlockMatrix, _Halved))
    return kept


def to_state(inverse: Inverse) -> dict[str, Any]:
    """Plain numbers and tensors."""
    kept = _kept(inverse)
    return {
        "kind": kept.kind,
        "block": inverse.block.to_dict(),
        "tensors": kept.tensors(),
        "damping": inverse.damping if isinstance(inverse, _Solve) else None,
        "halved": kept.halved if isinstance(kept, _Halved) else [False, False],
    }


def from_state(entry: Mapping[str, Any], device: torch.device) -> Inverse:
    """The inverse of `to_state`."""
    block, tensors = Block.from_dict(entry["block"]), entry["tensors"]
    if any(entry["halved"]):
        sides = zip((tensors[name] for name in _FACTORS), entry["halved"], strict=True)
        return _Halved(
            block,
            *(
                _Half(kept.to(device, copy=True)) if halved else _aligned(kept.to(device))
                for kept, halved in sides
            ),
        )
    tensors = {
        # In the same places of memory as before, so that products round the same.
        name: _aligned(value.to(device)) if name in _FACTORS else value.to(device, copy=True)
        for name, value in tensors.items()
    }
    matrix = BlockMatrix.kinds[entry["kind"]](block, **tensors)
    damping = entry["damping"]
    return matrix if damping is None else _Solve(matrix, damping.to(device, copy=True))


_FACTORS = ("inputs", "outputs")
