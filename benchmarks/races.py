"""`python -m benchmarks.races [relative|meanfield]`: epochs and seconds to where others end.

Every optimizer gets the same small search of learning rates; ours have a part of the steps. For
`nm.optim.relative` on the nets of Sun and Nielsen (arXiv 1606.06069), and for the metrics of units
(`nm.optim.meanfield`, `quasidiagonal`) against a plain diagonal; `--costs` instead tells what a
step costs in units of one with SGD or AdamW. BENCH: `smoke`, `quick` (the default) or `full`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import neuromanifold as nm
from benchmarks.harness import RESULTS, crowded, environment, interleave, quartiles, write_results
from benchmarks.training.contest import MODES, Outcome, as_data, contest, reached
from benchmarks.training.contestants import CONTESTANTS
from benchmarks.training.overhead import SETTLED, state_bytes
from benchmarks.training.problems import PROBLEMS, Bar, Problem, digits

NO_BAR = Bar(math.inf, math.inf)
PLAIN = (("weight_decay", 0.0),)
"""Options of ours where the training loss is judged."""


def perceptron(widths: tuple[int, ...], *, normalised: bool = False) -> nn.Module:
    """With relu; batch norm comes behind the activation functions, as in the source."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths[:-1]):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        if normalised:
            layers.append(nn.BatchNorm1d(fan_out))
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


def on_digits(title: str, *, normalised: bool, share: float) -> Problem:
    return Problem(
        title,
        nm.Categorical(),
        functional.cross_entropy,
        partial(perceptron, (64, 80, 80, 80, 10), normalised=normalised),
        digits,
        batch_size=50,
        steps=28 * 20,  # 20 epochs
        share=share,
        judged="train",
        bar=NO_BAR,
        options=PLAIN,
    )


def on_curves(share: float) -> Problem:
    return replace(PROBLEMS["curves"], share=share, bar=NO_BAR, without=(), options=PLAIN)


@dataclass(frozen=True)
class Step:
    """A training step whose cost is measured.

    Attributes:
        widths: of the net.
        batch: samples.
        unit: the optimizer that is the unit of time.
        bar: of the median, in these units; None if there is none for this batch.
    """

    widths: tuple[int, ...]
    batch: int
    unit: str
    bar: float | None = None


@dataclass(frozen=True)
class Races:
    """Some optimizers of ours against others.

    Attributes:
        ours: names of contestants.
        others: whose final training loss they are to reach.
        problems: by name.
        steps: whose cost is measured.
    """

    ours: tuple[str, ...]
    others: tuple[str, ...]
    problems: dict[str, Problem]
    steps: tuple[Step, ...]


def deep(width: int) -> tuple[int, ...]:
    return (64, width, width, width, 10)


RACES = {
    "relative": Races(
        ("relative",),
        ("SGD", "Adam"),
        {
            "digits": on_digits("digits, 64-80-80-80-10, N=50", normalised=False, share=0.5),
            "digits, batch norm": on_digits(
                "digits, 64-80-80-80-10 with batch norm, N=50", normalised=True, share=0.5
            ),
            "curves": on_curves(0.4),
        },
        tuple(
            Step(deep(width), batch, "SGD", bar)
            for width, bar in ((80, 2.0), (1024, 3.0))
            for batch in (50, 256, 512)
        ),
    ),
    "meanfield": Races(
        ("quasidiagonal", "meanfield"),
        ("SGD", "diagonal"),
        {
            "digits": on_digits("digits, 64-80-80-80-10, N=50", normalised=False, share=1.0),
            "curves": on_curves(1.0),
        },
        (
            Step((784, 1024, 1024, 10), 128, "AdamW"),
            Step((784, 1024, 1024, 10), 512, "AdamW", 1.3),
            Step((784, 102, 102, 10), 512, "AdamW"),
        ),
    ),
}


def race(races: Races, key: str, mode: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """Everything about one problem, for a JSON file."""
    problem = races.problems[key]
    outcomes = contest(problem, [*races.others, *races.ours], MODES[mode], tell)
    return {
        "problem": problem.title,
        "rows": rows(races, problem, outcomes),
        "outcomes": as_data(outcomes),
    }


def rows(races: Races, problem: Problem, outcomes: dict[str, Outcome]) -> list[dict[str, Any]]:
    """One for each pair: the opponent's loss at the end, and what it takes to get there."""
    found = []
    for ours in races.ours:
        for other in races.others:
            share = reached(problem, outcomes[ours], outcomes[other])
            found.append(
                {
                    "ours": ours,
                    "opponent": other,
                    "our loss": statistics.mean(outcomes[ours].final("train")),
                    "its loss": statistics.mean(outcomes[other].final("train")),
                    "epochs": share.steps,
                    "seconds": share.seconds,
                }
            )
    return found


def cost(races: Races, step: Step, rounds: int) -> list[dict[str, Any]]:
    """A training step in units of another optimizer's, once the schedule has settled.

    Steps follow each other as they do in training, a whole period of measurements and inversions
    at a time: their cost is in the mean, and caches are as warm as they are for a user.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(step.batch, step.widths[0], generator=generator)
    targets = torch.randint(step.widths[-1], (step.batch,), generator=generator)
    tasks: dict[str, Callable[[], object]] = {}
    optimizers = {}
    for name in (step.unit, *races.ours):
        torch.manual_seed(0)
        model = perceptron(step.widths)
        own = CONTESTANTS[name].build(model, nm.Categorical(), 1e-5)
        (optimizer,) = optimizers[name] = own
        tasks[name] = partial(_steps, model, inputs, targets, optimizer)
        _step(model, inputs, targets, optimizer)
        if isinstance(optimizer, nm.optim.NaturalGradient):
            for _ in range(SETTLED):
                optimizer.preconditioner.advance()
    seconds = interleave(tasks, rounds, warm_up=1)
    unit, unit_bytes = seconds[step.unit], state_bytes(optimizers[step.unit])
    return [
        {
            "net": "-".join(map(str, step.widths)),
            "batch": step.batch,
            "optimizer": name,
            "unit": step.unit,
            "bar": step.bar,
            "quartiles": quartiles(seconds[name], unit),
            "milliseconds": 1e3 * statistics.median(seconds[name]) / SPAN,
            "memory": state_bytes(optimizers[name]) / unit_bytes if unit_bytes else None,
        }
        for name in races.ours
    ]


SPAN = 50
"""Steps in a row: periods of our schedules, once settled, divide it."""


def _steps(*args: Any) -> None:
    for _ in range(SPAN):
        _step(*args)


def _step(
    model: nn.Module, inputs: Tensor, targets: Tensor, optimizer: torch.optim.Optimizer
) -> None:
    optimizer.zero_grad()
    functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()


def main() -> None:
    """Race or time, print, and store beside what other runs found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.races", description=__doc__)
    parser.add_argument("which", nargs="*", choices=[*RACES, []], help="all if not given")
    parser.add_argument("--costs", action="store_true", help="time steps, do not race")
    asked = parser.parse_args()
    mode = os.environ.get("BENCH", "quick")
    if mode not in MODES:
        sys.exit(f"BENCH={mode!r} is not a mode; choose one of {', '.join(MODES)}.")
    busy = crowded()
    console = Console()
    path = RESULTS / "races.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    stored.pop("environment", None)
    how = {"mode": mode, "crowded_at_start": busy, "environment": environment()}
    for which in asked.which or RACES:
        races = RACES[which]
        found = stored.setdefault(which, {})
        if asked.costs:
            rounds = {"smoke": 2, "quick": 5, "full": 15}[mode]
            costs = [row for step in races.steps for row in cost(races, step, rounds)]
            found["costs"] = {**how, "rows": costs}
            console.print(_costs(costs, trusted=not busy))
            continue
        for key, problem in races.problems.items():
            with console.status(problem.title) as status:
                found[key] = {**how, **race(races, key, mode, status.update)}
            console.print(_race(found[key]))
            write_results("races", stored)
    path = write_results("races", stored)
    print(f"Everything: {path.relative_to(path.parents[2])}")


def _race(found: dict[str, Any]) -> Table:
    table = Table(
        "ours",
        "opponent",
        "its final loss",
        "ours",
        "epochs",
        "seconds",
        title=f"{found['problem']}: what it takes to where the opponent ends",
        caption="Epochs and seconds in units of the opponent's; the median over seeds.",
    )
    for row in found["rows"]:
        table.add_row(
            row["ours"],
            row["opponent"],
            f"{row['its loss']:.4g}",
            f"{row['our loss']:.4g}",
            f"{row['epochs']:.2f}",
            f"{row['seconds']:.2f}",
        )
    return table


def _costs(rows: list[dict[str, Any]], *, trusted: bool) -> Table:
    table = Table(
        "net",
        "batch",
        "optimizer",
        "median",
        "quartiles",
        "ms",
        "state",
        title=f"A step in units of another optimizer's; {torch.get_num_threads()} threads"
        + ("" if trusted else " (others used this machine: times mean nothing)"),
    )
    for row in rows:
        low, median, high = row["quartiles"]
        table.add_row(
            row["net"],
            str(row["batch"]),
            row["optimizer"],
            f"{median:.2f} of {row['unit']}" + (f" (≤ {row['bar']:g})" if row["bar"] else ""),
            f"{low:.2f} to {high:.2f}",
            f"{row['milliseconds']:.2f}",
            "" if row["memory"] is None else f"{row['memory']:.2f}",
        )
    return table


if __name__ == "__main__":
    main()
