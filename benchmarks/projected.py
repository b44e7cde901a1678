"""`python -m benchmarks.projected`: K-FAC along an eighth of the directions, against all of K-FAC.

`--part` runs some of the parts; each replaces its own entry of the results, with the machine that
it ran on.

* `steps`: for a wide MLP and a wide conv net, a training step once the schedule has settled,
  curvature included, and what the curvature keeps.
* `digits`, `curves`: on the wide MLP and on the CURVES autoencoder, the loss that training ends
  with, and the seconds to the loss that AdamW ends with, after the same search of learning rates.
* `recursion`: how far an inverse that follows 20,000 measurements is off.

BENCH chooses how long: `smoke`, `quick` (the default) or `full`.
"""

from __future__ import annotations

import argparse
import copy
import json
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
from benchmarks.harness import RESULTS, crowded, environment, interleave
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
    "digits": Problem(
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


# ---- inverses that follow ------------------------------------------------------------------------

FOLLOWED, BATCH = 256, 16
"""Width of a side, and rows of a measurement: so few that the inverse follows them."""
MEASUREMENTS = {"smoke": 400, "quick": 4_000, "full": 20_000}
LOOKS = 20
"""Measurements from one look at the residual to the next."""
NEVER = nm.optim.Schedule(1, 10**9)
"""Every step measures; after the first, none inverts."""
RESIDUAL = 2e-3
"""Bar."""

STREAMS: dict[str, tuple[nm.optim.Schedule | None, dict[str, Any]]] = {
    "default schedule": (None, {}),
    "never inverted": (NEVER, {}),
    "half of the rows, tolerance 0.1": (NEVER, {"rows": BATCH // 2, "tolerance": 0.1}),
    "half of the rows": (NEVER, {"rows": BATCH // 2}),
}
"""Schedule, and options of the factor that are not the defaults."""


def recursion(title: str, measurements: int) -> dict[str, Any]:
    """The largest residual on a stream whose scale and eigenvalues change, and what happened.

    The residual is `‖Q (M + D) v − v‖ / ‖v‖` for random v, in float64 from numbers in float32. Of
    D there are two: the damping that each direction has, and the one that was asked for.
    """
    schedule, of_factor = STREAMS[title]
    torch.manual_seed(0)
    kept = nm.RecursiveInverse(**of_factor)
    layer = nn.Linear(FOLLOWED - 1, 10)
    pre = nm.optim.Preconditioner(
        layer, nm.Categorical(), nm.Kronecker(inputs=kept), schedule=schedule
    )
    basis = torch.linalg.qr(torch.randn(FOLLOWED - 1, FOLLOWED - 1))[0]
    falling = torch.exp(-torch.arange(FOLLOWED - 1) / 32)
    worst, inversions, measured = torch.zeros(2, dtype=torch.float64), 0, 0
    while measured < measurements:
        scale = 1 + 0.5 * math.sin(pre.step / 300)
        x = scale * torch.randn(BATCH, FOLLOWED - 1) * falling @ basis
        if pre.is_due:
            inverted = pre._inverted
            pre.measure(x)
            measured, inversions = measured + 1, inversions + (pre._inverted != inverted)
            if measured % LOOKS == 0:
                worst = torch.maximum(worst, _residuals(pre._curvature))
        pre.advance()
    own, asked = worst.tolist()
    return {
        "stream": title,
        "measurements": measured,
        "residual": own,
        "residual_with_damping_asked_for": asked,
        "inversions": inversions,
        **pre.events,
    }


def _residuals(curvature: Any) -> Tensor:
    """Largest of a few random vectors, for either damping."""
    ((key, recursion),) = curvature._following.items()
    moment, (inverse,) = curvature._along_directions(key)[0].double(), recursion.matrix.double()
    v = torch.randn(len(moment), 8, dtype=torch.float64)
    dampings = recursion.added[0].double(), recursion.damping.double()
    images = [inverse @ (moment @ v + d[..., None] * v) for d in dampings]
    return torch.stack([((image - v).norm(dim=0) / v.norm(dim=0)).amax() for image in images])


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


def show_recursion(rows: list[dict[str, Any]]) -> Table:
    """Largest residuals, and how often the inverse was made anew."""
    table = Table(
        "stream",
        "residual",
        "with the damping asked for",
        "inversions",
        "made anew: rows",
        "residual",
        title=f"The inverse over {rows[0]['measurements']} measurements of {BATCH} rows, "
        f"{FOLLOWED // 8} of {FOLLOWED} directions, float32",
        caption=f"Bar: residual ≤ {RESIDUAL:g}, with the default tolerance.",
    )
    for row in rows:
        table.add_row(
            row["stream"],
            f"[{'green' if row['residual'] <= RESIDUAL else 'red'}]{row['residual']:.1e}[/]",
            f"{row['residual_with_damping_asked_for']:.1e}",
            *(str(row[key]) for key in ("inversions", "renewed/rows", "renewed/residual")),
        )
    return table


# ---- parts ---------------------------------------------------------------------------------------


def _steps(mode: str, console: Console) -> dict[str, Any]:
    busy = crowded()
    rows = [row for key in WIDE for row in costs(key, PERIODS[mode])]
    console.print(show_costs(rows, trusted=not busy))
    return {"costs": rows}


def _race(key: str, mode: str, console: Console) -> dict[str, Any]:
    problem = RACES[key]
    with console.status(problem.title) as status:
        outcomes = race(problem, MODES[mode], status.update)
    rows = ends(problem, outcomes)
    console.print(show_ends(rows))
    return {"ends": rows, "curves": as_data(outcomes)}


def _recursion(mode: str, console: Console) -> dict[str, Any]:
    rows = [recursion(title, MEASUREMENTS[mode]) for title in STREAMS]
    console.print(show_recursion(rows))
    return {"streams": rows}


PARTS: dict[str, Callable[[str, Console], dict[str, Any]]] = {
    "steps": _steps,
    "digits": partial(_race, "digits"),
    "curves": partial(_race, "curves"),
    "recursion": _recursion,
}


def store(part: str, found: dict[str, Any]) -> None:
    """Replace the entry of one part, and leave the others as they are."""
    path = RESULTS / "projected.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    content[part] = found
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    """Run the parts that are asked for, all by default; print and store."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.projected")
    parser.add_argument("--part", choices=PARTS, action="append", help="again for each of several")
    chosen = parser.parse_args().part or list(PARTS)
    mode = os.environ.get("BENCH", "quick")
    if mode not in MODES:
        sys.exit(f"BENCH={mode!r} is not a mode; choose one of {', '.join(MODES)}.")
    console = Console()
    for part in chosen:
        start = {"environment": environment(), "mode": mode, "crowded_at_start": crowded()}
        store(part, {**start, **PARTS[part](mode, console)})


if __name__ == "__main__":
    main()
