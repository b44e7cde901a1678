"""What a section of a report is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from neuromanifold.report import charts

__all__ = ["Analysis", "Section", "Table", "code", "largest", "layer_name"]

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


def largest(rows: Sequence[Analysis], key: str, num: int) -> list[Analysis]:
    """The `num` rows with the largest numbers under a key, in the order that they came in.

    Example:
        >>> largest([{"x": 1}, {"x": 3}, {"x": 2}], "x", 2)
        [{'x': 3}, {'x': 2}]
    """
    ranked = sorted(range(len(rows)), key=lambda i: -rows[i][key])
    return [rows[i] for i in sorted(ranked[:num])]
