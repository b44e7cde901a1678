"""Charts of Helmholtz machines, as Vega-Lite specifications."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from neuromanifold.report.charts import Spec, _finish

__all__ = ["gallery", "log_likelihoods", "two_gradients"]

Rows = Sequence[Mapping[str, Any]]
Images = Sequence[Sequence[float]]

_WIDEST = 600
"""Of a gallery, in pixels: about the room that a page has for a figure."""

_LABEL = 0.06
"""Height of the words over a row of images, in widths of the row."""


def log_likelihoods(
    rows: Rows, description: str, *, x: str, title: str, lowest: float, best: float | None
) -> Spec:
    """Lines with 95% bands for each training.

    Args:
        rows: `training`, `value` in nats per image, `low` and `high`, and what is under `x`.
        description: read out by screen readers.
        x: "step" or "seconds".
        title: of the axis.
        lowest: where the axis begins; what is lower is cut off.
        best: a value that none can exceed, as a line; None if it is not known.
    """
    highest = max(row["high"] for row in rows)
    if best is not None:
        highest = max(highest, best)
    scale = alt.Scale(domain=[lowest, highest + 0.05 * (highest - lowest)], nice=False)
    axis = alt.Axis(title="log-likelihood (nats per image)", tickCount=6)
    names = list(dict.fromkeys(row["training"] for row in rows))
    legend = alt.Legend(orient="top", title=None, symbolOpacity=1, symbolStrokeWidth=0, columns=2)
    colour = alt.Color("training:N", scale=alt.Scale(domain=names), legend=legend)
    # Told apart by more than colour.
    shape = alt.Shape("training:N", scale=alt.Scale(domain=names), legend=legend)
    across = alt.X(f"{x}:Q", axis=alt.Axis(title=title, tickCount=6))
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=across,
        color=colour,
        tooltip=[
            "training:N",
            alt.Tooltip(f"{x}:Q", format=".4~g"),
            alt.Tooltip("value:Q", format=".4~g", title="log-likelihood"),
            alt.Tooltip("low:Q", format=".4~g", title="95% interval from"),
            alt.Tooltip("high:Q", format=".4~g", title="95% interval to"),
        ],
    )
    value = alt.Y("value:Q", axis=axis, scale=scale)
    layers = [
        base.mark_area(opacity=0.25, line=False, clip=True).encode(
            y=alt.Y("low:Q", axis=axis, scale=scale), y2="high:Q"
        ),
        base.mark_line(clip=True).encode(y=value),
        base.mark_point(filled=True, size=36, opacity=1, clip=True).encode(y=value, shape=shape),
    ]
    if best is not None:
        line = alt.Chart(alt.Data(values=[{"value": best}]))
        layers.append(line.mark_rule(style="whisker", strokeDash=[4, 3]).encode(y=value))
    return _finish(alt.layer(*layers), description, 280)


def gallery(rows: Mapping[str, Images], description: str, *, shape: Sequence[int]) -> Spec:
    """Rows of grey images, each under its name.

    Pixels stay square on narrow screens: both axes follow the width.

    Args:
        rows: images by name, each a list of values in [0, 1], line by line.
        description: read out by screen readers.
        shape: lines and columns of an image.
    """
    high, wide = shape
    columns = max(len(images) for images in rows.values())
    width = columns * (wide + 1) - 1  # in pixels of the images, with one between two of them
    label = _LABEL * width
    grounds, cells, labels = [], [], []
    for number, (name, images) in enumerate(rows.items()):
        top = label + number * (high + 0.3 + label)
        labels.append({"x": 0, "y": _short(top - 0.15 * label), "name": name})
        for column, image in enumerate(images):
            left = column * (wide + 1)
            grounds.append({"x": left, "y": _short(top), "on": 0})
            cells += [
                {"x": left + pixel % wide, "y": _short(top + pixel // wide), "on": _short(value)}
                for pixel, value in enumerate(image)
                if value >= 0.01
            ]
    height = len(rows) * (high + 0.3 + label)
    unit = f"min(width, {_WIDEST}) / {width}"
    x, y = (
        alt.Scale(domain=[0, most], range=[0, alt.ExprRef(f"{most} * {unit}")], nice=False)
        for most in (width, height)
    )
    colour = alt.Color("on:Q", scale=alt.Scale(domain=[0, 1], range="heatmap"), legend=None)

    def rectangles(values: Rows, across: float, down: float) -> alt.Chart:
        return (
            alt.Chart(alt.Data(values=values))
            .transform_calculate(right=f"datum.x + {across}", bottom=f"datum.y + {down}")
            .mark_rect(opacity=1)
            .encode(
                x=alt.X("x:Q", scale=x, axis=None),
                x2="right:Q",
                y=alt.Y("y:Q", scale=y, axis=None),
                y2="bottom:Q",
                color=colour,
            )
        )

    words = (
        alt.Chart(alt.Data(values=labels))
        .mark_text(style="label", align="left", baseline="bottom")
        .encode(
            x=alt.X("x:Q", scale=x, axis=None),
            y=alt.Y("y:Q", scale=y, axis=None),
            text="name:N",
        )
    )
    # A pixel reaches under the next ones, or hairlines would show between them.
    layers = [rectangles(grounds, wide, high), rectangles(cells, 1.04, 1.04), words]
    return _finish(alt.layer(*layers), description, round(_WIDEST / width * height))


def two_gradients(rows: Rows, description: str) -> Spec:
    """Shares in [0, 1] by step, a line for each.

    Args:
        rows: `step`, `measure` and `value`.
        description: read out by screen readers.
    """
    names = list(dict.fromkeys(row["measure"] for row in rows))
    legend = alt.Legend(orient="top", title=None, columns=1, labelLimit=420)
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point={"size": 36})
        .encode(
            x=alt.X("step:Q", axis=alt.Axis(title="update", tickCount=6)),
            y=alt.Y(
                "value:Q", axis=alt.Axis(title=None, tickCount=5), scale=alt.Scale(domain=[0, 1])
            ),
            color=alt.Color("measure:N", scale=alt.Scale(domain=names), legend=legend),
            tooltip=["measure:N", "step:Q", alt.Tooltip("value:Q", format=".3f")],
        )
    )
    return _finish(chart, description, 240)


def _short(value: float) -> float:
    """Two digits are enough to draw."""
    return round(value, 2)
