"""Charts of numbers that change while networks are trained, as Vega-Lite specifications."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from neuromanifold.report.charts import Spec, _finish
from neuromanifold.report.numerals import power_of_ten

__all__ = ["losses", "scalar_lines"]

Rows = Sequence[Mapping[str, Any]]

_HEIGHT = 280

MINIBATCHES = "minibatches"
"""What is said of losses that were seen in passing."""

_LOGARITHMIC_FROM = 8.0
"""Largest over smallest value from which an axis is logarithmic."""


def losses(rows: Rows, description: str, *, x: str, title: str) -> Spec:
    """Lines for each optimizer: solid after each epoch, dashed in passing.

    Args:
        rows: `optimizer`, `data` ("minibatches" or what was evaluated), `loss` in nats per
            sample, what is under `x`, and `low` and `high` where the 95% interval is known.
        description: read out by screen readers.
        x: "step" or "seconds".
        title: of the axis.
    """
    kinds = dict.fromkeys(row["data"] for row in rows if row["data"] != MINIBATCHES)
    dash = alt.StrokeDash(
        "data:N",
        scale=alt.Scale(domain=[*kinds, MINIBATCHES], range=[[1, 0], [3, 3]]),
        legend=alt.Legend(orient="top", title=None, symbolType="stroke"),
    )
    y = _axis("loss", "loss (nats per sample)", rows)
    across = alt.X(f"{x}:Q", axis=alt.Axis(title=title, tickCount=6))
    colour = _colour(rows)
    tooltip = [
        "optimizer:N",
        "data:N",
        alt.Tooltip(f"{x}:Q", format=".4~g"),
        alt.Tooltip("loss:Q", format=".4~g"),
    ]
    lines = (
        alt.Chart(alt.Data(values=rows))
        .mark_line()
        .encode(x=across, y=y, color=colour, strokeDash=dash, tooltip=tooltip)
    )
    marked = [row for row in rows if row["data"] != MINIBATCHES]
    points = (
        alt.Chart(alt.Data(values=marked))
        .mark_point(filled=True, size=36, opacity=1)
        .encode(x=across, y=y, color=colour, shape=_shape(rows), tooltip=tooltip)
    )
    layers = [*_band(rows, across, y, colour), lines, points]
    return _finish(alt.layer(*layers), description, _HEIGHT)


def scalar_lines(
    rows: Rows, description: str, *, name: str, title: str, share: bool = False
) -> Spec:
    """A line for each optimizer, by step.

    Args:
        rows: `optimizer`, `step`, the number under `name`, and `low` and `high` where the 95%
            interval is known.
        description: read out by screen readers.
        name: of the number.
        title: of its axis.
        share: whether the number is a share of the whole.
    """
    if share:
        axis = alt.Axis(title=title, format="%", tickCount=5)
        y = alt.Y(f"{name}:Q", axis=axis, scale=alt.Scale(domainMin=0))
    else:
        y = _axis(name, title, rows)
    x = alt.X("step:Q", axis=alt.Axis(title="step", tickCount=6))
    colour = _colour(rows)
    tooltip = ["optimizer:N", "step:Q", alt.Tooltip(f"{name}:Q", format=".1%" if share else ".3~g")]
    lines = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point={"size": 24})
        .encode(x=x, y=y, color=colour, tooltip=tooltip)
    )
    return _finish(alt.layer(*_band(rows, x, y, colour), lines), description, 220)


def _names(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["optimizer"] for row in rows))


def _colour(rows: Rows) -> alt.Color:
    return alt.Color("optimizer:N", scale=alt.Scale(domain=_names(rows)), legend=_legend())


def _shape(rows: Rows) -> alt.Shape:
    """Told apart by more than colour; there are more shapes than colours."""
    return alt.Shape("optimizer:N", scale=alt.Scale(domain=_names(rows)), legend=_legend())


def _legend() -> alt.Legend:
    """One for colour and shape, and not as pale as the bands."""
    return alt.Legend(orient="top", title=None, symbolOpacity=1, symbolStrokeWidth=0)


def _band(rows: Rows, x: alt.X, y: alt.Y, colour: alt.Color) -> list[alt.Chart]:
    known = [row for row in rows if "low" in row]
    if not known:
        return []
    low = y.copy()
    low.shorthand = "low:Q"
    kind = {"detail": "data:N"} if "data" in known[0] else {}
    area = alt.Chart(alt.Data(values=known)).mark_area(opacity=0.25, line=False)
    return [area.encode(x=x, y=low, y2="high:Q", color=colour, **kind)]


def _axis(name: str, title: str, rows: Rows) -> alt.Y:
    """Logarithmic where the numbers are positive and far apart, with ticks at 1, 2, 5, 10, ..."""
    values = [row[name] for row in rows]
    low, high = min(values), max(values)
    if low <= 0 or high / low < _LOGARITHMIC_FROM:
        scale = alt.Scale(zero=False, nice=True)
        return alt.Y(f"{name}:Q", axis=alt.Axis(title=title, tickCount=5), scale=scale)
    ends = [0.85 * low, 1.15 * high]
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(exponents) <= 3 else (1,)
    every = math.ceil(len(exponents) / 6)
    ticks = {
        step * 10.0**exponent: _tick_label(step, exponent)
        for exponent in exponents[::every]
        for step in steps
        if ends[0] <= step * 10.0**exponent <= ends[1]
    }
    texts = {str(round(1000 * math.log10(tick))): text for tick, text in ticks.items()}
    label = f"({json.dumps(texts)})[round(1000 * log(datum.value) / LN10)]"
    axis = alt.Axis(title=title, values=list(ticks), labelExpr=label)
    scale = alt.Scale(type="log", domain=ends, nice=False, clamp=True)
    return alt.Y(f"{name}:Q", axis=axis, scale=scale)


def _tick_label(digit: int, exponent: int) -> str:
    """A digit times a power of ten.

    Example:
        >>> _tick_label(2, -1), _tick_label(1, -6), _tick_label(5, -6)
        ('0.2', '10⁻⁶', '5×10⁻⁶')
    """
    if -3 <= exponent <= 3:
        return f"{digit * 10.0**exponent:g}"
    return power_of_ten(exponent) if digit == 1 else f"{digit}×{power_of_ten(exponent)}"
