"""How cost grows with width, depth, batch, classes and length.

Each quantity is timed at five sizes, everything else fixed; a line through the logarithms has the
slope, with the standard error of the fit.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import neuromanifold as nm
from benchmarks.harness import clock_of, interleave
from benchmarks.progress import Progress
from benchmarks.rows import LIKELIHOOD
from benchmarks.workloads import GPT, Batch, direction, forward_backward

__all__ = ["AXES", "Axis", "guesses", "measure", "slope"]

SECONDS_OF_ROUND = 0.5
"""Of all sizes and quantities, about."""


@dataclass(frozen=True)
class Axis:
    """One size that changes.

    Attributes:
        name: of the size.
        network: what stays, for a reader.
        sizes: five of them.
        build: a batch of one size.
    """

    name: str
    network: str
    sizes: tuple[int, ...]
    build: Callable[[int], Batch]


def perceptron(*, width: int = 128, depth: int = 2, batch: int = 128, classes: int = 10) -> Batch:
    """With `depth` hidden layers."""
    layers: list[nn.Module] = [nn.Linear(width, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, classes))
    return Batch(model, torch.randn(batch, width), torch.randint(classes, (batch,)))


def transformer(length: int) -> Batch:
    model = GPT(vocabulary=64, length=length, width=64, heads=4, depth=2)
    text = torch.randint(64, (8, length + 1))
    return Batch(model, text[:, :-1], text[:, 1:])


AXES = (
    Axis("width", "MLP, N=128", (128, 192, 256, 384, 512), lambda s: perceptron(width=s)),
    Axis("depth", "MLP of width 128, N=128", (2, 4, 6, 8, 12), lambda s: perceptron(depth=s)),
    Axis("batch", "MLP of width 128", (64, 128, 256, 512, 1024), lambda s: perceptron(batch=s)),
    Axis("classes", "MLP of width 128", (8, 32, 128, 512, 1024), lambda s: perceptron(classes=s)),
    Axis("sequence length", "GPT of width 64, N=8", (16, 32, 64, 128, 256), transformer),
)


def diagonal(batch: Batch) -> Callable[[], object]:
    return lambda: nm.fisher(batch.model, LIKELIHOOD, batch.inputs, nm.Diagonal())


def kronecker(batch: Batch) -> Callable[[], object]:
    return lambda: nm.fisher(batch.model, LIKELIHOOD, batch.inputs, nm.Kronecker())


def product(batch: Batch) -> Callable[[], object]:
    F = nm.fisher(batch.model, LIKELIHOOD, batch.inputs, nm.Implicit(), estimator=nm.Exact())
    v = direction(batch)
    return lambda: F @ v


def gram(batch: Batch) -> Callable[[], object]:
    def run() -> object:
        F = nm.fisher(batch.model, LIKELIHOOD, batch.inputs, nm.Gram())
        assert isinstance(F, nm.structures.gram.GramOperator)
        return F.gram

    return run


QUANTITIES: dict[str, Callable[[Batch], Callable[[], object]]] = {
    "forward + backward": lambda batch: partial(forward_backward, batch),
    "diagonal": diagonal,
    "Kronecker factors": kronecker,
    "product, repeated": product,
    "Gram matrix": gram,
}


def measure(
    axis: Axis, rounds: int, device: torch.device, progress: Progress
) -> list[dict[str, Any]]:
    """Median seconds of every quantity at every size, and their slopes."""
    progress.start(_part(axis))
    clock = time.process_time if device.type == "cpu" else clock_of(device)
    seconds: dict[str, list[float]] = {name: [] for name in QUANTITIES}
    for size in axis.sizes:
        torch.manual_seed(0)
        batch = axis.build(size).to(device)
        tasks = {name: prepare(batch) for name, prepare in QUANTITIES.items()}
        times = interleave(tasks, rounds, clock)
        for name, found in times.items():
            seconds[name].append(statistics.median(found))
    return [
        {
            "axis": axis.name,
            "network": axis.network,
            "quantity": name,
            "sizes": axis.sizes,
            "seconds": found,
            **slope(axis.sizes, found),
        }
        for name, found in seconds.items()
    ]


def guesses(axis: Axis, rounds: int) -> dict[str, float]:
    """Seconds that `measure` may take, by the name that it has there."""
    return {_part(axis): (rounds + 3) * SECONDS_OF_ROUND}


def _part(axis: Axis) -> str:
    return f"slopes with {axis.name}"


def slope(sizes: tuple[int, ...], seconds: list[float]) -> dict[str, float]:
    """Of the line through log seconds against log size, with the standard error of the fit."""
    x, y = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    line = statistics.linear_regression(x, y)
    rest = [b - line.intercept - line.slope * a for a, b in zip(x, y, strict=True)]
    spread = sum((a - statistics.mean(x)) ** 2 for a in x)
    variance = sum(r**2 for r in rest) / (len(x) - 2)
    return {"slope": line.slope, "stderr": math.sqrt(variance / spread)}
