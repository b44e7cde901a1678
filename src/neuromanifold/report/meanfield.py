"""The page about random networks: where one stands, and what theory says of its spectrum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neuromanifold._extras import require_extra
from neuromanifold.report.headline import Fact
from neuromanifold.report.kinds import require_kind
from neuromanifold.report.numerals import MISSING, count, counted, quantity
from neuromanifold.report.random_networks import KIND, VERSION

__all__ = ["render_meanfield"]

Study = Mapping[str, Any]


def render_meanfield(study: Study, *, title: str) -> str:
    """One self-contained HTML page: theory of random networks next to measurements.

    It keeps the promises of `neuromanifold.report.render`: nothing is loaded from anywhere, and the
    tables hold the numbers without JavaScript.

    Args:
        study: as `study_random` or `study_model` returns it.
        title: heading of the page, plain text.

    Returns:
        The page; write it as UTF-8.

    Raises:
        UnsupportedError: If the report extra is not installed.
        ValueError: If the dict is something else.
    """
    made_by = "study_random or study_model"
    require_kind(study, (KIND, VERSION), what="The study", made_by=made_by)
    require_extra("report", "jinja2", "altair", "vl_convert")
    from neuromanifold.report.render import fill
    from neuromanifold.report.sections.meanfield import meanfield_sections

    model = {
        "id": "network",
        "name": study["name"],
        "origin": _origin(study),
        "facts": _facts(study),
        "sections": meanfield_sections(study),
        "coverage": None,
        "notes": [f"Not in the theory: {what}." for what in study["left_out"]],
        "verdict": study["verdict"],
    }
    return fill("meanfield.html", title=title, models=[model])


def _origin(study: Study) -> list[str]:
    seeds = study["seeds"]
    widths = [study["layers"][0]["fan_in"], *(layer["fan_out"] for layer in study["layers"])]
    return [
        f"widths {_widths(widths)}",
        f"{count(study['num_parameters'])} parameters",
        study["likelihood"],
        counted(study["samples"], "sample"),
        "one network, as it is" if seeds is None else counted(len(seeds), "random network"),
    ]


def _widths(widths: list[int]) -> str:
    """Of equal ones how many there are.

    Example:
        >>> _widths([400, 400, 400, 10])
        '400 ×3, 10'
    """
    runs: list[list[int]] = []
    for width in widths:
        if runs and runs[-1][0] == width:
            runs[-1][1] += 1
        else:
            runs.append([width, 1])
    return ", ".join(f"{count(w)} ×{times}" if times > 1 else count(w) for w, times in runs)


PHASES = {
    "ordered": "Below 1: order. Signals of different inputs become alike with depth, and gradients "
    "vanish on their way back.",
    "chaotic": "Above 1: chaos. Inputs that are nearly alike are torn apart, and gradients "
    "explode on their way back.",
    "edge of chaos": "Close enough to 1 for this depth: signals and gradients come through.",
}
"""What the gain means."""


def _facts(study: Study) -> list[Fact]:
    bound = study["spectrum"]["learning_rate_bound"]
    found = []
    if study["gain"] is not None:
        caption = PHASES.get(study["phase"], "")
        found.append(Fact("Gain", quantity(study["gain"]), "per layer", caption, "term-gain"))
    elif len(study["layers"]) > 1:
        caption = "Signals grow without end."
        found.append(Fact("Gain", MISSING, "per layer", caption, "term-gain"))
    found.append(_initialisation(study))
    found.append(
        Fact(
            "Largest stable learning rate",
            quantity(bound["measured"]),
            "measured",
            f"Two over the largest eigenvalue, for gradient descent on the mean loss; "
            f"{quantity(bound['predicted'])} predicted.",
            "term-learning-rate",
        )
    )
    return found


def _initialisation(study: Study) -> Fact:
    wanted = study["recommended"]
    label, term = "Recommended weight variance", "term-variance"
    if wanted is None:
        caption = "Theory has none to offer for this network."
        return Fact(label, MISSING, "", caption, term)
    caption = (
        f"It is {quantity(study['weight_variance'])} now, on the average of hidden layers. The "
        f"edge of chaos then allows learning rates up to "
        f"{quantity(wanted['learning_rate_bound'])}."
        if wanted["changed"]
        else "What the network has: leave it."
    )
    return Fact(label, quantity(wanted["weight_variance"]), "/ fan-in", caption, term)
