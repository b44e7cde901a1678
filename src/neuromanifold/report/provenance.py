"""How the numbers of a report came about."""

from __future__ import annotations

from neuromanifold.report.numerals import percent, quantity
from neuromanifold.report.sections._base import Analysis, Table, layer_name

__all__ = ["coverage", "origin"]


def origin(analysis: Analysis) -> list[str]:
    """How the numbers came about, in a few words each."""
    words = [
        analysis["model"]["class"],
        analysis["likelihood"],
        f"estimator {analysis['estimator']}",
        analysis["dtype"],
    ]
    if timing := analysis.get("timing"):
        words.append(f"measured in {quantity(timing['seconds'])} s")
    if training := analysis.get("training"):
        words.append(f"{training['epochs']} epochs of {training['optimizer']}")
        words.append(f"{percent(training['test_accuracy'])} right on test data")
    return words


def coverage(analysis: Analysis) -> Table | None:
    """Which rule and which structure represent each parameter."""
    rows = [
        [
            entry["parameter"],
            layer_name(entry["block"]),
            entry["rule"],
            entry["structure"],
            "exact" if entry["exact"] else "approximate",
            entry["note"],
        ]
        for entry in analysis.get("coverage") or ()
    ]
    head = ("parameter", "block", "rule", "structure", "represented", "note")
    return Table("How each parameter is represented", head, rows, num_names=6) if rows else None
