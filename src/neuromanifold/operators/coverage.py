"""Which rule and which structure represent each parameter: nothing is skipped silently."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["Coverage", "CoverageEntry", "join"]


@dataclass(frozen=True)
class CoverageEntry:
    """How one parameter is represented.

    Attributes:
        parameter: its name.
        block: the block it belongs to; blocks are named after the module that owns them.
        rule: the layer rule that read it ("linear", "convolution", ...), or "generic".
        structure: what is kept of its block.
        exact: whether the entries kept are the estimator's own, without a further approximation.
        note: why it is not represented as asked, if it is not.
    """

    parameter: str
    block: str
    rule: str
    structure: str
    exact: bool
    note: str = ""


def _joined(one: CoverageEntry, other: CoverageEntry) -> CoverageEntry:
    return replace(
        one,
        rule=join([one.rule, other.rule]),
        structure=join([one.structure, other.structure]),
        exact=one.exact and other.exact,
        note=join([one.note, other.note], "; "),
    )


def join(texts: Iterable[str], separator: str = " + ") -> str:
    """Texts one after the other, each once; empty ones are left out."""
    return separator.join(dict.fromkeys(filter(None, texts)))


@dataclass(frozen=True)
class Coverage:
    """One entry per parameter, in the order of the layout."""

    entries: tuple[CoverageEntry, ...]

    def __iter__(self) -> Iterator[CoverageEntry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, parameter: str) -> CoverageEntry:
        """The entry of a parameter, by name."""
        for entry in self.entries:
            if entry.parameter == parameter:
                return entry
        raise KeyError(parameter)

    def restrict(self, parameters: tuple[str, ...]) -> Coverage:
        """The entries of some parameters."""
        return Coverage(tuple(entry for entry in self.entries if entry.parameter in parameters))

    def joined(self, other: Coverage) -> Coverage:
        """Of the sum of two matrices: exact where both are, and what is said of either."""
        pairs = zip(self, other, strict=True)
        return Coverage(tuple(_joined(one, another) for one, another in pairs))

    def to_list(self) -> list[dict[str, Any]]:
        """Plain dicts, for JSON."""
        return [asdict(entry) for entry in self.entries]

    @classmethod
    def from_list(cls, entries: list[dict[str, Any]]) -> Coverage:
        """The inverse of `to_list`."""
        return cls(tuple(CoverageEntry(**entry) for entry in entries))

    def __str__(self) -> str:
        header = ("parameter", "block", "rule", "structure", "exact", "note")
        rows = [header] + [
            (e.parameter, e.block, e.rule, e.structure, "yes" if e.exact else "no", e.note)
            for e in self.entries
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )
        return "\n".join(lines)
