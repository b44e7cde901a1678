"""`python -m benchmarks.training`: by step and by second, from the same small search for everyone.

Learning rates are chosen by the number that is judged, on the first seed, for everyone alike.
Name problems and contestants to run a part: `python -m benchmarks.training gpt --only AdamW,kfac`.
The environment variable BENCH chooses how long: `smoke`, `quick` (the default) or `full`.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys

from rich.console import Console
from rich.table import Table

from benchmarks.harness import crowded, write_results
from benchmarks.training.contest import (
    MODES,
    Outcome,
    as_data,
    best_at_the_edge,
    contest,
    reached,
    steps_of,
)
from benchmarks.training.contestants import CONTESTANTS, REFERENCE
from benchmarks.training.problems import PROBLEMS, Problem

NEVER = "never"


def main() -> None:
    """Run, print a table for each problem, and store all curves."""
    problems, names = _asked()
    mode = os.environ.get("BENCH", "quick")
    if mode not in MODES:
        sys.exit(f"BENCH={mode!r} is not a mode; choose one of {', '.join(MODES)}.")
    busy = crowded()
    console = Console()
    results = {}
    for key in problems:
        problem = PROBLEMS[key]
        without = dict(problem.without)
        present = [name for name in names if name not in without]
        with console.status(problem.title) as status:
            outcomes = contest(problem, present, MODES[mode], status.update)
        console.print(_table(problem, outcomes, MODES[mode].scale, trusted=not busy))
        for name in set(names) & set(without):
            console.print(f"Without {name}: {without[name]}.")
        results[key] = {
            "title": problem.title,
            "data": problem.data().origin,
            "judged": problem.judged,
            "without": without,
            "outcomes": as_data(outcomes),
        }
    path = write_results("training", {"mode": mode, "crowded_at_start": busy, "problems": results})
    print(f"All curves: {path.relative_to(path.parents[2])}")


def _asked() -> tuple[list[str], list[str]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("problems", nargs="*", metavar="problem", help=", ".join(PROBLEMS))
    parser.add_argument("--only", default=",".join(CONTESTANTS), help="contestants, by commas")
    asked = parser.parse_args()
    names = asked.only.split(",")
    for given, known in ((asked.problems, PROBLEMS), (names, CONTESTANTS)):
        for name in given:
            if name not in known:
                parser.error(f"there is no {name!r}; there are {', '.join(known)}")
    if REFERENCE not in names:
        names.insert(0, REFERENCE)
    return asked.problems or list(PROBLEMS), names


def _table(problem: Problem, outcomes: dict[str, Outcome], scale: float, *, trusted: bool) -> Table:
    bar, reference = problem.bar, outcomes[REFERENCE]
    table = Table(
        "optimizer",
        "lr",
        "of",
        f"final {problem.judged}",
        "steps",
        "seconds",
        "ms/step",
        title=problem.title,
        caption=f"steps and seconds: to where {REFERENCE} ends, in units of its own; bars for "
        f"kfac {bar.steps:g} and {bar.seconds:g}."
        + ("" if trusted else " Others used this machine: seconds mean nothing."),
    )
    for name, outcome in outcomes.items():
        shares = reached(problem, outcome, reference)
        judged = name == "kfac"
        last = [curve[-1] for curve in outcome.curves]
        table.add_row(
            name,
            f"{outcome.lr:.2g}" + (" (edge)" if best_at_the_edge(outcome) else ""),
            str(steps_of(problem, name, scale)),
            _spread(outcome.final(problem.judged)),
            _share(shares.steps, bar.steps, judged=judged),
            _share(shares.seconds, bar.seconds, judged=judged and trusted),
            f"{1e3 * statistics.median(p.seconds / p.step for p in last):.1f}",
        )
    return table


def _spread(values: list[float]) -> str:
    spread = f" ± {(max(values) - min(values)) / 2:.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"


def _share(value: float, bar: float, *, judged: bool) -> str:
    shown = NEVER if math.isinf(value) else f"{value:.2f}"
    if not judged:
        return shown
    return f"[green]{shown}[/]" if value <= bar else f"[red]{shown}[/]"


if __name__ == "__main__":
    main()
