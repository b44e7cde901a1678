"""What a section of a report is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from neuromanifold._intervals import quantile
from neuromanifold.report import charts

__all__ = [
    "WHISKERS",
    "Analysis",
    "Section",
    "Table",
    "code",
    "error",
    "interval",
    "largest",
    "layer_name",
]

WHISKERS = "Thin lines: 95% intervals."
"""What is said of them under a chart that has some."""

Analysis = Mapping[str, Any]
"""What `neuromanifold.report.collect` returns, or a part of it."""


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        num_names: how many of the first columns hold words; the others hold numbers.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_names: int = 1


@dataclass(frozen=True)
class Section:
    """One question, answered.

    Attributes:
        key: short name, unique within a model.
        says: what the chart shows, in one sentence.
        advice: what to do with it, in one sentence.
        reading: what the marks of the chart stand for; "" if its axes say it all.
    """

    key: str
    title: str
    says: Markup
    advice: Markup
    reading: str
    chart: charts.Spec
    table: Table


def code(name: str) -> Markup:
    """A name set apart from the words around it.

    Example:
        >>> code("<fc>")
        Markup('<code>&lt;fc&gt;</code>')
    """
    return Markup("<code>{}</code>").format(name)


def layer_name(name: str) -> str:
    """The name of a layer; a model that is one layer has none of its own."""
    return name or "(root)"


def error(numbers: Analysis, *path: str) -> float | None:
    """The standard error beside a number, by the same name; None if it is not known.

    Example:
        >>> error({"trace": 2.0, "stderr": {"trace": 0.1}}, "trace")
        0.1
        >>> error({"trace": 2.0}, "trace")
    """
    found: Any = numbers.get("stderr")
    for name in path:
        found = (found or {}).get(name)
    return found


def interval(
    value: float, stderr: float | None, *, logarithmic: bool = False, most: float = math.inf
) -> dict[str, float]:
    """The ends of the 95% interval of a number that is not negative, or nothing if unknown.

    Args:
        value: what was measured.
        stderr: its standard error.
        logarithmic: whether the axis is; the interval is then symmetric there, and above zero.
        most: the number is not larger.

    Example:
        >>> interval(1.0, 0.5)
        {'low': 0.02002, 'high': 1.98}
        >>> interval(1.0, None)
        {}
    """
    if stderr is None or (logarithmic and value <= 0):
        return {}
    width = quantile(0.95) * stderr
    if logarithmic:
        factor = math.exp(min(width / value, 30.0))
        return {"low": value / factor, "high": value * factor}
    return {
        "low": float(f"{max(value - width, 0.0):.4g}"),
        "high": float(f"{min(value + width, most):.4g}"),
    }


def largest(rows: Sequence[Analysis], key: str, num: int) -> list[Analysis]:
    """The `num` rows with the largest numbers under a key, in the order that they came in.

    Example:
        >>> largest([{"x": 1}, {"x": 3}, {"x": 2}], "x", 2)
        [{'x': 3}, {'x': 2}]
    """
    ranked = sorted(range(len(rows)), key=lambda i: -rows[i][key])
    return [rows[i] for i in sorted(ranked[:num])]
