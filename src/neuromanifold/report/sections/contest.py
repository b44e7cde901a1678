"""How optimizers compare: by step, by second, and what natural gradients saw on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from markupsafe import Markup

from neuromanifold.report import curves
from neuromanifold.report.numerals import MISSING, measured, percent, quantity, ratio
from neuromanifold.report.sections._base import Section, Table
from neuromanifold.report.standing import (
    Contest,
    Spread,
    Standing,
    half_width,
    share_needed,
    spread,
    standings,
)

__all__ = ["contest_sections"]

Row = dict[str, Any]

MUCH_TIME = 0.25
"""Share of the time on curvature from which measuring it less often is worth a thought."""

SHRUNK = 0.1
"""A step this much shorter in KL than at first says that training has settled."""


def contest_sections(contest: Contest) -> list[Section]:
    """Every section that the runs have numbers for, in reading order."""
    candidates = (
        by_step(contest),
        by_second(contest),
        step_lengths(contest),
        dampings(contest),
        time_on_curvature(contest),
    )
    return [section for section in candidates if section is not None]


# ---- losses ----------------------------------------------------------------------------------


def by_step(contest: Contest) -> Section | None:
    """Losses against steps, and the table of what came out."""
    rows = _loss_rows(contest, "step")
    if not rows:
        return None
    order = standings(contest)
    says = Markup("{}").format(_by_step_says(order))
    return Section(
        key="by-step",
        title="Who learns most from a step?",
        says=says,
        advice=_seeds_advice(contest),
        reading=_reading(contest),
        chart=curves.losses(rows, says.striptags(), x="step", title="step"),
        table=_final_table(contest, order),
    )


def by_second(contest: Contest) -> Section | None:
    """Losses against seconds of training."""
    points = _loss_rows(contest, "seconds")
    if not points:
        return None
    order = standings(contest)
    says = Markup("{}").format(_by_second_says(order))
    rows = [
        [
            each.optimizer,
            _shown(each.mean("seconds")),
            _milliseconds(each),
            _share_of_curvature(each),
        ]
        for each in order
    ]
    head = ("optimizer", "seconds in all", "milliseconds per step", "of that on curvature")
    title = "seconds of training, without evaluations"
    return Section(
        key="by-second",
        title="Who learns fastest by the clock?",
        says=says,
        advice=_clock_advice(order),
        reading=_reading(contest),
        chart=curves.losses(points, says.striptags(), x="seconds", title=title),
        table=Table("Time", head, rows),
    )


def _by_step_says(order: Sequence[Standing]) -> str:
    first, *others = order
    if first.loss is None:
        return "No optimizer ended at a finite loss."
    end = f"{first.optimizer} ended at {_shown(first.loss)} nats per sample"
    if not others or others[0].loss is None:
        return f"{end}."
    share = share_needed(first, others[0], "step")
    if share is None:
        return f"{end}, {others[0].optimizer} at {_shown(others[0].loss)}."
    return (
        f"{end}. It was where {others[0].optimizer} ended, at {_shown(others[0].loss)}, after "
        f"{percent(share)} of the steps."
    )


def _by_second_says(order: Sequence[Standing]) -> str:
    quickest = min(order, key=lambda each: _per_step(each))
    slowest = max(order, key=lambda each: _per_step(each))
    if quickest is slowest:
        return f"A step of {quickest.optimizer} takes {_milliseconds(quickest)} ms."
    times = ratio(_per_step(slowest) / _per_step(quickest))
    return (
        f"A step of {slowest.optimizer} takes {_milliseconds(slowest)} ms, {times} times as long "
        f"as one of {quickest.optimizer}."
    )


def _clock_advice(order: Sequence[Standing]) -> Markup:
    first, *others = order
    if not others or first.loss is None or others[0].loss is None:
        return Markup("Compare with another optimizer: add <code>--optimizer adamw</code>.")
    share = share_needed(first, others[0], "seconds")
    if share is None:
        return Markup(
            "For one seed at least, {} never was where {} ended: the clock decides nothing here. "
            "Train longer, or with more seeds."
        ).format(first.optimizer, others[0].optimizer)
    if share < 1:
        return Markup(
            "Take {}: it was where {} ended after {} of its seconds. Times are those of this "
            "machine, and change with batch size and width."
        ).format(first.optimizer, others[0].optimizer, percent(share))
    return Markup(
        "By the clock, {} is the better choice until its loss no longer falls: {} needs {} times "
        "its seconds to be there. Larger batches make steps count for more."
    ).format(others[0].optimizer, first.optimizer, ratio(share))


def _seeds_advice(contest: Contest) -> Markup:
    if len(contest["seeds"]) == 1:
        return Markup(
            "This is one run of each: add <code>--seeds 3</code> to see what is chance, and try "
            "other learning rates, as in <code>--optimizer adamw:0.003</code>."
        )
    return Markup(
        "Give each optimizer the learning rate that suits it before you judge, as in "
        "<code>--optimizer adamw:0.003</code>."
    )


def _evaluated(contest: Contest) -> str:
    return "test data" if contest["has_test"] else "training data"


def _reading(contest: Contest) -> str:
    said = f"Solid: {_evaluated(contest)} after each epoch. Dashed: minibatches in passing."
    if len(contest["seeds"]) > 1:
        said += f" Means over {len(contest['seeds'])} seeds; the bands are 95% intervals."
    return said


def _loss_rows(contest: Contest, axis: str) -> list[Row]:
    evaluated = _evaluated(contest)
    rows = []
    for optimizer, runs in _by_optimizer(contest).items():
        for data, points in ((curves.MINIBATCHES, "curve"), (evaluated, "history")):
            for at in _together([run[points] for run in runs], "loss"):
                row = {"optimizer": optimizer, "data": data, axis: at[axis], "loss": at["loss"]}
                rows.append(row | (_ends(at) if data == evaluated else {}))
    return rows


def _by_optimizer(contest: Contest) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run in contest["runs"]:
        found.setdefault(run["optimizer"], []).append(run)
    return found


def _together(series: Sequence[Sequence[Mapping[str, Any]]], key: str) -> list[Row]:
    """Means over seeds, point by point, where all of them have a finite number."""
    rows = []
    for points in zip(*series, strict=False):
        found = spread([point.get(key) for point in points])
        if found is None:
            continue
        width = half_width(found)
        row: Row = {"step": points[0]["step"], key: found.value}
        if "seconds" in points[0]:
            row["seconds"] = fmean(point["seconds"] for point in points)
        if width is not None:
            row |= {"low": found.value - width, "high": found.value + width}
            if min(point[key] for point in points) > 0:  # it may stand on a logarithmic axis
                row["low"] = max(row["low"], 0.5 * min(point[key] for point in points))
        rows.append(row)
    return rows


def _ends(row: Row) -> Row:
    return {end: row[end] for end in ("low", "high") if end in row}


def _final_table(contest: Contest, order: Sequence[Standing]) -> Table:
    numbers: list[tuple[str, Callable[[Standing], str]]] = [
        ("learning rate", lambda each: quantity(each.runs[0]["lr"])),
        ("steps", lambda each: f"{each.runs[0]['steps']:,}"),
        ("training loss", lambda each: _shown(each.mean("train_loss"))),
    ]
    if contest["has_test"]:
        numbers.append(("test loss", lambda each: _shown(each.mean("test_loss"))))
    for kind, name in (("train", "training"), ("test", "test")):
        if any(run[f"{kind}_accuracy"] is not None for run in contest["runs"]):
            label, key = f"right on {name} data", f"{kind}_accuracy"
            numbers.append((label, lambda each, key=key: _shown(each.mean(key), percent)))  # type: ignore[misc]
    rows = [[each.optimizer, *(show(each) for _, show in numbers)] for each in order]
    head = ("optimizer", *(name for name, _ in numbers))
    return Table("At the end (losses in nats per sample)", head, rows)


def _shown(found: Spread | None, show: Callable[[float | None], str] = quantity) -> str:
    if found is None:
        return MISSING
    if found.stderr is None:
        return show(found.value)
    return measured(found.value, found.stderr, None if show is quantity else show)


def _per_step(each: Standing) -> float:
    return fmean(run["seconds"] / run["steps"] for run in each.runs)


def _milliseconds(each: Standing) -> str:
    return quantity(1e3 * _per_step(each))


# ---- natural gradients -----------------------------------------------------------------------


def _scalar_rows(contest: Contest, name: str) -> list[Row]:
    return _rows_of(contest, name, lambda run: run["scalars"])


def _rows_of(
    contest: Contest, name: str, points: Callable[[Mapping[str, Any]], Sequence[Mapping[str, Any]]]
) -> list[Row]:
    rows = []
    for optimizer, runs in _by_optimizer(contest).items():
        rows += [
            {"optimizer": optimizer, "step": at["step"], name: at[name]} | _ends(at)
            for at in _together([points(run) for run in runs], name)
        ]
    return rows


def step_lengths(contest: Contest) -> Section | None:
    """The KL divergence of each step."""
    rows = [row for row in _scalar_rows(contest, "kl") if row["kl"] > 0]
    if len(rows) < 2:
        return None
    lines, settled = [], True
    for optimizer, kls in _series(rows, "kl").items():
        early, late = _ends_of(kls)
        settled = settled and late < SHRUNK * early
        lines.append([optimizer, quantity(early), quantity(late), quantity(max(kls))])
    first = lines[0]
    says = Markup(
        "A step of {} changed the predictions by a KL divergence of {} nats per sample at first, "
        "and of {} towards the end (medians of a quarter each)."
    ).format(first[0], first[1], first[2])
    advice = Markup(
        "The steps shortened by themselves: training has settled, and a constant learning rate "
        "will do."
        if settled
        else "The steps do not shorten by themselves: lower the learning rate towards the end, "
        "with any scheduler of torch, to settle."
    )
    head = ("optimizer", "KL at first", "KL at the end", "largest")
    return Section(
        key="kl",
        title="How far does a step go?",
        says=says,
        advice=advice,
        reading="",
        chart=curves.scalar_lines(
            rows, says.striptags(), name="kl", title="KL of the step (nats per sample)"
        ),
        table=Table("Length of steps (nats per sample and position)", head, lines),
    )


def _series(rows: Sequence[Row], name: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["optimizer"], []).append(row[name])
    return found


def _ends_of(values: Sequence[float]) -> tuple[float, float]:
    """Medians of the first and of the last quarter."""
    quarter = max(1, len(values) // 4)
    return median(values[:quarter]), median(values[-quarter:])


def dampings(contest: Contest) -> Section | None:
    """The damping, where it changes."""
    rows = _scalar_rows(contest, "damping")
    changing = {name for name, values in _series(rows, "damping").items() if len(set(values)) > 1}
    rows = [row for row in rows if row["optimizer"] in changing]
    if not rows:
        return None
    lines = [
        [name, quantity(values[0]), quantity(values[-1])]
        for name, values in _series(rows, "damping").items()
    ]
    says = Markup("The damping of {} went from {} to {} nats per parameter².").format(*lines[0])
    return Section(
        key="damping",
        title="How far was the curvature trusted?",
        says=says,
        advice=Markup(
            "Damping that keeps rising says that the quadratic model misleads: smaller learning "
            "rates, or curvature measured more often, help."
        ),
        reading="",
        chart=curves.scalar_lines(
            rows, says.striptags(), name="damping", title="damping (nats per parameter²)"
        ),
        table=Table("Damping", ("optimizer", "at first", "at the end"), lines),
    )


def time_on_curvature(contest: Contest) -> Section | None:
    """How much of the time measuring and inverting took."""
    name = "share"
    rows = [
        row | ({"high": min(row["high"], 1.0), "low": max(row["low"], 0.0)} if "low" in row else {})
        for row in _rows_of(contest, name, _shares_so_far)
    ]
    if len(rows) < 2:
        return None
    order = [each for each in standings(contest) if _curvature(each) is not None]
    shares = {each.optimizer: _curvature(each) or 0.0 for each in order}
    most = max(shares, key=lambda optimizer: shares[optimizer])
    says = Markup("Measuring and inverting curvature took {} of the seconds of {}.").format(
        percent(shares[most]), most
    )
    advice = Markup(
        "That is worth saving: measure less often, "
        "<code>schedule=nm.optim.Schedule(statistics=20, inverses=100)</code>, or on a part of "
        "each batch, <code>fraction=0.25</code>."
        if shares[most] > MUCH_TIME
        else "There is little to save here: curvature could even be measured more often."
    )
    lines = [
        [
            each.optimizer,
            percent(shares[each.optimizer]),
            *(f"{_total(each, key):,.0f}" for key in ("skipped", "failed")),
        ]
        for each in order
    ]
    head = ("optimizer", "share of the time", "steps left out", "measurements left out")
    return Section(
        key="time",
        title="What does curvature cost?",
        says=says,
        advice=advice,
        reading="Of all time up to each step.",
        chart=curves.scalar_lines(
            rows, says.striptags(), name=name, title="time on curvature so far", share=True
        ),
        table=Table("Time on curvature, and what was left out for NaN", head, lines),
    )


def _shares_so_far(run: Mapping[str, Any]) -> list[Row]:
    return [
        {"step": at["step"], "share": at["curvature_seconds"] / at["seconds"]}
        for at in run["scalars"]
        if "curvature_seconds" in at
    ]


def _curvature(each: Standing) -> float | None:
    """Share of the time, over all runs."""
    if not all(run["scalars"] and "failed" in run["scalars"][-1] for run in each.runs):
        return None
    spent = _total(each, "curvature_seconds")
    return spent / sum(run["seconds"] for run in each.runs)


def _total(each: Standing, name: str) -> float:
    return float(sum(run["scalars"][-1][name] for run in each.runs))


def _share_of_curvature(each: Standing) -> str:
    return percent(_curvature(each))
