"""`python -m neuromanifold` is the command `neuromanifold`."""

from __future__ import annotations

from neuromanifold.cli import app

if __name__ == "__main__":
    app(prog_name="neuromanifold")
