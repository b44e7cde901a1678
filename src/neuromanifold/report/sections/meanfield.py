"""Random networks: the phase diagram, signals by depth, and the spectrum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from neuromanifold._intervals import quantile
from neuromanifold.report import networks
from neuromanifold.report.numerals import MISSING, counted, measured, percent, quantity, ratio
from neuromanifold.report.sections._base import Section, Table, code, layer_name

__all__ = ["meanfield_sections"]

Study = Mapping[str, Any]
Row = dict[str, Any]

SHORTEST, LONGEST = 0.5, 200.0
"""Layers per e-fold of squared gradients beyond which colours do not change."""

SAME = 0.05
"""Correlations closer to 1 than this are of inputs that the network hardly tells apart."""

FAR_OFF = 0.1
"""Relative error of a prediction that wants an explanation."""

QUANTITIES = {
    "mean": "mean eigenvalue",
    "root": "root mean square",
    "largest": "largest eigenvalue",
}


def meanfield_sections(study: Study) -> list[Section]:
    """Every section that there are numbers for, in reading order."""
    candidates = (
        phase_diagram(study),
        sizes_by_depth(study),
        correlation_by_depth(study),
        spectrum(study),
    )
    return [section for section in candidates if section is not None]


def phase_diagram(study: Study) -> Section | None:
    """Where the network stands between order and chaos."""
    diagram = study["diagram"]
    if diagram is None:
        return None
    point = {"weight": study["weight_variance"], "bias": study["bias_variance"]}
    points = [{"which": networks.THIS, **point}]
    wanted = study["recommended"]
    if wanted is not None and wanted["changed"]:
        points.append(
            {
                "which": networks.RECOMMENDED,
                "weight": wanted["weight_variance"],
                "bias": wanted["bias_variance"],
            }
        )
    edge = [
        {"weight": weight, "bias": bias}
        for weight, bias in zip(
            diagram["edge"]["weight_variance"], diagram["edge"]["bias_variance"], strict=True
        )
        if weight is not None and weight <= diagram["room"][0]
    ]
    says = _phase_says(study)
    return Section(
        key="phases",
        title="Order or chaos?",
        says=says,
        advice=_phase_advice(study),
        reading=(
            "The darker, or on a dark screen the brighter, the more layers a gradient crosses "
            "before its square has changed e-fold. Line: the edge of chaos. Left of it is order, "
            "right of it chaos. Empty: signals grow without end."
        ),
        chart=networks.phase_plane(
            _cells(diagram), edge, points, says.striptags(), room=diagram["room"]
        ),
        table=Table(
            "Points of the phase diagram",
            ("network", "weight variance", "bias variance"),
            [[p["which"], quantity(p["weight"]), quantity(p["bias"])] for p in points]
            + [["edge of chaos", quantity(e["weight"]), quantity(e["bias"])] for e in edge[::6]],
        ),
    )


def _cells(diagram: Mapping[str, Any]) -> list[Row]:
    steps = [
        room / len(diagram[name])
        for room, name in zip(diagram["room"], ("weight_variance", "bias_variance"), strict=True)
    ]
    # A cell reaches under the next ones, or hairlines would show between them.
    return [
        {
            "w0": _short(weight - steps[0] / 2),
            "w1": _short(min(weight + 0.6 * steps[0], diagram["room"][0])),
            "b0": _short(bias - steps[1] / 2),
            "b1": _short(min(bias + 0.6 * steps[1], diagram["room"][1])),
            "gain": _short(gain),
            "reach": _short(min(max(_reach(gain), SHORTEST), LONGEST)),
        }
        for bias, gains in zip(diagram["bias_variance"], diagram["gain"], strict=True)
        for weight, gain in zip(diagram["weight_variance"], gains, strict=True)
        if gain is not None
    ]


def _short(value: float) -> float:
    """Four digits are enough to draw."""
    return float(f"{value:.4g}")


def _reach(gain: float) -> float:
    """Layers in which a squared gradient changes e-fold."""
    return 1 / abs(math.log(gain)) if gain > 0 and gain != 1 else math.inf * (gain == 1)


def _phase_says(study: Study) -> Markup:
    gain, hidden = study["gain"], len(study["layers"]) - 1
    if gain is None:
        return Markup("Signals of {} at these variances grow without end.").format(
            study["activation"]
        )
    crossed = gain**hidden
    times = (
        f"{ratio(crossed) if crossed >= 1 else quantity(crossed)} times"
        if math.isfinite(crossed)
        else "beyond all numbers"
    )
    return Markup("Squared gradients change {} times per layer, {} over {}: {}.").format(
        quantity(gain), times, counted(hidden, "hidden layer"), _phase_words(study["phase"])
    )


def _phase_words(phase: str) -> str:
    return "the edge of chaos" if phase == "edge of chaos" else f"the {phase} phase"


def _phase_advice(study: Study) -> Markup:
    wanted = study["recommended"]
    if wanted is None:
        return Markup(
            "No weight variance is at the edge of chaos: take another activation, or normalisation "
            "and skip connections, which are not in this theory."
        )
    if not wanted["changed"]:
        return Markup("Keep this initialisation for networks of this depth.")
    line = f"nn.init.normal_(weight, std=({wanted['weight_variance']:.4g} / fan_in) ** 0.5)"
    root = wanted["bias_variance"] ** 0.5
    bias = f"nn.init.normal_(bias, std={root:.3g})" if root else "nn.init.zeros_(bias)"
    return Markup("Begin on the edge: {} and {}.").format(code(line), code(bias))


def sizes_by_depth(study: Study) -> Section | None:
    """Activity and errors, by layer."""
    names = {"activity": "signal (activity)", "error": "gradient (error)"}
    rows = _signal_rows(study, names)
    if len(study["layers"]) < 2 or not rows:
        return None
    first, last = study["layers"][0], study["layers"][-1]
    says = Markup(
        "From the inputs to the last layer the mean square of signals went from {} to {}. On the "
        "way back squared gradients went from {} to {}."
    ).format(
        *(
            quantity(layer[name]["measured"])
            for name, layer in (
                ("activity", first),
                ("activity", last),
                ("error", last),
                ("error", first),
            )
        )
    )
    advice = Markup(
        "Both should stay within a few powers of ten: layers whose gradients are far smaller learn "
        "far slower, under any one learning rate."
    )
    return Section(
        key="sizes",
        title="How large are signals and gradients?",
        says=says,
        advice=advice,
        reading=_reading(study),
        chart=networks.by_layer(
            rows, says.striptags(), title="mean square, or sum of squares", logarithmic=True
        ),
        table=_layer_table(study, ("activity", "error", "gain")),
    )


def correlation_by_depth(study: Study) -> Section | None:
    """How alike two inputs are, by layer."""
    rows = _signal_rows(study, {"correlation": "correlation of two inputs"})
    if len(study["layers"]) < 2 or not rows:
        return None
    last = study["layers"][-1]["correlation"]["measured"]
    says = Markup(
        "Two inputs with signals of correlation {} have one of {} before the last layer."
    ).format(*(quantity(study["layers"][i]["correlation"]["measured"]) for i in (0, -1)))
    at = (study["fixed_point"] or {}).get("correlation_depth")
    settles = (
        Markup(" Theory says that it settles e-fold within {} layers.").format(quantity(at))
        if at is not None
        else Markup("")
    )
    advice = (
        Markup(
            "The outputs hardly depend on the inputs: all gradients point to the same few "
            "directions, and the network must first unlearn that. Use fewer layers, or the edge "
            "of chaos."
        )
        if last is not None and last > 1 - SAME
        else Markup("The network tells its inputs apart: nothing to mend here.")
    )
    return Section(
        key="correlation",
        title="Does the network tell its inputs apart?",
        says=says + settles,
        advice=advice,
        reading=_reading(study),
        chart=networks.by_layer(
            rows, says.striptags(), title="correlation of the signals of two inputs"
        ),
        table=_layer_table(study, ("correlation",)),
    )


def _reading(study: Study) -> str:
    if study["seeds"] is None:
        return "Line: predicted. Points: measured on the network."
    whiskers = ", with 95% intervals" if len(study["seeds"]) > 1 else ""
    networks = counted(len(study["seeds"]), "random network")
    return f"Line: predicted. Points: measured, the mean over {networks}{whiskers}."


def _signal_rows(study: Study, names: Mapping[str, str]) -> list[Row]:
    width = quantile(0.95)
    rows = []
    for name, words in names.items():
        for number, layer in enumerate(study["layers"], 1):
            found = layer[name]
            if found["predicted"] is None or found["measured"] is None:
                continue
            row = {
                "layer": number,
                "signal": words,
                "predicted": found["predicted"],
                "measured": found["measured"],
            }
            if found["stderr"]:
                ends = (found["measured"] + side * width * found["stderr"] for side in (-1, 1))
                row |= dict(zip(("low", "high"), ends, strict=True))
            rows.append(row)
    return rows


def _layer_table(study: Study, signals: Sequence[str]) -> Table:
    head = ["layer", "activation"]
    for signal in signals:
        head += [f"{signal}, predicted", "measured"]
    rows = []
    for layer in study["layers"]:
        row = [layer_name(layer["name"]), layer["activation"]]
        for signal in signals:
            found = layer[signal]
            row += [quantity(found["predicted"]), _measured(found)]
        rows.append(row)
    return Table("Layer by layer", head, rows, num_names=2)


def _measured(found: Mapping[str, Any]) -> str:
    if found["stderr"] is None:
        return quantity(found["measured"])
    return measured(found["measured"], found["stderr"])


def spectrum(study: Study) -> Section | None:
    """Predicted against measured statistics of the eigenvalues."""
    found = study["spectrum"]
    rows, predicted = [], []
    for key, words in QUANTITIES.items():
        source, power = ("second_moment", 0.5) if key == "root" else (key, 1.0)
        if not found[source]["predicted"] or not all(found[source]["networks"]):
            return None
        predicted.append({"quantity": words, "value": found[source]["predicted"] ** power})
        rows += [{"quantity": words, "value": v**power} for v in found[source]["networks"]]
    largest, bound = found["largest"], found["learning_rate_bound"]
    off = abs(largest["predicted"] / largest["measured"] - 1)
    says = Markup("Theory predicts a largest eigenvalue of {}, {} was measured{}: {} off.").format(
        quantity(largest["predicted"]),
        _measured(largest),
        "" if study["seeds"] is None else f" on {counted(len(study['seeds']), 'random network')}",
        percent(off),
    )
    if off > FAR_OFF and study["outputs"] > 1:
        says += Markup(
            " Theory has an eigenvalue for each of the {} outputs, all the same; measured is the "
            "largest of them."
        ).format(study["outputs"])
    advice = Markup(
        "Gradient descent on the mean loss is stable below a learning rate of {} (predicted: {}). "
        "Most eigenvalues are far smaller: the largest is {} times the mean."
    ).format(
        quantity(bound["measured"]),
        quantity(bound["predicted"]),
        ratio(largest["measured"] / found["mean"]["measured"]),
    )
    labels = {
        "mean": "mean eigenvalue",
        "second_moment": "second moment (squared unit)",
        "largest": "largest eigenvalue",
        "learning_rate_bound": "learning-rate bound 2/λmax",
    }
    table = [
        [
            words,
            quantity(found[key]["predicted"]),
            _measured(found[key]),
            MISSING if found[key]["scatter"] is None else percent(found[key]["scatter"]),
        ]
        for key, words in labels.items()
    ]
    dots = "measured" if study["seeds"] is None else "measured, one for each network"
    return Section(
        key="spectrum",
        title="Is the spectrum what theory says?",
        says=says,
        advice=advice,
        reading=f"Circles: {dots}. Ticks: predicted.",
        chart=networks.spectrum_statistics(rows, predicted, says.striptags()),
        table=Table(
            "Eigenvalues (nats per parameter²)",
            ("", "predicted", "measured", "scatter of one network"),
            table,
        ),
    )
