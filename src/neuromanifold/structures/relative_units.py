"""The metric that each unit has of its own, whatever the network above makes of its response.

Source: Sun and Nielsen, arXiv 1606.06069; docs/guides/relative.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
from torch import Tensor

from neuromanifold.capture import UnitTape
from neuromanifold.layers import Factored, Record
from neuromanifold.layers.parts import Part
from neuromanifold.likelihoods import DiagonalLikelihood, Gaussian
from neuromanifold.likelihoods._base import rademacher
from neuromanifold.linalg import Block, psd
from neuromanifold.operators import BlockMatrix, Matrices
from neuromanifold.structures._base import AdditiveStructure, Source, Statistics, accumulate
from neuromanifold.structures.diagonal import DiagonalMatrix
from neuromanifold.structures.kronecker import KroneckerMatrix
from neuromanifold.structures.quasidiagonal import QuasiDiagonal

__all__ = ["RelativeUnits"]

Form = Literal["UnitWise", "Shared", "QuasiDiagonal", "Diagonal"]


@dataclass(frozen=True)
class RelativeUnits(AdditiveStructure):
    """Relative Fisher information of each unit: `G_i = E[ν_i x̃ x̃ᵀ]`, given the unit's input x̃.

    A unit answers its input by a random response, whose mean is what the unit hands on: a Gaussian
    of variance 1 around the activation, or whatever `response` says. Then `ν = φ'² · information
    of the response`, with φ everything between the layer and the first activation function behind
    it, frozen normalisation included. The output layer's response is that of the likelihood; a
    layer without an activation function of its own, such as the last one of a residual branch,
    responds by what it computes. Positions of a sample respond one by one (convolutions, tokens).

    The estimator has no part in this: no cotangent comes from the outputs, and nothing is drawn.

    Args:
        response: what a unit's response is, given its mean: a likelihood with independent entries
            such as `nm.Gaussian(variance)` or `nm.relative.Binary((-1, 1))`; or a mapping from
            patterns of module names, of which the first match counts, to such.
        wide: of blocks that are too large to keep a matrix for each unit: "shared", the mean of
            these matrices, one for all units; or "quasidiagonal".
        widest: numbers in the matrices of a block's units up to which they are kept.

    Example:
        >>> import torch, neuromanifold as nm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> structure = nm.structures.RelativeUnits()
        >>> F = nm.fisher(net, nm.Categorical(), torch.randn(8, 4), structure)
        >>> F.blocks[0].matrices.shape
        torch.Size([3, 5, 5])
    """

    own_sweeps: ClassVar[bool] = True

    response: DiagonalLikelihood | Mapping[str, DiagonalLikelihood] = field(
        default_factory=Gaussian
    )
    wide: Literal["shared", "quasidiagonal"] = "shared"
    widest: int = 2**22

    def __post_init__(self) -> None:
        if self.wide not in ("shared", "quasidiagonal"):
            raise ValueError(f'wide is "shared" or "quasidiagonal", got {self.wide!r}.')
        for response in self._responses().values():
            if not isinstance(response, DiagonalLikelihood):
                raise TypeError(
                    f"The response of a unit is a likelihood whose entries are independent, e.g. "
                    f"nm.Gaussian() or nm.relative.Binary((-1, 1)); got {response!r}."
                )
        if self.widest < 1:
            raise ValueError(f"widest is a number of entries, at least 1; got {self.widest}.")

    def _responses(self) -> Mapping[str, DiagonalLikelihood]:
        return self.response if isinstance(self.response, Mapping) else {"*": self.response}

    def response_of(self, module: str) -> DiagonalLikelihood:
        """Of the units of a module, by name.

        Raises:
            ValueError: If no pattern matches.
        """
        for pattern, response in self._responses().items():
            if fnmatchcase(module, pattern):
                return response
        raise ValueError(
            f"No response is given for the units of {module!r}; the patterns are "
            f'{list(self._responses())}. Add "*" for all others.'
        )

    def sweeps(self, source: Source) -> Iterator[Iterator[Record]]:
        """One per batch: responses in place of cotangents."""
        source.num_samples = source.num_positions = 0
        likelihood = source.likelihood
        with UnitTape(source.plan, source.forward, likelihood.canonical) as tape:
            for done, batch in enumerate(source.data, start=1):
                outputs, targets = source.outputs(tape, batch)
                at_outputs = likelihood.fisher_diagonal(outputs)
                yield tape.respond(
                    lambda place, mean: self.response_of(place[0]).fisher_diagonal(mean),
                    likelihood.mask_cotangent(at_outputs, outputs, targets),
                    lambda like: rademacher(like.shape, like, source.generator),
                )
                if source.progress is not None:
                    source.progress(done, source.data.num_batches)

    def form(self, block: Block) -> Form:
        """What a block is kept as."""
        if block.lookup or block.fan_in == 1:
            return "Diagonal"
        if block.num_parameters * block.fan_in <= self.widest:
            return "UnitWise"
        return "Shared" if self.wide == "shared" else "QuasiDiagonal"

    def statistics(self, record: Record) -> Statistics:
        """Sums over uses, each by itself."""
        of = _STATISTICS[self.form(record.block)]
        groups = record.block.groups
        sums: Statistics = {}
        for part in record.parts:
            found = of(part.apart())
            if part.groups != slice(0, groups):
                found = {key: _among(value, part.groups, groups) for key, value in found.items()}
            accumulate(sums, found)
        return sums

    def assemble(self, block: Block, statistics: Statistics, normaliser: float) -> BlockMatrix:
        """Means over samples."""
        form = self.form(block)
        if form == "UnitWise":
            return Matrices(block, statistics["moments"].flatten(0, 1).div_(normaliser))
        if form == "Shared":
            shared = statistics["shared"].div_(normaliser)
            return KroneckerMatrix(block, shared, shared.new_ones(block.groups, block.fan_out))
        if form == "QuasiDiagonal":
            return QuasiDiagonal().assemble(block, statistics, normaliser)
        return DiagonalMatrix(block, statistics["squares"].div_(normaliser))

    def symmetric(self, block: Block) -> tuple[str, ...]:
        """The matrices."""
        return "moments", "shared"

    def numel(self, block: Block) -> int:
        """One matrix per unit, or what takes its place."""
        groups, _, fan_in = block.shape
        return {
            "UnitWise": block.num_parameters * fan_in,
            "Shared": groups * fan_in**2,
            "QuasiDiagonal": 2 * block.num_parameters,
            "Diagonal": block.num_parameters,
        }[self.form(block)]

    def represent(self, block: Block) -> tuple[str, bool, str]:
        """Relative, whatever is kept."""
        form = self.form(block)
        note = "relative to the unit's input"
        if form in ("Shared", "QuasiDiagonal"):
            note += f"; a matrix for each unit would take over {self.widest:,} numbers"
        return f"RelativeUnits, {form}", False, note


def _among(value: Tensor, where: slice, groups: int) -> Tensor:
    """With zeros for the other groups."""
    out = value.new_zeros(groups, *value.shape[1:])
    out[where] = value
    return out


def _squares(part: Part) -> Statistics:
    return {"squares": part.squared()}


def _moments(part: Part) -> Statistics:
    return {"moments": part.unit_moments()}


def _shared(part: Part) -> Statistics:
    """The mean over units of their moments."""
    if not isinstance(part, Factored):
        return {"shared": part.unit_moments().mean(dim=1)}
    weights = part.g.square().mean(dim=-1).sum(dim=0)  # (G, N, 1)
    return {"shared": psd.second_moment((part.augmented * weights.sqrt()[..., None]).squeeze(2))}


def _bias_row(part: Part) -> Statistics:
    """The diagonal, and products with the gradient of the bias."""
    if isinstance(part, Factored):
        weights = part.g.square().sum(dim=0).squeeze(2)  # (G, N, O)
        cross = weights.mT @ part.augmented.squeeze(2)[..., :-1]
    else:
        p = part.per_sample()
        cross = torch.einsum("vgno,vgnoi->goi", p[..., -1], p[..., :-1])
    return {"squares": part.squared(), "cross": cross}


_STATISTICS: dict[Form, Callable[[Part], Statistics]] = {
    "UnitWise": _moments,
    "Shared": _shared,
    "QuasiDiagonal": _bias_row,
    "Diagonal": _squares,
}
