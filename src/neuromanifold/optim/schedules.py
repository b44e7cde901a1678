"""Numbers that change with the step, and how often curvature is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Number", "Schedule", "at_step"]

Number: TypeAlias = float | Callable[[int], float]
"""A constant, or a function of the number of steps done."""


def at_step(number: Number, step: int) -> float:
    """The value at a step.

    Example:
        >>> at_step(0.1, 7), at_step(lambda step: 0.1 / (1 + step), 9)
        (0.1, 0.01)
    """
    return float(number(step) if callable(number) else number)


def _early_and_often(most: int) -> Callable[[int], float]:
    """A period that grows with the step: curvature changes fast at first."""
    return lambda step: min(1 + step // 10, most)


@dataclass(frozen=True)
class Schedule:
    """How often statistics are measured and inverses refreshed, in optimizer steps.

    Each is a period, or a function from the number of steps done to the period that holds then. The
    default is every step at first, and grows to every 10 and every 50 steps.

    Args:
        statistics: steps from one measurement to the next.
        inverses: steps from one inversion to the next; it happens right after a measurement.

    Example:
        >>> Schedule(statistics=5, inverses=20).due(statistics=3, inverses=3, step=8)
        (True, False)
    """

    statistics: Number | None = None
    inverses: Number | None = None

    def __post_init__(self) -> None:
        for name in ("statistics", "inverses"):
            period = getattr(self, name)
            if not (period is None or callable(period) or period >= 1):
                raise ValueError(
                    f"{name} is a period of at least 1 step, or a function of the step; "
                    f"got {period!r}."
                )

    def due(self, *, statistics: int | None, inverses: int | None, step: int) -> tuple[bool, bool]:
        """Whether to measure, and to invert, before a step.

        Args:
            statistics: step of the last measurement, None before the first.
            inverses: step of the last inversion.
            step: number of steps done.
        """
        periods = (
            _early_and_often(10) if self.statistics is None else self.statistics,
            _early_and_often(50) if self.inverses is None else self.inverses,
        )
        measure, invert = (
            last is None or step - last >= at_step(period, step)
            for last, period in zip((statistics, inverses), periods, strict=True)
        )
        return measure, invert
