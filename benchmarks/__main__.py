"""`python -m benchmarks`: ours beside every installed peer, in units of one forward and backward.

Every answer is checked against a float64 reference before its time counts; a peer that fails is
shown with its error. BENCH chooses how often: `smoke`, `quick` (the default) or `full`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from rich.console import Console

from benchmarks import steps, tables
from benchmarks.harness import crowded, limit_memory, write_results
from benchmarks.page import write_page
from benchmarks.peers import PEERS, Peer
from benchmarks.rows import ROWS, Row
from benchmarks.suite import MODES, Mode, measure
from benchmarks.workloads import WORKLOADS

NO_GPU = "cuda: not run (no device)"
NO_MEMORY = (
    "peak memory: not measured here, see python -m benchmarks.capture and .training.overhead"
)


def main() -> None:
    """Measure, print, and store what was run as a whole."""
    asked = _arguments()
    mode = _mode()
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
    console = Console()
    rows = _chosen(asked.rows, asked.workload)
    peers = [] if asked.no_peers else [peer for peer in PEERS if peer.version() is not None]
    found: dict[str, Any] = {
        "mode": os.environ.get("BENCH", "quick"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": "float32, no tf32",
        "crowded_at_start": busy,
        "peers": {peer.name: peer.version() for peer in PEERS},
        "not_run": list(_not_run(peers)),
        "rows": [],
    }
    everything = rows == ROWS
    name = "bench" if device.type == "cpu" else f"bench_{device.type}"
    for results in _measured(rows, peers, mode, device, console):
        console.print(tables.rows(results, trusted=not busy))
        console.print(tables.problems(results))
        found["rows"] += results
        if everything:
            write_results(name, found)  # a run takes long: what is done is kept
    if everything or asked.steps:
        with console.status("optimizer steps and updates"):
            found["steps"] = steps.measure(mode.step_rounds, peers, device)
            found["updates"] = steps.updates(mode.rounds)
        # A rehearsal sees too little of the schedule of measurements for a mean.
        judged = not busy and found["mode"] != "smoke"
        console.print(tables.steps(found["steps"], trusted=judged))
        console.print(tables.updates(found["updates"], trusted=not busy))
    for words in found["not_run"]:
        console.print(words)
    if everything:
        path = write_results(name, found)
        page = write_page(path)
        console.print(f"All repeats: {path.name}, charts: {page.name}, in {path.parent.name}/")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rows", default="*", help="pattern of quantities, such as 'product*'")
    parser.add_argument("--workload", choices=WORKLOADS, help="one of them, in place of all")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument("--steps", action="store_true", help="optimizer steps with some rows, too")
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        sys.exit(NO_GPU)
    return asked


def _mode() -> Mode:
    name = os.environ.get("BENCH", "quick")
    if name not in MODES:
        sys.exit(f"BENCH={name!r} is not a mode; choose one of {', '.join(MODES)}.")
    return MODES[name]


def _chosen(pattern: str, workload: str | None) -> list[Row]:
    rows = [
        row for row in ROWS if fnmatch(row.quantity, pattern) and workload in (None, row.workload)
    ]
    if not rows:
        names = ", ".join(dict.fromkeys(row.quantity for row in ROWS))
        sys.exit(f"No row is called {pattern!r}; there are: {names}.")
    return rows


def _not_run(peers: Sequence[Peer]) -> Iterator[str]:
    if not torch.cuda.is_available():
        yield NO_GPU
    yield NO_MEMORY
    for peer in peers:
        for (workload, quantity), why in peer.left_out.items():
            yield f"{peer.name}, {quantity} on {workload}: left out, {why}"
    absent = [peer.name for peer in PEERS if peer not in peers]
    if absent:
        yield f"peers that are not installed, or were not asked for: {', '.join(absent)}"


def _measured(
    rows: Sequence[Row], peers: Sequence[Peer], mode: Mode, device: torch.device, console: Console
) -> Iterator[list[dict[str, Any]]]:
    """Results of one workload after the other."""
    for workload in WORKLOADS:
        own = [row for row in rows if row.workload == workload]
        if own:
            with console.status(workload) as status:
                results = measure(workload, own, peers, mode, device, status.update)
            yield results


if __name__ == "__main__":
    main()
