"""`python -m benchmarks`: ours beside every installed peer, in units of one forward and backward.

Every answer is checked against a float64 reference before its time counts; a peer that fails is
shown with its error. BENCH chooses how often: `smoke`, `quick` (the default) or `full`. A rehearsal
(`smoke`) is stored as `local-bench.json`, so that it does not replace a measurement.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any

import torch
from rich.table import Table

from benchmarks import memory, slopes, steps, suite, tables
from benchmarks.harness import crowded, display, limit_memory, write_results
from benchmarks.page import write_page
from benchmarks.peers import PEERS, Peer
from benchmarks.progress import Progress
from benchmarks.rows import ROWS, Row
from benchmarks.suite import MODES, Mode
from benchmarks.workloads import WORKLOADS

NO_GPU = "cuda: not run (no device)"


@dataclass(frozen=True)
class Part:
    """Some of a run, whose results are printed and stored before the next one begins.

    Attributes:
        kind: key of its results in the JSON file.
        guesses: seconds that what it does may take, by name.
        measure: does it.
        tables: of its results.
    """

    kind: str
    guesses: Mapping[str, float]
    measure: Callable[[Progress], list[dict[str, Any]]]
    tables: Callable[[list[dict[str, Any]]], list[Table]]


def main() -> None:
    """Measure, print, and store what was run as a whole."""
    asked = _arguments()
    name, mode = _mode()
    device = torch.device(asked.device)
    # Products in full float32 everywhere, so that answers can be held to the same bound.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    busy = device.type == "cpu" and crowded()
    if device.type == "cpu":  # CUDA reserves more addresses than there is memory
        limit_memory()
    if busy:
        print(
            "Other programs leave fewer cores than there are threads: these ratios mean nothing. "
            "Wait, or set OMP_NUM_THREADS=1.",
            file=sys.stderr,
        )
    console = display()
    rows = _chosen(asked.rows, asked.workload)
    peers = [] if asked.no_peers else [peer for peer in PEERS if peer.version() is not None]
    everything = rows == ROWS
    rehearsal = name == "smoke"
    trusted = not busy and not rehearsal
    parts = [*_timed(rows, peers, mode, device, trusted=trusted)]
    where = [asked.workload] if asked.workload else list(WORKLOADS)
    if (everything or asked.memory) and memory.available(device):
        parts += _memory(where, peers, device)
    if everything or asked.steps:
        parts += _steps(where, peers, mode, device, trusted=trusted)
    if everything or asked.slopes:
        parts += _slopes(mode, device)
    found: dict[str, Any] = {
        "mode": name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": "float32, no tf32",
        "crowded_at_start": busy,
        "peers": {peer.name: peer.version() for peer in PEERS},
        "not_run": list(_not_run(peers, device)),
        **{part.kind: [] for part in parts},
    }
    stored = f"{'local-' if rehearsal else ''}bench{'_cuda' if device.type == 'cuda' else ''}"
    guesses = {key: guess for part in parts for key, guess in part.guesses.items()}
    progress = Progress(guesses, display(stderr=True))
    for part in parts:
        results = part.measure(progress)
        progress.finish()
        for table in part.tables(results):
            console.print(table)
        found[part.kind] += results
        if everything:
            path = write_results(stored, found)  # a run takes long: what is done is kept
    for words in found["not_run"]:
        console.print(words)
    if everything:
        page = write_page(path)
        console.print(f"All repeats: {path.name}, charts: {page.name}, in {path.parent.name}/")


def _timed(
    rows: Sequence[Row], peers: Sequence[Peer], mode: Mode, device: torch.device, *, trusted: bool
) -> Iterator[Part]:
    """The quantities of one workload after the other."""
    for workload in WORKLOADS:
        own = [row for row in rows if row.workload == workload]
        if own:
            yield Part(
                "rows",
                suite.guesses(workload, own, peers, mode, device),
                partial(suite.measure, workload, own, peers, mode, device),
                lambda results: [
                    tables.rows(results, trusted=trusted),
                    *tables.problems(results),
                ],
            )


def _memory(where: Sequence[str], peers: Sequence[Peer], device: torch.device) -> Iterator[Part]:
    for workload in (w for w in memory.WHERE if w in where):
        yield Part(
            "memory",
            memory.guesses(workload, peers),
            partial(memory.measure, workload, peers, device),
            lambda results: [tables.memory(results), *tables.problems(results)],
        )


def _steps(
    where: Sequence[str],
    peers: Sequence[Peer],
    mode: Mode,
    device: torch.device,
    *,
    trusted: bool,
) -> Iterator[Part]:
    """Optimizer steps, and updates of belief networks."""
    for workload in (w for w in steps.WHERE if w in where):
        yield Part(
            "steps",
            steps.guesses(workload, mode.step_rounds, device),
            partial(steps.measure, workload, mode.step_rounds, peers, device),
            lambda results: [tables.steps(results, trusted=trusted)],
        )
    yield Part(
        "updates",
        {steps.UPDATES: mode.rounds * steps.USUAL_UPDATES},
        partial(steps.updates, mode.rounds, device),
        lambda results: [tables.updates(results, trusted=trusted)],
    )


def _slopes(mode: Mode, device: torch.device) -> Iterator[Part]:
    for axis in slopes.AXES:
        yield Part(
            "slopes",
            slopes.guesses(axis, mode.rounds),
            partial(slopes.measure, axis, mode.rounds, device),
            lambda results: [tables.slopes(results)],
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rows", default="*", help="pattern of quantities, such as 'product*'")
    parser.add_argument("--workload", choices=WORKLOADS, help="one of them, in place of all")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument("--steps", action="store_true", help="optimizer steps with some rows, too")
    parser.add_argument("--memory", action="store_true", help="peak memory with some rows, too")
    parser.add_argument("--slopes", action="store_true", help="slopes with some rows, too")
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        sys.exit(NO_GPU)
    return asked


def _mode() -> tuple[str, Mode]:
    name = os.environ.get("BENCH", "quick")
    if name not in MODES:
        sys.exit(f"BENCH={name!r} is not a mode; choose one of {', '.join(MODES)}.")
    return name, MODES[name]


def _chosen(pattern: str, workload: str | None) -> list[Row]:
    rows = [
        row for row in ROWS if fnmatch(row.quantity, pattern) and workload in (None, row.workload)
    ]
    if not rows:
        names = ", ".join(dict.fromkeys(row.quantity for row in ROWS))
        sys.exit(f"No row is called {pattern!r}; there are: {names}.")
    return rows


def _not_run(peers: Sequence[Peer], device: torch.device) -> Iterator[str]:
    if not torch.cuda.is_available():
        yield NO_GPU
    if not memory.available(device):
        yield "peak memory: not run (it takes Linux, or a GPU)"
    for peer in peers:
        for (workload, quantity), why in peer.left_out.items():
            yield f"{peer.name}, {quantity} on {workload}: left out, {why}"
    absent = [peer.name for peer in PEERS if peer not in peers]
    if absent:
        yield f"peers that are not installed, or were not asked for: {', '.join(absent)}"


if __name__ == "__main__":
    main()
