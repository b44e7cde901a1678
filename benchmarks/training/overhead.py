"""`python -m benchmarks.training.overhead`: what a step costs, and what an optimizer keeps.

Time of a whole training step with default settings, once the schedule of measurements has settled,
in units of fused AdamW's on the same model and batch in the same round; bytes in units of AdamW's
state. BENCH chooses `quick` (the default) or `full`.
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

import neuromanifold as nm
from benchmarks.harness import clock_of, crowded, interleave, quartiles, write_results
from benchmarks.training.contestants import CONTESTANTS, REFERENCE
from benchmarks.workloads import WORKLOADS, Batch

BARS = {"W1": 1.6, "W2": 1.5, "W3": 1.5}
"""Of the median, for kfac."""

MEMORY_BAR = 2.5
ROUNDS = {"quick": 50, "full": 200}
"""Multiples of the longest period of the default schedule, so that the mean counts it right."""

SETTLED = 500
"""Steps after which the periods of the default schedule grow no more."""

NAMES = (REFERENCE, "Muon", "SOAP", "kfac", "ekfac", "quasidiagonal", "diagonal")
MATRICES_ONLY = {"W2": ("Muon",)}
LIKELIHOOD = nm.Categorical()


class Stateful(Protocol):
    """An optimizer, or its preconditioner."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors in a tree."""


def measure(
    workload: str,
    rounds: int,
    names: Sequence[str] = NAMES,
    others: Mapping[str, Callable[[], object]] | None = None,
    device: str | torch.device = "cpu",
) -> list[dict[str, Any]]:
    """Time and memory of every optimizer on one workload.

    Args:
        workload: key of `WORKLOADS`.
        rounds: steps of each that count.
        names: of contestants, with the unit.
        others: steps of other optimizers, by name; their memory is not known.
        device: where it is done.
    """
    torch.manual_seed(0)
    batch = WORKLOADS[workload].build().to(device)
    names = [name for name in names if name not in MATRICES_ONLY.get(workload, ())]
    optimizers = {}
    tasks: dict[str, Callable[[], object]] = dict(others or {})
    for name in names:
        model = copy.deepcopy(batch.model).train()
        own = CONTESTANTS[name].build(model, LIKELIHOOD, 1e-5)  # weights stay where they are
        optimizers[name] = own
        tasks[name] = partial(_step, model, batch, own)
        tasks[name]()
        for optimizer in own:
            if isinstance(optimizer, nm.optim.NaturalGradient):
                for _ in range(SETTLED):
                    optimizer.preconditioner.advance()
    seconds = interleave(tasks, rounds, clock_of(batch.device))
    unit, unit_bytes = seconds[REFERENCE], state_bytes(optimizers[REFERENCE])
    return [
        {
            "workload": workload,
            "optimizer": name,
            "quartiles": quartiles(seconds[name], unit),
            "mean": statistics.mean(seconds[name]) / statistics.mean(unit),
            "memory": state_bytes(optimizers[name]) / unit_bytes if name in optimizers else None,
            "seconds": seconds[name],
        }
        for name in tasks
    ]


def _step(model: nn.Module, batch: Batch, optimizers: list[Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    logits = model(batch.inputs)
    functional.cross_entropy(logits.flatten(0, -2), batch.targets.flatten()).backward()
    for optimizer in optimizers:
        optimizer.step()


def state_bytes(optimizers: Sequence[Stateful]) -> int:
    """Of all tensors in the state; those that share memory count once."""
    storages = {}
    for optimizer in optimizers:
        for tensor in _tensors(optimizer.state_dict()):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(tree: object) -> Iterable[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)


def show(results: list[dict[str, Any]], *, trusted: bool) -> None:
    title = (
        f"a training step, in units of fused {REFERENCE}'s; {torch.get_num_threads()} threads"
        + ("" if trusted else " (others used this machine: times mean nothing)")
    )
    table = Table("workload", "optimizer", "median", "quartiles", "mean", "state", title=title)
    for result in results:
        low, median, high = result["quartiles"]
        judged = result["optimizer"] == "kfac"
        bar = BARS[result["workload"]] if judged and trusted else None
        table.add_row(
            result["workload"],
            result["optimizer"],
            _judged(median, bar),
            f"{low:.2f} to {high:.2f}",
            f"{result['mean']:.2f}",
            _judged(result["memory"], MEMORY_BAR if judged else None),
        )
    Console().print(table)


def _judged(value: float, bar: float | None) -> str:
    if bar is None:
        return f"{value:.2f}"
    colour = "green" if value <= bar else "red"
    return f"[{colour}]{value:.2f}[/] (≤ {bar:g})"


def main() -> None:
    mode = os.environ.get("BENCH", "quick")
    if mode not in ROUNDS:
        sys.exit(f"BENCH={mode!r} is not a mode; choose one of {', '.join(ROUNDS)}.")
    busy = crowded()
    results = []
    for workload in BARS:
        results += measure(workload, ROUNDS[mode])
    show(results, trusted=not busy)
    path = write_results(
        "training_overhead", {"mode": mode, "crowded_at_start": busy, "rows": results}
    )
    print(f"All repeats: {path.relative_to(path.parents[2])}")


if __name__ == "__main__":
    main()
