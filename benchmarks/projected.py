"""`python -m benchmarks.projected`: K-FAC along an eighth of the directions, against all of K-FAC.

For a wide MLP and a wide conv net: a training step once the schedule has settled, curvature
included, and what the curvature keeps. Then, on the wide MLP and on CURVES, the loss that training
ends with, and the seconds to the loss that AdamW ends with, after the same search of learning
rates. BENCH chooses how long: `smoke`, `quick` (the default) or `full`.
"""

from __future__ import annotations

import copy
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

import neuromanifold as nm
from benchmarks.harness import crowded, interleave, write_results
from benchmarks.training.contest import Mode, Outcome, as_data, contest, reached
from benchmarks.training.contestants import CONTESTANTS
from benchmarks.training.overhead import SETTLED, state_bytes
from benchmarks.training.problems import PROBLEMS, Bar, Problem, digits

OURS, WHOLE, REFERENCE = "projected", "kfac", "AdamW"
NAMES = (REFERENCE, WHOLE, OURS)
FASTER, SMALLER = 2.0, 4.0
"""Bars: how many times faster, and smaller, than K-FAC."""

PERIOD = 50
"""Steps from one inversion to the next in the settled default schedule."""
PERIODS = {"smoke": 1, "quick": 2, "full": 6}
MODES = {"smoke": Mode(0.02, 1, 1), "quick": Mode(0.5, 2, 2), "full": Mode(1.0, 3, 5)}
WIDTH, CHANNELS = 2048, 512


def perceptron() -> nn.Module:
    """Of two hidden layers."""
    return nn.Sequential(
        nn.Linear(64, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, 10),
    )


def convnet() -> nn.Module:
    """Positions are few, 4×4, so that its factors are most of the work."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, CHANNELS, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(CHANNELS, 10),
    )


WIDE: dict[str, tuple[str, Callable[[], nn.Module], int]] = {
    "mlp": (f"MLP 64-{WIDTH}-{WIDTH}-10, N=128", perceptron, 128),
    "conv": (f"conv net of {CHANNELS} channels, N=32", convnet, 32),
}
"""Title, model and batch size."""

# ---- what a step costs ---------------------------------------------------------------------------


def costs(key: str, periods: int) -> list[dict[str, Any]]:
    """Seconds of each step of whole periods of the schedule, and bytes, by optimizer.

    In time of this process: with one thread, that is wall clock without what others compute.
    """
    title, build, size = WIDE[key]
    torch.manual_seed(0)
    model, (inputs, targets) = build(), digits().train
    x, y = inputs[:size], targets[:size]
    tasks: dict[str, Callable[[], object]] = {}
    optimizers: dict[str, Optimizer] = {}
    for name in NAMES:
        own = copy.deepcopy(model)
        # A learning rate so small that weights stay where they are.
        (optimizer,) = CONTESTANTS[name].build(own, nm.Categorical(), 1e-6)
        optimizers[name], tasks[name] = optimizer, partial(_step, own, x, y, optimizer)
        tasks[name]()
        if isinstance(optimizer, nm.optim.NaturalGradient):
            for _ in range(SETTLED):
                optimizer.preconditioner.advance()
    seconds = interleave(tasks, periods * PERIOD, clock=_clock())
    return [
        {
            "workload": title,
            "optimizer": name,
            "median_ms": 1e3 * statistics.median(seconds[name]),
            "mean_ms": 1e3 * statistics.mean(seconds[name]),
            "curvature_bytes": _curvature_bytes(optimizers[name]),
            "state_bytes": state_bytes([optimizers[name]]),
            "seconds": seconds[name],
        }
        for name in NAMES
    ]


def _clock() -> Callable[[], float]:
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _step(model: nn.Module, x: Tensor, y: Tensor, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def _curvature_bytes(optimizer: Optimizer) -> int:
    """Averages and inverses, without momentum."""
    if not isinstance(optimizer, nm.optim.NaturalGradient):
        return 0
    return state_bytes([optimizer.preconditioner])


# ---- what training ends with ---------------------------------------------------------------------

NO_BAR = Bar(math.inf, math.inf)
RACES: dict[str, Problem] = {
    "wide digits": Problem(
        f"digits, MLP 64-{WIDTH}-{WIDTH}-10, N=128",
        nm.Categorical(),
        functional.cross_entropy,
        perceptron,
        digits,
        batch_size=128,
        steps=11 * 8,  # 8 epochs
        share=0.5,
        judged="test",
        bar=NO_BAR,
    ),
    "curves": replace(PROBLEMS["curves"], bar=NO_BAR, without=()),
}


def race(problem: Problem, mode: Mode, tell: Callable[[str], None]) -> dict[str, Outcome]:
    """All three, after the same search of learning rates."""
    return contest(problem, [*NAMES], mode, tell)


def ends(problem: Problem, outcomes: dict[str, Outcome]) -> list[dict[str, Any]]:
    """Where each ends, over seeds, and when it reaches where AdamW does."""
    rows = []
    for name, outcome in outcomes.items():
        found: dict[str, Any] = {"problem": problem.title, "optimizer": name}
        for number in ("train", "test", "accuracy"):
            if problem.judged == "accuracy" or number != "accuracy":
                found[number] = outcome.final(number)
        saved = reached(problem, outcome, outcomes[REFERENCE])
        rows.append({**found, "steps": saved.steps, "seconds": saved.seconds})
    return rows


# ---- printing ------------------------------------------------------------------------------------


def show_costs(rows: list[dict[str, Any]], *, trusted: bool) -> Table:
    """Milliseconds and megabytes, and kfac's in units of ours."""
    table = Table(
        "workload",
        "optimizer",
        "ms, mean",
        "median",
        "curvature, MB",
        "state, MB",
        title=f"A training step; {torch.get_num_threads()} threads"
        + ("" if trusted else " (others used this machine: times mean nothing)"),
        caption=f"Bars: kfac's mean time ≥ {FASTER:g} and curvature ≥ {SMALLER:g} times ours.",
    )
    for workload in dict.fromkeys(row["workload"] for row in rows):
        of = {row["optimizer"]: row for row in rows if row["workload"] == workload}
        for name, row in of.items():
            table.add_row(
                workload,
                name,
                f"{row['mean_ms']:.1f}",
                f"{row['median_ms']:.1f}",
                f"{row['curvature_bytes'] / 1e6:.1f}",
                f"{row['state_bytes'] / 1e6:.1f}",
            )
        ratios = [
            of[WHOLE][key] / of[OURS][key]
            for key in ("mean_ms", "median_ms", "curvature_bytes", "state_bytes")
        ]
        table.add_row(
            workload,
            f"{WHOLE} / {OURS}",
            _judged(ratios[0], FASTER if trusted else 0),
            f"{ratios[1]:.2f}",
            _judged(ratios[2], SMALLER),
            f"{ratios[3]:.2f}",
        )
    return table


def _judged(ratio: float, bar: float) -> str:
    return f"[{'green' if ratio >= bar else 'red'}]{ratio:.2f}[/]"


def show_ends(rows: list[dict[str, Any]]) -> Table:
    """Mean and standard deviation over seeds."""
    table = Table("problem", "optimizer", "train", "test", "steps", "seconds", title="Training")
    for row in rows:
        table.add_row(
            row["problem"],
            row["optimizer"],
            *(_over_seeds(row[number]) for number in ("train", "test")),
            *(f"{row[key]:.2f}" for key in ("steps", "seconds")),
        )
    return table


def _over_seeds(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.4g} ± {spread:.2g}"


def main() -> None:
    """Time, race, print and store."""
    mode = os.environ.get("BENCH", "quick")
    if mode not in MODES:
        sys.exit(f"BENCH={mode!r} is not a mode; choose one of {', '.join(MODES)}.")
    busy, console = crowded(), Console()
    steps = [row for key in WIDE for row in costs(key, PERIODS[mode])]
    console.print(show_costs(steps, trusted=not busy))
    finals, curves = [], {}
    for key, problem in RACES.items():
        with console.status(problem.title) as status:
            outcomes = race(problem, MODES[mode], status.update)
        finals += ends(problem, outcomes)
        curves[key] = as_data(outcomes)
    console.print(show_ends(finals))
    found = {"mode": mode, "crowded_at_start": busy, "costs": steps, "ends": finals}
    path = write_results("projected", {**found, "curves": curves})
    print(f"All repeats: {path.relative_to(path.parents[2])}")


if __name__ == "__main__":
    main()
