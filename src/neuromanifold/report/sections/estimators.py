"""How sure each estimator of the diagonal is, and which one to use."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from neuromanifold.report import charts
from neuromanifold.report.numerals import counted, percent, quantity, ratio
from neuromanifold.report.sections._base import (
    Analysis,
    Section,
    Table,
    code,
    largest,
    layer_name,
)

_MOST_DRAWN = 24
"""Groups of a chart, with a mark for each estimator; the table has all of them."""


def estimator_choice(analysis: Analysis) -> Section | None:
    """What each estimator costs, how far off it is, and what is recommended."""
    found = analysis.get("estimators")
    rows = [row for row in found["rows"] if row["relative_error"]] if found else []
    whole = next((row["group"] for row in rows if row["kind"] == "model"), None)
    if not found or whole is None:  # nothing to compare, or no estimator is off
        return None
    advice = {each["group"]: each for each in found["advice"]}
    groups = [row for row in rows if row["estimator"] == rows[0]["estimator"]]
    layers = [row for row in groups if row["kind"] == "layer"]
    drawn = {row["group"] for row in largest(layers, "trace", _MOST_DRAWN)} | {whole}
    points = [
        {
            "layer": layer_name(row["group"]),
            "estimator": f"{row['estimator']}, {counted(row['sweeps'], 'sweep')}",
            "error": row["relative_error"],
            **({"bound": row["bound_of_draws"]} if row["bound_of_draws"] else {}),
        }
        for row in rows
        if row["group"] in drawn
    ]
    reading = (
        "Mark: standard error of the median entry of the diagonal, over its value, for these "
        "inputs as a sample of all. Tick: the most that draws can add to it, where there is a "
        "bound. A sweep goes back through the network once."
    )
    if len(drawn) <= len(layers):
        reading += (
            f" Drawn are the {_MOST_DRAWN} of {len(layers)} layers with the largest trace; the "
            f"table has all."
        )
    says = _say([row for row in rows if row["group"] == whole])
    cost = analysis["timing"].get("estimators") or {}
    table = Table(
        "Estimators by layer: relative standard error of the median entry of the diagonal",
        (
            "layer",
            "estimator",
            "use it?",
            "sweeps",
            "cost (forward + backward)",
            "trace (nats/param²)",
            "standard error",
            "of draws",
            "of draws, at most",
        ),
        [_cells(row, advice.get(row["group"]), cost) for row in rows],
        num_names=3,
    )
    return Section(
        key="estimators",
        title="How sure is each estimator, and which one should I use?",
        says=says,
        advice=_advise(found["advice"]),
        reading=reading,
        chart=charts.estimator_points(points, says.striptags()),
        table=table,
    )


def _cells(row: Analysis, advice: Analysis | None, cost: Analysis) -> list[str]:
    chosen = advice is not None and advice["estimator"] == row["estimator"]
    return [
        layer_name(row["group"]),
        row["estimator"],
        advice["reason"] if advice is not None and chosen else "",
        f"{row['sweeps']:,}",
        quantity(cost.get(row["estimator"])),
        quantity(row["trace"]),
        *(
            percent(row[name])
            for name in ("relative_error", "relative_error_of_draws", "bound_of_draws")
        ),
    ]


def _say(rows: Sequence[Analysis]) -> Markup:
    """Of the whole model: the surest estimator against the cheapest."""
    best = min(rows, key=lambda row: (row["relative_error"], row["sweeps"]))
    worst = max(rows, key=lambda row: row["relative_error"])
    sentence = Markup("Over all parameters, {} leaves the median entry {} off, with {}").format(
        code(best["estimator"]), percent(best["relative_error"]), counted(best["sweeps"], "sweep")
    )
    if worst["estimator"] == best["estimator"]:
        return sentence + Markup(".")
    return sentence + Markup("; {} leaves it {} off, {} times as much, with {}.").format(
        code(worst["estimator"]),
        percent(worst["relative_error"]),
        ratio(worst["relative_error"] / best["relative_error"]),
        counted(worst["sweeps"], "sweep"),
    )


def _advise(advice: Sequence[Analysis]) -> Markup:
    """The recommendation for the model, and where a layer has another one."""
    whole, *layers = advice
    sentence = Markup("Use {}: {}").format(code(whole["estimator"]), whole["reason"])
    others = [layer for layer in layers if layer["estimator"] != whole["estimator"]]
    if not others:
        return sentence
    return sentence + Markup(" For {}, {} would do.").format(
        code(layer_name(others[0]["group"]))
        if len(others) == 1
        else Markup("{} of {} layers").format(len(others), len(layers)),
        Markup(" or ").join(code(name) for name in dict.fromkeys(o["estimator"] for o in others)),
    )
