"""Several optimizers on one problem, from the same weights and through the same batches."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neuromanifold._estimate import plain
from neuromanifold._progress import reporting
from neuromanifold.errors import UnsupportedError
from neuromanifold.training.entries import Entry
from neuromanifold.training.interrupt import deferred_interrupt
from neuromanifold.training.loop import Problem, Run, Settings
from neuromanifold.training.randomness import seed_epoch

__all__ = ["compare_optimizers"]

KIND, VERSION = "neuromanifold.contest", 1

Note = Callable[[str], None]


def compare_optimizers(
    load: Callable[[int], Problem],
    entries: Sequence[Entry],
    *,
    epochs: int,
    batch_size: int = 64,
    seeds: Sequence[int] = (0,),
    damping: float | None = None,
    folder: Path | None = None,
    resume: bool = False,
    note: Note | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Train a copy of the same model by each optimizer, for each seed.

    Runs of one seed begin with the same weights and see the same batches in the same order. Each is
    warmed up by a step on a copy that is thrown away, so that no clock has what only the first step
    of a process needs; evaluations are not on the clock.

    Args:
        load: the problem of a seed; it draws initial weights from the global state, seeded here.
        entries: optimizers, each once.
        epochs: passes over the data.
        batch_size: of data that are no loader.
        seeds: one run of each optimizer for each.
        damping: of natural gradients, in nats/parameter²; None for their defaults.
        folder: where checkpoints go, one file for each run.
        resume: go on with the checkpoints that are there; a run that has none begins.
        note: told what happens, a line at a time.
        progress: show a bar on stderr, with the time left.

    Returns:
        A plain dict, as JSON has it: what was trained, and under `runs` what came of each.

    Raises:
        Stopped: If Ctrl-C was pressed; what was trained is in the checkpoints.
        UnsupportedError: If there are checkpoints, and `resume` is not asked for.
    """
    say = _silent if note is None else note
    _prepare(folder, resume)
    labels = [entry.label for entry in entries]
    if len(set(labels)) < len(labels):
        raise ValueError(f"Each optimizer can take part once; got {', '.join(labels)}.")
    runs: list[dict[str, Any]] = []
    described: dict[str, Any] = {}
    with deferred_interrupt() as stop, warnings.catch_warnings():
        # They are counted, and told at the end.
        warnings.filterwarnings("ignore", message="A measurement of curvature was left out")
        for seed in seeds:
            torch.manual_seed(seed)
            problem = load(seed)
            for entry in entries:
                own = problem._replace(model=copy.deepcopy(problem.model))
                name = f"{entry.label.replace(':', '-')}-seed{seed}.pt"
                path = None if folder is None else folder / name
                settings = Settings(entry, batch_size, seed, damping)
                run = Run(own, settings, epochs=epochs, path=path)
                if path is not None and path.exists():
                    run.resume()
                    say(f"{_title(run)}: goes on after {len(run.losses):,} steps")
                elif run.epoch < epochs:
                    _warm_up(problem, settings)
                with reporting(progress, _title(run)) as report:
                    run.train(stop=stop, report=report)
                found = plain(run.result())
                say(f"{_title(run)}: {_outcome(found)}")
                runs.append(found)
                described = described or _described(problem, run)
    return {
        "kind": KIND,
        "version": VERSION,
        **described,
        "epochs": epochs,
        "seeds": list(seeds),
        "damping": damping,
        "runs": runs,
        "notes": [line for found in runs for line in _warnings(found)],
    }


def _silent(_: str) -> None:
    """Nobody listens."""


def _prepare(folder: Path | None, resume: bool) -> None:
    if folder is None:
        if resume:
            raise ValueError("To resume, say where the checkpoints are: --checkpoint FOLDER.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    there = sorted(path.name for path in folder.glob("*.pt"))
    if there and not resume:
        raise UnsupportedError(
            f"{folder} has checkpoints already ({', '.join(there[:3])}). Go on with them by "
            f"--resume, or give another folder."
        )


def _warm_up(problem: Problem, settings: Settings) -> None:
    model = copy.deepcopy(problem.model)
    run = Run(problem._replace(model=model), settings, epochs=1)
    seed_epoch(run.data.source, settings.seed, 0)
    inputs, targets, _ = next(iter(run.data))
    model.train()
    run._step(inputs, targets)


def _title(run: Run) -> str:
    return f"{run.settings.entry.label}, seed {run.settings.seed}"


def _described(problem: Problem, run: Run) -> dict[str, Any]:
    model: nn.Module = problem.model
    some = next(model.parameters())
    return {
        "model": {
            "class": type(model).__name__,
            "num_trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
        "likelihood": repr(problem.likelihood),
        "dtype": str(some.dtype).removeprefix("torch."),
        "device": some.device.type,
        "samples_per_epoch": sum(run.sizes) // max(run.epoch, 1),
        "steps_per_epoch": len(run.sizes) // max(run.epoch, 1),
        "has_test": problem.test is not None,
    }


def _outcome(found: dict[str, Any]) -> str:
    parts = [f"{found['steps']:,} steps in {found['seconds']:.3g} s"]
    for kind in ("train", "test"):
        if found[f"{kind}_loss"] is not None:
            parts.append(f"{kind} loss {found[f'{kind}_loss']:.4g}")
        if found[f"{kind}_accuracy"] is not None:
            parts.append(f"{found[f'{kind}_accuracy']:.1%} right")
    return ", ".join([*parts, *_warnings(found, short=True)])


def _warnings(found: dict[str, Any], *, short: bool = False) -> list[str]:
    """What was not finite in a run, in words."""
    bad, lines = found["non_finite"], []
    if bad["count"]:
        lines.append(
            f"{bad['count']:,} of {found['steps']:,} losses were NaN or infinite, the first at "
            f"step {bad['first_step']:,}"
        )
    failed = found["scalars"][-1].get("failed", 0) if found["scalars"] else 0
    if failed:
        lines.append(f"{failed:,.0f} measurements of curvature held NaN and were left out")
    if found["diverged"]:
        lines.append(f"stopped after epoch {found['epochs']}: its weights are NaN or infinite")
    if short:
        return lines
    return [f"{found['optimizer']}, seed {found['seed']}: {line}." for line in lines]
