"""Natural directions of one layer: a solve for every unit, with statistics that are kept.

The Fisher matrix of a directed network has one block per unit (papers.md §5.2),
`F_u = Σ_n c_nu x̃_n x̃_nᵀ`, where the rows x̃ are shared by the units of a layer. A solver is made
once from rows and applied in many steps. The damped direction is `(1 + α) (F + αI)⁻¹ g`: the
natural gradient as α → 0, the plain one as α → ∞ (papers.md §5.3).

Blocks are exact for the rows, or have one basis for all units of a layer, or are diagonal. Where
rows are few for the inputs, directions of a shared basis were measured to be as close to those of
the Fisher matrix as directions of exact blocks, or closer (`benchmarks/belief.py`): the inverse of
a block makes most of what few rows know least.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from neuromanifold.errors import NotPositiveDefiniteError
from neuromanifold.linalg import memory, psd

__all__ = [
    "Blocks",
    "DenseSolver",
    "DiagonalSolver",
    "QRSolver",
    "Rows",
    "SharedSolver",
    "SolverSize",
    "UnitSolver",
    "WoodburySolver",
]

Blocks: TypeAlias = Literal["auto", "exact", "shared", "diagonal"]
"""What is kept of the block of a unit; "auto" is "exact" from `AMPLE` rows per input on, else
"shared"."""
AMPLE = 4
"""Rows per input from which on exact blocks are the better ones, as measured on digits."""

_STRIP = 16
"""Columns of all Fisher blocks of a layer that are made at a time."""
_TEMPORARY_NUMEL = 2**24
"""Numbers of the pairs of inputs that are made at a time."""


@dataclass(frozen=True)
class Rows:
    """What the Fisher blocks of a layer are sums over.

    Args:
        inputs: rows x̃, `(N, I)`; the last column, of ones, is the bias.
        curvature: `(N, B, c, c)`, the weight of a row times the Fisher matrix for the logits of
            each of B variables of c units, σ(1−σ) for Bernoulli units, c = 1; weights sum to 1 over
            the rows.

    Raises:
        ValueError: If the shapes are others.

    Example:
        >>> inputs = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
        >>> Rows(inputs, torch.full((2, 1, 1, 1), 0.25 / 2)).fisher()
        tensor([[[0.2500, 0.0000],
                 [0.0000, 0.2500]]])
    """

    inputs: Tensor
    curvature: Tensor

    def __post_init__(self) -> None:
        shape = self.curvature.shape
        if self.inputs.ndim != 2 or len(shape) != 4 or shape[0] != len(self.inputs):
            raise ValueError(
                f"Rows need inputs (N, I) and curvature (N, B, c, c), got "
                f"{tuple(self.inputs.shape)} and {tuple(shape)}."
            )

    @property
    def size(self) -> SolverSize:
        """All that the memory of a solver depends on."""
        (num, inputs), (variables, classes) = self.inputs.shape, self.curvature.shape[1:3]
        return SolverSize(num, inputs, variables, classes)

    def fisher(self) -> Tensor:
        """The blocks, `(B, c I, c I)`, nats per parameter²."""
        (num, n), (variables, classes) = self.inputs.shape, self.curvature.shape[1:3]
        curvature = self.curvature.flatten(1).mT  # (B c c, N)
        blocks = self.inputs.new_empty(len(curvature), n, n)
        # All units at once are one matrix product with the pairs of inputs; pairs are symmetric,
        # so that only columns on and right of the diagonal are multiplied.
        step = max(min(_STRIP, _TEMPORARY_NUMEL // (num * n)), 1)
        for start in range(0, n, step):
            stop = min(start + step, n)
            pairs = self.inputs[:, start:stop, None] * self.inputs[:, None, start:]
            found = (curvature @ pairs.flatten(1)).unflatten(1, (stop - start, n - start))
            blocks[:, start:stop, start:] = found
            blocks[:, stop:, start:stop] = found[..., stop - start :].mT
        if classes == 1:
            return blocks
        blocks = blocks.view(variables, classes, classes, n, n).transpose(2, 3)
        return blocks.reshape(variables, classes * n, classes * n)

    def diagonal(self) -> Tensor:
        """The diagonals of the blocks, `(O, I)`."""
        per_unit = self.curvature.diagonal(dim1=-2, dim2=-1).flatten(1)  # (N, O)
        return per_unit.mT @ self.inputs.square()

    def solver(self, *, damping: float, blocks: Blocks = "exact") -> UnitSolver:
        """The cheapest solver for these rows.

        Args:
            damping: α, in nats per parameter²; 0 for the pseudo-inverse, which exists in float
                arithmetic if the rows are linearly independent, or span all inputs.
            blocks: what is kept of them; of categorical variables, all but for "diagonal".

        Returns:
            Scalars for roots and for "diagonal"; for exact blocks, with fewer rows than inputs
            Woodbury's identity, or, undamped, a thin QR decomposition, and a Cholesky decomposition
            otherwise.

        Raises:
            ValueError: If the damping is negative.
            NotPositiveDefiniteError: If it is 0 and the blocks are singular.
            TooLargeError: If the inverses do not fit into memory.
        """
        if not damping >= 0:
            raise ValueError(f"damping must be >= 0 nats/parameter², got {damping}.")
        kind = self.size.kind(damping=damping, blocks=blocks)
        memory.require(
            # The matrices, their factors and a copy between them.
            3 * self.size.numbers(damping=damping, blocks=blocks) * self.inputs.element_size(),
            self.inputs.device,
            what=f"To solve for {self.curvature.shape[1]} variables of {self.inputs.shape[1]} "
            f"inputs",
            instead='Draw fewer samples, or use blocks="shared".',
        )
        return kind.of(self, damping)


@dataclass(frozen=True)
class SolverSize:
    """Sizes of the rows of a layer, from which the memory of its solver follows.

    Attributes:
        rows: N.
        inputs: I, bias included.
        variables: B.
        classes: c, units of a variable; 1 but for categorical ones.
    """

    rows: int
    inputs: int
    variables: int
    classes: int = 1

    def kind(self, *, damping: float, blocks: Blocks = "exact") -> type[UnitSolver]:
        """Which solver `Rows.solver` takes."""
        if blocks == "diagonal" or (self.inputs == 1 and self.classes == 1):
            return DiagonalSolver
        if self.classes > 1:
            return DenseSolver
        if blocks == "shared" or (blocks == "auto" and self.rows < AMPLE * self.inputs):
            return SharedSolver
        if self.rows >= self.inputs:
            return DenseSolver
        return WoodburySolver if damping else QRSolver

    def numbers(self, *, damping: float, blocks: Blocks = "exact") -> int:
        """How many numbers the solver keeps beyond the rows.

        Example:
            >>> SolverSize(rows=320, inputs=201, variables=300).numbers(damping=0.1)
            12120300
        """
        return {
            DiagonalSolver: self.variables * self.classes * self.inputs,
            DenseSolver: self.variables * (self.classes * self.inputs) ** 2,
            WoodburySolver: self.variables * self.rows**2,
            QRSolver: self.rows * (self.inputs + self.rows),
            SharedSolver: min(self.rows, self.inputs) * (self.inputs + self.variables),
        }[self.kind(damping=damping, blocks=blocks)]


class UnitSolver(ABC):
    """The damped inverses of the blocks of one layer."""

    damping: float

    @classmethod
    @abstractmethod
    def of(cls, rows: Rows, damping: float) -> UnitSolver:
        """From rows; see `Rows.solver`."""

    @abstractmethod
    def solve(self, gradient: Tensor) -> Tensor:
        """`(1 + α) (F_u + αI)⁻¹ g_u` for every unit.

        Args:
            gradient: `(O, I)`, bias last.

        Returns:
            `(O, I)`.
        """

    def squared_length(self, gradient: Tensor, direction: Tensor) -> Tensor:
        """`Σ_u d_uᵀ F_u d_u` of `direction = solve(gradient)`, a scalar.

        Twice the KL divergence of a step of length 1, to leading order.
        """
        # F d = (1 + α) g − α d, so that no product with F is needed.
        damping = self.damping
        first = (1 + damping) * torch.vdot(gradient.flatten(), direction.flatten())
        return (first - damping * direction.square().sum()).clamp(min=0)


@dataclass(frozen=True)
class DenseSolver(UnitSolver):
    """Inverses by Cholesky decomposition: for at least as many rows as inputs.

    Attributes:
        inverse: `(1 + α) (F_u + αI)⁻¹`, `(B, c I, c I)`.
        damping: α.
    """

    inverse: Tensor
    damping: float

    @classmethod
    def of(cls, rows: Rows, damping: float) -> DenseSolver:
        """From rows; see `Rows.solver`."""
        inverse = torch.cholesky_inverse(psd.cholesky(rows.fisher(), damping))
        return cls(inverse.mul_(1 + damping), damping)

    def solve(self, gradient: Tensor) -> Tensor:
        """See `UnitSolver.solve`."""
        flat = gradient.reshape(self.inverse.shape[:2])
        return _product(self.inverse, flat).view(gradient.shape)


@dataclass(frozen=True)
class WoodburySolver(UnitSolver):
    """Inverses between rows instead of inputs: for fewer rows than inputs.

    `(F + αI)⁻¹ g = (g − U (αQ⁻¹ + UᵀU)⁻¹ Uᵀ g) / α`, with the rows as columns of U and a unit's
    curvature as the diagonal Q. All units share U and `UᵀU` (papers.md §5.3).

    Attributes:
        inputs: Uᵀ, `(N, I)`.
        inner: `(αQ_u⁻¹ + UᵀU)⁻¹`, `(O, N, N)`.
        damping: α.
    """

    inputs: Tensor
    inner: Tensor
    damping: float

    @classmethod
    def of(cls, rows: Rows, damping: float) -> WoodburySolver:
        """From rows; see `Rows.solver`. The damping must be positive."""
        # Q½ (αI + Q½ UᵀU Q½)⁻¹ Q½ is the same and finite where a unit is saturated, Q = 0.
        root = rows.curvature[..., 0, 0].mT.sqrt()  # (O, N)
        gram = root[:, :, None] * (rows.inputs @ rows.inputs.mT) * root[:, None, :]
        inner = torch.cholesky_inverse(psd.cholesky(gram, damping))
        inner.mul_(root[:, :, None]).mul_(root[:, None, :])
        return cls(rows.inputs, inner, damping)

    def solve(self, gradient: Tensor) -> Tensor:
        """See `UnitSolver.solve`."""
        seen = _product(self.inner, gradient @ self.inputs.mT) @ self.inputs
        return (gradient - seen).mul_((1 + self.damping) / self.damping)


@dataclass(frozen=True)
class QRSolver(UnitSolver):
    """Undamped pseudo-inverses by a thin QR decomposition of linearly independent rows.

    `F⁺ g = V (R Q Rᵀ)⁻¹ Vᵀ g` with `U = V R`. All units share V and R, and Q is diagonal: no
    matrix of a unit is ever made. Parts of g outside the span of the rows are dropped.

    Attributes:
        basis: V, `(I, N)`.
        triangle: R, `(N, N)`.
        curvature: the diagonals of Q, `(N, O)`.
        damping: 0.
    """

    basis: Tensor
    triangle: Tensor
    curvature: Tensor
    damping: float = 0.0

    @classmethod
    def of(cls, rows: Rows, damping: float = 0.0) -> QRSolver:
        """From rows, undamped; see `Rows.solver`."""
        assert damping == 0
        basis, triangle = torch.linalg.qr(rows.inputs.mT)
        scale = triangle.diagonal().abs()
        least = len(scale) * torch.finfo(scale.dtype).eps * scale.max()
        if bool((scale <= least).any()) or bool((rows.curvature <= 0).any()):
            raise NotPositiveDefiniteError(
                "Without damping the rows have to be linearly independent and no unit saturated; "
                "samples repeat, or a probability is 0 or 1. Use a damping > 0."
            )
        return cls(basis, triangle, rows.curvature[..., 0, 0])

    def solve(self, gradient: Tensor) -> Tensor:
        """See `UnitSolver.solve`."""
        inside = torch.linalg.solve_triangular(
            self.triangle, (gradient @ self.basis).mT, upper=True
        )
        back = torch.linalg.solve_triangular(self.triangle.mT, inside / self.curvature, upper=False)
        return (self.basis @ back).mT


@dataclass(frozen=True)
class SharedSolver(UnitSolver):
    """One basis for all units of a layer, and each unit's own eigenvalues in it.

    `F_u ≈ V diag(d_u) Vᵀ`: V are the eigenvectors of the mean block of the layer and d_u is the
    diagonal of `Vᵀ F_u V`. No matrix of a unit is ever made, and a step is two matrix products for
    all units. What the basis leaves out, with fewer rows than inputs, has no information.

    Attributes:
        basis: V, `(I, R)`, R the smaller one of rows and inputs.
        scale: `(1 + α) / (d_u + α)` minus `outside`, `(O, R)`.
        outside: factor of what the basis leaves out, `(1 + α) / α`; 0 if that is nothing, and for
            pseudo-inverses.
        damping: α.
    """

    basis: Tensor
    scale: Tensor
    outside: float
    damping: float

    @classmethod
    def of(cls, rows: Rows, damping: float) -> SharedSolver:
        """From rows; see `Rows.solver`."""
        num, inputs = rows.inputs.shape
        curvature = rows.curvature[..., 0, 0]  # (N, O)
        weighted = curvature.mean(1, keepdim=True).sqrt() * rows.inputs
        if num < inputs:
            basis = torch.linalg.svd(weighted, full_matrices=False).Vh.mT.contiguous()
        else:
            basis = psd.eigh(weighted.mT @ weighted)[1]
        own = curvature.mT @ (rows.inputs @ basis).square()
        if not damping and bool((own <= inputs * torch.finfo(own.dtype).eps * own.max()).any()):
            raise NotPositiveDefiniteError(
                "Without damping the rows have to be linearly independent or span all inputs, and "
                "no unit may be saturated; samples repeat, or a probability is 0 or 1. Use a "
                "damping > 0."
            )
        outside = (1 + damping) / damping if damping and num < inputs else 0.0
        return cls(basis, (1 + damping) / (own + damping) - outside, outside, damping)

    def solve(self, gradient: Tensor) -> Tensor:
        """See `UnitSolver.solve`."""
        inside = ((gradient @ self.basis) * self.scale) @ self.basis.mT
        return inside.add_(gradient, alpha=self.outside) if self.outside else inside


@dataclass(frozen=True)
class DiagonalSolver(UnitSolver):
    """Scalars: the diagonal variant, and roots, whose blocks are scalars.

    Attributes:
        scale: `(1 + α) / (F_ii + α)`, `(O, I)`.
        damping: α.
    """

    scale: Tensor
    damping: float

    @classmethod
    def of(cls, rows: Rows, damping: float) -> DiagonalSolver:
        """From rows; see `Rows.solver`."""
        diagonal = rows.diagonal()
        if not damping and bool((diagonal <= 0).any()):
            raise NotPositiveDefiniteError(
                "An input is always 0 in these rows, or a probability is 0 or 1, so that its "
                "Fisher information is 0. Use a damping > 0."
            )
        return cls((1 + damping) / (diagonal + damping), damping)

    def solve(self, gradient: Tensor) -> Tensor:
        """See `UnitSolver.solve`."""
        return gradient * self.scale


def _product(matrices: Tensor, vectors: Tensor) -> Tensor:
    """`M_u v_u` for symmetric `(O, n, n)` and `(O, n)`."""
    # As rows: on CPUs, a batch of columns takes up to five times as long.
    return torch.bmm(vectors[:, None, :], matrices)[:, 0, :]
