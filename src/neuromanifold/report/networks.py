"""Charts of random networks, as Vega-Lite specifications."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import altair as alt

from neuromanifold.report.charts import Spec, _decades, _finish, _log_x, _log_y, _names, _room_for

__all__ = ["RECOMMENDED", "THIS", "by_layer", "phase_plane", "spectrum_statistics"]

Rows = Sequence[Mapping[str, Any]]

THIS, RECOMMENDED = "this network", "recommended"


def phase_plane(
    cells: Rows, edge: Rows, points: Rows, description: str, *, room: Sequence[float]
) -> Spec:
    """Weight variance against bias variance: how far gradients reach, and the edge of chaos.

    Args:
        cells: corners `w0`, `w1`, `b0`, `b1`, `gain`, and `reach` in layers, positive.
        edge: `weight` and `bias` along the edge of chaos; may be empty.
        points: `which`, `weight`, `bias`.
        description: read out by screen readers.
        room: largest weight and bias variance.
    """
    x_scale, y_scale = (alt.Scale(domain=[0, most], nice=False) for most in room)
    x_axis, y_axis = (
        alt.Axis(title=title, tickCount=5, grid=False)
        for title in ("weight variance σ_w² (times fan-in)", "bias variance σ_b²")
    )
    colour = alt.Color(
        "reach:Q",
        scale=alt.Scale(type="log", domain=[1, 100], clamp=True, range="heatmap"),
        legend=alt.Legend(
            orient="top",
            title="layers per e-fold of squared gradients",
            titleLimit=320,
            gradientLength=200,
            gradientThickness=10,
            values=[1, 10, 100],
        ),
    )
    ground = (
        alt.Chart(alt.Data(values=cells))
        .mark_rect()
        .encode(
            x=alt.X("w0:Q", scale=x_scale, axis=x_axis),
            x2="w1:Q",
            y=alt.Y("b0:Q", scale=y_scale, axis=y_axis),
            y2="b1:Q",
            color=colour,
            tooltip=[
                alt.Tooltip("gain:Q", format=".3~g"),
                alt.Tooltip("reach:Q", format=".3~g", title="layers per e-fold"),
            ],
        )
    )
    line = (
        alt.Chart(alt.Data(values=edge))
        .mark_line(style="whisker", strokeWidth=2.5)
        .encode(x="weight:Q", y="bias:Q", order="bias:Q")
    )
    shapes = alt.Scale(domain=[THIS, RECOMMENDED], range=["circle", "diamond"])
    # The names stand beside the points: two symbols need no legend.
    marks = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("weight:Q", scale=x_scale, axis=x_axis),
        y=alt.Y("bias:Q", scale=y_scale, axis=y_axis),
        tooltip=["which:N", alt.Tooltip("weight:Q"), alt.Tooltip("bias:Q")],
    )
    symbols = marks.mark_point(style="reference", filled=True, size=150).encode(
        shape=alt.Shape("which:N", scale=shapes, legend=None)
    )
    # Apart from one another, and the second one clear of the edge, which rises to its right.
    beside: dict[str, tuple[Literal["left", "right"], int, int]] = {
        THIS: ("left", 10, -12),
        RECOMMENDED: ("right", -8, -28),
    }
    texts = [
        marks.mark_text(style="label", align=align, dx=dx, dy=dy)
        .transform_filter(alt.datum.which == which)
        .encode(text="which:N")
        for which, (align, dx, dy) in beside.items()
    ]
    return _finish(alt.layer(ground, line, symbols, *texts), description, 320)


def by_layer(rows: Rows, description: str, *, title: str, logarithmic: bool = False) -> Spec:
    """Lines as predicted, points as measured, layer by layer.

    Args:
        rows: `layer` from 1, `signal`, `predicted`, `measured`, and `low` and `high` where the 95%
            interval is known.
        description: read out by screen readers.
        title: of the axis.
        logarithmic: whether the axis is; rows with numbers that are not positive are left out.
    """
    shown = [row for row in rows if not logarithmic or min(row["predicted"], row["measured"]) > 0]
    if logarithmic:
        values = [row[name] for row in shown for name in ("predicted", "measured")]
        low, high = _decades(min(values), max(values))
        axes = {name: _log_y(f"{name}:Q", title, low, high) for name in ("predicted", "measured")}
        ends, least = _log_y("low:Q", title, low, high), 10.0**low
    else:
        scale = alt.Scale(domain=[min(0, *(row["measured"] for row in shown)), 1], nice=True)
        axis = alt.Axis(title=title, tickCount=5)
        axes = {
            name: alt.Y(f"{name}:Q", axis=axis, scale=scale) for name in ("predicted", "measured")
        }
        ends, least = alt.Y("low:Q", axis=axis, scale=scale), -1.0
    x = alt.X(
        "layer:Q",
        axis=alt.Axis(title="layer", tickMinStep=1, tickCount=8, format="d"),
        scale=alt.Scale(domain=[1, max(2, *(row["layer"] for row in shown))], nice=False),
    )
    signals = list(dict.fromkeys(row["signal"] for row in shown))
    legend = alt.Legend(orient="top", title=None) if len(signals) > 1 else None
    colour = alt.Color("signal:N", sort=signals, legend=legend)
    base = alt.Chart(alt.Data(values=shown)).encode(
        x=x,
        color=colour,
        tooltip=[
            "layer:Q",
            "signal:N",
            *(alt.Tooltip(f"{name}:Q", format=".3~g") for name in ("predicted", "measured")),
        ],
    )
    known = [row for row in shown if "low" in row and row["low"] >= least]
    layers = [base.mark_line().encode(y=axes["predicted"])]
    if known:
        whiskers = alt.Chart(alt.Data(values=known)).mark_rule(style="whisker")
        layers.append(whiskers.encode(x=x, y=ends, y2="high:Q"))
    layers.append(base.mark_point(filled=True, size=34, opacity=1).encode(y=axes["measured"]))
    return _finish(alt.layer(*layers), description, 260)


def spectrum_statistics(rows: Rows, predicted: Rows, description: str) -> Spec:
    """Circles for measured numbers, ticks for predicted ones, on a logarithmic axis.

    Args:
        rows: `quantity` and `value` in nats per parameter², positive; several of each.
        predicted: likewise, one of each.
        description: read out by screen readers.
    """
    values = [row["value"] for row in [*rows, *predicted]]
    x = _log_x("value:Q", "nats per parameter²", *_decades(min(values), max(values)))
    y = _names("quantity", predicted)
    tooltip = ["quantity:N", alt.Tooltip("value:Q", format=".3~g")]
    circles = alt.Chart(alt.Data(values=rows)).mark_circle(size=90, opacity=0.65)
    ticks = alt.Chart(alt.Data(values=predicted)).mark_tick(style="reference", thickness=4)
    layers = [mark.encode(x=x, y=y, tooltip=tooltip) for mark in (circles, ticks)]
    return _finish(alt.layer(*layers), description, _room_for(len(predicted), each=44))
