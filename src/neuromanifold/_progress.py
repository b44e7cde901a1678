"""Progress of long work on stderr, with the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["reporting"]

Progress = Callable[[int, int | None], None]


@contextmanager
def reporting(progress: bool | Progress, label: str = "batches") -> Iterator[Progress | None]:
    """Turn the `progress` argument of a public function into a callback `(done, total)`.

    Args:
        progress: False for none, True for a bar on stderr, or the callback itself.
        label: what is counted.
    """
    if progress is not True:
        yield progress or None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
