"""When an estimate is good enough, and when it never will be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from neuromanifold._estimation.result import Estimated, shares
from neuromanifold._intervals import quantile

__all__ = ["DRAWS", "Goal", "Verdict"]

DRAWS = 2
"""Of the estimator for each input in a round: the fewest that show how much they differ."""
PATIENCE = 4
"""Rounds after which the noise of the data is taken for known."""
ROUNDING = 1e-12
"""No number is known better than that."""


@dataclass(frozen=True)
class Verdict:
    """What to do after a round.

    Attributes:
        done: whether to stop.
        note: why the tolerance is out of reach; empty if it is reached, or may be.
        rounds: how many there will be in all, a forecast.
    """

    done: bool
    note: str
    rounds: float


@dataclass(frozen=True)
class Goal:
    """A tolerance, and how long to try."""

    rtol: float
    confidence: float
    max_draws: int

    def __post_init__(self) -> None:
        if not ROUNDING <= self.rtol < math.inf:
            raise ValueError(
                f"rtol is a positive number such as 0.05, not below {ROUNDING:g}; got {self.rtol}."
            )
        quantile(self.confidence)
        if self.max_draws < DRAWS:
            raise ValueError(
                f"max_draws is at least {DRAWS}: how much labels vary is seen from two of them "
                f"for each input. Got {self.max_draws}."
            )

    def judge(self, found: Estimated, rounds: int, *, drawing: bool) -> Verdict:
        """Whether to stop after some rounds; `drawing` tells whether another one would help."""
        names, (squares, data, drawn) = shares(found)
        allowed = squares * (self.rtol / quantile(self.confidence)) ** 2
        open_ = data + drawn > allowed
        if not bool(open_.any()):
            return Verdict(True, "", rounds)
        labels = found.draws // rounds
        hopeless = open_ & (data >= allowed)
        exhausted = not drawing or found.draws + labels > self.max_draws
        needed = float(torch.where(open_, drawn * rounds / (allowed - data), 0).max())

        def half(variance: Tensor, worst: int) -> float:
            return float((variance / squares)[worst].sqrt()) * quantile(self.confidence)

        if bool(hopeless.any()) and (rounds >= PATIENCE or exhausted):
            worst = int(torch.where(hopeless, data / allowed, 0).argmax())
            more = math.ceil(found.num_samples * float(data[worst] / allowed[worst]))
            note = (
                f"With these {found.num_samples:,} inputs the data alone leave "
                f"{half(data, worst):.1%}{_of(names[worst])}, more than rtol={self.rtol:g}, "
                f"however many labels are drawn: more than {more:,} inputs would be needed."
            )
        elif exhausted:
            worst = int(torch.where(open_, (data + drawn) / allowed, 0).argmax())
            note = (
                f"After {found.draws} labels for each input, max_draws, the error is "
                f"{half(data + drawn, worst):.1%}{_of(names[worst])}, more than "
                f"rtol={self.rtol:g}: about {math.ceil(needed * labels):,} labels, or more "
                f"inputs, would be needed."
            )
        else:
            most = self.max_draws // labels
            return Verdict(False, "", min(max(needed, rounds + 1), most))
        return Verdict(True, note, rounds)


def _of(name: str) -> str:
    return f" for {name!r}" if name else ""
