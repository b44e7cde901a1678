"""Which rule and which structure represent each parameter: nothing is skipped silently."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Coverage", "CoverageEntry"]


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
