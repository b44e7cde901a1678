"""`python -m benchmarks.costs`: counted operations of every quantity on small networks.

Counts do not depend on the machine, so a test compares them with those that are stored beside it.
`--record` stores the present ones: do that when a change of cost is meant, and say why.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.floors import operations
from benchmarks.rows import ROWS
from benchmarks.workloads import GPT, Batch, Residual, forward_backward

__all__ = ["STORED", "grown", "measured", "small"]

STORED = Path(__file__).parents[1] / "tests" / "benchmarks" / "costs.json"
TOLERANCES = {"operations": 0.01, "calls": 0.1}
"""Of multiplications and additions in matrix products, and of calls of torch operators."""

ITERATIVE = ("top-10 eigenvalues", "trace, 1 %")
"""Whose number of steps depends on rounding, or on draws."""

Costs = dict[str, dict[str, int]]


class Calls(TorchDispatchMode):
    """Counts operators, of any kind."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def small() -> dict[str, Batch]:
    """Networks of the kinds of the workloads, by the same keys."""
    torch.manual_seed(0)
    mlp = nn.Sequential(
        nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    conv = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    gpt = GPT(vocabulary=16, length=8, width=16, heads=2, depth=1)
    residual = nn.Sequential(
        Residual(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    )
    text = torch.randint(16, (4, 9))
    labels = torch.randint(4, (8,))
    return {
        "W1": Batch(mlp, torch.randn(8, 24), labels),
        "W2": Batch(conv, torch.randn(8, 3, 8, 8), labels),
        "W3": Batch(gpt, text[:, :-1], text[:, 1:]),
        "W4": Batch(residual.eval(), torch.randn(8, 3, 8, 8), labels),
    }


def measured() -> Costs:
    """Operations and calls of every quantity, and of forward and backward, on the small nets."""
    return {name: _cost(task) for name, task in _tasks()}


def _tasks() -> Iterator[tuple[str, Callable[[], object]]]:
    batches = small()
    for workload, batch in batches.items():
        yield f"{workload}, forward + backward", partial(forward_backward, batch)
    for row in ROWS:
        if row.quantity not in ITERATIVE:
            task = row.prepare(batches[row.workload], torch.Generator().manual_seed(0))
            yield f"{row.workload}, {row.quantity}", task


def _cost(task: Callable[[], object]) -> dict[str, int]:
    task()  # what is made once for a model is not counted
    with Calls() as calls:
        task()
    return {"operations": operations(task), "calls": calls.count}


def grown(costs: Costs, stored: Costs) -> list[str]:
    """What costs more than stored, or less, beyond the tolerances: a line for each."""
    found = [f"{name}: not recorded" for name in costs.keys() - stored.keys()]
    found += [f"{name}: recorded, but no longer measured" for name in stored.keys() - costs.keys()]
    for name in sorted(costs.keys() & stored.keys()):
        for kind, tolerance in TOLERANCES.items():
            now, before = costs[name][kind], stored[name][kind]
            if abs(now - before) > tolerance * before:
                verb = "grew" if now > before else "fell"
                found.append(f"{name}: {kind} {verb} from {before:,} to {now:,}")
    return found


def main() -> None:
    """Print the counts beside the stored ones, or store them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.costs", description=__doc__)
    parser.add_argument("--record", action="store_true", help="store the present counts")
    record = parser.parse_args().record
    costs = measured()
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    table = Table("quantity", "operations", "stored", "calls", "stored", title="Counted")
    for name, cost in costs.items():
        before = stored.get(name, {})
        cells = (
            f"{x:,}" if x is not None else ""
            for kind in TOLERANCES
            for x in (cost[kind], before.get(kind))
        )
        table.add_row(name, *cells)
    Console().print(table)
    if record:
        STORED.write_text(json.dumps(costs, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
