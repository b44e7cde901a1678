"""`python -m benchmarks.training.poisson`: a physics-informed network, by equal time.

The Poisson equation −Δu = f on the unit square, with u = 0 at its edge and the solution
sin(πx) sin(πy), by the residuals of a small network in float64. Adam gets its best learning rate of
a small grid, and a rate that falls linearly to zero over its time; `nm.optim.gram` gets nothing.
Time is that of the processor, of one thread; errors are measured beside the clock.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import neuromanifold as nm
from benchmarks.harness import write_results

SECONDS = 10.0
SEEDS = (0, 1, 2)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
WIDTH = 32
INSIDE = 400
"""Random points."""
EDGE = 100
EDGE_WEIGHT = 10.0
"""Of residuals at the edge, which are values, beside those inside, which are second derivatives."""
RECORDS = 40


@dataclass
class Run:
    """One training.

    Attributes:
        name: of the optimizer.
        seed: of the model and the points.
        steps: done.
        error: relative L2 error at the end.
        curve: seconds and relative L2 errors.
    """

    name: str
    seed: int
    steps: int
    error: float
    curve: list[tuple[float, float]]


class Problem:
    """Model, points and residuals, all from one seed."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        layers = [nn.Linear(2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()]
        self.model = nn.Sequential(*layers, nn.Linear(WIDTH, 1)).double()
        self.inside = torch.rand(INSIDE, 2, dtype=torch.float64)
        self.edge = torch.rand(EDGE, 2, dtype=torch.float64)
        self.edge[::2, 0] = self.edge[::2, 0].round()
        self.edge[1::2, 1] = self.edge[1::2, 1].round()
        grid = torch.linspace(0, 1, 64, dtype=torch.float64)
        self.test = torch.cartesian_prod(grid, grid)
        # ½ mean r² is half the sum of the two means of squares.
        total = INSIDE + EDGE
        self.weights = math.sqrt(total / INSIDE), EDGE_WEIGHT * math.sqrt(total / EDGE)

    def residuals(self) -> Tensor:
        """`(INSIDE + EDGE,)`."""
        x = self.inside.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.model(x).sum(), x, create_graph=True)
        laplacian = torch.zeros(INSIDE, dtype=torch.float64)
        for i in range(2):
            (bend,) = torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)
            laplacian = laplacian + bend[:, i]
        inside = -laplacian - 2 * math.pi**2 * solution(x.detach())
        return torch.cat([self.weights[0] * inside, self.weights[1] * self.model(self.edge)[:, 0]])

    @torch.no_grad()
    def error(self) -> float:
        """Relative L2 error, on a grid that no one trains on."""
        truth = solution(self.test)
        return float((self.model(self.test)[:, 0] - truth).norm() / truth.norm())


def solution(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x[:, 0]) * torch.sin(math.pi * x[:, 1])


def train(
    name: str, seed: int, seconds: float, stepper: Callable[[Problem], Callable[[float], object]]
) -> Run:
    """Step until the time is over; the stepper is told the part of it that has passed."""
    problem = Problem(seed)
    step, spent, steps = stepper(problem), 0.0, 0
    curve = [(0.0, problem.error())]
    while spent < seconds:
        start = time.process_time()
        step(spent / seconds)
        spent += time.process_time() - start
        steps += 1
        if spent >= seconds * len(curve) / RECORDS:
            curve.append((spent, problem.error()))
    return Run(name, seed, steps, problem.error(), curve)


def adam(rate: float) -> Callable[[Problem], Callable[[float], object]]:
    """Adam with a rate that falls linearly over the time that there is."""

    def stepper(problem: Problem) -> Callable[[float], object]:
        optimizer = torch.optim.Adam(problem.model.parameters(), rate)

        def step(passed: float) -> None:
            optimizer.param_groups[0]["lr"] = rate * (1 - passed)
            optimizer.zero_grad()
            (problem.residuals().square().mean() / 2).backward()
            optimizer.step()

        return step

    return stepper


def gram(problem: Problem) -> Callable[[float], object]:
    """The natural gradient of the residuals, as it comes."""
    optimizer = nm.optim.gram(problem.model)
    return lambda _: optimizer.step(problem.residuals)


def main() -> None:
    """Tune Adam on the first seed, compare on all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each training")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    console = Console()
    with console.status("Adam's learning rate"):
        tuning = [train(f"Adam {r:g}", SEEDS[0], seconds, adam(r)) for r in RATES]
    rate = RATES[min(range(len(RATES)), key=lambda i: tuning[i].error)]
    runs = [tuning[RATES.index(rate)]]
    with console.status("comparison"):
        runs += [train(f"Adam {rate:g}", seed, seconds, adam(rate)) for seed in SEEDS[1:]]
        runs += [train("gram", seed, seconds, gram) for seed in SEEDS]
    table = Table(
        "optimizer", "seed", "steps", "relative L2 error", title=f"Poisson, {seconds:g} s each"
    )
    for run in runs:
        table.add_row(run.name, str(run.seed), str(run.steps), f"{run.error:.1e}")
    console.print(table)
    errors = {
        kind: [run.error for run in runs if run.name.startswith(kind)] for kind in ("Adam", "gram")
    }
    ratios = [a / g for a, g in zip(errors["Adam"], errors["gram"], strict=True)]
    console.print(
        f"Adam's error over gram's: {statistics.median(ratios):.0f} (median), "
        f"{min(ratios):.0f} (least)."
    )
    write_results(
        "poisson",
        {
            "seconds": seconds,
            "ratios": ratios,
            "tuning": {f"{r:g}": run.error for r, run in zip(RATES, tuning, strict=True)},
            "runs": [asdict(run) for run in runs],
        },
    )


if __name__ == "__main__":
    main()
