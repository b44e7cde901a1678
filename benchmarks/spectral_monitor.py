"""`python -m benchmarks.spectral_monitor`: what watching the spectrum along training costs.

Two workloads, an MLP and a conv net, are trained by AdamW with and without `nm.spectral.Monitor`,
the same steps in turns. The monitor's share is told by a clock outside of it, in two ways: the time
in `step()` over that of everything else, and the time of a watched run over that of one alone. What
the first use in a process takes, most of it imports, is told apart from that. The environment
variable BENCH chooses how long: `quick` (the default) or `full`.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

import neuromanifold as nm
from benchmarks.harness import crowded, write_results
from benchmarks.workloads import Batch

BUDGET = 0.05
SECONDS = {"quick": 45.0, "full": 240.0}
TURN = 10
"""Steps of one side before the other has its turn."""


def mlp() -> Batch:
    model = nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )
    return Batch(model, torch.randn(512, 784), torch.randint(10, (512,)))


def conv_net() -> Batch:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(1024, 10),
    )
    return Batch(model, torch.randn(64, 3, 32, 32), torch.randint(10, (64,)))


WORKLOADS = {
    "MLP 784-512-512-10, N=512": (mlp, 64),
    "conv net 32-64, 32x32, N=64": (conv_net, 8),
}
"""How to build them, and how many samples the monitor measures."""


class Run:
    """One training, with or without a monitor; the clock is outside of both."""

    def __init__(self, build: Any, samples: int) -> None:
        torch.manual_seed(0)
        self.batch = build()
        self.optimizer = torch.optim.AdamW(self.batch.model.parameters(), lr=1e-4)
        self.away = 0.0
        began = time.perf_counter()
        self.monitor = None
        if samples:
            some = self.batch.inputs[:samples]
            self.monitor = nm.spectral.Monitor(
                self.batch.model, nm.Categorical(), some, BUDGET, clock=self.clock
            )
        self.watching = self.set_up = time.perf_counter() - began
        self.training = 0.0
        self.steps = 0

    def clock(self) -> float:
        """Without the time in which the other side had its turn."""
        return time.perf_counter() - self.away

    def step(self) -> None:
        """Of training, and of the monitor."""
        began = time.perf_counter()
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(self.batch.model(self.batch.inputs), self.batch.targets)
        loss.backward()
        self.optimizer.step()
        trained = time.perf_counter()
        if self.monitor is not None:
            self.monitor.step()
        self.training += trained - began
        self.watching += time.perf_counter() - trained
        self.steps += 1

    @property
    def seconds(self) -> float:
        """In all."""
        return self.training + self.watching


def measure(build: Any, samples: int, seconds: float) -> dict[str, Any]:
    """Both sides in turns, so that they see the same weather."""
    alone, watched = Run(build, samples=0), Run(build, samples)
    highest = 0.0
    while watched.training < seconds:
        began = time.perf_counter()
        for _ in range(TURN):
            alone.step()
        watched.away += time.perf_counter() - began
        for _ in range(TURN):
            watched.step()
        if watched.monitor is not None and watched.monitor.history:
            highest = max(highest, watched.watching / watched.training)
    assert watched.monitor is not None
    history = watched.monitor.history
    assert history, "too short a run for a single measurement"
    for name, p in alone.batch.model.named_parameters():  # watching changes nothing
        assert torch.equal(p, watched.batch.model.get_parameter(name))
    return {
        "samples": samples,
        "steps": watched.steps,
        "training_seconds": watched.training,
        "measurements": len(history),
        "first_at_step": history[0].step,
        "seconds_per_measurement": statistics.median(m.seconds for m in history),
        "set_up_seconds": watched.set_up,
        "share": watched.watching / watched.training,
        "highest_share": highest,
        "share_by_its_own_clock": watched.monitor.share,
        "slowdown": watched.seconds / alone.seconds - 1,
        "training_alone_seconds": alone.training,
        "budget": BUDGET,
        "method": history[-1].method,
    }


def main() -> None:
    """Train, print and store."""
    mode = os.environ.get("BENCH", "quick")
    if mode not in SECONDS:
        sys.exit(f"BENCH={mode!r} is not a mode; choose one of {', '.join(SECONDS)}.")
    busy = crowded()
    first_use = Run(mlp, samples=1).set_up
    rows = {title: measure(*workload, SECONDS[mode]) for title, workload in WORKLOADS.items()}
    table = Table(
        "workload", "steps", "measurements", "s each", "share of the time", "slowdown", "budget",
        title=f"nm.spectral.Monitor; {torch.get_num_threads()} threads",
    )  # fmt: skip
    for title, row in rows.items():
        table.add_row(
            title,
            f"{row['steps']:,}",
            str(row["measurements"]),
            f"{row['seconds_per_measurement']:.2f}",
            f"{row['share']:.2%}, at most {row['highest_share']:.2%}",
            f"{row['slowdown']:+.2%}",
            f"{row['budget']:.0%}",
        )
    Console().print(table)
    path = write_results(
        "spectral_monitor",
        {
            "mode": mode,
            "crowded_at_start": busy,
            "first_use_seconds": first_use,
            "workloads": rows,
        },
    )
    print(f"All numbers: {path.relative_to(path.parents[2])}")


if __name__ == "__main__":
    main()
