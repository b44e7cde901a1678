"""Interleaved timing, peak memory and the description of the machine."""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import re
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

__all__ = [
    "CPU",
    "RESULTS",
    "RETURN_FREED",
    "Guarded",
    "clock_of",
    "crowded",
    "described",
    "display",
    "environment",
    "first_line",
    "held_memory",
    "interleave",
    "limit_memory",
    "peak_memory",
    "quartiles",
    "write_results",
]

RESULTS = Path(__file__).parent / "results"
WARM_UP_ROUNDS = 3
CPU = torch.device("cpu")
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""For the environment of a process whose resident memory is to be what is alive in it."""
WIDTH = 180
"""Columns of tables in a file."""


def interleave(
    tasks: Mapping[str, Callable[[], object]],
    rounds: int | Mapping[str, int],
    clock: Callable[[], float] = time.perf_counter,
    warm_up: int = WARM_UP_ROUNDS,
) -> dict[str, list[float]]:
    """Time every task once per round, in an order that changes, so that all see the same weather.

    Args:
        tasks: what to run, by name.
        rounds: timed calls of each task, after some untimed ones; by name where they differ. Those
            with fewer take part in the first rounds.
        clock: wall-clock time by default; `time.process_time` counts work, whoever else computes;
            `clock_of(device)` waits for an accelerator.
        warm_up: rounds before those that count.

    Returns:
        Seconds of each call, `rounds` per task, in order.
    """
    turns = {
        name: warm_up + (rounds if isinstance(rounds, int) else rounds[name]) for name in tasks
    }
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    order = list(tasks)
    shuffle = random.Random(0).shuffle
    gc.disable()
    try:
        for turn in range(max(turns.values())):
            gc.collect()
            shuffle(order)
            for name in order:
                if turn >= turns[name]:
                    continue
                start = clock()
                tasks[name]()
                elapsed = clock() - start
                if turn >= warm_up:
                    seconds[name].append(elapsed)
    finally:
        gc.enable()
    return seconds


@dataclass
class Guarded:
    """A call that is not repeated once it has failed, so that others can go on.

    Attributes:
        task: what is called.
        problem: its error, on one line; "" if there was none.
    """

    task: Callable[[], Any]
    problem: str = ""

    def __call__(self) -> Any:
        """What the task gives; None if it has failed."""
        if self.problem:
            return None
        try:
            return self.task()
        except Exception as error:  # whatever a library raises is its result
            self.problem = described(error)
            return None


def described(error: Exception) -> str:
    """Its class, and the first line of its message."""
    return ": ".join(filter(None, (type(error).__name__, first_line(error))))


def first_line(error: Exception) -> str:
    """Of its message, no longer than a table can show."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def clock_of(device: torch.device) -> Callable[[], float]:
    """Wall-clock time at which everything sent to a device is done."""
    if device.type != "cuda":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def quartiles(seconds: list[float], unit: list[float]) -> list[float]:
    """Quartiles over rounds of a task's time in units of another's time in the same round.

    The middle one is the ratio to report; the outer ones say how far to trust it, unless there was
    only one round.
    """
    ratios = [s / u for s, u in zip(seconds, unit, strict=True)]
    return statistics.quantiles(ratios, n=4) if len(ratios) > 1 else 3 * ratios


def peak_memory(
    task: Callable[[], object], device: torch.device = CPU, before: int | None = None
) -> int:
    """Bytes that one warm call adds to what a device holds for this process, at its peak.

    On CPUs that is the resident memory, Linux only. The kernel keeps its high-water mark and lets a
    process reset it, so nothing is sampled. Run it in a fresh process with RETURN_FREED: a freed
    tensor then leaves the resident set at once instead of hiding the next one's cost. On GPUs it is
    what torch has allocated.

    Args:
        task: the call.
        device: whose memory counts.
        before: `held_memory` of a time from which on all that is kept counts, too; by default only
            the call does.
    """
    task()
    gc.collect()
    if before is None:
        before = held_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        task()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")
    task()
    return _resident("VmHWM") - before


def held_memory(device: torch.device = CPU) -> int:
    """Bytes of this process on a device at the moment."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    return _resident("VmRSS")


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def display(*, stderr: bool = False) -> Console:
    """Where tables go; wide enough for them where no terminal says how wide it is."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=WIDTH)


def limit_memory(share: float = 0.9) -> None:
    """Let allocations fail that would take the process beyond a share of the machine's memory.

    A library that asks for more then raises, and is shown with its error, where the kernel would
    end the whole run. The limit counts addresses, of which a process has more than memory.
    """
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (int(share * pages * size), hard))


def environment() -> dict[str, Any]:
    """What a reader needs to judge the numbers: versions, processor, threads, load."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
        "cpu": model[1] if model else platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def crowded() -> bool:
    """Whether others leave fewer cores than this process has threads; ask before measuring.

    Parallel regions then wait for a thread that has no core. On two cores with one of them taken,
    an eigendecomposition was seen to take 500 times as long, forward and backward more than 10, so
    ratios are wrong by any factor, with narrow quartiles. `OMP_NUM_THREADS=1` avoids it.
    """
    free = (os.cpu_count() or 1) - os.getloadavg()[0]
    return torch.get_num_threads() > 1 and free < torch.get_num_threads() - 0.5


def write_results(name: str, results: Mapping[str, Any]) -> Path:
    """Store results with the environment as `results/<name>.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"environment": environment(), **results}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path
