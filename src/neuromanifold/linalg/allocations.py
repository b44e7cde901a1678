"""How much memory a piece of code took, counted allocation by allocation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch._C import _autograd, _profiler

from neuromanifold.errors import UnsupportedError

__all__ = ["Usage", "watching"]


@dataclass(eq=False)
class Usage:
    """Bytes of tensors, over those that were there before.

    Attributes:
        kept: alive at present.
        segments: between one mark and the next, bytes alive at the start and at most.
        device: where.
    """

    device: torch.device
    kept: int = 0
    segments: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])

    @property
    def peak(self) -> int:
        """The most that was alive at once."""
        return max(peak for _, peak in self.segments)

    def mark(self) -> None:
        """Begin a new segment."""
        _count(self.device)
        self.segments.append((self.kept, self.kept))
        _start(self.device)

    def _add(self, size: int) -> None:
        self.kept += size
        self._reach(self.kept)

    def _reach(self, alive: int) -> None:
        start, peak = self.segments[-1]
        self.segments[-1] = (start, max(peak, alive))


_WATCHING: list[Usage] = []
"""Who is told of allocations, one inside the other; all of them watch the same device."""

_ALLOCATED: dict[torch.device, int] = {}
"""Bytes on a CUDA device when counting started."""


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
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"Memory is counted on CPU and CUDA devices only, not on {device}.")
    if _WATCHING:
        _count(device)
    _start(device)
    usage = Usage(device)
    _WATCHING.append(usage)
    try:
        yield usage
    finally:
        _count(device)
        _WATCHING.pop()
        if _WATCHING:
            _start(device)


def _count(device: torch.device) -> None:
    """Tell what was allocated since the start, and stop."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        now, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        for usage in _WATCHING:
            before = _ALLOCATED[device]
            usage._reach(usage.kept + peak - before)
            usage.kept += now - before
        return
    # The newer profiler writes to the standard error of some builds; this one is silent.
    for events in _autograd._disable_profiler_legacy():
        for event in events:
            if str(event.kind()) == "memory_alloc":
                for usage in _WATCHING:
                    usage._add(event.cpu_memory_usage())


def _start(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        _ALLOCATED[device] = torch.cuda.memory_allocated(device)
        return
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
