"""`python -m benchmarks.relative`: relative natural gradient against SGD and Adam.

Epochs and seconds to the training loss that the others end with, after the same small search of
learning rates, on the nets of Sun and Nielsen (arXiv 1606.06069) and on CURVES; and what a step
costs, in units of one with SGD. BENCH chooses how long: `smoke`, `quick` (the default) or `full`.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import neuromanifold as nm
from benchmarks.harness import crowded, interleave, quartiles, write_results
from benchmarks.training.contest import MODES, Outcome, as_data, contest, reached
from benchmarks.training.contestants import CONTESTANTS
from benchmarks.training.problems import PROBLEMS, Bar, Problem, digits

OTHERS = ("SGD", "Adam")
OURS = "relative"
NO_BAR = Bar(math.inf, math.inf)

WIDTHS = (80, 1024)
BATCHES = (50, 256, 512)
COST_BAR = {80: 2.0, 1024: 3.0}
SETTLED = 500
"""Steps after which the periods of the default schedule grow no more."""


def perceptron(width: int, *, normalised: bool) -> nn.Module:
    """Three hidden layers; batch norm comes behind the activation functions, as in the source."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise((64, width, width, width)):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        if normalised:
            layers.append(nn.BatchNorm1d(fan_out))
    return nn.Sequential(*layers, nn.Linear(width, 10))


def on_digits(title: str, *, normalised: bool) -> Problem:
    return Problem(
        title,
        nm.Categorical(),
        functional.cross_entropy,
        partial(perceptron, 80, normalised=normalised),
        digits,
        batch_size=50,
        steps=28 * 20,  # 20 epochs
        share=0.5,
        judged="train",
        bar=NO_BAR,
        options=(("weight_decay", 0.0),),
    )


RACES = {
    "digits": on_digits("digits, 64-80-80-80-10, N=50", normalised=False),
    "digits, batch norm": on_digits("digits, 64-80-80-80-10 with batch norm", normalised=True),
    "curves": replace(
        PROBLEMS["curves"],
        share=0.4,
        bar=NO_BAR,
        without=(),
        options=(("weight_decay", 0.0),),
    ),
}


def race(problem: Problem, outcomes: dict[str, Outcome]) -> list[dict[str, Any]]:
    """One row for each opponent: its loss at the end, and what it takes to get there."""
    rows = []
    for name in OTHERS:
        found = reached(problem, outcomes[OURS], outcomes[name])
        rows.append(
            {
                "problem": problem.title,
                "opponent": name,
                "its loss": statistics.mean(outcomes[name].final("train")),
                "our loss": statistics.mean(outcomes[OURS].final("train")),
                "epochs": found.steps,
                "seconds": found.seconds,
            }
        )
    return rows


def cost(width: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """A training step in units of one with SGD, once the schedule has settled."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(batch_size, 64, generator=generator)
    targets = torch.randint(10, (batch_size,), generator=generator)
    tasks: dict[str, Callable[[], object]] = {}
    for name in ("SGD", OURS):
        torch.manual_seed(0)
        model = perceptron(width, normalised=False)
        (optimizer,) = CONTESTANTS[name].build(model, nm.Categorical(), 1e-5)
        tasks[name] = partial(_step, model, inputs, targets, optimizer)
        tasks[name]()
        if isinstance(optimizer, nm.optim.NaturalGradient):
            for _ in range(SETTLED):
                optimizer.preconditioner.advance()
    seconds = interleave(tasks, rounds)
    return {
        "width": width,
        "batch": batch_size,
        "quartiles": quartiles(seconds[OURS], seconds["SGD"]),
        "mean": statistics.mean(seconds[OURS]) / statistics.mean(seconds["SGD"]),
        "sgd_ms": 1e3 * statistics.median(seconds["SGD"]),
    }


def _step(
    model: nn.Module, inputs: Tensor, targets: Tensor, optimizer: torch.optim.Optimizer
) -> None:
    optimizer.zero_grad()
    functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()


def main() -> None:
    """Race, time, print and store."""
    mode = os.environ.get("BENCH", "quick")
    if mode not in MODES:
        sys.exit(f"BENCH={mode!r} is not a mode; choose one of {', '.join(MODES)}.")
    busy = crowded()
    console = Console()
    races: list[dict[str, Any]] = []
    curves = {}
    for key, problem in RACES.items():
        with console.status(problem.title) as status:
            outcomes = contest(problem, [*OTHERS, OURS], MODES[mode], status.update)
        races += race(problem, outcomes)
        curves[key] = as_data(outcomes)
    console.print(_races(races))
    rounds = {"smoke": 20, "quick": 100, "full": 300}[mode]
    costs = [cost(width, batch, rounds) for width in WIDTHS for batch in BATCHES]
    console.print(_costs(costs, trusted=not busy))
    found = {"mode": mode, "crowded_at_start": busy, "races": races, "costs": costs}
    path = write_results("relative", {**found, "curves": curves})
    print(f"All curves: {path.relative_to(path.parents[2])}")


def _races(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "problem",
        "opponent",
        "its final loss",
        "ours",
        "epochs",
        "seconds",
        title="Relative natural gradient: what it takes to where the opponent ends",
        caption="Epochs and seconds in units of the opponent's; the median over seeds.",
    )
    for row in rows:
        table.add_row(
            row["problem"],
            row["opponent"],
            f"{row['its loss']:.4g}",
            f"{row['our loss']:.4g}",
            f"{row['epochs']:.2f}",
            f"{row['seconds']:.2f}",
        )
    return table


def _costs(rows: list[dict[str, Any]], *, trusted: bool) -> Table:
    table = Table(
        "width",
        "batch",
        "SGD, ms",
        "ours, median",
        "quartiles",
        "mean",
        title=f"A step, in units of SGD's; {torch.get_num_threads()} threads"
        + ("" if trusted else " (others used this machine: times mean nothing)"),
        caption=f"Bars: {COST_BAR}.",
    )
    for row in rows:
        low, median, high = row["quartiles"]
        table.add_row(
            str(row["width"]),
            str(row["batch"]),
            f"{row['sgd_ms']:.2f}",
            f"{median:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{row['mean']:.2f}",
        )
    return table


if __name__ == "__main__":
    main()
