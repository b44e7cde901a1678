"""The charts of a report, as Vega-Lite specifications.

They hold data and axes but no colours or fonts: the page adds those when it draws, from its style
sheet, once for a light screen and once for a dark one. A mark that is not in the first accent
colour says so by a style that the page knows: `reference`, `ring`, or `whisker` for lines from the
`low` to the `high` end of an interval, which rows have where it is known.
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
    "estimator_points",
    "grouped_error_bars",
    "loss_curve",
    "share_bars",
    "spectrum",
    "unit_quartiles",
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
        rows: `layer`, `trace_share`, `parameter_share` (both in [0, 1]), `trace`, and `low` and
            `high` ends of the first share.
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
    layers = [bars, *_whiskers(rows, x="low:Q", y=_names("layer", rows)), ticks]
    return _finish(alt.layer(*layers), description, _room_for(len(rows)))


def diagonal_quantiles(rows: Rows, description: str) -> Spec:
    """A line from the 5% to the 95% quantile, a bar over the middle half, a tick at the median.

    Args:
        rows: `parameter` and `q05`, `q25`, `q50`, `q75`, `q95` in nats per parameter², at least
            one of them positive; what is zero is drawn at the left edge. `low` and `high` are the
            ends of the median.
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
    kept = [row for row in shown if row.get("low", 0) >= 10.0**low]
    whiskers = _whiskers(kept, x="low:Q", y=_names("parameter", rows))
    return _finish(alt.layer(lines, bars, *whiskers, ticks), description, height)


def unit_quartiles(rows: Rows, description: str, *, title: str, logarithmic: bool) -> Spec:
    """A bar over the middle half of a layer's units, a tick at the median.

    Args:
        rows: `layer`, and `lower`, `median` and `upper` quartiles; positive.
        description: read out by screen readers.
        title: of the axis.
        logarithmic: whether the axis is; else it ends at 1.
    """
    if logarithmic:
        low = min(row["lower"] for row in rows)
        high = max(row["upper"] for row in rows)
        x = _log_x("lower:Q", title, *_decades(low, high))
    else:
        scale = alt.Scale(domain=[0, 1], clamp=True)
        x = alt.X("lower:Q", scale=scale, axis=alt.Axis(title=title, tickCount=5))
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=_names("layer", rows),
        tooltip=[
            alt.Tooltip("layer:N"),
            *(
                alt.Tooltip(f"{field}:Q", format=".3~g", title=words)
                for field, words in (
                    ("lower", "a quarter below"),
                    ("median", "median"),
                    ("upper", "a quarter above"),
                )
            ),
        ],
    )
    height = _room_for(len(rows))
    bars = base.mark_bar(size=min(10, 0.6 * height / len(rows))).encode(x=x, x2="upper")
    ticks = base.mark_tick(style="reference", thickness=5).encode(x="median:Q")
    return _finish(alt.layer(bars, ticks), description, height)


def spectrum(rows: Rows, description: str) -> Spec:
    """Eigenvalues against their rank, both on logarithmic axes.

    Args:
        rows: `rank` from 1 and `eigenvalue` in nats per parameter², positive, with `low` and
            `high`.
        description: read out by screen readers.
    """
    values = [row["eigenvalue"] for row in rows]
    highest = max(row.get("high", row["eigenvalue"]) for row in rows)
    low, high = _decades(min(values), highest)
    _, last = _decades(1, max(row["rank"] for row in rows))
    x = _log_x("rank:Q", "rank of the eigenvalue (1 is the largest)", 0, last)
    title = "eigenvalue (nats per parameter²)"
    points = (
        alt.Chart(alt.Data(values=rows))
        .mark_circle(size=22, opacity=0.9)
        .encode(
            x=x,
            y=_log_y("eigenvalue:Q", title, low, high),
            tooltip=["rank:Q", alt.Tooltip("eigenvalue:Q", format=".3~g")],
        )
    )
    kept = [row for row in rows if row.get("low", 0) >= 10.0**low]
    whiskers = _whiskers(kept, x=x, y=_log_y("low:Q", title, low, high), upright=True)
    return _finish(alt.layer(*whiskers, points), description, _HEIGHT)


def dimension_curve(rows: Rows, description: str, *, reference: Mapping[str, float]) -> Spec:
    """Effective dimension against damping, with one point picked out.

    Args:
        rows: `damping` in nats per parameter², positive, and `value`, with `low` and `high`.
        description: read out by screen readers.
        reference: `damping` and `value` of the point.
    """
    dampings = [row["damping"] for row in rows]
    x = _log_x(
        "damping:Q", "damping (nats per parameter²)", *_decades(min(dampings), max(dampings))
    )
    axis = alt.Axis(title="effective dimension (directions)", tickCount=6)
    y = alt.Y("value:Q", axis=axis)
    tooltip = [alt.Tooltip(f"{name}:Q", format=".3~g") for name in ("damping", "value")]
    curve = alt.Chart(alt.Data(values=rows)).mark_line(point={"size": 24})
    point = alt.Chart(alt.Data(values=[reference])).mark_point(style="ring", size=130)
    known = [row for row in rows if "low" in row]
    band = alt.Chart(alt.Data(values=known)).mark_area(opacity=0.25)
    layers = [band.encode(x=x, y=alt.Y("low:Q", axis=axis), y2="high:Q")] if known else []
    layers.append(curve.encode(x=x, y=y, tooltip=[*tooltip, *_ends()] if known else tooltip))
    layers.append(point.encode(x="damping:Q", y="value:Q"))
    return _finish(alt.layer(*layers), description, _HEIGHT)


def grouped_error_bars(rows: Rows, description: str) -> Spec:
    """Relative errors: per layer, one bar for each structure.

    Args:
        rows: `layer`, `structure`, `error`, with `low` and `high`; structures in the order in which
            they are drawn.
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
    offset = alt.YOffset("structure:N", sort=structures)
    whiskers = [
        each.encode(yOffset=offset) for each in _whiskers(rows, x="low:Q", y=_names("layer", rows))
    ]
    layers = len({row["layer"] for row in rows})
    height = _room_for(layers, each=16 * len(structures) + 12)
    return _finish(alt.layer(chart, *whiskers), description, height)


def estimator_points(rows: Rows, description: str) -> Spec:
    """How far single entries are off by each estimator, layer by layer.

    Args:
        rows: `layer`, `estimator` with its cost, `error` (relative, positive), and `bound` or none.
        description: read out by screen readers.
    """
    estimators = list(dict.fromkeys(row["estimator"] for row in rows))
    bounded = [row for row in rows if row.get("bound")]
    values = [row["error"] for row in rows] + [row["bound"] for row in bounded]
    x = _log_percent("error:Q", "relative standard error of the median entry", values)
    layers = len({row["layer"] for row in rows})
    height = _room_for(layers, each=14 * len(estimators) + 16)
    offset = alt.YOffset("estimator:N", sort=estimators)
    legend = alt.Legend(orient="top", title=None, columns=1, labelLimit=320)
    points = (
        alt.Chart(alt.Data(values=rows))
        .mark_point(filled=True, size=min(90, 40 * height / len(rows)), opacity=1)
        .encode(
            x=x,
            y=_names("layer", rows),
            yOffset=offset,
            color=alt.Color("estimator:N", sort=estimators, legend=legend),
            tooltip=[
                "layer:N",
                "estimator:N",
                alt.Tooltip("error:Q", format=".2%"),
            ],
        )
    )
    ticks = alt.Chart(alt.Data(values=bounded)).mark_tick(style="reference", thickness=4)
    ticks = ticks.encode(
        x=_log_percent("bound:Q", "relative standard error of the median entry", values),
        y=_names("layer", rows),
        yOffset=offset,
        tooltip=[
            "layer:N",
            "estimator:N",
            alt.Tooltip("bound:Q", format=".2%", title="draws add at most"),
        ],
    )
    return _finish(alt.layer(ticks, points) if bounded else points, description, height)


def error_bars(rows: Rows, description: str) -> Spec:
    """Relative errors of the whole matrix: one bar for each `structure`, as long as its `error`.

    `low` and `high` are its ends.
    """
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_bar()
        .encode(
            x=_error("relative error ‖F − K‖ / ‖F‖"),
            y=_names("structure", rows),
            tooltip=["structure:N", alt.Tooltip("error:Q", format=".3~g")],
        )
    )
    whiskers = _whiskers(rows, x="low:Q", y=_names("structure", rows))
    return _finish(alt.layer(chart, *whiskers), description, _room_for(len(rows)))


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


def _whiskers(
    rows: Rows, *, x: str | alt.X, y: str | alt.Y, upright: bool = False
) -> list[alt.Chart]:
    """Lines from `low` to `high`, of the rows that have them; a layer, or none."""
    known = [row for row in rows if "low" in row]
    if not known:
        return []
    lines = alt.Chart(alt.Data(values=known)).mark_rule(style="whisker")
    end = {"y2": "high:Q"} if upright else {"x2": "high:Q"}
    return [lines.encode(x=x, y=y, tooltip=_ends(), **end)]


def _ends() -> list[alt.Tooltip]:
    """Of an interval, in the box at the pointer."""
    return [
        alt.Tooltip(f"{end}:Q", format=".3~g", title=f"95% interval {words}")
        for end, words in (("low", "from"), ("high", "to"))
    ]


def _finish(
    chart: alt.Chart | alt.LayerChart | alt.FacetChart, description: str, height: int
) -> Spec:
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


def _log_percent(field: str, title: str, values: Sequence[float]) -> alt.X:
    """A logarithmic axis with no more room than the values need, ticks at 1, 2, 5, 10, ... %."""
    low, high = 0.8 * min(values), 1.25 * max(values)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    steps = (1, 2, 5) if len(exponents) <= 2 else (1,)
    ticks = [step * 10.0**exponent for exponent in exponents for step in steps]
    shown = [tick for tick in ticks if low <= tick <= high]
    axis = alt.Axis(title=title, values=shown, format="~%")
    return alt.X(field, scale=alt.Scale(type="log", domain=[low, high], nice=False), axis=axis)


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
