"""The spectrum along training, as a chart to save or to show in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from neuromanifold._extras import require_extra
from neuromanifold._intervals import quantile
from neuromanifold.spectral import Measured

if TYPE_CHECKING:
    import altair as alt

__all__ = ["spectra_chart"]

TITLES = {
    "trace": "trace (nats/param²)",
    "norm": "Frobenius norm (nats/param²)",
    "largest_eigenvalue": "largest eigenvalue (nats/param²)",
    "learning_rate_bound": "largest stable learning rate",
    "effective_dimension": "effective dimension",
    "participation_ratio": "participation ratio",
    "stable_rank": "stable rank",
    "condition_number": "condition number",
}

SHOWN = ("trace", "largest_eigenvalue", "effective_dimension", "learning_rate_bound")

WHOLE = "all"


def spectra_chart(history: Sequence[Measured], names: Sequence[str] = SHOWN) -> alt.ConcatChart:
    """Lines by step of training, one panel for each number, with 95% intervals of estimates.

    Args:
        history: of `nm.spectral.Monitor`; with numbers of layers, there is a line for each.
        names: numbers of `nm.spectral.Summary`.

    Returns:
        An altair chart: `chart.save("spectra.html")`, with `inline=True` for a page that loads
        nothing from anywhere.

    Raises:
        UnsupportedError: If the report extra is not installed.
        ValueError: If nothing was measured, or not under one of the names.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(4, 3), torch.randn(32, 4)
        >>> monitor = nm.spectral.Monitor(model, nm.Categorical(), x)
        >>> first = monitor.measure()
        >>> chart = nm.report.spectra_chart(monitor.history)
        >>> len(chart.concat)
        4
    """
    require_extra("report", "altair")
    import altair as alt

    if not history:
        raise ValueError(
            "Nothing was measured yet. monitor.measure() measures without waiting for the budget."
        )
    unknown = [name for name in names if name not in history[0].values]
    if unknown or not names:
        known = [name for name in history[0].values if "/" not in name]
        raise ValueError(f"Numbers are among {known}; got {unknown or names}.")
    panels = [_panel(alt, _rows(history, name), name) for name in names]
    return alt.concat(*panels, columns=2).resolve_scale(y="independent")


def _rows(history: Sequence[Measured], name: str) -> list[dict[str, Any]]:
    width = quantile(0.95)
    found = []
    for measured in history:
        for key, value in measured.values.items():
            number, _, layer = key.partition("/")
            if number == name:
                half = width * measured.errors[key]
                ends = {"low": value - half, "high": value + half}
                found.append(
                    {"step": measured.step, "layer": layer or WHOLE, "value": value, **ends}
                )
    return found


def _panel(alt: Any, rows: list[dict[str, Any]], name: str) -> Any:
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    x = alt.X("step:Q", axis=alt.Axis(title="step", grid=False, tickMinStep=1))
    positive = all(row["value"] > 0 and row["low"] > 0 for row in rows)
    scale = alt.Scale(type="log" if positive else "linear", nice=True, zero=False)
    axis = alt.Axis(title=TITLES.get(name, name), format="~g", tickCount=5)
    legend = alt.Legend(title="layer") if len(layers) > 1 else None
    colour = alt.Color("layer:N", sort=layers, legend=legend)
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, color=colour)
    lines = base.mark_line(point=True).encode(
        y=alt.Y("value:Q", scale=scale, axis=axis),
        tooltip=["layer:N", "step:Q", alt.Tooltip("value:Q", format=".4~g")],
    )
    drawn = [lines]
    if any(row["low"] < row["high"] for row in rows):
        drawn.insert(
            0,
            base.mark_area(opacity=0.2).encode(
                y=alt.Y("low:Q", scale=scale, axis=axis), y2="high:Q"
            ),
        )
    return alt.layer(*drawn).properties(width=300, height=180)
