"""`python -m benchmarks.belief`: natural reweighted wake-sleep against the plain one.

What a natural update costs and how close it is to the natural gradient, by the blocks that it
keeps; lines of 3 × 3 pixels by their exact KL divergence; binarised digits by the
importance-weighted log-likelihood of test images, each algorithm at the best of its settings. BENCH
chooses how long: `smoke`, `quick` (the default) or `full`. Meant for one thread, OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.harness import CPU, clock_of, crowded, interleave, quartiles, write_results
from neuromanifold.belief.datasets import BinaryDigits, binarised_digits, lines
from neuromanifold.belief.machines import HelmholtzMachine, RecognitionNetwork
from neuromanifold.belief.networks import LayeredNetwork, SigmoidBeliefNetwork
from neuromanifold.belief.solves import Blocks, Rows
from neuromanifold.belief.training import ReweightedWakeSleep

SAMPLES, BATCH, DIGIT_BATCH = 10, 32, 128
MODES = {
    "smoke": {
        "line_steps": 70,
        "digit_steps": 60,
        "seeds": 2,
        "importance": 100,
        "rounds": 5,
        "accuracy_steps": 30,
        "draws": 1,
    },
    "quick": {
        "line_steps": 700,
        "digit_steps": 300,
        "seeds": 3,
        "importance": 1000,
        "rounds": 50,
        "accuracy_steps": 150,
        "draws": 4,
    },
    "full": {
        "line_steps": 700,
        "digit_steps": 1000,
        "seeds": 5,
        "importance": 2000,
        "rounds": 200,
        "accuracy_steps": 150,
        "draws": 16,
    },
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
        momentum: of the directions.
        kl_max: the longest step, in nats.
        decay: whether the rate falls linearly to 0 over the second half of the steps.
    """

    name: str
    lr: float
    damping: float | None = None
    adam: bool = False
    momentum: float = 0.0
    kl_max: float | None = None
    decay: bool = True

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step."""
        return self.lr * min(1.0, 2 * (1 - step / steps)) if self.decay else self.lr

    def __str__(self) -> str:
        damping = "" if self.damping is None else f", damping {self.damping:g}"
        momentum = f", momentum {self.momentum:g}" if self.momentum else ""
        longest = f", KL {self.kl_max:g}" if self.kl_max else ""
        return f"{self.name}, lr {self.lr:g}{momentum}{damping}{longest}"

    def optimizer(self, machine: HelmholtzMachine) -> torch.optim.Optimizer | None:
        """What takes the directions further, if anything does."""
        if self.adam:
            return torch.optim.Adam(machine.parameters(), lr=self.lr)
        if self.momentum:
            return torch.optim.SGD(machine.parameters(), lr=self.lr, momentum=self.momentum)
        return None


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
    optimizer = way.optimizer(machine)
    training = ReweightedWakeSleep(
        machine,
        lr=None if optimizer else partial(way.rate, steps=steps),
        samples=SAMPLES,
        natural=way.damping is not None,
        damping=way.damping or 0.0,
        kl_max=way.kl_max,
        period=period,
        generator=generator,
        optimizer=optimizer,
    )
    start = time.process_time()
    for step in range(steps):
        if optimizer is not None:
            optimizer.param_groups[0]["lr"] = way.rate(step, steps)
        training.step(draw(generator))
    return machine, time.process_time() - start


# ---- 3 × 3 lines ---------------------------------------------------------------------------


def race_lines(mode: Mapping[str, int], status: Callable[[str], None]) -> list[dict[str, Any]]:
    """Exact KL divergence after 700 steps, over seeds, for rates of both.

    The plain algorithm's rates go on until it gets worse.
    """
    data = lines()
    ways = [
        Way("RWS", 0.3, decay=False),
        *(Way("RWS", lr) for lr in (3.0, 4.0, 6.0)),
        Way("RWS", 1.0, momentum=0.8),
        Way("natural", 0.3, 0.1, decay=False),
        Way("natural", 1.0, 0.1),
        Way("natural", 2.0, 0.02, kl_max=0.1),
        Way("natural", 0.6, 0.05, momentum=0.5),
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
                period=5,
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


@cache
def _digits() -> BinaryDigits:
    return binarised_digits(coding=(-1, 1), generator=torch.Generator().manual_seed(0))


def _draw(generator: torch.Generator) -> Tensor:
    train = _digits().train
    return train[torch.randint(len(train), (DIGIT_BATCH,), generator=generator)]


def race_digits(mode: Mapping[str, int], status: Callable[[str], None]) -> list[dict[str, Any]]:
    """Test log-likelihood of each at its best rate; of the natural one after half the steps too."""
    digits, steps = _digits(), mode["digit_steps"]

    def score(machine: HelmholtzMachine, images: Tensor, samples: int) -> float:
        generator = torch.Generator().manual_seed(1)
        return float(machine.log_likelihood(images, samples, generator).value)

    def run(
        way: Way, sizes: Sequence[int], steps: int, seed: int
    ) -> tuple[HelmholtzMachine, float]:
        status(f"digits, {len(sizes) - 1} hidden layers: {way}, seed {seed}")
        return trained(way, sizes, (-1, 1), _draw, steps=steps, seed=seed, period=3)

    def judged(way: Way, sizes: Sequence[int], steps: int) -> dict[str, Any]:
        found: dict[str, list[float]] = {"test": [], "train": [], "seconds": []}
        for seed in range(mode["seeds"]):
            machine, spent = run(way, sizes, steps, seed)
            found["test"].append(score(machine, digits.test, mode["importance"]))
            some = digits.train[: len(digits.test)]
            found["train"].append(score(machine, some, mode["importance"] // 5))
            found["seconds"].append(spent)
        return {"way": str(way), "steps": steps} | found

    families = {
        "RWS": [
            *(Way("RWS", lr) for lr in (0.7, 1.0)),
            Way("RWS", 0.3, momentum=0.8),
        ],
        "RWS with Adam": [Way("RWS with Adam", lr, adam=True) for lr in (0.05, 0.065, 0.08)],
        "natural": [
            *(Way("natural", 0.8, damping) for damping in (0.03, 0.1)),
            Way("natural", 0.4, 0.05, momentum=0.5),
        ],
    }
    rows = []
    for title, sizes in DIGIT_NETS.items():
        for name, ways in families.items():
            budgets = (steps // 2, steps) if name == "natural" else (steps,)
            # Settings are chosen with a seed that is not judged, for the first budget.
            scores = {}
            for way in ways:
                machine, _ = run(way, sizes, budgets[0], 100)
                scores[way] = score(machine, digits.test, mode["importance"] // 5)
            best = max(scores, key=scores.__getitem__)
            rows += [{"net": title} | judged(best, sizes, budget) for budget in budgets]
    return rows


def show_digits(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title="binarised digits: log-likelihood, nats, mean ± standard error over seeds")
    for column in ("net", "", "updates", "test", "train", "seconds"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["net"],
            row["way"],
            f"{row['steps']:,}",
            *(
                f"{statistics.mean(row[name]):.2f} ± "
                f"{statistics.stdev(row[name]) / math.sqrt(len(row[name])):.2f}"
                for name in ("test", "train")
            ),
            f"{statistics.mean(row['seconds']):.1f}",
        )
    console.print(table)


# ---- cost ----------------------------------------------------------------------------------


def cost(rounds: int, blocks: Blocks, device: torch.device = CPU) -> dict[str, Any]:
    """A natural update, its share of a refresh included, in units of a plain one."""
    generator = torch.Generator(device).manual_seed(0)
    v = 2.0 * torch.randint(2, (BATCH, COST_SIZES[-1]), generator=generator, device=device) - 1
    trainings = {}
    for natural in (False, True):
        machine = HelmholtzMachine(
            COST_SIZES, coding=(-1, 1), bias=-1, generator=generator, device=device
        )
        trainings[natural] = ReweightedWakeSleep(
            machine,
            lr=0.002,
            samples=SAMPLES,
            natural=natural,
            damping=0.2,
            period=PERIOD,
            blocks=blocks,
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
    clock = time.process_time if device.type == "cpu" else clock_of(device)
    seconds = interleave(tasks, rounds, clock)
    refreshes = interleave({"refresh": partial(update, refresh=True)}, max(rounds // 10, 1), clock)
    unit = statistics.median(seconds["plain"])
    refresh = statistics.median(refreshes["refresh"])
    share = (refresh / unit - 1) / PERIOD
    low, middle, high = quartiles(seconds["frozen"], seconds["plain"])
    return {
        "blocks": blocks,
        "plain_ms": 1e3 * unit,
        "refresh_ms": 1e3 * refresh,
        "quartiles": [low + share, middle + share, high + share],
        "statistics_bytes": ours.statistics_bytes(BATCH),
    }


def show_cost(console: Console, rows: list[dict[str, Any]], *, trusted: bool) -> None:
    title = (
        f"a natural update in plain ones, {'-'.join(map(str, reversed(COST_SIZES)))}, K={SAMPLES}, "
        f"B={BATCH}, statistics for {PERIOD} steps; bar {COST_BAR}"
    )
    table = Table(title=title)
    for column in (
        "blocks",
        "ratio",
        "quartiles",
        "plain, ms",
        "refresh, ms",
        "statistics, MB",
        "",
    ):
        table.add_column(column)
    for row in rows:
        low, middle, high = row["quartiles"]
        reached = "[green]reached[/]" if high <= COST_BAR else "[red]missed[/]"
        table.add_row(
            row["blocks"],
            f"{middle:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{row['plain_ms']:.1f}",
            f"{row['refresh_ms']:.0f}",
            f"{row['statistics_bytes'] / 1e6:.0f}",
            reached if trusted else "[yellow]not judged[/]",
        )
    console.print(table)


# ---- blocks --------------------------------------------------------------------------------


def accuracy(steps: int, draws: int) -> list[dict[str, Any]]:
    """How far directions are from natural ones, by the rows that their blocks are made of.

    On a machine that has learnt digits, for the gradients of a batch: `‖d − d*‖ / ‖d*‖` in the
    metric F + α, where F and d* are of many rows. Means over layers and draws.
    """
    digits = _digits().train
    generator = torch.Generator().manual_seed(0)
    way = Way("natural", 0.1, 0.1, decay=False)
    machine, _ = trained(
        way, DIGIT_NETS["two hidden layers"], (-1, 1), _draw, steps=steps, seed=0, period=10
    )
    dampings, multiples = (0.2, 0.05), (1, 2, 4, 8, 16)
    found: dict[tuple[float, int, str], list[float]] = {}
    with torch.no_grad():
        for net in (machine.generative, machine.recognition):
            for layer in net.modelled:
                if not net.parents[layer]:
                    continue
                v = digits[torch.randint(len(digits), (BATCH,), generator=generator)]
                wake = machine.recognition.sample(v.repeat(SAMPLES, 1), generator)
                weights = machine.log_weights(wake).view(SAMPLES, -1).softmax(0).flatten() / BATCH
                score = net.score(wake, layer) * weights[:, None]
                gradient = score.mT @ net.inputs(wake, layer)
                many = _rows(net, layer, 20_000, digits, generator)
                fisher = many.fisher()
                for damping in dampings:
                    best = many.solver(damping=damping).solve(gradient)
                    length = _length(best, fisher, damping)
                    for multiple in multiples:
                        for _ in range(draws):
                            num = multiple * many.inputs.shape[1]
                            rows = _rows(net, layer, num, digits, generator)
                            for blocks in ("exact", "shared"):
                                solver = rows.solver(damping=damping, blocks=blocks)
                                off = _length(solver.solve(gradient) - best, fisher, damping)
                                found.setdefault((damping, multiple, blocks), []).append(
                                    float(off / length)
                                )
    return [
        {"damping": damping, "rows_per_input": multiple}
        | {kind: statistics.mean(found[damping, multiple, kind]) for kind in ("exact", "shared")}
        for damping in dampings
        for multiple in multiples
    ]


def _rows(
    net: LayeredNetwork, layer: int, num: int, data: Tensor, generator: torch.Generator
) -> Rows:
    """Independent rows of the distribution that a layer's Fisher matrix is an expectation over."""
    if isinstance(net, RecognitionNetwork):
        v = data[torch.randint(len(data), (num,), generator=generator)]
        layers = net.sample(v, generator)
    else:
        assert isinstance(net, SigmoidBeliefNetwork)
        layers = net.sample(num, generator)
    covariance = net.units[layer].covariance(net.logits(layers, layer))
    return Rows(net.inputs(layers, layer), covariance / num)


def _length(direction: Tensor, fisher: Tensor, damping: float) -> Tensor:
    inside = torch.einsum("oi,oij,oj->", direction, fisher, direction)
    return (inside + damping * direction.square().sum()).sqrt()


def show_accuracy(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title="relative distance of directions from the natural gradient, on digits")
    for column in ("damping", "rows per input", "exact blocks", "shared basis"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            f"{row['damping']:g}",
            str(row["rows_per_input"]),
            f"{row['exact']:.2f}",
            f"{row['shared']:.2f}",
        )
    console.print(table)


def main() -> None:
    """Race, time, print and store."""
    name = os.environ.get("BENCH", "quick")
    if name not in MODES:
        sys.exit(f"BENCH={name!r} is not a mode; choose one of {', '.join(MODES)}.")
    mode, busy, console = MODES[name], crowded(), Console()
    costs = [cost(mode["rounds"], blocks) for blocks in ("auto", "exact")]
    show_cost(console, costs, trusted=not busy)
    errors = accuracy(mode["accuracy_steps"], mode["draws"])
    show_accuracy(console, errors)
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
            "accuracy": errors,
            "lines": on_lines,
            "digits": on_digits,
        },
    )


if __name__ == "__main__":
    main()
