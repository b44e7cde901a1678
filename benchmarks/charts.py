"""Charts of the speed page, as Vega-Lite specifications; the page adds colours and fonts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from benchmarks.suite import OURS

__all__ = ["bar_of_peak", "bar_of_step", "bars_of", "growth", "ratios"]

Row = dict[str, Any]
KINDS = ("ours", "others")
MOST_LEFT = 0.2
"""Where the axis of ratios begins, or a little before, unless something is less."""


def bars_of(result: Mapping[str, Any]) -> list[Row]:
    """Of everyone whose answer on a workload is right, with the marks of the workload."""
    return [
        {
            "who": f"{result['workload']}  {who}",
            "kind": KINDS[who != OURS],
            "ratio": answer["quartiles"][1],
            "target": result["target"],
            "floor": result["floor"],
        }
        for who, answer in result["answers"].items()
        if not answer["problem"] and "quartiles" in answer
    ]


def bar_of_step(result: Mapping[str, Any]) -> Row:
    """Of one optimizer on a workload."""
    return {
        "who": f"{result['workload']}  {result['optimizer']} ({result['by']})",
        "kind": KINDS[result["by"] != OURS],
        "ratio": result["mean"],
        "target": result["target"],
        "floor": None,
    }


def bar_of_peak(result: Mapping[str, Any], who: str, ratio: float) -> Row:
    """Of one library's memory for a quantity."""
    return {
        "who": f"{result['workload']}  {result['quantity']}: {who}",
        "kind": KINDS[who != OURS],
        "ratio": ratio,
        "target": None,
        "floor": None,
    }


def ratios(rows: Sequence[Row], description: str) -> dict[str, Any]:
    """Bars on a logarithmic axis, with ticks at targets and floors."""
    marks = [row[f] for row in rows for f in ("ratio", "target", "floor") if row[f]]
    low, high = min([MOST_LEFT, *marks]) / 1.5, max([1.0, *marks]) * 1.1
    shown = [{**row, "from": low} for row in rows]
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    x = alt.X(
        "ratio:Q", scale=scale, axis=alt.Axis(title="ratio to the unit", tickCount=6, format="~g")
    )
    y = alt.Y("who:N", sort=None, axis=alt.Axis(title=None))
    legend = alt.Legend(orient="top", title=None)
    colour = alt.Color("kind:N", scale=alt.Scale(domain=list(KINDS)), legend=legend)
    tooltip = [
        "who:N",
        *(alt.Tooltip(f"{f}:Q", format=".3~g") for f in ("ratio", "target", "floor")),
    ]
    bars = (
        alt.Chart(alt.Data(values=shown))
        .mark_bar()
        .encode(x=x, x2="from:Q", y=y, color=colour, tooltip=tooltip)
    )
    ticks = [
        alt.Chart(alt.Data(values=[row for row in shown if row[field] is not None]))
        .mark_tick(style=style, thickness=thickness)
        .encode(x=alt.X(f"{field}:Q", scale=scale), y=y)
        for field, style, thickness in (("target", "reference", 5), ("floor", "whisker", 2))
    ]
    return _finished(alt.layer(bars, *ticks), description, max(110, 26 * len(rows) + 40))


def growth(rows: Sequence[Mapping[str, Any]], description: str, axis: str) -> dict[str, Any]:
    """Seconds against size, both logarithmic, a line for each quantity."""
    points = [
        {"quantity": row["quantity"], "size": size, "milliseconds": 1e3 * seconds}
        for row in rows
        for size, seconds in zip(row["sizes"], row["seconds"], strict=True)
    ]
    log = alt.Scale(type="log", nice=False)
    sizes = sorted({point["size"] for point in points})
    chart = (
        alt.Chart(alt.Data(values=points))
        .mark_line(point={"size": 30})
        .encode(
            x=alt.X("size:Q", scale=log, axis=alt.Axis(title=axis, values=sizes)),
            y=alt.Y("milliseconds:Q", scale=log, axis=alt.Axis(title="time (ms)", tickCount=5)),
            color=alt.Color("quantity:N", legend=alt.Legend(orient="top", title=None, columns=2)),
            strokeDash=alt.StrokeDash("quantity:N", legend=None),
            tooltip=["quantity:N", "size:Q", alt.Tooltip("milliseconds:Q", format=".3~g")],
        )
    )
    return _finished(chart, description, 280)


def _finished(
    chart: alt.Chart | alt.LayerChart | alt.FacetChart, description: str, height: int
) -> dict[str, Any]:
    spec = chart.properties(width="container", height=height, description=description).to_dict()
    del spec["config"]  # the page has its own look
    return spec
