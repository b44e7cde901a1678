"""Kronecker products whose factors are kept along some directions only.

Source: papers.md §4.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from neuromanifold.linalg import Block, psd
from neuromanifold.linalg.projection import Projection
from neuromanifold.operators import BlockMatrix
from neuromanifold.structures import factors

__all__ = ["ProjectedKroneckerMatrix"]

_PARTS = ("values", "vectors", "rest")


class ProjectedKroneckerMatrix(BlockMatrix):
    """`B ⊗ A` per group, unit-major, of which one factor or both are projections.

    Args:
        block: whose matrix this is.
        **tensors: of each of `inputs` and `outputs` either the factor, as in `KroneckerMatrix`, or
            `inputs_values` `(G, k)`, `inputs_vectors` `(G, I, k)` and `inputs_rest` `(G,)`.
    """

    kind = "projected_kronecker"

    def __init__(self, block: Block, **tensors: Tensor) -> None:
        super().__init__(block)
        self.inputs = _side(tensors, "inputs")
        self.outputs = _side(tensors, "outputs")

    @classmethod
    def of(
        cls, block: Block, inputs: Tensor | Projection, outputs: Tensor | Projection
    ) -> ProjectedKroneckerMatrix:
        """From its factors."""
        return cls(block, **_tensors(inputs, "inputs"), **_tensors(outputs, "outputs"))

    def matmul(self, x: Tensor) -> Tensor:
        """`B X A`, in `2 n k` multiplications per row and projected side."""
        x = factors.apply(self.outputs, x, outputs=True)
        return factors.apply(self.inputs, x, outputs=False)

    def function(self, function: psd.Function, x: Tensor) -> Tensor:
        """In the product of the directions and of what is left over, exactly."""
        out = torch.zeros_like(x)
        for of_outputs, part, back in _spectral(self._spectra[0], x):
            for of_inputs, rows, across in _spectral(self._spectra[1], part.mT):
                values = function(of_outputs[:, :, None] * of_inputs[:, None, :])
                out += back(across((values * rows.mT).mT).mT)
        return out

    def eigenvalues(self) -> Tensor:
        """Products of the factors' eigenvalues."""
        outputs, inputs = (_eigenvalues(spectrum) for spectrum in self._spectra)
        return (outputs[:, :, None] * inputs[:, None, :]).flatten()

    def diagonal(self) -> Tensor:
        """Products of the factors' diagonals."""
        outputs, inputs = factors.diagonal(self.outputs), factors.diagonal(self.inputs)
        return outputs[:, :, None] * inputs[:, None, :]

    def norm(self) -> Tensor:
        """Products of the factors' norms, over groups."""
        return (_norm(self.inputs) * _norm(self.outputs)).norm()

    def tensors(self) -> dict[str, Tensor]:
        """The parts of the factors."""
        return {**_tensors(self.inputs, "inputs"), **_tensors(self.outputs, "outputs")}

    def scaled(self, factor: float) -> ProjectedKroneckerMatrix:
        """The multiple goes into the output factor."""
        outputs = self.outputs
        scaled = (
            outputs.function(lambda values: values * factor)
            if isinstance(outputs, Projection)
            else outputs * factor
        )
        return ProjectedKroneckerMatrix.of(self.block, self.inputs, scaled)

    def restrict(self, block: Block, columns: list[int]) -> ProjectedKroneckerMatrix:
        """A principal submatrix of the input factor, which is no projection any more."""
        inputs = factors.submatrix(factors.whole(self.inputs), columns)
        return ProjectedKroneckerMatrix.of(block, inputs, self.outputs)

    def dense(self) -> Tensor:
        """Kronecker products of the groups along the diagonal."""
        pairs = zip(factors.full(self.outputs), factors.full(self.inputs), strict=True)
        return torch.block_diag(*(torch.kron(b.contiguous(), a.contiguous()) for b, a in pairs))

    @cached_property
    def _spectra(self) -> tuple[Spectrum, Spectrum]:
        """Of outputs and inputs."""
        return _spectrum(self.outputs), _spectrum(self.inputs)


Spectrum = Projection | tuple[Tensor, Tensor | None]
"""A projection, or all eigenvalues and eigenvectors, None for unit vectors."""


def _spectrum(factor: Tensor | Projection) -> Spectrum:
    return factor if isinstance(factor, Projection) else factors.eigh(factor)


def _eigenvalues(spectrum: Spectrum) -> Tensor:
    return spectrum.eigenvalues() if isinstance(spectrum, Projection) else spectrum[0]


def _spectral(spectrum: Spectrum, x: Tensor) -> Iterator[tuple[Tensor, Tensor, psd.Function]]:
    """Eigenvalues, coordinates of columns `(R, G, n, m)`, and the way back, for parts of space."""
    if isinstance(spectrum, Projection):
        vectors = spectrum.vectors
        along, left = spectrum.split(x)
        yield spectrum.values, along, lambda part: vectors @ part
        yield spectrum.rest[:, None], left, lambda part: part
        return
    values, basis = spectrum
    if basis is None:
        yield values, x, lambda part: part
    else:
        yield values, basis.mT @ x, lambda part: basis @ part


def _norm(factor: Tensor | Projection) -> Tensor:
    return factor.norm() if isinstance(factor, Projection) else factor.flatten(1).norm(dim=1)


def _side(tensors: dict[str, Tensor], name: str) -> Tensor | Projection:
    if name in tensors:
        return tensors[name]
    return Projection(*(tensors[f"{name}_{part}"] for part in _PARTS))


def _tensors(factor: Tensor | Projection, name: str) -> dict[str, Tensor]:
    if isinstance(factor, Projection):
        return {f"{name}_{part}": getattr(factor, part) for part in _PARTS}
    return {name: factor}
