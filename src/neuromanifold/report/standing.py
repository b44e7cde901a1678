"""Who is ahead after a comparison of optimizers, by how much, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any

from neuromanifold.report.numerals import measured, percent, quantity, ratio

__all__ = [
    "Contest",
    "Spread",
    "Standing",
    "half_width",
    "measure_name",
    "share_needed",
    "spread",
    "standings",
    "verdict",
]

Contest = Mapping[str, Any]
"""What `neuromanifold.training.compare_optimizers` returns."""

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5% quantiles of Student's t for 1, 2, ... degrees of freedom."""


@dataclass(frozen=True)
class Spread:
    """A mean over seeds.

    Attributes:
        stderr: its standard error; None for one seed.
        num: of seeds.
    """

    value: float
    stderr: float | None
    num: int


@dataclass(frozen=True)
class Standing:
    """What came of one optimizer.

    Attributes:
        loss: that the order is by; None if a run did not end with a finite one.
        runs: by seed, in the order of the seeds.
    """

    optimizer: str
    loss: Spread | None
    runs: Sequence[Mapping[str, Any]]

    def mean(self, name: str) -> Spread | None:
        """Of a number of its runs; None if one of them lacks it."""
        return spread([run[name] for run in self.runs])


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean and standard error; None if a value is missing.

    Example:
        >>> spread([1.0, 2.0, 3.0])
        Spread(value=2.0, stderr=0.5773502691896258, num=3)
        >>> spread([1.0]), spread([1.0, None])
        (Spread(value=1.0, stderr=None, num=1), None)
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    stderr = stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None
    return Spread(fmean(known), stderr, len(known))


def half_width(found: Spread) -> float | None:
    """Half the 95% interval of a mean over few seeds, by Student's t; None for one seed.

    Example:
        >>> round(half_width(Spread(2.0, 1.0, 3)), 3), round(half_width(Spread(2.0, 1.0, 31)), 3)
        (4.303, 2.042)
    """
    if found.stderr is None:
        return None
    freedom = found.num - 1
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1] * found.stderr
    # Cornish-Fisher: right to three digits from here on.
    z = NormalDist().inv_cdf(0.975)
    wider = (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return (z + wider) * found.stderr


def measure_name(contest: Contest) -> str:
    """What the order is by: the loss on test data, where there are some."""
    return "test_loss" if contest["has_test"] else "train_loss"


def standings(contest: Contest) -> list[Standing]:
    """Each optimizer, best first; those that did not end with a finite loss come last."""
    names = dict.fromkeys(run["optimizer"] for run in contest["runs"])
    found = []
    for name in names:
        runs = [run for run in contest["runs"] if run["optimizer"] == name]
        found.append(Standing(name, spread([run[measure_name(contest)] for run in runs]), runs))
    return sorted(found, key=lambda each: math.inf if each.loss is None else each.loss.value)


def verdict(contest: Contest) -> str:
    """Who won, by how much, and whether that could be chance.

    Example:
        >>> run = {"optimizer": "kfac", "seed": 0, "steps": 10, "seconds": 2.0, "test_loss": 0.5}
        >>> print(verdict({"runs": [run], "has_test": True, "seeds": [0]}))
        kfac ended at a test loss of 0.500 nats per sample, after 10 steps in 2.00 s.
    """
    first, *others = standings(contest)
    kind = measure_name(contest).replace("_", " ")
    if first.loss is None:
        return f"No optimizer ended at a finite {kind}: try smaller learning rates."
    if not others:
        steps, seconds = first.mean("steps"), first.mean("seconds")
        assert steps is not None
        assert seconds is not None
        return (
            f"{first.optimizer} ended at a {kind} of {_written(first.loss)} nats per sample, after "
            f"{steps.value:,.0f} steps in {quantity(seconds.value)} s."
        )
    second = others[0]
    if second.loss is None:
        return (
            f"{first.optimizer} won with a {kind} of {_written(first.loss)} nats per sample; no "
            f"other optimizer ended at a finite loss."
        )
    return " ".join([_difference(contest, first, second, kind), *_sooner(first, second)])


def _difference(contest: Contest, first: Standing, second: Standing, kind: str) -> str:
    name = measure_name(contest)
    pairs = zip(first.runs, second.runs, strict=True)
    gap = spread([other[name] - run[name] for run, other in pairs])
    assert gap is not None
    assert first.loss is not None
    assert second.loss is not None
    losses = f"{_written(first.loss)} against {_written(second.loss)} nats per sample"
    width = half_width(gap)
    if width is None:
        return (
            f"{first.optimizer} is ahead of {second.optimizer} with a {kind} of {losses}, in one "
            f"run of each: --seeds 3 would tell whether that is chance."
        )
    lead = f"{quantity(gap.value)} ± {quantity(width, digits=2)}"
    if width >= gap.value:
        return (
            f"{first.optimizer} and {second.optimizer} cannot be told apart: their {kind} is "
            f"{losses}, and the difference of {lead} over {gap.num} seeds (95% interval) could be "
            f"chance."
        )
    return (
        f"{first.optimizer} won over {second.optimizer} with a {kind} of {losses}: lower by {lead} "
        f"over {gap.num} seeds (95% interval)."
    )


def _sooner(first: Standing, second: Standing) -> list[str]:
    """How soon the first was where the second ended."""
    steps, seconds = (share_needed(first, second, axis) for axis in ("step", "seconds"))
    if steps is None or seconds is None:
        return []
    return [
        f"{first.optimizer} was where {second.optimizer} ended after {percent(steps)} of the "
        f"steps and {_of_time(seconds)}."
    ]


def _of_time(share: float) -> str:
    return f"{percent(share)} of the seconds" if share <= 1 else f"{ratio(share)} times the seconds"


def share_needed(first: Standing, second: Standing, axis: str) -> float | None:
    """How far the first had gone when it was where the second ended, as a share of all of that.

    Args:
        first: is at least as good at the end.
        second: all of whose steps or seconds are 1.
        axis: "step" or "seconds".

    Returns:
        The mean over seeds; None if for some seed it never was there.
    """
    shares = []
    for run, other in zip(first.runs, second.runs, strict=True):
        goal, whole = other["history"][-1]["loss"], other["history"][-1][axis]
        if goal is None or not whole:
            return None
        there = [
            point[axis]
            for point in run["history"]
            if point["loss"] is not None and point["loss"] <= goal
        ]
        if not there:
            return None
        shares.append(there[0] / whole)
    return fmean(shares)


def _written(found: Spread) -> str:
    if found.stderr is None:
        return quantity(found.value)
    return measured(found.value, found.stderr)
