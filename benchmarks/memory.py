"""Peak memory of ours and of every peer, each in a process of its own.

`python -m benchmarks.memory WORKLOAD QUANTITY LIBRARY DEVICE` is such a process: it prints bytes.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.harness import RETURN_FREED, described, held_memory, limit_memory, peak_memory
from benchmarks.peers import PEERS, Peer
from benchmarks.progress import Progress
from benchmarks.rows import ROWS
from benchmarks.suite import OURS, SEED, UNIT
from benchmarks.workloads import WORKLOADS, Batch, forward_backward

__all__ = ["QUANTITIES", "WHERE", "available", "guesses", "measure", "peak_of"]

WHERE = ("W1", "W2", "W3")
QUANTITIES = ("diagonal", "product, repeated", "Kronecker factors")
LONGEST = 120.0
"""Seconds that a process may take."""
USUAL = 6.0
"""Seconds that one takes, most of them to import."""


def available(device: torch.device) -> bool:
    """Whether it can be measured here."""
    return device.type == "cuda" or sys.platform == "linux"


def measure(
    workload: str, peers: Sequence[Peer], device: torch.device, progress: Progress
) -> list[dict[str, Any]]:
    """Peaks of everyone who has a row, in bytes."""
    progress.start(_part(workload, UNIT, OURS))
    unit = _in_fresh_process(workload, UNIT, OURS, device)
    if unit["problem"]:
        raise RuntimeError(f"No peak memory of forward and backward: {unit['problem']}")
    found = []
    for quantity in QUANTITIES:
        answers = {}
        for who in _libraries(workload, quantity, peers):
            progress.start(_part(workload, quantity, who))
            answers[who] = _in_fresh_process(workload, quantity, who, device)
        found.append(
            {
                "workload": workload,
                "title": WORKLOADS[workload].title,
                "quantity": quantity,
                "unit_bytes": unit["bytes"],
                "answers": answers,
            }
        )
    return found


def guesses(workload: str, peers: Sequence[Peer]) -> dict[str, float]:
    """Seconds that the parts of `measure` may take, by the names that they have there."""
    rows = (
        (quantity, who) for quantity in QUANTITIES for who in _libraries(workload, quantity, peers)
    )
    parts = [_part(workload, UNIT, OURS), *(_part(workload, *row) for row in rows)]
    return dict.fromkeys(parts, USUAL)


def _libraries(workload: str, quantity: str, peers: Sequence[Peer]) -> Iterator[str]:
    yield OURS
    yield from (peer.name for peer in peers if (workload, quantity) in peer.rows)


def _part(workload: str, quantity: str, who: str) -> str:
    return f"{workload}: memory of {quantity}: {who}"


# --- each in a process of its own ----------------------------------------------------------------


def _in_fresh_process(
    workload: str, quantity: str, who: str, device: torch.device
) -> dict[str, Any]:
    """An answer: what was wrong, or the bytes."""
    command = [sys.executable, "-m", "benchmarks.memory", workload, quantity, who, str(device)]
    try:
        ended = subprocess.run(
            command,
            env=os.environ | RETURN_FREED,
            capture_output=True,
            text=True,
            timeout=LONGEST,
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"more than {LONGEST:.0f} seconds"}
    if ended.returncode:
        return {"problem": (ended.stderr.strip().splitlines() or [""])[-1][:200]}
    return {"problem": "", "bytes": int(json.loads(ended.stdout.splitlines()[-1]))}


def peak_of(workload: str, quantity: str, who: str, device: torch.device) -> int:
    """Bytes at the peak of a warm call, with what was kept since before it was prepared."""
    prepare = _preparation(workload, quantity, who)
    prepare(_private(workload, device))()  # imports, and what is made once for a process
    batch = _private(workload, device)
    gc.collect()
    before = held_memory(device)
    return peak_memory(prepare(batch), device, before)


def _private(workload: str, device: torch.device) -> Batch:
    torch.manual_seed(SEED)
    return replace(WORKLOADS[workload].build().to(device), shared=False)


def _preparation(workload: str, quantity: str, who: str) -> Callable[[Batch], Callable[[], object]]:
    if quantity == UNIT:
        return lambda batch: lambda: forward_backward(batch)
    if who == OURS:
        row = next(r for r in ROWS if (r.workload, r.quantity) == (workload, quantity))
        return lambda batch: row.prepare(batch, torch.Generator(batch.device).manual_seed(SEED))
    theirs = next(peer for peer in PEERS if peer.name == who).rows[workload, quantity]
    return lambda batch: theirs(batch, batch.targets)


def main() -> None:
    """Print the bytes of what the command line names."""
    workload, quantity, who, device = sys.argv[1:]
    if device == "cpu":
        limit_memory()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print(json.dumps(peak_of(workload, quantity, who, torch.device(device))))


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # the last line is read as the problem
        sys.exit(described(error))
