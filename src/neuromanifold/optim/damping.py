"""Damping that follows how well the quadratic model predicts the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from neuromanifold.optim.schedules import Number

__all__ = ["LevenbergMarquardt", "check_damping"]


def check_damping(damping: Number) -> None:
    """Refuse a constant that is not positive.

    Raises:
        ValueError: If it is zero or negative.
    """
    if not (callable(damping) or damping > 0):
        raise ValueError(
            f"damping is a positive number in nats/parameter², or a function of the step; "
            f"got {damping!r}."
        )


@dataclass
class LevenbergMarquardt:
    """Less damping where the loss falls as predicted, more where it does not.

    Every `period` steps the reduction of the loss is compared with that of the quadratic model
    `gᵀδ + ½ δᵀ (F + damping) δ`. Where the ratio is over 3/4 the damping falls by `factor^period`,
    under 1/4 it rises by as much (Levenberg-Marquardt; Martens and Grosse, arXiv 1503.05671, §6.5).
    The step must be given a closure, which is evaluated once more in those steps.

    Args:
        value: in nats/parameter², to start with; later, the present one.
        period: steps from one comparison to the next.
        factor: per step, in (0, 1).
        least: it does not fall below.
        most: it does not rise above.

    Attributes:
        ratio: the last reduction over the predicted one.

    Example:
        >>> damping = LevenbergMarquardt(1.0)
        >>> damping.compare(reduction=0.9, predicted=1.0)
        >>> round(damping.value, 3)
        0.774
    """

    value: float = 1.0
    period: int = 5
    factor: float = 0.95
    least: float = 1e-8
    most: float = 1e8
    ratio: float = field(default=math.nan, init=False)

    def __post_init__(self) -> None:
        if not (0 < self.least <= self.value <= self.most):
            raise ValueError(
                f"The damping must be positive and between least={self.least:g} and "
                f"most={self.most:g}, got {self.value!r}."
            )
        if self.period < 1 or not 0 < self.factor < 1:
            raise ValueError(
                f"period is at least 1 and factor in (0, 1); got {self.period} and {self.factor}."
            )

    def __call__(self, step: int) -> float:
        """The present damping: a schedule like any other."""
        return self.value

    def is_due(self, step: int) -> bool:
        """Whether to compare in this step."""
        return (step + 1) % self.period == 0

    def compare(self, *, reduction: float, predicted: float) -> None:
        """Change the damping by one comparison; both numbers are positive where the loss falls."""
        self.ratio = reduction / predicted if predicted > 0 else math.nan
        change = self.factor**self.period
        if self.ratio > 0.75:
            self.value = max(self.value * change, self.least)
        elif not self.ratio >= 0.25:  # also if it is NaN
            self.value = min(self.value / change, self.most)

    def state_dict(self) -> dict[str, Any]:
        """The present damping and ratio."""
        return {"value": self.value, "ratio": self.ratio}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.value, self.ratio = state["value"], state["ratio"]
