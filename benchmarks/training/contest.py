"""Training runs that take turns, so that their seconds can be compared."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.training.contestants import CONTESTANTS, GRID
from benchmarks.training.problems import Problem

__all__ = [
    "MODES",
    "Mode",
    "Outcome",
    "Point",
    "Reached",
    "as_data",
    "best_at_the_edge",
    "contest",
    "heat",
    "reached",
    "steps_of",
]

EVALUATIONS = 25
"""In one run."""

WARM_UP = 0.05
"""Share of the steps in which the learning rate rises; then it falls to zero, for everyone."""


@dataclass(frozen=True)
class Mode:
    """How thorough.

    Attributes:
        scale: of the steps of every run.
        rates: how many of the grid's learning rates are tried, on the first seed.
        seeds: on which the best of them runs.
    """

    scale: float
    rates: int
    seeds: int


MODES = {"smoke": Mode(0.02, 1, 1), "quick": Mode(0.25, 3, 1), "full": Mode(1.0, 4, 3)}


class Point(NamedTuple):
    """One evaluation.

    Attributes:
        step: steps done.
        seconds: spent on them, evaluations left out.
        found: by name, see `Problem.evaluate`.
    """

    step: int
    seconds: float
    found: dict[str, float]


@dataclass
class Outcome:
    """What became of one contestant.

    Attributes:
        searched: final judged value by learning rate, on the first seed.
        lr: the best of them.
        curves: one per seed, at this learning rate.
    """

    searched: dict[float, float] = field(default_factory=dict)
    lr: float = math.nan
    curves: list[list[Point]] = field(default_factory=list)

    def final(self, name: str) -> list[float]:
        """Last evaluation, by seed."""
        return [curve[-1].found.get(name, math.nan) for curve in self.curves]


class _Run:
    """One model in training, advanced in stretches."""

    def __init__(self, problem: Problem, name: str, lr: float, seed: int, steps: int) -> None:
        torch.manual_seed(seed)
        contestant = CONTESTANTS[name]
        self.problem, self.steps = problem, steps
        self.model = problem.model().train()
        options = dict(problem.options) if contestant.curvature else {}
        self.optimizers = contestant.build(self.model, problem.likelihood, lr, **options)
        schedule = _rise_and_fall(steps)
        self.schedulers = [LambdaLR(optimizer, schedule) for optimizer in self.optimizers]
        self.batches = problem.batches(torch.Generator().manual_seed(seed))
        self.done, self.seconds = 0, 0.0
        self.curve = [Point(0, 0.0, problem.evaluate(self.model))]

    @property
    def is_over(self) -> bool:
        return self.done >= self.steps or not math.isfinite(self.curve[-1].found["train"])

    def advance(self, steps: int) -> None:
        """Train, then evaluate."""
        steps = min(steps, self.steps - self.done)
        started = time.perf_counter()
        for _ in range(steps):
            inputs, targets = next(self.batches)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            self.problem.loss(self.model(inputs), targets).backward()
            for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
                optimizer.step()
                scheduler.step()
        self.seconds += time.perf_counter() - started
        self.done += steps
        self.curve.append(Point(self.done, self.seconds, self.problem.evaluate(self.model)))


def _rise_and_fall(steps: int) -> Callable[[int], float]:
    rise = max(1, round(WARM_UP * steps))
    return lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def heat(
    problem: Problem, rates: Mapping[str, float], seed: int, scale: float
) -> dict[str, list[Point]]:
    """Train with every contestant at once: a stretch each, in an order that changes.

    Args:
        problem: what is trained.
        rates: learning rate of each contestant.
        seed: of the start and of the batches, the same for all.
        scale: of the steps; there is one at least.

    Returns:
        Evaluations by contestant, the start included. A run whose loss is not finite ends there.
    """
    runs = {
        name: _Run(problem, name, lr, seed, steps_of(problem, name, scale))
        for name, lr in rates.items()
    }
    order, shuffle = list(runs), random.Random(seed).shuffle
    while order:
        shuffle(order)
        for name in order:
            runs[name].advance(math.ceil(runs[name].steps / EVALUATIONS))
        order = [name for name in order if not runs[name].is_over]
    return {name: run.curve for name, run in runs.items()}


def steps_of(problem: Problem, name: str, scale: float) -> int:
    """How many steps a contestant has."""
    share = problem.share if CONTESTANTS[name].curvature else 1.0
    return max(1, round(problem.steps * share * scale))


def contest(
    problem: Problem,
    names: list[str],
    mode: Mode,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Outcome]:
    """Search a learning rate for each contestant on one seed, then run the best on all seeds.

    Args:
        problem: what is trained.
        names: of the contestants that take part.
        mode: how thorough.
        tell: is told what comes next.
    """
    outcomes = {name: Outcome() for name in names}
    first: dict[str, dict[float, list[Point]]] = {name: {} for name in names}
    heat(problem, {name: CONTESTANTS[name].lr for name in names}, 0, scale=0)  # what is lazy
    for factor in GRID[: mode.rates]:
        tell(f"{problem.title}: learning rates × {factor:.2g}")
        rates = {name: factor * CONTESTANTS[name].lr for name in names}
        for name, curve in heat(problem, rates, 0, mode.scale).items():
            first[name][rates[name]] = curve
    for name, outcome in outcomes.items():
        outcome.searched = {
            lr: curve[-1].found[problem.judged] for lr, curve in first[name].items()
        }
        outcome.lr = min(outcome.searched, key=lambda lr: problem.cost(outcome.searched[lr]))
        outcome.curves.append(first[name][outcome.lr])
    for seed in range(1, mode.seeds):
        tell(f"{problem.title}: seed {seed}")
        rates = {name: outcome.lr for name, outcome in outcomes.items()}
        for name, curve in heat(problem, rates, seed, mode.scale).items():
            outcomes[name].curves.append(curve)
    return outcomes


class Reached(NamedTuple):
    """Where a contestant is as good as AdamW at its end; the median over seeds.

    Attributes:
        steps: in units of AdamW's; infinite where the median run never is.
        seconds: the same.
    """

    steps: float
    seconds: float


def reached(problem: Problem, outcome: Outcome, reference: Outcome) -> Reached:
    """Compare seed by seed."""
    shares = [
        _reached(problem, curve, other[-1])
        for curve, other in zip(outcome.curves, reference.curves, strict=True)
    ]
    steps, seconds = (statistics.median(column) for column in zip(*shares, strict=True))
    return Reached(steps, seconds)


def _reached(problem: Problem, curve: list[Point], end: Point) -> Reached:
    target = problem.cost(end.found[problem.judged])
    for point in curve[1:]:
        cost = problem.cost(point.found[problem.judged])
        if math.isfinite(cost) and cost <= target:
            return Reached(point.step / end.step, point.seconds / end.seconds)
    return Reached(math.inf, math.inf)


def as_data(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """For a JSON file: every evaluation of the runs that count."""
    return {
        name: {
            "lr": outcome.lr,
            "searched": {f"{lr:.3g}": value for lr, value in outcome.searched.items()},
            "curves": [
                [{"step": p.step, "seconds": round(p.seconds, 4), **p.found} for p in curve]
                for curve in outcome.curves
            ],
        }
        for name, outcome in outcomes.items()
    }


def best_at_the_edge(outcome: Outcome) -> bool:
    """Whether the search may have stopped too early."""
    return len(outcome.searched) > 1 and outcome.lr in (
        min(outcome.searched),
        max(outcome.searched),
    )
