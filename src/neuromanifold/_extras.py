"""Optional dependencies, asked for by the extra that brings them."""

from __future__ import annotations

from importlib.util import find_spec

from neuromanifold.errors import UnsupportedError

__all__ = ["require_extra"]


def require_extra(extra: str, *modules: str) -> None:
    """Refuse early, before a long run, when an optional dependency is not installed.

    Raises:
        UnsupportedError: With the command that installs it.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UnsupportedError(
            f"This needs {', '.join(missing)}, which the extra {extra!r} brings: "
            f"pip install 'neuromanifold[{extra}]'"
        )
