"""`python -m benchmarks.coverage`: do intervals cover, and do plans keep what they promise?

The population is the empirical distribution of all handwritten digits, so that its Fisher matrix is
known. Inputs are drawn from it with replacement, again and again: how often does the nominal 95 %
interval hold the truth, and how often is a run of the planned size within the tolerance?

The environment variable BENCH chooses how often: `quick` (the default) or `full`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import neuromanifold as nm
from benchmarks.harness import write_results
from neuromanifold._typing import Params

LIKELIHOOD = nm.Categorical()
CONFIDENCE = 0.95
TRAINING, EPOCHS = 1500, 20

SEEDS = {"quick": 20, "full": 300}
SIZES = (256, 2048)
"""Inputs of a measurement; the bar is for the last of them."""
BAR = (0.92, 0.98)

RUNS = {"quick": 10, "full": 100}
PILOT = 500
MOST_DRAWS = 8
"""Labels for each input of a run to the tolerance."""
PLANNED = {"trace": 0.1, "diagonal": 0.2, "quadratic": 0.1}
"""Relative error that is asked for."""
PLAN_BAR = (0.93, 1.0)


@dataclass(frozen=True)
class Population:
    """A trained model and all inputs there are.

    Attributes:
        model: that maps inputs to logits (N, 10).
        inputs: all of them, (N, ...).
        truth: the exact value of each number, by what it is asked for with.
    """

    model: nn.Module
    inputs: Tensor
    vectors: Mapping[str, Tensor]
    truth: Mapping[str, Any]

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Inputs with replacement."""
        return self.inputs[torch.randint(len(self.inputs), (num,), generator=generator)]

    def asked(self, quantity: str) -> dict[str, Any]:
        """Arguments of `nm.estimate` and of `nm.variance.plan`."""
        if quantity in self.vectors:
            return {"quantity": "quadratic", "vector": self.vectors[quantity]}
        return {"quantity": quantity}


def multilayer() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"MLP": multilayer, "conv net": convolutional}


def trained(build: Callable[[], nn.Module]) -> Population:
    """A model after training on most of the digits, and the Fisher matrix of all of them."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(TRAINING).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    dense = nm.fisher(model, LIKELIHOOD, x, nm.Dense(), estimator=nm.Exact()).to_dense()
    generator = seeded(0)
    vectors = {f"random v {i}": torch.randn(len(dense), generator=generator) for i in (1, 2)} | {
        "top v": torch.linalg.eigh(dense.double())[1][:, -1].float()
    }
    population = Population(model, x, vectors, {})
    truth = {
        quantity: nm.estimate(
            model, LIKELIHOOD, x, estimator=nm.Exact(), **population.asked(quantity)
        ).value
        for quantity in ("trace", "layers", "diagonal", *vectors)
    }
    return Population(model, x, vectors, truth)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- intervals -------------------------------------------------------------------------------


@dataclass
class Tally:
    """How often the truth was below, in, or above an interval; shares of entries count as such."""

    below: float = 0.0
    above: float = 0.0
    runs: int = 0
    relative: list[float] = field(default_factory=list)

    def add(self, found: nm.Estimate, truth: Any, *, positive: bool) -> None:
        """Compare one interval, of a number or of all entries."""
        low, high, true, errors = (
            flat(part) for part in (*found.interval(CONFIDENCE, positive=positive), truth,
                                    found.relative)
        )  # fmt: skip
        self.below += float((true < low).double().mean())
        self.above += float((true > high).double().mean())
        self.relative.append(float(errors.median()))
        self.runs += 1

    def row(self) -> dict[str, Any]:
        """Shares of the runs."""
        share = 1 - (self.below + self.above) / self.runs
        return {
            "covered": share,
            "stderr": binomial(share, self.runs),
            "truth_below": self.below / self.runs,
            "truth_above": self.above / self.runs,
            "relative_error": float(torch.tensor(self.relative).median()),
            "runs": self.runs,
        }


def flat(quantity: Tensor | Params) -> Tensor:
    parts = [quantity] if isinstance(quantity, Tensor) else quantity.values()
    # The truth in float64, so that entries that no input reaches are covered by 0 ± 0.
    return torch.cat([part.detach().double().flatten() for part in parts])


def binomial(share: float, runs: int) -> float:
    """Standard error of a share."""
    return (share * (1 - share) / runs) ** 0.5


def measured(
    population: Population, num: int, generator: torch.Generator
) -> Iterator[tuple[str, nm.Estimate, Any]]:
    """Every number from one sample of inputs: its name, the estimate, and the truth."""
    model, truth = population.model, population.truth
    x = population.draw(num, generator)
    # A tolerance that is never reached: one round, two labels for each input.
    fixed: dict[str, Any] = {"rtol": 1e-9, "max_draws": 2, "generator": generator}
    for quantity in truth:
        found = nm.estimate(model, LIKELIHOOD, x, **population.asked(quantity), **fixed)
        if quantity == "layers":
            for index, name in enumerate(truth["layers"], start=1):
                yield f"trace of layer {index}", part(found, name), truth["layers"][name]
        else:
            yield {"diagonal": "entries"}.get(quantity, quantity), found, truth[quantity]
    F = nm.fisher(model, LIKELIHOOD, x, nm.Diagonal(), generator=generator)
    errors = nm.variance.diagonal(model, LIKELIHOOD, x)
    drawn = nm.Estimate(F.diagonal(), errors.variances, num_samples=num)
    yield "entries, closed form", drawn, truth["diagonal"]


def part(found: nm.Estimate, name: str) -> nm.Estimate:
    """The estimate of one of several numbers."""

    def only(quantity: Tensor | Params) -> Tensor:
        assert not isinstance(quantity, Tensor)
        return quantity[name]

    variances = {source: only(of_all) for source, of_all in found.variances.items()}
    return nm.Estimate(only(found.value), variances, num_samples=found.num_samples)


def coverage(model: str, population: Population, seeds: int) -> Iterator[dict[str, Any]]:
    """Rows of the first table."""
    for num in SIZES:
        tallies: dict[tuple[str, str], Tally] = {}
        for seed in range(seeds):
            for name, found, truth in measured(population, num, seeded(1000 * num + seed)):
                for interval in ("symmetric", "positive"):
                    tally = tallies.setdefault((name, interval), Tally())
                    tally.add(found, truth, positive=interval == "positive")
        for (name, interval), tally in tallies.items():
            judged = num == SIZES[-1] and not name.startswith("entries")
            yield {
                "model": model,
                "inputs": num,
                "number": name,
                "interval": interval,
                **tally.row(),
                "bar": BAR if judged else None,
            }


# ---- plans -----------------------------------------------------------------------------------


def off(found: nm.Estimate, truth: Any) -> float:
    """The largest relative error, of a number or in the Euclidean norm of each parameter's."""
    if isinstance(found.value, Tensor):
        return float((found.value - truth).abs() / truth)
    return max(float((v - truth[k]).norm() / truth[k].norm()) for k, v in found.value.items())


def with_labels(population: Population, x: Tensor, labels: int, generator: torch.Generator) -> Any:
    """Inputs with so many labels drawn from the model for each.

    The empirical Fisher of these is that of `nm.MonteCarlo(labels)`.
    """
    with torch.no_grad():
        drawn = LIKELIHOOD.sample(population.model(x), labels, generator=generator)
    return x.repeat(labels, 1), torch.cat(list(drawn))


def plans(model: str, population: Population, runs: int) -> Iterator[dict[str, Any]]:
    """Rows of the second table."""
    for quantity, rtol in PLANNED.items():
        name = "top v" if quantity == "quadratic" else quantity
        asked, truth = population.asked(name), population.truth[name]
        start = time.process_time()
        errors: dict[str, list[float]] = {"planned": [], "to tolerance": []}
        inputs, reached = [], 0
        for run in range(runs):
            generator = seeded(run)
            pilot = population.draw(PILOT, generator)
            plan = nm.variance.plan(
                population.model, LIKELIHOOD, pilot, rtol=rtol, generator=generator, **asked
            )
            x = population.draw(plan.inputs, generator)
            labelled = with_labels(population, x, plan.labels, generator)
            planned = nm.estimate(
                population.model, LIKELIHOOD, labelled, estimator=nm.Empirical(), **asked
            )
            # Labels beyond the plan's are allowed, but no more inputs.
            ran = nm.estimate(
                population.model,
                LIKELIHOOD,
                x,
                rtol=rtol,
                max_draws=MOST_DRAWS,
                generator=generator,
                **asked,
            )
            errors["planned"].append(off(planned, truth))
            errors["to tolerance"].append(off(ran, truth))
            inputs.append(plan.inputs)
            reached += ran.reached
        seconds = time.process_time() - start
        for how, found in errors.items():
            share = sum(error <= rtol for error in found) / runs
            yield {
                "model": model,
                "number": quantity,
                "rtol": rtol,
                "run": how,
                "within": share,
                "stderr": binomial(share, runs),
                "runs": runs,
                "inputs": sorted(inputs),
                "reached": reached / runs if how == "to tolerance" else None,
                "errors": found,
                "bar": PLAN_BAR,
                "cpu_seconds_of_both": seconds,
            }


# ---- tables ----------------------------------------------------------------------------------


def verdict(share: float, runs: int, bar: tuple[float, float] | None) -> str:
    """Outside of the bar by less than two standard errors is unclear."""
    if bar is None:
        return ""
    low, high = bar
    if low <= share <= high:
        return "[green]reached[/]"
    near = low - 2 * binomial(low, runs) <= share <= high + 2 * binomial(high, runs)
    return "[yellow]unclear[/]" if near else "[red]missed[/]"


def show_coverage(rows: list[dict[str, Any]]) -> None:
    table = Table(
        *("model", "inputs", "number", "error", "symmetric", "positive", "bar", "bar"),
        title=f"share of {CONFIDENCE:.0%} intervals that hold the truth",
        caption="± one binomial standard error; misses on the side of small values, of large ones",
    )
    for symmetric, positive in zip(rows[::2], rows[1::2], strict=True):
        table.add_row(
            symmetric["model"],
            str(symmetric["inputs"]),
            symmetric["number"],
            f"{symmetric['relative_error']:.1%}",
            *(
                f"{100 * row['covered']:.1f} ± {100 * row['stderr']:.1f} "
                f"({100 * row['truth_above']:.1f}, {100 * row['truth_below']:.1f})"
                for row in (symmetric, positive)
            ),
            *(verdict(row["covered"], row["runs"], row["bar"]) for row in (symmetric, positive)),
        )
    Console(width=120).print(table)


def show_plans(rows: list[dict[str, Any]]) -> None:
    table = Table(
        *("model", "number", "rtol", "run", "inputs", "within", "reached", "bar", "CPU s"),
        title=f"runs within the tolerance, after a pilot of {PILOT} inputs",
    )
    for row in rows:
        table.add_row(
            row["model"],
            row["number"],
            f"{row['rtol']:.0%}",
            row["run"],
            f"{row['inputs'][0]:,} to {row['inputs'][-1]:,}",
            f"{100 * row['within']:.0f} ± {100 * row['stderr']:.1f} of 100",
            "" if row["reached"] is None else f"{row['reached']:.0%}",
            verdict(row["within"], row["runs"], row["bar"]),
            f"{row['cpu_seconds_of_both']:.0f}",
        )
    Console(width=120).print(table)


def main() -> None:
    """Measure both models, show tables, keep results."""
    mode = os.environ.get("BENCH", "quick")
    if mode not in SEEDS:
        sys.exit(f"BENCH={mode!r} is not a mode; choose one of {', '.join(SEEDS)}.")
    covered: list[dict[str, Any]] = []
    planned: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    for name, build in MODELS.items():
        start = time.process_time()
        population = trained(build)
        seconds[f"{name}: training, truth"] = time.process_time() - start
        start = time.process_time()
        covered += coverage(name, population, SEEDS[mode])
        seconds[f"{name}: intervals"] = time.process_time() - start
        start = time.process_time()
        planned += plans(name, population, RUNS[mode])
        seconds[f"{name}: plans"] = time.process_time() - start
    show_coverage(covered)
    show_plans(planned)
    for what, taken in seconds.items():
        print(f"{what}: {taken:.0f} s of CPU time")
    path = write_results(
        "coverage",
        {"mode": mode, "cpu_seconds": seconds, "intervals": covered, "plans": planned},
    )
    print(f"All rows: {path.relative_to(path.parents[2])}")


if __name__ == "__main__":
    main()
