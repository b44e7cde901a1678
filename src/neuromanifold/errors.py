"""Named failures: each says what was given, what was expected, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

__all__ = [
    "CaptureError",
    "NeuromanifoldError",
    "NonFiniteError",
    "NotPositiveDefiniteError",
    "StorageError",
    "TooLargeError",
    "UncoveredParameterError",
    "UnsupportedError",
]


class NeuromanifoldError(ValueError):
    """Base of every error that this library raises on purpose."""


class UncoveredParameterError(NeuromanifoldError):
    """No layer rule covers a trainable parameter, and `uncovered="error"` was asked for."""


class UnsupportedError(NeuromanifoldError):
    """The request has no exact answer here; the message names what has one."""


class CaptureError(NeuromanifoldError):
    """A layer that should have reported its inputs and cotangents did not, or not usably."""


class NonFiniteError(NeuromanifoldError):
    """A NaN or an infinity was found before it could reach a result."""


class NotPositiveDefiniteError(NeuromanifoldError):
    """A matrix that had to be positive definite is singular or indefinite."""


class StorageError(NeuromanifoldError):
    """A file cannot be read back as a Fisher matrix."""


class TooLargeError(NeuromanifoldError):
    """An allocation would not fit into memory; raised before it is tried.

    Attributes:
        bytes_needed: size of the allocation.
        bytes_available: memory that was free when it was asked for.
    """

    def __init__(self, message: str, *, bytes_needed: int, bytes_available: int) -> None:
        super().__init__(message)
        self.bytes_needed = bytes_needed
        self.bytes_available = bytes_available


MOST_LISTED = 8


def listed(names: Iterable[str], near: str | None = None) -> str:
    """Names for a message; of many, a few, and how many more there are.

    Args:
        names: of parameters, blocks, ...
        near: a name that was not found; the most similar ones are listed first.

    Example:
        >>> listed(["head.weight", "head.bias"])
        "['head.weight', 'head.bias']"
        >>> print(listed(map("layer.{}".format, range(100)), near="layers.70")[:11])
        ['layer.70'
    """
    names = list(names)
    if len(names) <= MOST_LISTED:
        return str(names)
    if near is not None:
        names.sort(key=lambda name: -SequenceMatcher(None, near, name).ratio())
    shown = ", ".join(map(repr, names[:MOST_LISTED]))
    return f"[{shown}, ... and {len(names) - MOST_LISTED:,} more]"
