"""Kronecker factors: `F_layer ≈ B ⊗ A`, output side and input side apart (K-FAC)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from neuromanifold.layers import Record
from neuromanifold.linalg import Block, psd
from neuromanifold.operators import BlockMatrix
from neuromanifold.structures._base import AdditiveStructure, Statistics
from neuromanifold.structures.diagonal import DiagonalMatrix

__all__ = ["Kronecker", "KroneckerMatrix"]


@dataclass(frozen=True)
class Kronecker(AdditiveStructure):
    """Two factors per layer and group: `A (I, I)` of the inputs, `B (O, O)` of the cotangents.

    With one position per sample `A = E[ã ãᵀ]`, `B = E[g gᵀ]`. Where a layer is used at several
    positions (convolution, sequence, repeated call):

    * "expand" treats positions as independent: A is the mean over positions, B the sum over them;
    * "reduce" treats them as one use: A of the mean input, B of the summed cotangent.

    Exact for one sample at one position, for a single linear layer with Gaussian output, and for
    deep linear networks; an approximation elsewhere. Parameters without inputs (generic path, or a
    bias alone) are kept by their diagonal.

    Args:
        weight_sharing: "expand" or "reduce".

    Source: Martens and Grosse, arXiv 1503.05671; Eschenhagen et al., arXiv 2311.00636.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
        >>> F = nm.fisher(model, nm.Gaussian(), x, nm.Kronecker(), estimator=nm.Exact())
        >>> F.solve(torch.ones(8), damping=1e-3).shape
        torch.Size([8])
    """

    weight_sharing: Literal["expand", "reduce"] = "expand"

    def __post_init__(self) -> None:
        if self.weight_sharing not in ("expand", "reduce"):
            raise ValueError(
                f'weight_sharing is "expand" or "reduce", got {self.weight_sharing!r}.'
            )

    def statistics(self, record: Record) -> Statistics:
        """Second moments of inputs and cotangents, and the number of positions summed over."""
        if not _has_inputs(record.block):
            return {"squares": record.squared()}
        reduce = self.weight_sharing == "reduce"
        statistics = {"outputs": record.output_moment(reduce=reduce)}
        if record.first:
            statistics["inputs"] = record.input_moment(reduce=reduce)
            uses = record.num_samples * (1 if reduce else record.num_positions)
            statistics["uses"] = torch.tensor(uses, device=record.g.device)
        return statistics

    def assemble(self, block: Block, statistics: Statistics, normaliser: int) -> BlockMatrix:
        """Means: inputs over uses, cotangents over samples."""
        if "squares" in statistics:
            return DiagonalMatrix(block, statistics["squares"].div_(normaliser))
        inputs = statistics["inputs"].div_(statistics["uses"].to(statistics["inputs"]))
        return KroneckerMatrix(block, inputs, statistics["outputs"].div_(normaliser))

    def numel(self, block: Block) -> int:
        """Two squares per group."""
        if not _has_inputs(block):
            return block.num_parameters
        return block.groups * (block.fan_in**2 + block.fan_out**2)

    def represent(self, block: Block) -> tuple[str, bool, str]:
        """Kronecker where there are inputs, Diagonal elsewhere."""
        if _has_inputs(block):
            return "Kronecker", False, ""
        return "Diagonal", True, "only a bias, which has no input factor"


def _has_inputs(block: Block) -> bool:
    return block.fan_in > block.biased


class KroneckerMatrix(BlockMatrix):
    """`B ⊗ A` per group: `inputs A (G, I, I)`, `outputs B (G, O, O)`, unit-major."""

    kind = "kronecker"

    def __init__(self, block: Block, inputs: Tensor, outputs: Tensor) -> None:
        super().__init__(block)
        self.inputs = inputs
        self.outputs = outputs

    def matmul(self, x: Tensor) -> Tensor:
        """`B X A`."""
        return self.outputs @ x @ self.inputs

    def function(self, function: psd.Function, x: Tensor) -> Tensor:
        """In the product of the two eigenbases, exactly."""
        (_, q_in), (_, q_out) = self._eigh
        rotated = q_out.mT @ x @ q_in
        return q_out @ (function(self._spectrum) * rotated) @ q_in.mT

    def eigenvalues(self) -> Tensor:
        """Products of the factors' eigenvalues."""
        return self._spectrum.flatten()

    def diagonal(self) -> Tensor:
        """Products of the factors' diagonals."""
        return _outer(_diagonal(self.outputs), _diagonal(self.inputs))

    def norm(self) -> Tensor:
        """Products of the factors' norms, over groups."""
        norms = self.inputs.flatten(1).norm(dim=1) * self.outputs.flatten(1).norm(dim=1)
        return norms.norm()

    def tensors(self) -> dict[str, Tensor]:
        """The factors."""
        return {"inputs": self.inputs, "outputs": self.outputs}

    def scaled(self, factor: float) -> KroneckerMatrix:
        """The multiple goes into the output factor, which carries the units of the likelihood."""
        return KroneckerMatrix(self.block, self.inputs, self.outputs * factor)

    def restrict(self, block: Block, columns: list[int]) -> KroneckerMatrix:
        """A principal submatrix of the input factor."""
        keep = torch.tensor(columns, device=self.inputs.device)
        return KroneckerMatrix(block, self.inputs[:, keep[:, None], keep], self.outputs)

    def dense(self) -> Tensor:
        """Kronecker products of the groups along the diagonal."""
        pairs = zip(self.outputs, self.inputs, strict=True)
        return torch.block_diag(*(torch.kron(b.contiguous(), a.contiguous()) for b, a in pairs))

    @cached_property
    def _eigh(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return psd.eigh(self.inputs), psd.eigh(self.outputs)

    @property
    def _spectrum(self) -> Tensor:
        (inputs, _), (outputs, _) = self._eigh
        return _outer(outputs, inputs)


def _diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1)


def _outer(outputs: Tensor, inputs: Tensor) -> Tensor:
    """`(G, O)` and `(G, I)` to `(G, O, I)`."""
    return outputs[:, :, None] * inputs[:, None, :]
