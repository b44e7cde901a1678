"""What a layer's own metric leaves out: how much the network above cares for each unit's response.

The exact Fisher block of unit i is `E_i = E[ε_i² ν_i x̃ x̃ᵀ]`, its relative metric is
`R_i = E[ν_i x̃ x̃ᵀ]`: what is dropped is the sensitivity ε² of the network above to the response. If
it does not depend on the input, the two are proportional, and their natural gradients have the same
direction (papers.md §1.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from neuromanifold._estimate import plain
from neuromanifold._fisher import requested
from neuromanifold.capture import Batch, Forward, UnitTape
from neuromanifold.estimators import Exact
from neuromanifold.layers import Factored, Record
from neuromanifold.likelihoods import DiagonalLikelihood, Gaussian, Likelihood
from neuromanifold.linalg import Block
from neuromanifold.structures import Progress, RelativeUnits, Source

__all__ = ["Comparison", "Layer", "Quartiles", "compare"]

WIDEST = 2**22
"""Numbers in the matrices of a layer's units up to which cosines are computed."""


@dataclass(frozen=True)
class Quartiles:
    """Of a number over the units of a layer: a quarter has less than `lower`, half than `median`.

    NaN where no unit has the number.
    """

    lower: float
    median: float
    upper: float


@dataclass(frozen=True, eq=False)
class Layer:
    """Exact blocks of a layer's units, against their relative ones.

    What a unit does not have is NaN: a dead unit has no metric.

    Attributes:
        name: of its block.
        factor: sensitivity, `tr E_i / tr R_i`, `(O,)`: by how much a step in the unit's own metric
            is to be divided.
        cosine: of the angle between the two matrices, `(O,)`: 1 if they are proportional. None if
            the layer is too wide to keep a matrix for each unit.
        variation: standard deviation of ε² over its mean, inputs weighted by ν, `(O,)`: 0 if the
            sensitivity does not depend on the input.
        num_parameters: of the layer.
    """

    name: str
    factor: Tensor
    cosine: Tensor | None
    variation: Tensor
    num_parameters: int

    @property
    def dead(self) -> int:
        """How many units have no metric on these data."""
        return int(self.factor.isnan().sum())

    @property
    def summary(self) -> dict[str, Quartiles]:
        """Quartiles over units, by "factor", "cosine" (if there is one) and "variation"."""
        found = {"factor": self.factor, "cosine": self.cosine, "variation": self.variation}
        return {name: _quartiles(value) for name, value in found.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; what is NaN is None."""
        return plain(
            {
                "name": self.name,
                "num_parameters": self.num_parameters,
                "dead": self.dead,
                "factor": self.factor,
                "cosine": self.cosine,
                "variation": self.variation,
                "summary": {name: asdict(value) for name, value in self.summary.items()},
            }
        )


@dataclass(frozen=True, eq=False)
class Comparison:
    """Layers whose units have a response of their own; `print` shows a table.

    Attributes:
        layers: in the order of the model.
        left_out: why, by the names of all other blocks.
        num_samples: N.
    """

    layers: tuple[Layer, ...]
    left_out: Mapping[str, str]
    num_samples: int

    def __getitem__(self, name: str) -> Layer:
        """The layer of that name.

        Raises:
            KeyError: If it is not compared; the message says why, or lists those that are.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        if name in self.left_out:
            raise KeyError(f"{name!r} was left out: {self.left_out[name]}")
        raise KeyError(f"no layer {name!r}; there are {[layer.name for layer in self.layers]}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; what is NaN is None."""
        return {
            "num_samples": self.num_samples,
            "layers": [layer.to_dict() for layer in self.layers],
            "left_out": dict(self.left_out),
        }

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [
            ("layer", "units", "dead", "sensitivity", "cosine", "variation")
        ]
        for layer in self.layers:
            summary = layer.summary
            cells = [_words(summary.get(key)) for key in ("factor", "cosine", "variation")]
            units = f"{len(layer.factor):,}"
            lines.append((layer.name or "–", units, f"{layer.dead:,}", *cells))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        notes = [f"{name or '–'} was left out: {why}" for name, why in self.left_out.items()]
        caption = (
            f"Exact against relative blocks of units, N = {self.num_samples:,}: median (quartiles) "
            f"over units"
        )
        return "\n".join([caption, "", *table, *([""] if notes else []), *notes])


def compare(
    model: nn.Module,
    likelihood: Likelihood,
    data: Any,
    response: DiagonalLikelihood | Mapping[str, DiagonalLikelihood] | None = None,
    *,
    params: Iterable[str] | None = None,
    forward: Forward | None = None,
    progress: bool | Progress = False,
) -> Comparison:
    """What each unit's own metric sees of its exact Fisher block, layer by layer.

    A layer takes part if an activation function of its own follows, or if its outputs are those of
    the model, whose response is the likelihood's: there the two blocks are equal. Positions of a
    sample (of convolutions, of tokens) respond one by one in the relative metric, and are summed in
    the exact one; the cosine sees the difference.

    The exact blocks take all columns of the output Fisher, in one pass.

    Args:
        model: as for `nm.fisher`, like all that follow but the response.
        likelihood: what the outputs mean.
        data: inputs, with or without targets.
        response: of a unit, given its activation; Gaussian of variance 1 by default. See
            `nm.structures.RelativeUnits`.
        params: names or patterns of the parameters.
        forward: how the model is called.
        progress: True shows a progress bar.

    Returns:
        One entry per layer, with arrays over units, and why layers were left out.

    Raises:
        UnsupportedError: If the likelihood has no exact Fisher information.
        TypeError: If the response has no independent entries.
        ValueError: As for `nm.fisher`.

    Example:
        >>> import torch, neuromanifold as nm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
        >>> found = nm.relative.compare(net, nm.Categorical(), torch.randn(32, 4))
        >>> found["0"].factor.shape, bool(found["0"].cosine.max() < 1)
        (torch.Size([3]), True)
        >>> round(found["2"].summary["cosine"].median, 4)  # the output layer
        1.0
    """
    units = RelativeUnits(Gaussian() if response is None else response)
    asked = requested(
        model,
        likelihood,
        data,
        units,
        estimator=Exact(),
        params=params,
        forward=forward,
        uncovered="generic",
        progress=progress,
    )
    sums: dict[str, _Sums] = {}
    left_out: dict[str, str] = {}
    with asked as (_, source):
        with UnitTape(source.plan, source.forward, likelihood.canonical) as tape:
            for done, batch in enumerate(source.data, start=1):
                _add(source, tape, batch, units, sums, left_out)
                if source.progress is not None:
                    source.progress(done, source.data.num_batches)
        blocks = source.plan.blocks
    compared = [block for block in blocks if block.name not in left_out]
    return Comparison(
        tuple(sums[block.name].layer(block) for block in compared),
        {block.name: left_out[block.name] for block in blocks if block.name in left_out},
        source.num_samples,
    )


def _add(
    source: Source,
    tape: UnitTape,
    batch: Batch,
    units: RelativeUnits,
    sums: dict[str, _Sums],
    left_out: dict[str, str],
) -> None:
    """One batch: the relative sweep, then all columns of the output Fisher."""
    likelihood = source.likelihood
    outputs, targets = source.outputs(tape, batch)
    at_outputs = likelihood.mask_cotangent(likelihood.fisher_diagonal(outputs), outputs, targets)
    # Cotangents without signs: nothing is summed before it is squared in the layers looked at.
    responses = tape.respond(
        lambda place, mean: units.response_of(place[0]).fisher_diagonal(mean),
        at_outputs,
        torch.ones_like,
    )
    own: dict[str, Factored] = {}
    for record in responses:
        why, part = _unit_responses(source, tape, record)
        if part is None:
            left_out.setdefault(record.block.name, why)
        elif record.block.name not in left_out:
            own[record.block.name] = part
    squares: dict[str, Tensor] = {}
    for records in _sweeps(source, tape, outputs, targets):
        for record in records:
            name = record.block.name
            if name not in own:
                continue
            part = _factored(record)
            total = sums.setdefault(name, _Sums.like(record.block, part))
            for some in units.split(record):
                total.add_exact(_factored(some))
            w = part.apart().g.square().sum(dim=0).squeeze(2)  # (G, N·T, O), summed over columns
            squares[name] = squares[name] + w if name in squares else w
    for name, part in own.items():
        sums[name].add_relative(part, squares[name])


def _sweeps(
    source: Source, tape: UnitTape, outputs: Tensor, targets: Tensor | None
) -> Iterator[Iterator[Record]]:
    """The exact estimator's, as many at a time as memory likes."""
    columns = source.estimator.cotangents(
        source.likelihood, outputs, targets, generator=source.generator
    )
    together = source.sweeps_together(tape.sweep_numel)
    while chunk := list(islice(columns, together)):
        yield tape.records(torch.stack(chunk))


def _unit_responses(source: Source, tape: UnitTape, record: Record) -> tuple[str, Factored | None]:
    """Roots of ν beside the inputs, positions apart; or why a block has none."""
    block = record.block
    site = source.plan.sites.get(block.name)
    if site is None:
        return f"no layer rule reads it ({source.plan.generic[block.parameters[0]]})", None
    if len(site.ports) > 1:
        return "its weight is used at several places", None
    if not isinstance(record.single, Factored):
        return "its units do not read a vector of inputs", None
    if not record.calls:
        return "a batch did not use it", None
    without = set(tape.without_response()).intersection(module for module, _ in site.ports)
    if without:
        return "no activation function of its own follows it", None
    return "", record.single.apart()


def _factored(record: Record) -> Factored:
    part = record.single
    assert isinstance(part, Factored)
    return part


@dataclass
class _Sums:
    """Sums over the data, of all units of a layer, `(G, O, ...)`.

    Attributes:
        traces: of E and of R.
        matrices: E and R; None if the layer is too wide.
        weight: Σ ν.
        mean: of ε², weighted by ν.
        spread: Σ ν (ε² − mean)².
    """

    traces: tuple[Tensor, Tensor]
    matrices: tuple[Tensor, Tensor] | None
    weight: Tensor
    mean: Tensor
    spread: Tensor

    @classmethod
    def like(cls, block: Block, part: Factored) -> _Sums:
        """Zeros."""
        groups, fan_out, fan_in = block.shape

        def zeros(*shape: int) -> Tensor:
            return part.g.new_zeros(groups, fan_out, *shape)

        narrow = block.num_parameters * fan_in <= WIDEST
        matrices = (zeros(fan_in, fan_in), zeros(fan_in, fan_in)) if narrow else None
        return cls((zeros(), zeros()), matrices, zeros(), zeros(), zeros())

    def add_exact(self, part: Factored) -> None:
        """Some sweeps of a batch."""
        self._add_moments(0, part)

    def add_relative(self, part: Factored, squares: Tensor) -> None:
        """A batch: roots of ν, and `ε² ν (G, N·T, O)`."""
        self._add_moments(1, part)
        nu = part.g[0].square().squeeze(2)  # (G, N·T, O)
        informed = nu > 0
        sensitivity = torch.where(informed, squares / torch.where(informed, nu, 1), 0)
        # Means and spreads of parts are merged as those of Chan et al.: nothing cancels.
        weight = nu.sum(dim=1)
        mean = (nu * sensitivity).sum(dim=1) / torch.where(weight > 0, weight, 1)
        spread = (nu * (sensitivity - mean[:, None]).square()).sum(dim=1)
        total = self.weight + weight
        share = weight / torch.where(total > 0, total, 1)
        gap = mean - self.mean
        self.spread += spread + gap.square() * self.weight * share
        self.mean += gap * share
        self.weight = total

    def _add_moments(self, which: int, part: Factored) -> None:
        if self.matrices is None:
            self.traces[which].add_(part.squared().sum(dim=-1))
            return
        moments = part.unit_moments()
        self.traces[which].add_(moments.diagonal(dim1=-2, dim2=-1).sum(dim=-1))
        self.matrices[which].add_(moments)

    def layer(self, block: Block) -> Layer:
        """What they say."""
        exact, relative = self.traces
        cosine = None
        if self.matrices is not None:
            E, R = self.matrices
            lengths = [torch.linalg.matrix_norm(matrix) for matrix in (E, R)]
            # Of unit length first: products of small matrices would be zero.
            cosine = (
                (E / _nonzero(lengths[0])[..., None, None])
                .mul(R / _nonzero(lengths[1])[..., None, None])
                .sum(dim=(-2, -1))
            )
            cosine = cosine.clamp(max=1).flatten().cpu()
        variation = (self.spread / _nonzero(self.weight)).sqrt() / _nonzero(self.mean)
        return Layer(
            block.name,
            factor=(exact / _nonzero(relative)).flatten().cpu(),
            cosine=cosine,
            variation=variation.flatten().cpu(),
            num_parameters=block.num_parameters,
        )


def _nonzero(values: Tensor) -> Tensor:
    """NaN for zero: what is divided by it is not there."""
    return torch.where(values > 0, values, torch.nan)


def _quartiles(values: Tensor) -> Quartiles:
    known = values[values.isfinite()].double().sort().values
    if not len(known):
        return Quartiles(math.nan, math.nan, math.nan)
    levels = torch.tensor([0.25, 0.5, 0.75], dtype=known.dtype)
    at = levels * (len(known) - 1)  # linear between two units; torch.quantile refuses many
    low = at.floor().long()
    high = at.ceil().long()
    return Quartiles(*(known[low] + (at - low) * (known[high] - known[low])).tolist())


def _words(quartiles: Quartiles | None) -> str:
    if quartiles is None:
        return "too wide"
    return f"{quartiles.median:.3g} ({quartiles.lower:.3g} to {quartiles.upper:.3g})"
