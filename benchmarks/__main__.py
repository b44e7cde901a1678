"""`python -m benchmarks`: every row of every workload, against one forward and backward.

The environment variable BENCH chooses how often: `quick` (the default) or `full`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import crowded, interleave, quartiles, write_results
from benchmarks.reference import reference
from benchmarks.rows import LIKELIHOOD, ROWS, Row
from benchmarks.workloads import WORKLOADS, forward_backward

ROUNDS = {"quick": 9, "full": 51}
SEED = 0


def measure(workload: str, rows: list[Row], rounds: int) -> list[dict[str, Any]]:
    """Check the rows of one workload, then time them together with forward and backward."""
    torch.manual_seed(SEED)
    batch = WORKLOADS[workload].build()
    labels = LIKELIHOOD.sample(batch.model(batch.inputs).detach(), 1, generator=seeded())[0]
    expected = reference(batch, labels)
    unit = "forward + backward"
    tasks: dict[str, Callable[[], object]] = {unit: partial(forward_backward, batch)}
    for row in rows:
        task = row.prepare(batch, seeded())
        row.check(task(), expected)  # the first answer is the one with the reference's labels
        tasks[row.quantity] = task
    del expected
    seconds = interleave(tasks, rounds)
    return [
        {
            "workload": workload,
            "quantity": row.quantity,
            "target": row.target,
            "quartiles": quartiles(seconds[row.quantity], seconds[unit]),
            "seconds": seconds[row.quantity],
            "unit_seconds": seconds[unit],
        }
        for row in rows
    ]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def show(results: list[dict[str, Any]], *, trusted: bool) -> None:
    title = (
        f"time, in forward + backward passes on the same batch; {torch.get_num_threads()} threads"
    )
    table = Table("workload", "quantity", "ratio", "quartiles", "target", "", title=title)
    for result in results:
        low, ratio, high = result["quartiles"]
        table.add_row(
            WORKLOADS[result["workload"]].title,
            result["quantity"],
            f"{ratio:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"≤ {result['target']:.2f}",
            verdict(low, high, result["target"]) if trusted else "[yellow]not judged[/]",
        )
    Console().print(table)


def verdict(low: float, high: float, target: float) -> str:
    """A target between the quartiles is decided by a longer run on a quieter machine."""
    if high <= target:
        return "[green]reached[/]"
    return "[red]missed[/]" if low > target else "[yellow]unclear[/]"


def main() -> None:
    mode = os.environ.get("BENCH", "quick")
    if mode not in ROUNDS:
        sys.exit(f"BENCH={mode!r} is not a mode; choose one of {', '.join(ROUNDS)}.")
    busy = crowded()
    if busy:
        print(
            "Other programs leave fewer cores than there are threads: these ratios mean nothing. "
            "Wait, or set OMP_NUM_THREADS=1.",
            file=sys.stderr,
        )
    results = []
    for workload in WORKLOADS:
        rows = [row for row in ROWS if row.workload == workload]
        if rows:
            results += measure(workload, rows, ROUNDS[mode])
    show(results, trusted=not busy)
    path = write_results("bench", {"mode": mode, "crowded_at_start": busy, "rows": results})
    print(f"All repeats: {path.relative_to(path.parents[2])}")


if __name__ == "__main__":
    main()
