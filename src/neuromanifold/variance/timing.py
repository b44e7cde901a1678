"""What estimators of the diagonal cost, in forward and backward passes of the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from neuromanifold.capture import Batch, Data
from neuromanifold.estimators import Estimator
from neuromanifold.structures import Diagonal, Source

__all__ = ["Pace", "pace", "seconds"]

REPEATS = 2
"""Runs of which the faster counts, after one that sets things up."""
MOST_SWEEPS = 8
"""That are timed; further ones take as long each."""


@dataclass(frozen=True)
class Pace:
    """Seconds that one batch takes.

    Attributes:
        training: forward pass of the model and backward pass to all measured parameters.
        one: the diagonal with one sweep.
        further: each further sweep.
    """

    training: float
    one: float
    further: float

    def cost(self, sweeps: int) -> float:
        """The diagonal with some sweeps, in forward and backward passes."""
        return (self.one + (sweeps - 1) * self.further) / self.training

    def sweeps(self, seconds: float) -> int:
        """How many sweeps take as long, at least 1."""
        return max(round((seconds - self.one) / max(self.further, 0.1 * self.one)) + 1, 1)


def pace(source: Source, batch: Batch, estimator: Estimator, sweeps: int) -> Pace:
    """Time a few passes over one batch.

    Args:
        source: the measurement; its data and its randomness are left alone.
        batch: the samples.
        estimator: one with the most sweeps,
        sweeps: their number.
    """
    some = min(sweeps, MOST_SWEEPS)
    one = seconds(source, batch, estimator, 1)
    further = 0.0
    if some > 1:
        further = max(seconds(source, batch, estimator, some) - one, 0.0) / (some - 1)
    return Pace(_best(source, lambda: _forward_and_backward(source, batch)), one, further)


def seconds(
    source: Source, batch: Batch, estimator: Estimator, most_sweeps: int | None = None
) -> float:
    """Wall time of the diagonal of one batch."""

    def build() -> None:
        trial = replace(
            source,
            estimator=estimator,
            data=Data(batch),
            generator=torch.Generator(source.device).manual_seed(0),
            reducer=None,
            progress=None,
            most_sweeps=most_sweeps,
        )
        Diagonal().build(trial)

    return _best(source, build)


def _forward_and_backward(source: Source, batch: Batch) -> None:
    plan = source.plan
    with torch.enable_grad():
        outputs = source.likelihood.canonical(source.forward(plan.model, batch.inputs))
        parameters = list(plan.parameters.values())
        torch.autograd.grad(outputs.sum(), parameters, allow_unused=True)


def _best(source: Source, run: Callable[[], None]) -> float:
    """Seconds of the fastest of several runs, not counting the first."""
    times = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        run()
        if source.device.type == "cuda":
            torch.cuda.synchronize(source.device)
        times.append(time.perf_counter() - started)
    return min(times[1:])
