"""What is lost when only a part of the Fisher matrix is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping

from markupsafe import Markup

from neuromanifold.report import charts
from neuromanifold.report.numerals import measured, percent, quantity
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

_STRUCTURES = {
    "Kronecker": "kronecker_error",
    "UnitWise": "unitwise_error",
    "Diagonal": "diagonal_error",
}
"""Structures compared layer by layer, in the order drawn, and where a layer keeps their error."""

_WORTH_A_CHANGE = 0.05
"""How much smaller another structure's error has to be for it to be recommended for a layer."""

_MOST_DRAWN = 24
"""Layers of a chart, with a bar for each structure; the table has all of them."""


def layer_errors(analysis: Analysis) -> Section | None:
    """How far each structure is from the block of each layer."""
    errors = {
        layer_name(layer["name"]): {
            structure: layer[key]
            for structure, key in _STRUCTURES.items()
            if layer[key] is not None
        }
        for layer in analysis.get("layers") or ()
    }
    errors = {layer: of for layer, of in errors.items() if of}
    if not errors:
        return None
    known = [layer for layer in analysis["layers"] if layer_name(layer["name"]) in errors]
    drawn = [layer_name(layer["name"]) for layer in largest(known, "trace", _MOST_DRAWN)]
    spread = {
        (layer_name(layer["name"]), structure): error(layer, key)
        for layer in known
        for structure, key in _STRUCTURES.items()
    }
    rows = [
        {
            "layer": layer,
            "structure": structure,
            "error": distance,
            **interval(distance, spread[layer, structure]),
        }
        for layer in drawn
        for structure, distance in errors[layer].items()
    ]
    reading = "0 is exact; at 1, the approximation K misses as much as leaving everything out."
    if len(drawn) < len(errors):
        reading += (
            f" Drawn are the {len(drawn)} of {len(errors)} layers with the largest trace; the "
            f"table has all."
        )
    if any("low" in row for row in rows):
        reading += f" {WHISKERS}"
    ratios = {layer_name(layer["name"]): layer.get("kronecker_largest_ratio") for layer in known}
    closest = {layer: min(of, key=of.__getitem__) for layer, of in errors.items()}
    leader = max(_STRUCTURES, key=list(closest.values()).count)
    says = _say_layer_errors(errors, closest, leader)
    table = Table(
        "Relative error of each layer’s block",
        ("layer", *_STRUCTURES, "closest", "λmax of Kronecker / own"),
        [
            [
                layer,
                *(measured(of.get(kind), spread[layer, kind]) for kind in _STRUCTURES),
                closest[layer],
                quantity(ratios[layer]),
            ]
            for layer, of in errors.items()
        ],
    )
    return Section(
        key="layer-errors",
        title="Which approximation fits each layer?",
        says=says,
        advice=_advice_on_layer_errors(errors, closest, leader),
        reading=reading,
        chart=charts.grouped_error_bars(rows, says.striptags()),
        table=table,
    )


def _say_layer_errors(
    errors: Mapping[str, Mapping[str, float]], closest: Mapping[str, str], leader: str
) -> Markup:
    own = {layer: of[leader] for layer, of in errors.items() if leader in of}
    low, high = min(own, key=own.__getitem__), max(own, key=own.__getitem__)
    if len(errors) == 1:
        return Markup("{} is the closest in {}, with an error of {}.").format(
            leader, code(low), quantity(own[low])
        )
    wins = list(closest.values()).count(leader)
    return Markup("{} is the closest in {}; its error goes from {} in {} to {} in {}.").format(
        leader,
        "every layer" if wins == len(errors) else f"{wins} of {len(errors)} layers",
        quantity(own[low]),
        code(low),
        quantity(own[high]),
        code(high),
    )


def _advice_on_layer_errors(
    errors: Mapping[str, Mapping[str, float]], closest: Mapping[str, str], leader: str
) -> Markup:
    gain = {
        layer: errors[layer].get(leader, math.inf) - errors[layer][structure]
        for layer, structure in closest.items()
    }
    layer = max(gain, key=gain.__getitem__)
    if gain[layer] > _WORTH_A_CHANGE:
        return Markup("Use {} in general, but {} for {}, where it has an error of {}.").format(
            code(f"{leader}()"),
            code(f"{closest[layer]}()"),
            code(layer),
            quantity(errors[layer][closest[layer]]),
        )
    worst = max(errors, key=lambda name: errors[name][leader])
    if errors[worst][leader] < 0.5:
        return Markup(
            "Use {}: no layer loses more than {}, which is in {}; look there first if training is "
            "unstable."
        ).format(code(f"{leader}()"), quantity(errors[worst][leader]), code(worst))
    return Markup(
        "Use {}, but do not trust it in {}, where more than half is missed: compare its steps "
        "there with those of {}, which is exact."
    ).format(code(f"{leader}()"), code(worst), code("Gram()"))


def whole_errors(analysis: Analysis) -> Section | None:
    """How far each structure is from the full matrix."""
    found = analysis.get("whole_errors") or {}
    known = ((name, distance) for name, distance in found.items() if distance is not None)
    errors = dict(sorted(known, key=lambda item: item[1]))
    if not errors:
        return None
    spread = {name: error(analysis, "whole_errors", name) for name in errors}
    says, advice = _say_whole_errors(errors), _advice_on_whole_errors(errors)
    table = Table(
        "Relative error against the full matrix",
        ("structure", "‖F − K‖ / ‖F‖"),
        [[name, measured(value, spread[name])] for name, value in errors.items()],
    )
    rows = [
        {"structure": name, "error": value, **interval(value, spread[name])}
        for name, value in errors.items()
    ]
    reading = "BlockDiagonal keeps every layer exactly and drops only what couples the layers."
    if any("low" in row for row in rows):
        reading += f" {WHISKERS}"
    return Section(
        key="whole-errors",
        title="What is lost over the whole network?",
        says=says,
        advice=advice,
        reading=reading,
        chart=charts.error_bars(rows, says.striptags()),
        table=table,
    )


def _say_whole_errors(errors: Mapping[str, float]) -> Markup:
    closest = min(errors, key=errors.__getitem__)
    sentence = Markup("{} is the closest to the full matrix, with an error of {}").format(
        closest, quantity(errors[closest])
    )
    stored = {name: error for name, error in errors.items() if name != "BlockDiagonal"}
    if closest != "BlockDiagonal" or not stored:
        return sentence + "."
    best = min(stored, key=stored.__getitem__)
    return sentence + Markup("; among those that are cheap to store it is {}, with {}.").format(
        best, quantity(stored[best])
    )


def _advice_on_whole_errors(errors: Mapping[str, float]) -> Markup:
    coupling = errors.get("BlockDiagonal")
    stored = {name: error for name, error in errors.items() if name != "BlockDiagonal"}
    if coupling is None or not stored:
        return Markup("Where that is too much, use {}, which is exact.").format(code("Gram()"))
    best = min(stored, key=stored.__getitem__)
    # Entries between layers and entries within them add up in the squared Frobenius norm.
    share = min(1.0, (coupling / stored[best]) ** 2) if stored[best] else 0.0
    if share > 0.5:
        return Markup(
            "{} of the squared error of {} is coupling between layers, which no layer-by-layer "
            "method can keep: use {} or {} where it matters."
        ).format(percent(share), best, code("Gram()"), code("Implicit()"))
    return Markup(
        "{} of the squared error of {} arises inside the layers: {} would remove that part, if its "
        "blocks fit into memory."
    ).format(percent(1 - share), best, code("BlockDiagonal()"))
