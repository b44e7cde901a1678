"""How much memory a piece of code took, counted allocation by allocation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch._C import _autograd, _profiler

from neuromanifold.errors import UnsupportedError

__all__ = ["Usage", "watching"]


@dataclass(eq=False)
class Usage:
    """Bytes of tensors, over those that were there before.

    Attributes:
        peak: the most that was alive at once.
        kept: alive at the end.
    """

    peak: int = 0
    kept: int = 0


_WATCHING: list[Usage] = []
"""Who is told of allocations in host memory, one inside the other."""


@contextmanager
def watching(device: torch.device) -> Iterator[Usage]:
    """Count the bytes that torch allocates on a device; the answer is there at the end.

    On a CUDA device this resets torch's own record of the peak.

    Raises:
        UnsupportedError: If a profiler is running, or torch does not count on such a device.

    Example:
        >>> with watching(torch.device("cpu")) as usage:
        ...     total = (torch.ones(1000) + torch.ones(1000)).sum()
        >>> usage.peak, usage.kept
        (12000, 4)
    """
    usage = Usage()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield usage
        torch.cuda.synchronize(device)
        usage.peak = torch.cuda.max_memory_allocated(device) - before
        usage.kept = torch.cuda.memory_allocated(device) - before
    elif device.type == "cpu":
        _count(_WATCHING)
        _start()
        _WATCHING.append(usage)
        try:
            yield usage
        finally:
            _count(_WATCHING)
            _WATCHING.pop()
            if _WATCHING:
                _start()
    else:
        raise UnsupportedError(f"Memory is counted on CPU and CUDA devices only, not on {device}.")


def _count(told: list[Usage]) -> None:
    """Stop, and tell what was allocated since the start."""
    if not told:
        return
    # The newer profiler writes to the standard error of some builds; this one is silent.
    for events in _autograd._disable_profiler_legacy():
        for event in events:
            if str(event.kind()) != "memory_alloc":
                continue
            for usage in told:
                usage.kept += event.cpu_memory_usage()
                usage.peak = max(usage.peak, usage.kept)


def _start() -> None:
    config = _profiler.ProfilerConfig(
        _profiler.ProfilerState.CPU,
        False,  # shapes
        True,  # memory
        False,  # stacks
        False,  # operations
        False,  # modules
        _profiler._ExperimentalConfig(),
    )
    try:
        _autograd._enable_profiler_legacy(config)
    except RuntimeError as error:
        raise UnsupportedError(
            "Allocations are counted through torch's profiler, and one is running already. Leave "
            "it before you ask for a forecast or for max_bytes=..."
        ) from error
