"""How the numbers of a report came about."""

from __future__ import annotations

from collections import Counter

from neuromanifold.report.numerals import counted, percent, quantity
from neuromanifold.report.sections._base import Analysis, Table, layer_name

__all__ = ["coverage", "origin"]


def origin(analysis: Analysis) -> list[str]:
    """How the numbers came about, in a few words each."""
    words = [] if analysis["model"]["class"] == analysis["name"] else [analysis["model"]["class"]]
    words += [
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
    entries = analysis.get("coverage") or ()
    rows = [
        [
            entry["parameter"],
            layer_name(entry["block"]),
            entry["rule"],
            entry["structure"],
            "exact" if entry["exact"] else "approximate",
            entry["note"],
        ]
        for entry in entries
    ]
    if not rows:
        return None
    rules = Counter(entry["rule"] for entry in entries).most_common()
    parts = ", ".join(f"{number} by {rule}" for rule, number in rules)
    caption = f"How each of {counted(len(rows), 'parameter')} is read: {parts}"
    head = ("parameter", "block", "rule", "structure", "represented", "note")
    return Table(caption, head, rows, num_names=6)
