"""`python -m benchmarks.belief`: natural reweighted wake-sleep against the plain one.

Lines of 3 × 3 pixels by their exact KL divergence, binarised digits by the importance-weighted
log-likelihood of test images, each plain algorithm at the best of its learning rates, and what a
natural update costs. BENCH chooses how long: `smoke`, `quick` (the default) or `full`.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.harness import crowded, interleave, quartiles, write_results
from neuromanifold.belief.datasets import binarised_digits, lines
from neuromanifold.belief.machines import HelmholtzMachine
from neuromanifold.belief.training import ReweightedWakeSleep

SAMPLES, BATCH = 10, 32
MODES = {
    "smoke": {"line_steps": 70, "digit_steps": 60, "seeds": 2, "importance": 100, "rounds": 5},
    "quick": {"line_steps": 700, "digit_steps": 2000, "seeds": 3, "importance": 1000, "rounds": 30},
    "full": {"line_steps": 700, "digit_steps": 6000, "seeds": 5, "importance": 2000, "rounds": 100},
}
COST_SIZES = (10, 10, 15, 20, 25, 30, 35, 50, 75, 100, 200, 300)
COST_BAR = 1.5
PERIOD = 100
DIGIT_NETS = {"two hidden layers": (16, 32, 64), "five hidden layers": (10, 16, 24, 32, 48, 64)}


@dataclass(frozen=True)
class Way:
    """How a machine is trained.

    Attributes:
        name: of the algorithm.
        lr: learning rate at first.
        damping: of natural gradients; None for plain ones.
        adam: whether plain gradients go through Adam.
        decay: whether the rate falls linearly to 0 over the second half of the steps.
    """

    name: str
    lr: float
    damping: float | None = None
    adam: bool = False
    decay: bool = True

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step."""
        return self.lr * min(1.0, 2 * (1 - step / steps)) if self.decay else self.lr

    def __str__(self) -> str:
        damping = "" if self.damping is None else f", damping {self.damping:g}"
        return f"{self.name}, lr {self.lr:g}{damping}"


def trained(
    way: Way,
    sizes: Sequence[int],
    coding: tuple[float, float],
    draw: Callable[[torch.Generator], Tensor],
    *,
    steps: int,
    seed: int,
    period: int,
) -> tuple[HelmholtzMachine, float]:
    """A machine after so many steps, and the seconds that they took."""
    generator = torch.Generator().manual_seed(seed)
    machine = HelmholtzMachine(sizes, coding=coding, generator=generator)
    adam = torch.optim.Adam(machine.parameters(), lr=way.lr) if way.adam else None
    training = ReweightedWakeSleep(
        machine,
        lr=None if way.adam else partial(way.rate, steps=steps),
        samples=SAMPLES,
        natural=way.damping is not None,
        damping=way.damping or 0.0,
        period=period,
        generator=generator,
        optimizer=adam,
    )
    start = time.process_time()
    for step in range(steps):
        if adam is not None:
            adam.param_groups[0]["lr"] = way.rate(step, steps)
        training.step(draw(generator))
    return machine, time.process_time() - start


# ---- 3 × 3 lines ---------------------------------------------------------------------------


def race_lines(mode: Mapping[str, int], status: Callable[[str], None]) -> list[dict[str, Any]]:
    """Exact KL divergence after 700 steps, over seeds, for rates of both.

    The plain algorithm's rates go on until it gets worse, and both have the same schedules.
    """
    data = lines()
    ways = [
        *(Way("RWS", lr, decay=d) for d in (False, True) for lr in (0.3, 1.0, 2.0, 4.0, 8.0)),
        *(Way("natural", lr, 0.1, decay=d) for d in (False, True) for lr in (0.3, 1.0)),
        *(Way("natural", lr, 0.2, decay=d) for d in (False, True) for lr in (1.0, 1.5)),
    ]
    rows = []
    for way in ways:
        status(f"lines: {way}")
        found = []
        for seed in range(mode["seeds"] + 2):
            machine, _ = trained(
                way,
                (1, 6, 9),
                (0, 1),
                lambda generator: data.draw(BATCH, generator=generator),
                steps=mode["line_steps"],
                seed=seed,
                period=10,
            )
            with torch.no_grad():
                found.append(float(data.kl(machine.generative.exact_log_likelihood(data.states))))
        rows.append(
            {"way": str(way), "name": way.name, "lr": way.lr, "decay": way.decay, "kl": found}
        )
    return rows


def show_lines(console: Console, rows: list[dict[str, Any]], steps: int) -> None:
    table = Table(title=f"3 × 3 lines: exact KL divergence after {steps} steps, nats; by seed")
    for column in ("", "rate falls", "mean", "seeds"):
        table.add_column(column)
    for row in rows:
        seeds = "  ".join(f"{kl:.3f}" for kl in row["kl"])
        table.add_row(
            row["way"], "yes" if row["decay"] else "no", f"{statistics.mean(row['kl']):.3f}", seeds
        )
    console.print(table)


# ---- binarised digits ----------------------------------------------------------------------


def race_digits(mode: Mapping[str, int], status: Callable[[str], None]) -> list[dict[str, Any]]:
    """Test log-likelihood of each at its best rate; of the natural one after half the steps too."""
    digits = binarised_digits(coding=(-1, 1), generator=torch.Generator().manual_seed(0))
    steps = mode["digit_steps"]

    def draw(generator: torch.Generator) -> Tensor:
        return digits.train[torch.randint(len(digits.train), (BATCH,), generator=generator)]

    def runs(way: Way, sizes: Sequence[int], steps: int, seeds: range) -> dict[str, Any]:
        values, seconds = [], []
        for seed in seeds:
            status(f"digits, {len(sizes) - 1} hidden layers: {way}, seed {seed}")
            machine, spent = trained(way, sizes, (-1, 1), draw, steps=steps, seed=seed, period=10)
            found = machine.log_likelihood(
                digits.test, samples=mode["importance"], generator=torch.Generator().manual_seed(1)
            )
            values.append(float(found.value))
            seconds.append(spent)
        return {"way": str(way), "steps": steps, "log_likelihood": values, "seconds": seconds}

    families = {
        "RWS": [Way("RWS", lr) for lr in (0.1, 0.3, 1.0, 3.0)],
        "RWS with Adam": [Way("RWS with Adam", lr, adam=True) for lr in (0.01, 0.03, 0.1)],
        "natural": [Way("natural", lr, d) for lr, d in ((0.05, 0.1), (0.1, 0.1), (0.2, 0.2))],
    }
    rows = []
    for title, sizes in DIGIT_NETS.items():
        for name, ways in families.items():
            # Rates are chosen with a seed that is not among the judged ones.
            scores = {
                way: statistics.mean(runs(way, sizes, steps, range(100, 101))["log_likelihood"])
                for way in ways
            }
            best = max(scores, key=scores.__getitem__)
            budgets = (steps // 2, steps) if name == "natural" else (steps,)
            rows += [
                {"net": title} | runs(best, sizes, budget, range(mode["seeds"]))
                for budget in budgets
            ]
    return rows


def show_digits(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title="binarised digits: test log-likelihood, nats, mean ± standard error")
    for column in ("net", "", "steps", "log-likelihood", "seconds"):
        table.add_column(column)
    for row in rows:
        values = row["log_likelihood"]
        stderr = statistics.stdev(values) / math.sqrt(len(values))
        table.add_row(
            row["net"],
            row["way"],
            f"{row['steps']:,}",
            f"{statistics.mean(values):.2f} ± {stderr:.2f}",
            f"{statistics.mean(row['seconds']):.1f}",
        )
    console.print(table)


# ---- cost ----------------------------------------------------------------------------------


def cost(rounds: int, rows: int | None) -> dict[str, Any]:
    """A natural update, its share of a refresh included, in units of a plain one."""
    generator = torch.Generator().manual_seed(0)
    v = 2.0 * torch.randint(2, (BATCH, COST_SIZES[-1]), generator=generator) - 1
    trainings = {}
    for natural in (False, True):
        machine = HelmholtzMachine(COST_SIZES, coding=(-1, 1), bias=-1, generator=generator)
        trainings[natural] = ReweightedWakeSleep(
            machine,
            lr=0.002,
            samples=SAMPLES,
            natural=natural,
            damping=0.2,
            period=PERIOD,
            rows=rows,
            generator=generator,
        )
    plain, ours = trainings[False], trainings[True]

    def update(*, refresh: bool) -> None:
        ours.steps = 0 if refresh else 1
        ours.step(v)

    update(refresh=True)
    tasks: dict[str, Callable[[], object]] = {
        "plain": partial(plain.step, v),
        "frozen": partial(update, refresh=False),
    }
    seconds = interleave(tasks, rounds)
    refreshing = interleave({"refresh": partial(update, refresh=True)}, max(rounds // 10, 1))
    unit = statistics.median(seconds["plain"])
    share = (statistics.median(refreshing["refresh"]) / unit - 1) / PERIOD
    low, middle, high = quartiles(seconds["frozen"], seconds["plain"])
    return {
        "rows": rows or SAMPLES * BATCH,
        "plain_ms": 1e3 * unit,
        "refresh_ms": 1e3 * statistics.median(refreshing["refresh"]),
        "quartiles": [low + share, middle + share, high + share],
        "statistics_bytes": ours.statistics_bytes(BATCH),
    }


def show_cost(console: Console, rows: list[dict[str, Any]], *, trusted: bool) -> None:
    title = (
        f"a natural update in plain ones, {'-'.join(map(str, reversed(COST_SIZES)))}, K={SAMPLES}, "
        f"B={BATCH}, statistics for {PERIOD} steps; bar {COST_BAR}"
    )
    table = Table(title=title)
    for column in ("rows", "ratio", "quartiles", "plain, ms", "refresh, ms", "statistics, MB", ""):
        table.add_column(column)
    for row in rows:
        low, middle, high = row["quartiles"]
        reached = "[green]reached[/]" if high <= COST_BAR else "[red]missed[/]"
        table.add_row(
            str(row["rows"]),
            f"{middle:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{row['plain_ms']:.1f}",
            f"{row['refresh_ms']:.0f}",
            f"{row['statistics_bytes'] / 1e6:.0f}",
            reached if trusted else "[yellow]not judged[/]",
        )
    console.print(table)


def main() -> None:
    """Race, time, print and store."""
    name = os.environ.get("BENCH", "quick")
    if name not in MODES:
        sys.exit(f"BENCH={name!r} is not a mode; choose one of {', '.join(MODES)}.")
    mode, busy, console = MODES[name], crowded(), Console()
    costs = [cost(mode["rounds"], rows) for rows in (None, 128, 64)]
    show_cost(console, costs, trusted=not busy)
    with console.status("") as status:
        on_lines = race_lines(mode, status.update)
        on_digits = race_digits(mode, status.update)
    show_lines(console, on_lines, mode["line_steps"])
    show_digits(console, on_digits)
    write_results(
        "belief",
        {
            "mode": name,
            "crowded_at_start": busy,
            "cost": costs,
            "lines": on_lines,
            "digits": on_digits,
        },
    )


if __name__ == "__main__":
    main()
