"""The command line, `neuromanifold`."""

from __future__ import annotations

from neuromanifold.cli import training  # noqa: F401  (registers its command)
from neuromanifold.cli.app import app

__all__ = ["app"]
