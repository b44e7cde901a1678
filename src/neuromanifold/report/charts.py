"""The charts of a report, as Vega-Lite specifications.

They hold data and axes but no colours or fonts: the page adds those when it draws, from its style
sheet, once for a light screen and once for a dark one. A mark that is not in the first accent
colour says so by a style that the page knows: `reference` or `ring`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from neuromanifold.report.numerals import power_of_ten

__all__ = [
    "Spec",
    "diagonal_quantiles",
    "dimension_curve",
    "error_bars",
    "grouped_error_bars",
    "loss_curve",
    "share_bars",
    "spectrum",
]

Spec = dict[str, Any]
"""A Vega-Lite specification: plain JSON."""

Rows = Sequence[Mapping[str, Any]]

_HEIGHT = 260
_MOST_DECADES_LABELLED = 6
_LONGEST_LABEL = 36


def share_bars(rows: Rows, description: str) -> Spec:
    """Bars for a layer's share of the trace, ticks for its share of the parameters.

    Args:
        rows: `layer`, `trace_share`, `parameter_share` (both in [0, 1]) and `trace`.
        description: read out by screen readers.
    """
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=_names("layer", rows),
        tooltip=[
            alt.Tooltip("layer:N"),
            alt.Tooltip("trace:Q", format=".3~g", title="trace (nats/param²)"),
            alt.Tooltip("trace_share:Q", format=".1%", title="share of the trace"),
            alt.Tooltip("parameter_share:Q", format=".1%", title="share of the parameters"),
        ],
    )
    axis = alt.Axis(title="share of the network (%)", format="%", tickCount=5)
    bars = base.mark_bar().encode(x=alt.X("trace_share:Q", axis=axis))
    ticks = base.mark_tick(style="reference", thickness=5).encode(x="parameter_share:Q")
    return _finish(bars + ticks, description, _room_for(len(rows)))


def diagonal_quantiles(rows: Rows, description: str) -> Spec:
    """A line from the 5% to the 95% quantile, a bar over the middle half, a tick at the median.

    Args:
        rows: `parameter` and `q05`, `q25`, `q50`, `q75`, `q95` in nats per parameter², at least
            one of them positive; what is zero is drawn at the left edge.
        description: read out by screen readers.
    """
    quantiles = ("q05", "q25", "q50", "q75", "q95")
    positive = [row[q] for row in rows for q in quantiles if row[q] > 0]
    low, high = _decades(min(positive), max(positive))
    shown = [{**row, **{f"x{q}": max(row[q], 10.0**low) for q in quantiles}} for row in rows]
    title = "diagonal entry (nats per parameter²)"
    x = _log_x("xq05:Q", title, low, high)
    base = alt.Chart(alt.Data(values=shown)).encode(
        y=_names("parameter", rows),
        tooltip=[
            alt.Tooltip("parameter:N"),
            *(
                alt.Tooltip(f"{q}:Q", format=".3~g", title=f"{q[1:].lstrip('0')}% below")
                for q in quantiles
            ),
        ],
    )
    lines = base.mark_rule().encode(x=x, x2="xq95")
    height = _room_for(len(rows))
    bars = base.mark_bar(size=min(10, 0.6 * height / len(rows))).encode(x="xq25:Q", x2="xq75")
    ticks = base.mark_tick(style="reference", thickness=5).encode(x="xq50:Q")
    return _finish(lines + bars + ticks, description, height)


def spectrum(rows: Rows, description: str) -> Spec:
    """Eigenvalues against their rank, both on logarithmic axes.

    Args:
        rows: `rank` from 1 and `eigenvalue` in nats per parameter², positive.
        description: read out by screen readers.
    """
    values = [row["eigenvalue"] for row in rows]
    low, high = _decades(min(values), max(values))
    _, last = _decades(1, max(row["rank"] for row in rows))
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_circle(size=22, opacity=0.9)
        .encode(
            x=_log_x("rank:Q", "rank of the eigenvalue (1 is the largest)", 0, last),
            y=_log_y("eigenvalue:Q", "eigenvalue (nats per parameter²)", low, high),
            tooltip=["rank:Q", alt.Tooltip("eigenvalue:Q", format=".3~g")],
        )
    )
    return _finish(chart, description, _HEIGHT)


def dimension_curve(rows: Rows, description: str, *, reference: Mapping[str, float]) -> Spec:
    """Effective dimension against damping, with one point picked out.

    Args:
        rows: `damping` in nats per parameter², positive, and `value`.
        description: read out by screen readers.
        reference: `damping` and `value` of the point.
    """
    dampings = [row["damping"] for row in rows]
    x = _log_x(
        "damping:Q", "damping (nats per parameter²)", *_decades(min(dampings), max(dampings))
    )
    y = alt.Y("value:Q", axis=alt.Axis(title="effective dimension (directions)", tickCount=6))
    tooltip = [alt.Tooltip(f"{name}:Q", format=".3~g") for name in ("damping", "value")]
    curve = alt.Chart(alt.Data(values=rows)).mark_line(point={"size": 24})
    point = alt.Chart(alt.Data(values=[reference])).mark_point(style="ring", size=130)
    return _finish(
        curve.encode(x=x, y=y, tooltip=tooltip) + point.encode(x="damping:Q", y="value:Q"),
        description,
        _HEIGHT,
    )


def grouped_error_bars(rows: Rows, description: str) -> Spec:
    """Relative errors: per layer, one bar for each structure.

    Args:
        rows: `layer`, `structure`, `error`; structures in the order in which they are drawn.
        description: read out by screen readers.
    """
    structures = list(dict.fromkeys(row["structure"] for row in rows))
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_bar()
        .encode(
            x=_error("relative error ‖F − K‖ / ‖F‖"),
            y=_names("layer", rows),
            yOffset=alt.YOffset("structure:N", sort=structures),
            color=alt.Color(
                "structure:N", sort=structures, legend=alt.Legend(orient="top", title=None)
            ),
            tooltip=["layer:N", "structure:N", alt.Tooltip("error:Q", format=".3~g")],
        )
    )
    layers = len({row["layer"] for row in rows})
    return _finish(chart, description, _room_for(layers, each=16 * len(structures) + 12))


def error_bars(rows: Rows, description: str) -> Spec:
    """Relative errors of the whole matrix: one bar for each `structure`, as long as its `error`."""
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_bar()
        .encode(
            x=_error("relative error ‖F − K‖ / ‖F‖"),
            y=_names("structure", rows),
            tooltip=["structure:N", alt.Tooltip("error:Q", format=".3~g")],
        )
    )
    return _finish(chart, description, _room_for(len(rows)))


def loss_curve(rows: Rows, description: str) -> Spec:
    """Mean `loss` in nats per sample after each `epoch`."""
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point={"size": 24})
        .encode(
            x=alt.X("epoch:Q", axis=alt.Axis(title="epoch", tickMinStep=1, tickCount=8)),
            y=alt.Y("loss:Q", axis=alt.Axis(title="mean loss (nats per sample)", tickCount=5)),
            tooltip=["epoch:Q", alt.Tooltip("loss:Q", format=".3~g")],
        )
    )
    return _finish(chart, description, 200)


def _finish(chart: alt.Chart | alt.LayerChart, description: str, height: int) -> Spec:
    spec = chart.properties(width="container", height=height, description=description).to_dict()
    del spec["config"]  # Altair's default look; the page has its own
    return spec


def _names(field: str, rows: Rows) -> alt.Y:
    """An axis of names in the order of the data; long ones are abbreviated."""
    names = dict.fromkeys(row[field] for row in rows)
    short = {name: short_name(name) for name in names if len(name) > _LONGEST_LABEL}
    label = f"({json.dumps(short)})[datum.label] || datum.label"
    axis = alt.Axis(title=None, labelOverlap=True, labelExpr=label)
    return alt.Y(f"{field}:N", sort=None, axis=axis)


def short_name(name: str) -> str:
    """The end of a long name, which is what tells the layers of a network apart.

    Example:
        >>> short_name("bert.encoder.layer.0.attention.output.LayerNorm.weight")
        '…0.attention.output.LayerNorm.weight'
    """
    if len(name) <= _LONGEST_LABEL:
        return name
    _, dot, whole_parts = name[-_LONGEST_LABEL - 1 :].partition(".")
    return "…" + (whole_parts if dot else name[-_LONGEST_LABEL:])


def _room_for(bars: int, *, each: int = 30) -> int:
    """Height in pixels that keeps few bars slim and many bars on one screen."""
    return max(90, min(each * bars, 720))


def _error(title: str) -> alt.X:
    return alt.X("error:Q", axis=alt.Axis(title=title, tickCount=5), scale=alt.Scale(zero=True))


def _decades(low: float, high: float) -> tuple[int, int]:
    """Exponents of the powers of ten around a range, at least one apart."""
    first = math.floor(math.log10(low))
    return first, max(math.ceil(math.log10(high)), first + 1)


def _log_x(field: str, title: str, low: int, high: int) -> alt.X:
    return alt.X(field, scale=_log_scale(low, high), axis=_log_axis(title, low, high))


def _log_y(field: str, title: str, low: int, high: int) -> alt.Y:
    return alt.Y(field, scale=_log_scale(low, high), axis=_log_axis(title, low, high))


def _log_scale(low: int, high: int) -> alt.Scale:
    return alt.Scale(type="log", domain=[10.0**low, 10.0**high], nice=False)


def _log_axis(title: str, low: int, high: int) -> alt.Axis:
    """Ticks at powers of ten, few enough to be read on a phone."""
    step = math.ceil((high - low) / _MOST_DECADES_LABELLED)
    exponents = range(low, high + 1, step)
    texts = ", ".join(f"'{exponent}': '{power_of_ten(exponent)}'" for exponent in exponents)
    return alt.Axis(
        title=title,
        values=[10.0**exponent for exponent in exponents],
        labelExpr=f"({{{texts}}})[round(log(datum.value) / LN10)]",
    )
