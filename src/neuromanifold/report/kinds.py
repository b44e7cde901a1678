"""Plain dicts say what they are, so that a page is not made of something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["require_kind"]


def require_kind(
    given: Mapping[str, Any], expected: tuple[str, int], *, what: str, made_by: str
) -> None:
    """Refuse a dict of another kind, or of another version.

    Args:
        given: what a page is to be made of.
        expected: its `kind` and `version`.
        what: it is called in the message.
        made_by: which function returns it.

    Raises:
        ValueError: If it is something else.

    Example:
        >>> require_kind({"kind": "a", "version": 1}, ("a", 1), what="The study", made_by="f")
    """
    found = given.get("kind"), given.get("version")
    if found != expected:
        raise ValueError(
            f"{what} has kind {found[0]!r} and version {found[1]!r}, expected {expected[0]!r} and "
            f"{expected[1]}. Pass what {made_by} returned, and measure again if that was another "
            f"version."
        )
