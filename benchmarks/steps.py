"""Training steps in units of one with fused AdamW, and belief updates in units of a plain one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import belief
from benchmarks.harness import Guarded
from benchmarks.peers import Peer
from benchmarks.progress import Progress
from benchmarks.suite import OURS, Scene, unit_seconds
from benchmarks.training import overhead

__all__ = ["TARGETS", "UPDATES", "USUAL_UPDATES", "WHERE", "guesses", "measure", "updates"]

TARGETS = {
    **{(workload, "kfac"): bar for workload, bar in overhead.BARS.items()},
    **{("W1", name): 1.3 for name in ("quasidiagonal", "diagonal", "meanfield")},
}
"""Of the mean, by workload and optimizer."""

WHERE = tuple(overhead.BARS)
"""Workloads."""

NAMES = (*overhead.NAMES, "meanfield", "projected")
OPTIMIZERS = len(NAMES) + 5
"""With those of peers."""
UPDATES, USUAL_UPDATES = "belief updates", 2.0
"""Their name, and seconds of a round of them."""
USUAL = 2.0
"""Units that a step takes, to guess how long a run will."""
BY = {"AdamW": "torch", "Muon": "torch", "SOAP": "benchmarks.training.soap"}
"""Who wrote those that are not ours."""


def measure(
    workload: str, rounds: int, peers: Sequence[Peer], device: torch.device, progress: Progress
) -> list[dict[str, Any]]:
    """Every optimizer on one workload; those that fail come first."""
    progress.start(_part(workload))
    tasks: dict[str, Guarded] = {}
    problems = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for peer, optimizer, prepare in _of_peers(workload, peers, device):
            name = f"{peer.name}: {optimizer}"
            first = Guarded(partial(_trained, prepare))
            task = first()
            if first.problem:
                problems[name] = first.problem
            else:
                tasks[name] = Guarded(task)
        rows = overhead.measure(workload, rounds, NAMES, tasks, device)
    problems |= {name: task.problem for name, task in tasks.items() if task.problem}
    failed = [{"workload": workload, **_named(name), "problem": p} for name, p in problems.items()]
    return failed + [_row(row) for row in rows if row["optimizer"] not in problems]


def guesses(workload: str, rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds that `measure` may take, by the name that it has there."""
    step = USUAL * unit_seconds(workload, device)
    return {_part(workload): OPTIMIZERS * (rounds + 5) * step}


def _part(workload: str) -> str:
    return f"{workload}: optimizer steps"


def _of_peers(
    workload: str, peers: Sequence[Peer], device: torch.device
) -> Iterator[tuple[Peer, str, Callable[[], Callable[[], Any]]]]:
    scene = Scene(workload, device)
    for peer in peers:
        for (where, quantity), prepare in peer.rows.items():
            if where == workload and quantity.startswith("step, "):
                optimizer = quantity.removeprefix("step, ")
                yield peer, optimizer, partial(prepare, scene.batch, scene.labels)


def _trained(prepare: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    """A step that was seen to give its model, with parameters that stay finite."""
    step = prepare()
    model = step()
    assert isinstance(model, torch.nn.Module), "a step gives the model it trained"
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    assert finite, "parameters are not finite after a step"
    return step


def _row(row: dict[str, Any]) -> dict[str, Any]:
    names = _named(row["optimizer"])
    ours = names["by"] == OURS
    target = TARGETS.get((row["workload"], names["optimizer"])) if ours else None
    return {**row, **names, "target": target}


def _named(name: str) -> dict[str, str]:
    """An optimizer, and who wrote it."""
    by, _, optimizer = name.rpartition(": ")
    return {"optimizer": optimizer, "by": by or BY.get(optimizer, OURS)}


def updates(rounds: int, device: torch.device, progress: Progress) -> list[dict[str, Any]]:
    """Natural reweighted wake-sleep, with blocks chosen by default, and with exact ones."""
    progress.start(UPDATES)
    network = "-".join(map(str, reversed(belief.COST_SIZES)))
    return [
        {**belief.cost(rounds, blocks, device), "network": f"{network}, blocks: {blocks}"}
        for blocks in ("auto", "exact")
    ]
