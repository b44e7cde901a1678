"""Studies of Helmholtz machines while they are trained, as plain dicts."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neuromanifold._estimate import plain
from neuromanifold.belief.datasets import Patterns
from neuromanifold.belief.gradients import compare_gradients
from neuromanifold.belief.machines import HelmholtzMachine
from neuromanifold.belief.networks import SigmoidBeliefNetwork
from neuromanifold.belief.training import Training
from neuromanifold.belief.units import BernoulliUnits, Units

__all__ = ["KIND", "VERSION", "study_belief"]

KIND, VERSION = "neuromanifold.belief", 1

DREAMS = 1000
"""Samples that are compared with the training images."""


def study_belief(
    trainings: Mapping[str, Training],
    data: Tensor | Patterns,
    test: Tensor | None = None,
    *,
    name: str,
    steps: int,
    batch_size: int = 32,
    evaluations: int = 12,
    samples: int = 1000,
    pictures: int = 12,
    shape: tuple[int, int] | None = None,
    geometries: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Train machines on the same batches, and note what each of them has learned.

    Trainings take turns, so that what else the computer does slows all of them alike.

    Args:
        trainings: by name, each of a machine of its own with Bernoulli leaves.
        data: training images `(N, n_v)` in coded values, or patterns with probabilities, which
            machines are then also judged by.
        test: other images `(M, n_v)`, not with patterns.
        name: of the data.
        steps: updates of each machine.
        batch_size: rows of a batch.
        evaluations: how often log-likelihoods are measured on the way.
        samples: importance samples for each row, see `HelmholtzMachine.log_likelihood`.
        pictures: how many samples and reconstructions are kept.
        shape: rows and columns of an image; square if not given.
        geometries: whether to compare the natural gradients of all units and of the visible ones on
            the way of the first training, by enumeration: for small networks.
        seed: of batches and of evaluations.

    Returns:
        Plain data for `render_belief` and for JSON.

    Raises:
        TooLargeError: If natural gradients are to be compared of a network that is not small.
        ValueError: If there is nothing to train or to judge by, or images have another shape.

    Example:
        >>> from neuromanifold import belief
        >>> machine = belief.HelmholtzMachine([1, 4, 9])
        >>> training = {"natural": belief.WakeSleep(machine, lr=0.1)}
        >>> study = study_belief(training, belief.lines(), name="lines", steps=4, evaluations=2)
        >>> round(study["best"], 2)  # no machine has a higher log-likelihood
        -2.43
    """
    machine = _first_machine(trainings)
    net = machine.generative
    if isinstance(data, Patterns) != (test is None):
        raise ValueError("Give test images with training images, and none with patterns.")
    train = data if isinstance(data, Patterns) else _equal(data)
    judged = train if test is None else _equal(test)
    shape = shape or (math.isqrt(net.sizes[-1]),) * 2
    if shape[0] * shape[1] != net.sizes[-1]:
        raise ValueError(
            f"{net.sizes[-1]} visible units are no image of {shape[0]} × {shape[1]} pixels; "
            f"pass its rows and columns as shape=."
        )
    if steps < evaluations or evaluations < 1:
        raise ValueError(
            f"evaluations are at least 1 and at most steps, got {evaluations} and {steps}."
        )

    runs = {key: _Run(training) for key, training in trainings.items()}
    batches = torch.Generator().manual_seed(seed)
    judge = _Judge(judged, samples=samples, sampled=test is not None, seed=seed)
    geometry = []
    stops = [round(steps * part / evaluations) for part in range(evaluations + 1)]
    for before, stop in zip([0, *stops], stops, strict=False):
        chunk = [train.draw(batch_size, generator=batches) for _ in range(stop - before)]
        for run in runs.values():
            run.advance(chunk)
            run.curve.append({"step": stop, "seconds": run.seconds, **judge(run)})
        if geometries:
            geometry.append({"step": stop, **_two_gradients(net, judged)})
    pictured = judged.states[:pictures]
    found: dict[str, Any] = plain(
        {
            "kind": KIND,
            "version": VERSION,
            "name": name,
            "shape": shape,
            "sizes": net.sizes,
            "num_parameters": sum(parameter.numel() for parameter in machine.parameters()),
            "dtype": str(net.dtype).removeprefix("torch."),
            "device": str(net.device),
            "steps": steps,
            "batch_size": batch_size,
            "samples": samples,
            "tested_on": len(judged.states),
            "sampled": judge.sampled,
            "best": None if judge.sampled else -judged.entropy,
            "images": net.units[-1].statistic(pictured),
            "test": _likeness(judged.states, train.states, net.units[-1])
            if judge.sampled
            else None,
            "runs": [
                {"name": key, **run.algorithm(), "seconds": run.seconds, "curve": run.curve}
                | _pictures(run.machine, train, judged, pictures, seed)
                for key, run in runs.items()
            ],
            "difference": _leaders(runs, judge),
            "geometry": geometry,
        }
    )
    return found


@dataclass
class _Run:
    """A training with what has been noted of it."""

    training: Training
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)
    rows: Tensor | None = None
    """Log-likelihood of each row, at the last evaluation."""

    @property
    def machine(self) -> HelmholtzMachine:
        return self.training.machine

    def algorithm(self) -> dict[str, Any]:
        training = self.training
        return {
            "algorithm": type(training).__name__,
            "natural": training.natural,
            "samples": training.samples,
        }

    def advance(self, batches: Sequence[Tensor]) -> None:
        start, found = time.perf_counter(), None
        for batch in batches:
            found = self.training.step(batch)
        if found is not None:
            float(found["log_likelihood"])  # a device has done its work when it answers
        self.seconds += time.perf_counter() - start


@dataclass(frozen=True)
class _Judge:
    """Log-likelihoods by importance sampling, with standard errors."""

    patterns: Patterns
    samples: int
    sampled: bool
    seed: int

    def __call__(self, run: _Run) -> dict[str, float]:
        net = run.machine.generative
        generator = torch.Generator(net.device).manual_seed(self.seed)
        states = self.patterns.states.to(net.device, net.dtype)
        found = run.machine.log_likelihood(states, self.samples, generator, per_row=True)
        assert isinstance(found.value, Tensor)
        run.rows = found.value.cpu()
        drawn = found.variances["draws"]
        assert isinstance(drawn, Tensor)
        # What rows of a sample differ by holds the error of each.
        variance = (
            run.rows.var() / len(run.rows)
            if self.sampled
            else self.patterns.probabilities.square() @ drawn.cpu()
        )
        return {
            "value": float(self.patterns.probabilities @ run.rows),
            "stderr": float(variance.sqrt()),
        }

    def difference(self, one: _Run, other: _Run) -> dict[str, float]:
        """Of two log-likelihoods of the same rows, which is known better than either."""
        assert one.rows is not None
        assert other.rows is not None
        apart = one.rows - other.rows
        stderr = math.hypot(one.curve[-1]["stderr"], other.curve[-1]["stderr"])
        if self.sampled:
            stderr = float(apart.std()) / math.sqrt(len(apart))
        return {"value": float(self.patterns.probabilities @ apart), "stderr": stderr}


def _first_machine(trainings: Mapping[str, Training]) -> HelmholtzMachine:
    machines = [training.machine for training in trainings.values()]
    if not machines:
        raise ValueError("There is nothing to train: pass at least one training by its name.")
    if len(set(map(id, machines))) < len(machines):
        raise ValueError("Each training needs a machine of its own; two of them share one.")
    if len({machine.generative.sizes[-1] for machine in machines}) > 1:
        raise ValueError("Machines of one study have the same visible units.")
    for machine in machines:
        leaves = machine.generative.units[-1]
        if not isinstance(leaves, BernoulliUnits):
            raise ValueError(f"Pictures are made of Bernoulli leaves, got {leaves!r}.")
    return machines[0]


def _equal(rows: Tensor) -> Patterns:
    return Patterns(rows, rows.new_full((len(rows),), 1 / len(rows)))


def _two_gradients(net: SigmoidBeliefNetwork, data: Patterns) -> dict[str, float]:
    found = compare_gradients(
        copy.deepcopy(net).double(),
        Patterns(
            data.states.to(net.device, torch.float64),
            data.probabilities.to(net.device, torch.float64),
        ),
    )
    return {
        "full_rate": float(found.full_rate),
        "visible_rate": float(found.visible_rate),
        "cosine": float(found.cosine),
    }


def _leaders(runs: Mapping[str, _Run], judge: _Judge) -> dict[str, Any] | None:
    """How far the best is ahead of the second, None if there is one alone."""
    order = sorted(runs, key=lambda key: -runs[key].curve[-1]["value"])
    if len(order) < 2:
        return None
    first, second = order[:2]
    return {"first": first, "second": second} | judge.difference(runs[first], runs[second])


@torch.no_grad()
def _pictures(
    machine: HelmholtzMachine, train: Patterns, judged: Patterns, pictures: int, seed: int
) -> dict[str, Any]:
    """Samples and reconstructions, and how good they are."""
    net = machine.generative
    last, leaves = len(net.sizes) - 1, net.units[-1]
    generator = torch.Generator(net.device).manual_seed(seed)
    dreams = net.sample(DREAMS, generator)[-1]
    rows = judged.states.to(net.device, net.dtype)
    restored = net.probabilities(machine.recognition.sample(rows, generator), last)
    seen = leaves.statistic(rows)
    right = (seen * restored + (1 - seen) * (1 - restored)).mean(-1).cpu()
    return {
        "dreams": leaves.statistic(dreams[:pictures]),
        "restored": restored[:pictures],
        "likeness": _likeness(dreams.cpu(), train.states, leaves),
        "right": float(judged.probabilities @ right.to(judged.probabilities)),
    }


def _likeness(images: Tensor, train: Tensor, leaves: Units) -> dict[str, float]:
    """How images compare with training images."""
    ours, theirs = leaves.statistic(images), leaves.statistic(train).to(images)
    pixels = ours.sum(-1)[:, None] + theirs.sum(-1) - 2 * ours @ theirs.mT
    nearest = pixels.min(-1).values
    return {
        "on": float(ours.mean()),
        "nearest": float(nearest.mean()),
        "nearest_stderr": float(nearest.std()) / math.sqrt(len(nearest)),
        "known": float((nearest < 0.5).to(nearest).mean()),
    }
