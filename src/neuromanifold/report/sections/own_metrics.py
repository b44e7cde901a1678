"""What the units' own metrics see of the exact blocks, and what the network above adds."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from neuromanifold.report import charts
from neuromanifold.report.numerals import counted, percent, quantity, ratio
from neuromanifold.report.own_metrics import sees_everything
from neuromanifold.report.sections._base import (
    Analysis,
    Section,
    Table,
    code,
    largest,
    layer_name,
)

_MOST_DRAWN = 40
"""Layers of a chart; the tables have all of them."""

_ALIKE = 3.0
"""Sensitivities that differ by less than this factor are served by one learning rate."""

_GOOD, _FAIR = 0.95, 0.8
"""Cosines above which a unit's own metric points as its exact block does, or nearly so."""


def unit_sensitivity(analysis: Analysis) -> Section | None:
    """What the network above makes of the units' responses."""
    layers = _layers(analysis, "factor")
    hidden = [layer for layer in layers if not sees_everything(layer)]
    if not hidden:
        return None
    drawn = _drawn(layers, "factor")
    says = _say_sensitivity(hidden)
    table = Table(
        "Sensitivity to the units’ responses by layer: exact trace over that of the own metric",
        ("layer", "units", "dead", "a quarter below", "median", "a quarter above"),
        [
            [
                layer_name(layer["name"]),
                f"{layer['units']:,}",
                f"{layer['dead']:,}",
                *_cells(layer["factor"]),
            ]
            for layer in layers
        ],
    )
    return Section(
        key="unit-sensitivity",
        title="How much does the network make of each unit?",
        says=says,
        advice=_advice_on_sensitivity(hidden),
        reading=_reading(drawn, layers, "A layer of the outputs has 1."),
        chart=charts.unit_quartiles(
            drawn,
            says.striptags(),
            title="sensitivity to a unit’s response (nats per squared response)",
            logarithmic=True,
        ),
        table=table,
    )


def own_metric(analysis: Analysis) -> Section | None:
    """How much of its exact block a unit's own metric sees."""
    layers = _layers(analysis, "cosine")
    hidden = [layer for layer in layers if not sees_everything(layer)]
    if not hidden:
        return None
    drawn = _drawn(layers, "cosine")
    worst = min(hidden, key=lambda layer: layer["cosine"]["median"])
    rank = f", the lowest of {counted(len(hidden), 'hidden layer')}" if len(hidden) > 1 else ""
    says = Markup(
        "In {}, the own metric of the median unit has a cosine of {} with its exact block{}. The "
        "sensitivity that it leaves out has a standard deviation of {} over inputs."
    ).format(
        code(layer_name(worst["name"])),
        quantity(worst["cosine"]["median"]),
        rank,
        percent(worst["variation"]["median"]),
    )
    table = Table(
        "Own metrics of units against their exact blocks by layer, medians over units",
        ("layer", "cosine", "a quarter below", "sensitivity varies by", "a quarter above"),
        [
            [
                layer_name(layer["name"]),
                quantity(layer["cosine"]["median"]),
                quantity(layer["cosine"]["lower"]),
                percent(layer["variation"]["median"]),
                percent(layer["variation"]["upper"]),
            ]
            for layer in layers
        ],
    )
    return Section(
        key="own-metric",
        title="What does a layer’s own metric see?",
        says=says,
        advice=_advice_on_own_metric(worst),
        reading=_reading(drawn, layers, "1: the two matrices are proportional."),
        chart=charts.unit_quartiles(
            drawn,
            says.striptags(),
            title="cosine of a unit’s own metric and its exact block",
            logarithmic=False,
        ),
        table=table,
    )


def _layers(analysis: Analysis, number: str) -> list[Analysis]:
    """Those that have it, above zero: what has no influence is told by other sections."""
    found = analysis.get("own_metrics") or {"layers": []}
    return [
        layer
        for layer in found["layers"]
        if layer[number] is not None and layer[number]["lower"] > 0
    ]


def _drawn(layers: Sequence[Analysis], number: str) -> list[Analysis]:
    """Rows of the chart."""
    return [
        {"layer": layer_name(layer["name"]), **layer[number]}
        for layer in largest(layers, "num_parameters", _MOST_DRAWN)
    ]


def _cells(quartiles: Analysis) -> list[str]:
    return [quantity(quartiles[name]) for name in ("lower", "median", "upper")]


def _reading(drawn: Sequence[Analysis], layers: Sequence[Analysis], scale: str) -> str:
    reading = (
        f"Bar: the middle half of a layer’s units. Tick: median. {scale} A unit’s own metric takes "
        f"its response for a Gaussian of variance 1 around its activation."
    )
    if len(drawn) < len(layers):
        reading += (
            f" Drawn are the {len(drawn)} of {len(layers)} layers with most parameters; the table "
            f"has all."
        )
    return reading


def _say_sensitivity(hidden: Sequence[Analysis]) -> Markup:
    most = max(hidden, key=lambda layer: layer["factor"]["median"])
    least = min(hidden, key=lambda layer: layer["factor"]["median"])
    if most is least:
        return Markup(
            "If the median unit of {} responds by d more, the predictions move by half of {} d² "
            "nats."
        ).format(code(layer_name(most["name"])), quantity(most["factor"]["median"]))
    return Markup(
        "The predictions are {} times as sensitive to the response of the median unit of {} as to "
        "that of {}."
    ).format(
        ratio(most["factor"]["median"] / least["factor"]["median"]),
        code(layer_name(most["name"])),
        code(layer_name(least["name"])),
    )


def _advice_on_sensitivity(hidden: Sequence[Analysis]) -> Markup:
    dead = max(hidden, key=lambda layer: layer["dead"] / layer["units"])
    if dead["dead"] > 0.1 * dead["units"]:
        return Markup(
            "{} of {} units of {} respond to none of these inputs: they neither learn nor matter, "
            "so look at the scale of its weights, or prune them."
        ).format(f"{dead['dead']:,}", f"{dead['units']:,}", code(layer_name(dead["name"])))
    medians = [layer["factor"]["median"] for layer in hidden]
    spread = max(medians) / min(medians)
    if spread < _ALIKE:
        return Markup(
            "A relative natural gradient leaves this number out. It is much the same in all hidden "
            "layers, so that one learning rate serves them all."
        )
    return Markup(
        "A relative natural gradient leaves this number out, and so takes steps that move the "
        "predictions by different amounts: a learning rate that is safe for the most sensitive "
        "layer is {} times too small for the least. Scale it by layer, or take {}."
    ).format(ratio(spread), code("nm.optim.kfac"))


def _advice_on_own_metric(worst: Analysis) -> Markup:
    cosine = worst["cosine"]["median"]
    if cosine >= _GOOD:
        return Markup(
            "Own metrics point where the exact blocks do: {} follows nearly the directions of {}, "
            "without a backward pass for its metric."
        ).format(code("nm.optim.relative"), code("nm.optim.unitwise"))
    if cosine >= _FAIR:
        return Markup(
            "Own metrics see most of the exact blocks: {} is worth a try beside {}, which measures "
            "the rest by a backward pass."
        ).format(code("nm.optim.relative"), code("nm.optim.kfac"))
    return Markup(
        "Which inputs matter to {} depends on what the network above makes of them, and its own "
        "metric does not know: take a structure that measures it, such as {} or {}."
    ).format(code(layer_name(worst["name"])), code("UnitWise()"), code("Kronecker()"))
