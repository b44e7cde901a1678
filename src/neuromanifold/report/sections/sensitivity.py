"""Which layers and which parameters the predictions depend on."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from neuromanifold.report import charts
from neuromanifold.report.numerals import count, measured, percent, quantity, ratio
from neuromanifold.report.sections._base import (
    WHISKERS,
    Analysis,
    Section,
    Table,
    code,
    error,
    interval,
    largest,
    layer_name,
)

_QUANTILES = {"0.05": "q05", "0.25": "q25", "0.5": "q50", "0.75": "q75", "0.95": "q95"}
"""Quantiles drawn: as an analysis names them, and as a chart does."""

_MOST_DRAWN = 40
"""Rows of a chart; of more, the names could not be read. The tables have all of them."""


def trace_by_layer(analysis: Analysis) -> Section | None:
    """How the trace is shared among the layers."""
    layers = [layer for layer in analysis.get("layers") or () if layer["share"] is not None]
    if not layers:
        return None
    total = sum(layer["num_parameters"] for layer in layers)
    rows = [
        {
            "layer": layer_name(layer["name"]),
            "trace": layer["trace"],
            "trace_share": layer["share"],
            "parameter_share": layer["num_parameters"] / total,
            **interval(layer["share"], error(layer, "share"), most=1.0),
        }
        for layer in layers
    ]
    top = max(rows, key=lambda row: row["trace_share"])
    drawn = largest(rows, "trace", _MOST_DRAWN)
    reading = "Bar: the layer’s share of the trace. Tick: its share of the parameters."
    if len(drawn) < len(rows):
        reading += (
            f" Drawn are the {len(drawn)} of {len(rows)} layers with the largest trace, "
            f"{percent(sum(row['trace_share'] for row in drawn))} of it; the table has all."
        )
    if any("low" in row for row in drawn):
        reading += f" {WHISKERS}"
    says = Markup("{} holds {} of the trace with {} of the parameters.").format(
        code(top["layer"]), percent(top["trace_share"]), percent(top["parameter_share"])
    )
    table = Table(
        "Trace by layer",
        (
            "layer",
            "type",
            "parameters",
            "trace (nats/param²)",
            "share of the trace",
            "trace per parameter",
            "largest eigenvalue",
        ),
        [
            [
                layer_name(layer["name"]),
                layer["type"],
                count(layer["num_parameters"]),
                measured(layer["trace"], error(layer, "trace")),
                measured(layer["share"], error(layer, "share"), percent),
                *(
                    measured(layer[name], error(layer, name))
                    for name in ("trace_per_parameter", "largest_eigenvalue")
                ),
            ]
            for layer in layers
        ],
        num_names=2,
    )
    return Section(
        key="layers",
        title="Which layers do the predictions depend on?",
        says=says,
        advice=_advice_on_layers(layers),
        reading=reading,
        chart=charts.share_bars(drawn, says.striptags()),
        table=table,
    )


def _advice_on_layers(layers: Sequence[Analysis]) -> Markup:
    if len(layers) == 1:
        return Markup("There is one layer only; its weights and biases are told apart below.")
    silent = [layer for layer in layers if layer["trace"] == 0]
    if silent:
        return Markup(
            "{} has no Fisher information at all, so nothing it does reaches the predictions on "
            "these data: check that it is used, and that its activations are not dead."
        ).format(code(layer_name(silent[0]["name"])))
    most = max(layers, key=lambda layer: layer["trace_per_parameter"])
    least = min(layers, key=lambda layer: layer["trace_per_parameter"])
    spread = most["trace_per_parameter"] / least["trace_per_parameter"]
    if spread < 3:
        return Markup(
            "Per parameter, no layer is more than {} times as sensitive as another: one learning "
            "rate suits them all."
        ).format(ratio(spread))
    return Markup(
        "Per parameter, {} is {} times as sensitive as {}: a learning rate that is safe for the "
        "first is slow for the second, so scale the steps layer by layer, for example with "
        "{}."
    ).format(
        code(layer_name(most["name"])),
        ratio(spread),
        code(layer_name(least["name"])),
        code("Kronecker()"),
    )


def diagonal(analysis: Analysis) -> Section | None:
    """How the diagonal is distributed within each parameter."""
    groups = analysis.get("diagonal") or ()
    if not any(group["quantiles"]["0.95"] > 0 for group in groups):
        return None
    rows = [
        {
            "parameter": group["parameter"],
            **{field: group["quantiles"][q] for q, field in _QUANTILES.items()},
            **interval(
                group["quantiles"]["0.5"], error(group, "quantiles", "0.5"), logarithmic=True
            ),
        }
        for group in groups
    ]
    drawn = _extremes(rows)
    says = _say_diagonal(groups)
    table = Table(
        "Diagonal of the Fisher matrix (nats/param²) by parameter",
        (
            "parameter",
            "entries",
            "5% below",
            "median",
            "95% below",
            "mean",
            "exactly zero",
            "single entries ±",
        ),
        [
            [
                group["parameter"],
                count(group["count"]),
                *(
                    measured(group["quantiles"][q], error(group, "quantiles", q))
                    for q in ("0.05", "0.5", "0.95")
                ),
                measured(group["mean"], error(group, "mean")),
                count(group["zeros"]),
                percent(group.get("median_relative_error")),
            ]
            for group in groups
        ],
    )
    reading = "Thick bar: the middle half of the entries. Thin line: 5% to 95%. Tick: median."
    if len(drawn) < len(rows):
        reading += (
            f" Drawn are the {_MOST_DRAWN // 2} parameters with the largest medians and the "
            f"{_MOST_DRAWN // 2} with the smallest, of {len(rows)}; the table has all."
        )
    if any("low" in row for row in drawn):
        reading += " Across the tick: its 95% interval."
    if any(row["q05"] == 0 for row in drawn):
        reading += " What touches the left edge includes entries of zero."
    return Section(
        key="diagonal",
        title="How much does each parameter matter on its own?",
        says=says,
        advice=_advice_on_diagonal(groups),
        reading=reading,
        chart=charts.diagonal_quantiles(drawn, says.striptags()),
        table=table,
    )


def _extremes(rows: Sequence[Analysis]) -> Sequence[Analysis]:
    """All rows if they fit into a chart, else those with the largest and the smallest medians."""
    if len(rows) <= _MOST_DRAWN:
        return rows
    ranked = sorted(range(len(rows)), key=lambda i: rows[i]["q50"])
    half = _MOST_DRAWN // 2
    return [rows[i] for i in sorted(ranked[:half] + ranked[-half:])]


def _say_diagonal(groups: Sequence[Analysis]) -> Markup:
    middle = {group["parameter"]: group["quantiles"]["0.5"] for group in groups}
    low, high = min(middle, key=middle.__getitem__), max(middle, key=middle.__getitem__)
    if low == high:
        return Markup("The median entry of {} is {} nats per parameter².").format(
            code(low), quantity(middle[low])
        )
    sentence = Markup("The median entry goes from {} in {} to {} in {}").format(
        quantity(middle[low]), code(low), quantity(middle[high]), code(high)
    )
    if middle[low] == 0:
        return sentence + "."
    return sentence + Markup(", a factor of {}.").format(ratio(middle[high] / middle[low]))


def _advice_on_diagonal(groups: Sequence[Analysis]) -> Markup:
    zeros, total = (sum(group[key] for group in groups) for key in ("zeros", "count"))
    if zeros:
        worst = max(groups, key=lambda group: group["zeros"])
        return Markup(
            "{} of {} entries ({}) are exactly zero, above all in {}: moving those parameters a "
            "little changes no prediction on these data, so prune or freeze them first."
        ).format(count(zeros), count(total), percent(zeros / total), code(worst["parameter"]))
    least = min(groups, key=lambda group: group["quantiles"]["0.5"])
    return Markup(
        "Keep the damping of a diagonal method below {}, the median of {}; above it, that group "
        "takes plain gradient steps."
    ).format(quantity(least["quantiles"]["0.5"]), code(least["parameter"]))
