"""Where numbers of a training go: TensorBoard, or any function."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeAlias

from neuromanifold.errors import UnsupportedError

__all__ = ["Write", "writer"]

Write: TypeAlias = Callable[[int, dict[str, float]], Any]
"""`write(step, scalars)`."""


def writer(write: Any, prefix: str) -> Write:
    """A function that writes numbers.

    Args:
        write: a `torch.utils.tensorboard.SummaryWriter`, a folder to write such events into, or a
            function `write(step, scalars)`.
        prefix: of the names that TensorBoard shows.

    Raises:
        UnsupportedError: If a folder is given, and TensorBoard is not installed.
        TypeError: If it is nothing that can be written to.
    """
    if isinstance(write, (str, os.PathLike)):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UnsupportedError(
                "Events for TensorBoard need it installed: pip install tensorboard. Or pass a "
                "function write(step, scalars)."
            ) from None
        write = SummaryWriter(os.fspath(write))
    add: Callable[[str, float, int], None] | None = getattr(write, "add_scalar", None)
    if add is not None:

        def to_tensorboard(step: int, found: dict[str, float]) -> None:
            for name, value in found.items():
                add(prefix + name, value, step)

        return to_tensorboard
    if not callable(write):
        raise TypeError(
            f"write is a SummaryWriter, a folder, or a function write(step, scalars); "
            f"got {type(write).__name__}."
        )
    found_writer: Write = write
    return found_writer
