"""Training steps in units of one with fused AdamW, and belief updates in units of a plain one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import belief
from benchmarks.peers import Peer
from benchmarks.suite import OURS, Scene
from benchmarks.training import overhead

__all__ = ["TARGETS", "measure", "updates"]

TARGETS = {
    **{(workload, "kfac"): bar for workload, bar in overhead.BARS.items()},
    **{("W1", name): 1.3 for name in ("quasidiagonal", "diagonal", "meanfield")},
}
"""Of the mean, by workload and optimizer."""

NAMES = (*overhead.NAMES, "meanfield", "projected")
BY = {"AdamW": "torch", "Muon": "torch", "SOAP": "benchmarks.training.soap"}
"""Who wrote those that are not ours."""


def measure(rounds: int, peers: Sequence[Peer], device: torch.device) -> list[dict[str, Any]]:
    """Every optimizer on every workload that has a target."""
    found = []
    for workload in overhead.BARS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tasks: dict[str, Callable[[], Any]] = {}
            for peer, optimizer, prepare in _of_peers(workload, peers, device):
                name = f"{peer.name}: {optimizer}"
                try:
                    tasks[name] = prepare()
                    _require_training(tasks[name]())
                except Exception as error:  # whatever a peer raises is its result
                    tasks.pop(name, None)
                    problem = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
                    found.append(_failed(workload, peer, optimizer, problem))
            rows = overhead.measure(workload, rounds, NAMES, tasks, device)
        found += [_row(row) for row in rows]
    return found


def _of_peers(
    workload: str, peers: Sequence[Peer], device: torch.device
) -> Iterator[tuple[Peer, str, Callable[[], Callable[[], Any]]]]:
    scene = Scene(workload, device)
    for peer in peers:
        for (where, quantity), prepare in peer.rows.items():
            if where == workload and quantity.startswith("step, "):
                optimizer = quantity.removeprefix("step, ")
                yield peer, optimizer, partial(prepare, scene.batch, scene.labels)


def _require_training(model: Any) -> None:
    """A step of a peer gives its model, whose parameters stay finite."""
    assert isinstance(model, torch.nn.Module), "a step gives the model it trained"
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    assert finite, "parameters are not finite after a step"


def _row(row: dict[str, Any]) -> dict[str, Any]:
    by, _, optimizer = row["optimizer"].rpartition(": ")
    by = by or BY.get(optimizer, OURS)
    target = TARGETS.get((row["workload"], optimizer)) if by == OURS else None
    return {**row, "optimizer": optimizer, "by": by, "target": target}


def _failed(workload: str, peer: Peer, optimizer: str, problem: str) -> dict[str, Any]:
    return {"workload": workload, "optimizer": optimizer, "by": peer.name, "problem": problem}


def updates(rounds: int) -> list[dict[str, Any]]:
    """Natural reweighted wake-sleep, with blocks chosen by default, and with exact ones."""
    network = "-".join(map(str, reversed(belief.COST_SIZES)))
    return [
        {**belief.cost(rounds, blocks), "network": f"{network}, blocks: {blocks}"}
        for blocks in ("auto", "exact")
    ]
