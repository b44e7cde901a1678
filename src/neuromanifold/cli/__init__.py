"""The command line, `neuromanifold`."""

from __future__ import annotations

from neuromanifold.cli.app import app

__all__ = ["app"]
