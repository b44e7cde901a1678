"""Kronecker factors: `F_layer ≈ B ⊗ A`, output side and input side apart (K-FAC)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from neuromanifold.layers import Record, count_uses
from neuromanifold.linalg import Block, psd
from neuromanifold.operators import BlockMatrix, Matrices
from neuromanifold.structures import factors
from neuromanifold.structures._base import AdditiveStructure, Statistics
from neuromanifold.structures.diagonal import DiagonalMatrix
from neuromanifold.structures.factors import Full

__all__ = ["Kronecker", "KroneckerMatrix"]


@dataclass(frozen=True, repr=False)
class Kronecker(AdditiveStructure):
    """Two factors per layer and group: `A (I, I)` of the inputs, `B (O, O)` of the cotangents.

    With one position per sample `A = E[ã ãᵀ]`, `B = E[g gᵀ]`. Where a layer is used at several
    positions (convolution, sequence, repeated call):

    * "expand" treats positions as independent: A is the mean over positions, B the sum over them;
    * "reduce" treats them as one use: A of the mean input, B of the summed cotangent.

    A weight that several modules share has the Kronecker product nearest to the sum of theirs, in
    Frobenius norm: their uses are treated as independent. An embedding's units are the rows of its
    table, and B is diagonal ("expand"): how often each row is looked up.

    Exact for one sample at one position, for a single linear layer with Gaussian output, and for
    deep linear networks; an approximation elsewhere. Layers of one unit per group (norms, depthwise
    convolutions) have exact unit-wise blocks, which are as small. Parameters without inputs
    (generic path, or a bias alone) are kept by their diagonal.

    Args:
        weight_sharing: "expand" or "reduce".
        inputs: what is kept of A.
        outputs: what is kept of B.

    Source: Martens and Grosse, arXiv 1503.05671; Eschenhagen et al., arXiv 2311.00636.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
        >>> F = nm.fisher(model, nm.Gaussian(), x, nm.Kronecker(), estimator=nm.Exact())
        >>> F.solve(torch.ones(8), damping=1e-3).shape
        torch.Size([8])
    """

    whole_gradients: ClassVar[bool | None] = False

    weight_sharing: Literal["expand", "reduce"] = "expand"
    inputs: Full = field(default_factory=Full)
    outputs: Full = field(default_factory=Full)

    def __post_init__(self) -> None:
        if self.weight_sharing not in ("expand", "reduce"):
            raise ValueError(
                f'weight_sharing is "expand" or "reduce", got {self.weight_sharing!r}.'
            )

    def statistics(self, record: Record) -> Statistics:
        """Second moments of both sides at each place of use, and the number of uses."""
        form = self.form(record.block)
        if form == "Diagonal":
            return {"squares": record.squared()}
        if form == "UnitWise":
            return {"moments": record.unit_moments()}
        _, fan_out, fan_in = record.block.shape
        reduce = self.weight_sharing == "reduce"
        statistics: Statistics = {}
        for i, part in enumerate(record.parts):
            assert part.sides is not None, f"{record.block.name}: units without inputs"
            outputs, inputs = part.sides
            key = f"{part.groups.start}.{i}"
            if record.first or not inputs.once:
                moment = self.inputs.moment(inputs, fan_in, reduce=reduce)
                statistics[f"{key}.inputs"] = moment
            if record.first or not outputs.once:
                moment = self.outputs.moment(outputs, fan_out, reduce=reduce)
                statistics[f"{key}.outputs"] = moment
            if record.first:
                positions = (record.num_samples, part.num_positions)
                uses = count_uses(part.used, positions, reduce=reduce)
                if isinstance(uses, int):  # filled on the device: no copy from the host
                    uses = torch.full((), uses, device=record.device)
                statistics[f"{key}.uses"] = uses
        return statistics

    def assemble(self, block: Block, statistics: Statistics, normaliser: float) -> BlockMatrix:
        """Means: inputs over uses, cotangents over samples."""
        if "squares" in statistics:
            return DiagonalMatrix(block, statistics["squares"].div_(normaliser))
        if "moments" in statistics:
            return Matrices(block, statistics["moments"].flatten(0, 1).div_(normaliser))
        places: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for key in (key for key in statistics if key.endswith(".uses")):
            place = key.removesuffix(".uses")
            inputs, outputs = statistics[f"{place}.inputs"], statistics[f"{place}.outputs"]
            inputs.div_(statistics[key].clamp(min=1).to(inputs))
            outputs.div_(normaliser)
            places.setdefault(int(place.partition(".")[0]), []).append((outputs, inputs))
        groups = [
            factors.nearest_product(*zip(*places[start], strict=True)) for start in sorted(places)
        ]
        outputs, inputs = (
            parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*groups, strict=True)
        )
        return KroneckerMatrix(block, inputs, outputs)

    def form(self, block: Block) -> Literal["Kronecker", "UnitWise", "Diagonal"]:
        """What a block is kept as."""
        if block.fan_in == block.biased or block.fan_in == block.fan_out == 1:
            return "Diagonal"
        if block.fan_out > 1:
            return "Kronecker"
        return "Diagonal" if self.inputs.is_diagonal(block.fan_in) else "UnitWise"

    def symmetric(self, block: Block) -> tuple[str, ...]:
        """Factors, and the blocks of units."""
        return "inputs", "outputs", "moments"

    def numel(self, block: Block) -> int:
        """Two squares per group."""
        form = self.form(block)
        if form == "Diagonal":
            return block.num_parameters
        if form == "UnitWise":
            return block.num_parameters * block.fan_in
        # Tokens at single positions are unit vectors, whose moment is diagonal.
        unit_vectors = block.lookup and self.weight_sharing == "expand"
        outputs = block.fan_out if unit_vectors else self.outputs.numel(block.fan_out)
        return block.groups * (self.inputs.numel(block.fan_in) + outputs)

    def represent(self, block: Block) -> tuple[str, bool, str]:
        """Kronecker where there are inputs and several units; else exact forms."""
        form = self.form(block)
        if form != "Kronecker":
            without = "no inputs, hence no input factor" if block.fan_in == block.biased else ""
            return form, True, without
        wide = [
            f"{side} by their diagonal: {width} wide"
            for side, kept, width in (
                ("inputs", self.inputs, block.fan_in),
                ("outputs", self.outputs, block.fan_out),
            )
            if kept.is_diagonal(width)
        ]
        return form, False, "; ".join(wide)


class KroneckerMatrix(BlockMatrix):
    """`B ⊗ A` per group, unit-major: `inputs A (G, I, I)`, `outputs B (G, O, O)`.

    A factor that is diagonal is `(G, I)` or `(G, O)`.
    """

    kind = "kronecker"

    def __init__(self, block: Block, inputs: Tensor, outputs: Tensor) -> None:
        super().__init__(block)
        self.inputs = inputs
        self.outputs = outputs

    def matmul(self, x: Tensor) -> Tensor:
        """`B X A`."""
        return factors.apply(
            self.inputs, factors.apply(self.outputs, x, outputs=True), outputs=False
        )

    def function(self, function: psd.Function, x: Tensor) -> Tensor:
        """In the product of the two eigenbases, exactly."""
        (_, q_in), (_, q_out) = self._eigh
        x = x if q_out is None else q_out.mT @ x
        x = x if q_in is None else x @ q_in
        x = function(self._spectrum) * x
        x = x if q_out is None else q_out @ x
        return x if q_in is None else x @ q_in.mT

    def eigenvalues(self) -> Tensor:
        """Products of the factors' eigenvalues."""
        return self._spectrum.flatten()

    def diagonal(self) -> Tensor:
        """Products of the factors' diagonals."""
        return _outer(factors.diagonal(self.outputs), factors.diagonal(self.inputs))

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
        inputs = (
            self.inputs[:, keep] if self.inputs.ndim == 2 else self.inputs[:, keep[:, None], keep]
        )
        return KroneckerMatrix(block, inputs, self.outputs)

    def dense(self) -> Tensor:
        """Kronecker products of the groups along the diagonal."""
        pairs = zip(factors.full(self.outputs), factors.full(self.inputs), strict=True)
        return torch.block_diag(*(torch.kron(b.contiguous(), a.contiguous()) for b, a in pairs))

    @cached_property
    def _eigh(self) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        return factors.eigh(self.inputs), factors.eigh(self.outputs)

    @property
    def _spectrum(self) -> Tensor:
        (inputs, _), (outputs, _) = self._eigh
        return _outer(outputs, inputs)


def _outer(outputs: Tensor, inputs: Tensor) -> Tensor:
    """`(G, O)` and `(G, I)` to `(G, O, I)`."""
    return outputs[:, :, None] * inputs[:, None, :]
