"""The command line, `neuromanifold`."""

from __future__ import annotations

from neuromanifold.cli import meanfield, training  # noqa: F401  (register their commands)
from neuromanifold.cli.app import app

__all__ = ["app"]
