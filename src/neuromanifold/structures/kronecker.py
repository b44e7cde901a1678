"""Kronecker factors: `F_layer ≈ B ⊗ A`, output side and input side apart (K-FAC)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from neuromanifold.layers import Record, Side, count_uses
from neuromanifold.linalg import Block, psd
from neuromanifold.linalg.projection import Projection
from neuromanifold.operators import BlockMatrix, Matrices
from neuromanifold.structures import factors
from neuromanifold.structures._base import AdditiveStructure, Statistics
from neuromanifold.structures.diagonal import DiagonalMatrix
from neuromanifold.structures.factors import Factor, Full
from neuromanifold.structures.projected import ProjectedKroneckerMatrix

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
    inputs: Factor = field(default_factory=Full)
    outputs: Factor = field(default_factory=Full)

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
        statistics: Statistics = {}
        for i, part in enumerate(record.parts):
            assert part.sides is not None, f"{record.block.name}: units without inputs"
            key = f"{part.groups.start}.{i}"
            for name, side in zip(("outputs", "inputs"), part.sides, strict=True):
                if record.first or not side.once:
                    statistics.update(self.of_side(record.block, f"{key}.{name}", side))
            if record.first:
                positions = (record.num_samples, part.num_positions)
                uses = count_uses(part.used, positions, reduce=self.weight_sharing == "reduce")
                if isinstance(uses, int):  # filled on the device: no copy from the host
                    uses = torch.full((), uses, device=record.device)
                statistics[f"{key}.uses"] = uses
        return statistics

    def of_side(self, block: Block, key: str, side: Side) -> Statistics:
        """What is summed of one side at one place of use; keys begin with `PLACE.SIDE`."""
        factor, width = self.factor(block, key)
        return {key: factor.moment(side, width, reduce=self.weight_sharing == "reduce")}

    def factor(self, block: Block, key: str) -> tuple[Factor, int]:
        """What is kept of a side, and its width."""
        if key.endswith("inputs"):
            return self.inputs, block.fan_in
        return self.outputs, block.fan_out

    def mean(
        self, block: Block, key: str, statistics: Statistics, count: float | Tensor
    ) -> Tensor | Projection:
        """The factor of one side at one place of use; the sums may be written over."""
        return statistics[key].div_(count)

    def assemble(self, block: Block, statistics: Statistics, normaliser: float) -> BlockMatrix:
        """Means: inputs over uses, cotangents over samples."""
        if "squares" in statistics:
            return DiagonalMatrix(block, statistics["squares"].div_(normaliser))
        if "moments" in statistics:
            return Matrices(block, statistics["moments"].flatten(0, 1).div_(normaliser))
        places: dict[int, list[tuple[Tensor | Projection, Tensor | Projection]]] = {}
        for place in (key.removesuffix(".uses") for key in statistics if key.endswith(".uses")):
            uses = statistics[f"{place}.uses"].clamp(min=1)
            outputs = self.mean(block, f"{place}.outputs", statistics, normaliser)
            inputs = self.mean(block, f"{place}.inputs", statistics, uses)
            places.setdefault(int(place.partition(".")[0]), []).append((outputs, inputs))
        groups = [_product(places[start]) for start in sorted(places)]
        outputs, inputs = (factors.joined(parts) for parts in zip(*groups, strict=True))
        outputs, inputs = self.outputs.kept(outputs), self.inputs.kept(inputs)
        if isinstance(outputs, Projection) or isinstance(inputs, Projection):
            return ProjectedKroneckerMatrix.of(block, inputs, outputs)
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
        sides = (
            ("inputs", self.inputs, block.fan_in),
            ("outputs", self.outputs, block.fan_out),
        )
        notes = [
            f"{side} by {_kept(kept, width)}"
            for side, kept, width in sides
            if kept.is_diagonal(width) or kept.directions(width) is not None
        ]
        return form, False, "; ".join(notes)


def _kept(factor: Factor, width: int) -> str:
    if factor.is_diagonal(width):
        return f"their diagonal: {width} wide"
    return f"{factor.directions(width)} of {width} directions"


def _product(
    terms: list[tuple[Tensor | Projection, Tensor | Projection]],
) -> tuple[Tensor | Projection, Tensor | Projection]:
    """One product for all places of use."""
    if len(terms) == 1:
        return terms[0]
    outputs, inputs = (map(factors.whole, side) for side in zip(*terms, strict=True))
    return factors.nearest_product(list(outputs), list(inputs))


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
        return KroneckerMatrix(block, factors.submatrix(self.inputs, columns), self.outputs)

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
