"""What a Fisher matrix can do."""

from __future__ import annotations

import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from neuromanifold._typing import Params
from neuromanifold.errors import UnsupportedError, listed
from neuromanifold.linalg import Layout, Vector, memory, psd
from neuromanifold.operators.coverage import Coverage

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

__all__ = ["FisherOperator", "NaiveFallbackWarning", "Origin"]


class NaiveFallbackWarning(UserWarning):
    """A result is exact but was computed the slow way, one product per parameter."""


@dataclass(frozen=True)
class Origin:
    """Where a Fisher matrix comes from: the choices it was measured with.

    Attributes:
        num_samples: N, over all batches.
        structure, estimator, likelihood: the objects' representations.
        per: "sample" or "position".
        notes: what else a reader of the numbers should know.
    """

    num_samples: int
    structure: str
    estimator: str
    likelihood: str
    per: str = "sample"
    notes: tuple[str, ...] = ()


class FisherOperator(ABC):
    """A symmetric positive semi-definite matrix over parameters, `(P, P)`, in nats/parameter².

    A method is exact for this operator or raises. Vectors are dicts from parameter name to tensor,
    or flat `(P,)` or `(P, R)` tensors in the layout's order; the answer has the kind that came in.

    A new operator must write `_matmat`. With `_function` and `_eigenvalues` it can solve, take
    square roots, determinants and samples; what it does not write has a slow exact default or an
    error.

    Args:
        layout: names and shapes of the parameters.
        coverage: how each parameter is represented.
        origin: where the matrix comes from.
        dtype: of the numbers.
        device: where they are.
    """

    def __init__(
        self,
        layout: Layout,
        coverage: Coverage,
        origin: Origin,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layout = layout
        self.coverage = coverage
        self._origin = origin
        self.dtype = dtype
        self.device = device

    @property
    def origin(self) -> Origin:
        """Where the matrix comes from."""
        return self._origin

    @origin.setter
    def origin(self, origin: Origin) -> None:
        self._origin = origin

    # ---- what an operator writes -----------------------------------------------------------

    @abstractmethod
    def _matmat(self, rows: Tensor) -> Tensor:
        """The matrix times R vectors, rows `(R, P)` to rows `(R, P)`."""

    def _function(self, function: psd.Function, rows: Tensor) -> Tensor:
        """A function of the matrix (acting on eigenvalues) times rows `(R, P)`."""
        raise self._unsupported("functions of the matrix")

    def _solve(self, rows: Tensor, damping: float) -> Tensor:
        """`(F + damping)⁻¹` times rows."""
        if damping == 0:
            self._require_regular()
        return self._function(lambda values: (values + damping).reciprocal_(), rows)

    def _eigenvalues(self) -> Tensor:
        """Eigenvalues in descending order; zeros at the end may be left out."""
        raise self._unsupported("eigenvalues")

    # ---- products --------------------------------------------------------------------------

    def __matmul__(self, v: Vector) -> Any:
        """`F v` for one vector, or for each column of a `(P, R)` tensor."""
        rows, restore = self._rows(v)
        return restore(self._matmat(rows))

    def matmat(self, vectors: Tensor) -> Tensor:
        """`F V` for the columns of `V (P, R)`."""
        if not isinstance(vectors, Tensor) or vectors.ndim != 2:
            raise ValueError("matmat takes a (P, R) tensor; use F @ v for dicts and flat vectors.")
        result: Tensor = self @ vectors
        return result

    def inner(self, u: Vector, v: Vector) -> Tensor:
        """`uᵀ F v`, a scalar tensor in nats."""
        left, _ = self._rows(u)
        right, _ = self._rows(v)
        if len(left) != 1 or len(right) != 1:
            raise ValueError("inner takes single vectors; use u.T @ F.matmat(V) for several.")
        return (left * self._matmat(right)).sum()

    # ---- functions of the matrix -----------------------------------------------------------

    def solve(self, v: Vector, *, damping: float) -> Any:
        """`(F + damping · I)⁻¹ v`.

        Args:
            v: a vector, or `(P, R)` right-hand sides.
            damping: nats/parameter²; zero is accepted where F itself is positive definite.

        Raises:
            ValueError: If the damping is negative or not finite.
            NotPositiveDefiniteError: If the damped matrix is singular.
        """
        damping = _checked(damping)
        rows, restore = self._rows(v)
        return restore(self._solve(rows, damping))

    def sqrt_matvec(self, v: Vector) -> Any:
        """`F^{1/2} v`, the symmetric square root."""
        rows, restore = self._rows(v)
        return restore(self._function(psd.square_root, rows))

    def inv_sqrt_matvec(self, v: Vector, *, damping: float) -> Any:
        """`(F + damping · I)^{-1/2} v`."""
        damping = _checked(damping)
        if damping == 0:
            self._require_regular()
        rows, restore = self._rows(v)
        return restore(self._function(psd.inverse_square_root(damping), rows))

    def logdet(self, *, damping: float) -> Tensor:
        """`log det(F + damping · I)`, a scalar tensor."""
        damping = _checked(damping)
        if damping == 0:
            self._require_regular()
        values = self.eigenvalues()
        silent = self.num_parameters - len(values)  # eigenvalues that are zero and not listed
        logs = (values + damping).log().sum()
        return logs + silent * math.log(damping) if silent else logs

    def sample(
        self, num: int, *, damping: float, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws from the Gaussian `N(0, (F + damping · I)⁻¹)`.

        Returns:
            `(num, P)`; `F.layout.unflatten(draw)` gives a dict.
        """
        if num < 1:
            raise ValueError(f"sample draws at least 1 vector, got num={num}.")
        noise = torch.randn(
            num, self.num_parameters, generator=generator, dtype=self.dtype, device=self.device
        )
        draws: Tensor = self.inv_sqrt_matvec(noise.T, damping=damping)
        return draws.T

    # ---- numbers ---------------------------------------------------------------------------

    def trace(self) -> Tensor:
        """Sum of the diagonal, a scalar tensor in nats/parameter²."""
        return self._diagonal().sum()

    def eigenvalues(self, k: int | None = None) -> Tensor:
        """Eigenvalues in descending order, or the `k` largest.

        `Gram` lists the eigenvalues that can be non-zero; all others of the P are zero.
        """
        if k is not None and k < 1:
            raise ValueError(f"eigenvalues takes k >= 1, or None for all, got k={k}.")
        return self._eigenvalues()[:k]

    def norm(self) -> Tensor:
        """Frobenius norm, a scalar tensor in nats/parameter²."""
        return self.eigenvalues().square().sum().sqrt()

    def diagonal(self) -> Params:
        """The diagonal, shaped like the parameters."""
        return self.layout.unflatten(self._diagonal())

    def _diagonal(self) -> Tensor:
        warnings.warn(
            f"The diagonal of {type(self).__name__} takes {self.num_parameters} products.",
            NaiveFallbackWarning,
            stacklevel=3,
        )
        return self.to_dense().diagonal()

    def to_dense(self) -> Tensor:
        """The matrix `(P, P)`, in the layout's order.

        Raises:
            TooLargeError: If it would not fit into memory.
        """
        self._require_dense_fits()
        eye = torch.eye(self.num_parameters, dtype=self.dtype, device=self.device)
        return self._matmat(eye)

    # ---- parts and combinations ------------------------------------------------------------

    def block(self, name: str) -> FisherOperator:
        """The diagonal block of one module's parameters.

        Raises:
            ValueError: If there is no such block.
        """
        names = [entry.parameter for entry in self.coverage if entry.block == name]
        if not names:
            blocks = list(dict.fromkeys(entry.block for entry in self.coverage))
            raise ValueError(f"There is no block {name!r}. There are: {listed(blocks, near=name)}.")
        return self.restrict(names)

    def restrict(self, names: Iterable[str]) -> FisherOperator:
        """The principal submatrix of some parameters, by name.

        Raises:
            ValueError: If a name does not exist.
        """
        from neuromanifold.operators.algebra import Restriction

        return Restriction(self, self.layout.restrict(names))

    def __add__(self, other: FisherOperator) -> FisherOperator:
        """The sum of two Fisher matrices over the same parameters."""
        if not isinstance(other, FisherOperator):
            return NotImplemented
        from neuromanifold.operators.algebra import add

        return add(self, other)

    def __rmul__(self, factor: float) -> FisherOperator:
        """A non-negative multiple of the matrix."""
        if not isinstance(factor, (int, float)):
            return NotImplemented
        if not (math.isfinite(factor) and factor >= 0):
            raise ValueError(
                f"A Fisher matrix can be multiplied by a finite number >= 0, got {factor}: "
                f"a negative multiple is not positive semi-definite."
            )
        return self._scaled(float(factor))

    __mul__ = __rmul__

    def _scaled(self, factor: float) -> FisherOperator:
        from neuromanifold.operators.algebra import Sum

        return Sum([self], [factor])

    def _plus(self, other: FisherOperator) -> FisherOperator | None:
        """The sum in this structure, or None if the structure is not closed under sums."""
        return None

    # ---- exchange --------------------------------------------------------------------------

    def to_scipy(self) -> LinearOperator:
        """A `scipy.sparse.linalg.LinearOperator` on float arrays, for SciPy's iterative methods."""
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise UnsupportedError("to_scipy needs SciPy: pip install scipy.") from error

        def product(array: Any) -> Any:
            # A copy: SciPy may pass read-only or reversed views, which torch does not take.
            tensor = torch.from_numpy(np.array(array)).to(self.device, self.dtype)
            squeezed = tensor.reshape(self.num_parameters, -1)
            return self.matmat(squeezed).reshape(tensor.shape).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(
            self.shape,
            matvec=product,
            rmatvec=product,
            matmat=product,
            rmatmat=product,
            dtype=dtype,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file that `nm.load` reads without the model or the data.

        The file is complete or absent: it is written beside the target and moved into place.
        """
        from neuromanifold.operators.storage import save

        save(self, path)

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `save` writes: a JSON-able description and tensors by name."""
        raise self._unsupported("stored form")

    # ---- description -----------------------------------------------------------------------

    @property
    def num_samples(self) -> int:
        """N, over all batches and ranks."""
        return self.origin.num_samples

    @property
    def num_parameters(self) -> int:
        """P."""
        return self.layout.num_parameters

    @property
    def shape(self) -> tuple[int, int]:
        """`(P, P)`."""
        return (self.num_parameters, self.num_parameters)

    def __repr__(self) -> str:
        return (
            f"<Fisher matrix {self.shape[0]} x {self.shape[1]}: {self.origin.structure}, "
            f"{self.origin.likelihood}, {self.origin.estimator}, N={self.num_samples}, "
            f"per {self.origin.per}, {str(self.dtype).removeprefix('torch.')} on {self.device}>"
        )

    # ---- helpers ---------------------------------------------------------------------------

    def _rows(self, v: Vector) -> tuple[Tensor, Any]:
        rows, restore = self.layout.rows(v)
        if rows.device != self.device:
            raise ValueError(f"The vector is on {rows.device}, the Fisher matrix on {self.device}.")
        return rows.to(self.dtype), restore

    def _require_dense_fits(self) -> None:
        memory.require(
            self.num_parameters**2 * self.dtype.itemsize,
            self.device,
            what=f"A dense {self.num_parameters} x {self.num_parameters} matrix",
            instead="Use products F @ v, F.block(name).to_dense(), or nm.Gram() for spectra.",
        )

    def _require_regular(self) -> None:
        """Refuse to invert a singular matrix."""
        from neuromanifold.errors import NotPositiveDefiniteError

        values = self.eigenvalues()
        eps = self.num_parameters * torch.finfo(self.dtype).eps
        if len(values) < self.num_parameters or bool(values[-1] <= eps * values[0]):
            raise NotPositiveDefiniteError(
                "The Fisher matrix is singular to working precision, so damping=0 has no answer. "
                "Give a damping > 0 (nats/parameter²); 1e-3 times the mean eigenvalue, "
                "F.trace() / F.num_parameters, is a usual start."
            )

    def _unsupported(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.origin.structure} has no exact {what}. Measure with nm.Gram() (exact for the "
            f"batch, any P), nm.Kronecker(), nm.UnitWise(), nm.Diagonal(), nm.BlockDiagonal() or "
            f"nm.Dense(); iterative methods can use F.to_scipy()."
        )


def _checked(damping: float) -> float:
    if not (isinstance(damping, (int, float)) and math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping is a finite number >= 0 in nats/parameter², got {damping!r}.")
    return float(damping)
