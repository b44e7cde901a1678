"""Which estimator of the diagonal is worth its sweeps, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neuromanifold._estimate import plain
from neuromanifold._fisher import requested
from neuromanifold._typing import Params
from neuromanifold.capture import Batch, Forward
from neuromanifold.estimators import Estimator, Exact, Hessian, Moments, MonteCarlo, RandomSigns
from neuromanifold.likelihoods import Likelihood
from neuromanifold.linalg import memory
from neuromanifold.structures import Progress, Reducer, Source
from neuromanifold.structures._base import SWEEP_BYTES
from neuromanifold.structures.cost import load
from neuromanifold.variance.moments import moments
from neuromanifold.variance.second import second_derivative
from neuromanifold.variance.timing import pace, seconds

__all__ = ["Advice", "Comparison", "Row", "Spread", "compare"]

NEGLIGIBLE = 0.1
"""Draws that add no more than this share to the error of the data are as good as none."""
SHARE = f"{NEGLIGIBLE:.0%}"
HIGH = 0.95
"""The quantile that stands for the worst entries."""
WHOLE = "all parameters"
"""Name of the group that is the model."""
UNNAMED = "–"
"""Stands for what has no name or number."""
WORDS = ("layer", "estimator")
HEADER: tuple[str, ...] = ("layer", "entries", "trace", "estimator", "sweeps", "cost")
HEADER += ("error", "95 %", "data", "draws", "draws ≤", "bound/true")


@dataclass(frozen=True)
class Spread:
    """Relative standard errors of single entries of the diagonal, over a group of parameters.

    Attributes:
        median: half of the entries have less.
        high: 95 % of the entries have less.
    """

    median: float
    high: float


@dataclass(frozen=True)
class Row:
    """One estimator in one group of parameters.

    Attributes:
        group: name of the layer or parameter, or "all parameters".
        kind: "model", "layer" or "parameter".
        num_parameters: entries of the diagonal.
        zeros: how many of them are zero; they have no relative error and are left out below.
        estimator: as it is written.
        sweeps: backward passes for each batch; of `nm.Hessian`, as many as take its time.
        cost: time of the diagonal over that of a forward and backward pass of the model, on the
            first batch; of all parameters, whatever the group.
        trace: sum of the entries, in nats/parameter². All these estimators have it on average.
        stderr: all sources of error together.
        data: because the inputs are a sample; the same for all estimators.
        draws: because labels or signs are drawn.
        source: what is drawn, "labels" or "probes"; None for nothing.
        bound: `draws` at most, median over entries; None if there is no bound.
        tightness: bound over variance of the draws, median over entries; 1 if it is reached.
    """

    group: str
    kind: Literal["model", "layer", "parameter"]
    num_parameters: int
    zeros: int
    estimator: str
    sweeps: int
    cost: float
    trace: float
    stderr: Spread
    data: Spread
    draws: Spread
    source: str | None
    bound: float | None
    tightness: float | None


@dataclass(frozen=True)
class Advice:
    """What to use for a group of parameters.

    Attributes:
        group: name of the layer, or "all parameters".
        estimator: the one that is worth its sweeps, as it is written.
        sweeps: backward passes for each batch that are worth it.
        gain: how many times the variance of the second best estimator that draws is larger, at
            equal sweeps; median entries. None if fewer than two draw.
        reason: a sentence.
    """

    group: str
    estimator: str
    sweeps: int
    gain: float | None
    reason: str


@dataclass(frozen=True)
class Comparison:
    """Estimators of the diagonal side by side; `print` shows a table.

    Attributes:
        rows: for the model, each layer and each parameter, one per estimator.
        advice: for the model and each layer.
        num_samples: N, inputs.
    """

    rows: tuple[Row, ...]
    advice: tuple[Advice, ...]
    num_samples: int

    def __getitem__(self, group: str) -> tuple[Row, ...]:
        """The rows of "all parameters", of a layer, or else of a parameter.

        Raises:
            KeyError: If there is no such group; the message lists them.
        """
        found = [row for row in self.rows if row.group == group]
        if not found:
            groups = list(dict.fromkeys(row.group for row in self.rows))
            raise KeyError(f"no group {group!r}; there are {groups}")
        return tuple(row for row in found if row.kind == found[0].kind)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; what is not finite is None."""
        numbers: dict[str, Any] = plain(asdict(self))
        return numbers

    def __str__(self) -> str:
        lines, before = [HEADER], None
        for row in self.rows:
            if row.kind != "parameter":
                lines.append(_cells(row, first=row.group != before))
                before = row.group
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(map(_padded, range(len(HEADER)), line, widths)).rstrip() for line in lines
        ]
        advice = [f"{advice.group or UNNAMED}: {advice.reason}" for advice in self.advice]
        caption = (
            f"Relative standard error of single entries of the diagonal, N = {self.num_samples:,}: "
            f"median and {HIGH:.0%} quantile, then medians by source; cost in forward and backward "
            f"passes"
        )
        return "\n".join([caption, "", *table, "", *advice])


def compare(
    model: nn.Module,
    likelihood: Likelihood,
    data: Any,
    *,
    estimators: Sequence[Estimator] = (MonteCarlo(1), RandomSigns(1), Exact()),
    params: Iterable[str] | None = None,
    forward: Forward | None = None,
    uncovered: Literal["generic", "error"] = "generic",
    reducer: Reducer | None = None,
    generator: torch.Generator | None = None,
    progress: bool | Progress = False,
) -> Comparison:
    """How far off the diagonal is by each estimator, what that costs, and which one to take.

    All estimators have the same value on average. What differs is the error that their draws add
    to that of the data, and the number of sweeps. Both are closed forms, so nothing is drawn: one
    pass with all columns of the output Fisher, at the cost of `nm.Exact()`. Only an
    `nm.FromDistribution` of infinite support has its moments measured from labels, as for
    `nm.variance.diagonal`. Sweeps and seconds are those of the first batch, which is run some ten
    times for the latter.

    Args:
        model: as for `nm.fisher`, like all that follow.
        likelihood: what the outputs mean.
        data: inputs, with or without targets.
        estimators: those with a closed form, any but `nm.Empirical`. `nm.Hessian`, the estimator
            made of second derivatives, takes another pass over the data and more time than all
            others together (see `nm.variance.second_derivative`).
        params: names or patterns of the parameters.
        forward: how the model is called.
        uncovered: what to do about parameters without a layer rule.
        reducer: sums over processes.
        generator: source of the labels that moments are measured from.
        progress: True shows a progress bar.

    Returns:
        Rows for the model, its layers and parameters, with advice.

    Raises:
        UnsupportedError: If an estimator has no closed form, or, with `nm.Hessian`, the data can be
            read only once.
        TypeError: If an estimator is none.
        ValueError: If there is no estimator, and as `nm.fisher`.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(4, 3), torch.randn(256, 4)
        >>> comparison = nm.variance.compare(model, nm.Categorical(), x)
        >>> labels, signs, exact = comparison["all parameters"]
        >>> exact.sweeps, exact.draws.median
        (3, 0.0)
        >>> comparison.advice[0].gain > 1
        True
    """
    estimators = tuple(estimators)
    if not estimators:
        raise ValueError(
            "There is no estimator to compare: give at least one, e.g. (nm.MonteCarlo(1),)."
        )
    for estimator in estimators:
        if not isinstance(estimator, Estimator):
            raise TypeError(
                f"estimators are objects such as nm.MonteCarlo(1) or nm.Exact(); got {estimator!r}."
            )
    asked = requested(
        model,
        likelihood,
        data,
        estimator=estimators[0],
        params=params,
        forward=forward,
        uncovered=uncovered,
        reducer=reducer,
        generator=generator,
        progress=progress,
    )
    with asked as (_, source):
        if any(isinstance(estimator, Hessian) for estimator in estimators):
            source.require_repeatable("A comparison with nm.Hessian")
        first, data = source.data.peek()
        source = replace(source, data=data)
        found = moments(source, bounds=True)
        how = {
            "params": source.plan.layout.names,
            "forward": source.forward,
            "uncovered": uncovered,
            "reducer": reducer,
        }
        variances = list(_variances(source, first, estimators, found, how))
        groups = list(_groups(source))
    rows, advice = [], []
    for group in groups:
        of_group = list(_rows(group, found, variances))
        rows += of_group
        if group.kind != "parameter":
            advice.append(_advise(of_group))
    return Comparison(tuple(rows), tuple(advice), found.num_samples)


def _variances(
    source: Source,
    first: Batch,
    estimators: Sequence[Estimator],
    found: Moments,
    how: Mapping[str, Any],
) -> Iterator[_Variances]:
    """What each estimator adds, and what it costs."""
    noise = {
        i: (estimator.noise(found), estimator.noise_bounds(found))
        for i, estimator in enumerate(estimators)
        if not isinstance(estimator, Hessian)
    }
    free = memory.available(source.device)
    # nm.Hessian sends nothing back; it has a variance, and a time, of its own.
    sweeps = {i: load(replace(source, estimator=estimators[i]), first, free).sweeps for i in noise}
    most = max(sweeps, key=lambda i: sweeps[i], default=None)
    numel = load(replace(source, estimator=MonteCarlo(1)), first, free).sweep_numel
    fitting = max(SWEEP_BYTES // (4 * numel + 1), 1)
    some = first.samples(0, min(first.num_samples, fitting))
    timed = pace(
        source,
        some,
        MonteCarlo(1) if most is None else estimators[most],
        1 if most is None else sweeps[most],
    )
    for i, estimator in enumerate(estimators):
        if isinstance(estimator, Hessian):
            taken = seconds(source, some, estimator)
            error = second_derivative(
                source.plan.model,
                source.likelihood,
                source.data,
                samples=estimator.samples,
                **how,
            )
            labels = error.variances["labels"]
            assert not isinstance(labels, Tensor)
            sweeps_then, cost = timed.sweeps(taken), taken / timed.training
            yield _Variances(repr(estimator), sweeps_then, cost, {"labels": labels}, {})
        else:
            cost = timed.cost(sweeps[i])
            yield _Variances(repr(estimator), sweeps[i], cost, *noise[i])


@dataclass(frozen=True)
class _Group:
    name: str
    kind: Literal["model", "layer", "parameter"]
    parameters: tuple[str, ...]

    def entries(self, params: Params) -> Tensor:
        """In a row, in double precision: their squares may be small."""
        return torch.cat([params[name].flatten() for name in self.parameters]).double()


@dataclass(frozen=True)
class _Variances:
    """What an estimator's draws add to the variance of the diagonal, by source."""

    estimator: str
    sweeps: int
    cost: float
    noise: Mapping[str, Params]
    bounds: Mapping[str, Params]


def _groups(source: Source) -> Iterator[_Group]:
    yield _Group(WHOLE, "model", source.plan.layout.names)
    for block in source.plan.blocks:
        yield _Group(block.name, "layer", block.parameters)
    for name in source.plan.layout.names:
        yield _Group(name, "parameter", (name,))


def _rows(group: _Group, found: Moments, estimators: Sequence[_Variances]) -> Iterator[Row]:
    """One for each estimator, from variances relative to the squares of the entries."""
    value = group.entries(found.information)
    informed = value > 0
    squares = value[informed].square()

    def relative(params: Params) -> Tensor:
        return group.entries(params)[informed] / squares

    if found.num_samples > 1:
        data = relative(found.between_samples) / found.num_samples
    else:  # one input says nothing of others
        data = torch.full_like(squares, torch.inf)
    of_data = _spread(data)
    for each in estimators:
        noise = [relative(params) for params in each.noise.values()]
        draws = torch.stack(noise).sum(dim=0) if noise else None
        bounds = [relative(params) for params in each.bounds.values()]
        most = torch.stack(bounds).sum(dim=0) if bounds else None
        yield Row(
            group=group.name,
            kind=group.kind,
            num_parameters=len(value),
            zeros=len(value) - len(squares),
            estimator=each.estimator,
            sweeps=each.sweeps,
            cost=each.cost,
            trace=float(value.sum()),
            stderr=of_data if draws is None else _spread(data + draws),
            data=of_data,
            draws=Spread(0.0, 0.0) if draws is None else _spread(draws),
            source=" and ".join(each.noise) or None,
            bound=None if most is None else math.sqrt(_quantile(most, 0.5)),
            tightness=None if most is None or draws is None else _tightness(most, draws),
        )


def _tightness(most: Tensor, true: Tensor) -> float | None:
    drawn = true > 0
    return _quantile(most[drawn] / true[drawn], 0.5) if bool(drawn.any()) else None


def _spread(variances: Tensor) -> Spread:
    return Spread(*(math.sqrt(_quantile(variances, q)) for q in (0.5, HIGH)))


def _quantile(values: Tensor, q: float) -> float:
    """By selection: torch.quantile refuses large tensors. NaN of nothing."""
    if not len(values):
        return math.nan
    return float(values.kthvalue(min(int(q * len(values)), len(values) - 1) + 1).values)


def _advise(rows: Sequence[Row]) -> Advice:
    """The cheapest estimator whose draws add next to nothing to the error of the data."""
    group = rows[0].group
    # A draw cannot be divided, and one of nm.Hessian may cost more than enough sweeps of another.
    ranked = sorted(
        (row for row in rows if row.source is not None),
        key=lambda row: (max(_sweeps_enough(row), row.sweeps), _cost(row)),
    )
    exact = min((row for row in rows if row.source is None), key=_cost_of_exact, default=None)
    if rows[0].zeros == rows[0].num_parameters:
        least = min(rows, key=_cost_of_exact)
        return Advice(group, least.estimator, least.sweeps, None, "all entries are zero.")
    if not ranked:
        assert exact is not None
        reason = "draws nothing, so only more inputs make the error smaller."
        return Advice(group, exact.estimator, exact.sweeps, None, f"{exact.estimator} {reason}")
    best, *others = ranked
    gain = _gain(best, others[0]) if others else None
    compared = ""
    if gain is not None and gain > 1:
        times = f"varies {gain:.2g} times as much" if math.isfinite(gain) else "does add some"
        compared = f"; at equal sweeps {others[0].estimator} {times}"
    small = f"less than {SHARE} to the error of the data"
    enough = _sweeps_enough(best)
    sweeps = f"{enough:,.0f}" if math.isfinite(enough) else "no number of"
    row, worth = best, best.sweeps
    if best.draws.median == 0 and exact is not None and exact.cost < best.cost:
        row, worth = exact, exact.sweeps
        reason = (
            f"the draws of {best.estimator} add no error, and {exact.estimator}, which draws "
            f"nothing, costs less"
        )
    elif best.draws.median == 0:
        reason = f"the draws of {best.estimator} add no error to that of the data"
    elif math.isinf(best.data.median):
        reason = f"one input leaves the error of the data unknown, so {best.estimator} may do"
    elif enough <= best.sweeps:
        reason = f"the draws of {best.estimator} add {small}: more inputs help, more draws do not"
    elif exact is not None and exact.sweeps <= enough:
        row, worth = exact, exact.sweeps
        reason = (
            f"{exact.estimator} takes {exact.sweeps:,} sweeps, and {sweeps} sweeps of "
            f"{best.estimator} would be enough to add {small}"
        )
    elif math.isinf(enough):
        reason = f"{best.estimator} is the least noisy, and as the data add no error, draws decide"
    else:
        worth = int(enough)
        instead = "" if exact is None else f", where {exact.estimator} takes {exact.sweeps:,}"
        reason = f"{sweeps} sweeps of {best.estimator} add {small}{instead}"
    return Advice(group, row.estimator, worth, gain, f"{reason}{compared}.")


def _cost(row: Row) -> float:
    """Variance of one sweep, of the median entry."""
    return row.draws.median**2 * row.sweeps


def _cost_of_exact(row: Row) -> int:
    return row.sweeps


def _gain(best: Row, other: Row) -> float:
    if _cost(best) == 0:
        return 1.0 if _cost(other) == 0 else math.inf
    return _cost(other) / _cost(best)


def _sweeps_enough(row: Row) -> float:
    """Sweeps with which the draws add no more than a negligible share to the data's error."""
    allowed = ((1 + NEGLIGIBLE) ** 2 - 1) * row.data.median**2
    return math.ceil(_cost(row) / allowed) if allowed > 0 else math.inf


def _cells(row: Row, *, first: bool) -> tuple[str, ...]:
    """A line of the table; what estimators have in common stands at the first of them."""
    errors = (row.stderr.median, row.stderr.high, row.data.median, row.draws.median, row.bound)
    return (
        (row.group or UNNAMED) if first else "",
        f"{row.num_parameters:,}" if first else "",
        f"{row.trace:.3g}" if first else "",
        row.estimator,
        f"{row.sweeps:,}",
        f"{row.cost:.2g}",
        *map(_percent, errors),
        UNNAMED if row.tightness is None else f"{row.tightness:.2f}",
    )


def _padded(column: int, cell: str, width: int) -> str:
    return cell.ljust(width) if HEADER[column] in WORDS else cell.rjust(width)


def _percent(value: float | None) -> str:
    """To three digits."""
    if value is None or not math.isfinite(value):
        return UNNAMED
    digits = 0 if value >= 1 else 1 if value >= 0.1 else 2
    return f"{value:.{digits}%}"
