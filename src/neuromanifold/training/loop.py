"""One model trained by one optimizer, which can stop at any step and go on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neuromanifold import optim
from neuromanifold._progress import Progress
from neuromanifold.capture import call_model, logits_of
from neuromanifold.likelihoods import Likelihood
from neuromanifold.training import checkpoint
from neuromanifold.training.batches import Minibatches
from neuromanifold.training.entries import Entry
from neuromanifold.training.evaluation import evaluate
from neuromanifold.training.randomness import restore, seed_epoch, states

__all__ = ["Problem", "Run", "Settings", "Stopped"]

POINTS = 40
"""Of a loss curve; each is the mean over a window of steps."""

WRITINGS = 50
"""How often a run looks at the scalars of a natural-gradient optimizer."""


class Problem(NamedTuple):
    """A model, what its outputs mean, and data; `test` is None if there are none."""

    model: nn.Module
    likelihood: Likelihood
    data: Any
    test: Any = None


class Settings(NamedTuple):
    """What a run that goes on must share with the one that stopped."""

    entry: Entry
    batch_size: int
    seed: int
    damping: float | None

    def plain(self) -> dict[str, Any]:
        """As it is written into a checkpoint."""
        own = {"optimizer": self.entry.name, "lr": self.entry.lr}
        return {**own, "batch_size": self.batch_size, "seed": self.seed, "damping": self.damping}


class Stopped(Exception):
    """The run was asked to stop, and its checkpoint, if it has one, was written."""


class Run:
    """Training by one optimizer from one seed.

    Args:
        problem: its model is trained in place.
        settings: of this run.
        epochs: that it is trained for in all.
        path: of its checkpoint, written after each epoch and when it stops; None for none.
    """

    def __init__(
        self, problem: Problem, settings: Settings, *, epochs: int, path: Path | None = None
    ) -> None:
        self.model, self.likelihood = problem.model, problem.likelihood
        self.settings, self.epochs, self.path = settings, epochs, path
        self.data = Minibatches(problem.data, self.model, settings.batch_size)
        self.test = (
            None
            if problem.test is None
            else Minibatches(problem.test, self.model, settings.batch_size)
        )
        self.optimizer = settings.entry.build(
            self.model, self.likelihood, seed=settings.seed, damping=settings.damping
        )
        self.epoch = 0
        """Epochs that are complete."""
        self.done = 0
        """Minibatches of the running epoch that are."""
        self.losses: list[Tensor] = []
        """Of each step, in nats per sample, on the device."""
        self.sizes: list[int] = []
        self.clock: list[float] = []
        """Seconds of training at the end of each step, without evaluations."""
        self.history: list[dict[str, Any]] = []
        """Loss and accuracy after each epoch, on test data or else on those of training."""
        self.scalars: list[dict[str, float]] = []
        self.ended: dict[str, float | None] | None = None
        """Loss and accuracy on the training data at the end."""
        self._monitor: optim.Monitor | None = None
        if isinstance(self.optimizer, optim.NaturalGradient | optim.ExactNaturalGradient):
            every = max(1, epochs * len(self.data) // WRITINGS) if len(self.data) else 10
            self._monitor = optim.Monitor(self.optimizer, self._note_scalars, every=every)

    def _note_scalars(self, step: int, found: dict[str, float]) -> None:
        self.scalars.append({"step": step, **found})

    @property
    def diverged(self) -> bool:
        """Whether parameters hold NaN or infinity, from which no step leads back."""
        sums = [p.detach().double().sum() for p in self.model.parameters()]
        return not math.isfinite(float(torch.stack(sums).sum()))

    # ---- training --------------------------------------------------------------------------

    def train(self, *, stop: Callable[[], bool], report: Progress | None = None) -> None:
        """Train to the last epoch.

        Args:
            stop: asked after each step.
            report: told of steps done, and how many there are if that is known.

        Raises:
            Stopped: If it was asked to; the checkpoint is of this very step then.
        """
        self.model.train()
        if not self.history:
            self._evaluate()
        while self.epoch < self.epochs and not self._gave_up:
            self._train_epoch(stop, report)
            self.epoch, self.done = self.epoch + 1, 0
            self._evaluate()
            self.save()
            if stop():
                raise Stopped
        if self.ended is None or self.ended["epoch"] != self.epoch:
            loss, accuracy = evaluate(self.model, self.likelihood, self.data)
            self.ended = {"epoch": self.epoch, "loss": loss, "accuracy": accuracy}
            self.save()

    @property
    def _gave_up(self) -> bool:
        return self.epoch > 0 and self.done == 0 and self.diverged

    def _train_epoch(self, stop: Callable[[], bool], report: Progress | None) -> None:
        stopped_with = states() if self.done else None
        seed_epoch(self.data.source, self.settings.seed, self.epoch)
        batches = iter(self.data)
        if stopped_with is not None:  # the first batches were trained on before
            next(islice(batches, self.done - 1, None))
            restore(stopped_with)
        per_epoch = len(self.data)
        start = time.perf_counter() - (self.clock[-1] if self.clock else 0.0)
        watched = 0.0 if self._monitor is None else self._monitor.seconds
        for inputs, targets, num in batches:
            self.losses.append(self._step(inputs, targets))
            self.sizes.append(num)
            now = time.perf_counter() - start
            if self._monitor is not None:
                now -= self._monitor.seconds - watched
            self.clock.append(now)
            if self.scalars and self.scalars[-1]["step"] == len(self.clock):
                self.scalars[-1]["seconds"] = now
            self.done += 1
            if report is not None:
                report(len(self.losses), per_epoch * self.epochs or None)
            if stop():
                self.save()
                raise Stopped

    def _step(self, inputs: Any, targets: Tensor) -> Tensor:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            outputs = self.likelihood.canonical(logits_of(call_model(self.model, inputs)))
            loss = self.likelihood.loss(outputs, targets)
            # The mean over positions is minimised, as losses of torch are: learning rates and
            # curvature are in that unit.
            positions = self.likelihood.num_positions(outputs, targets).clamp(min=1)
            (loss * (len(outputs) / positions)).backward()
            return loss

        loss: Any = self.optimizer.step(closure)  # type: ignore[arg-type]  # floats, it says
        return torch.as_tensor(loss).detach()

    def _evaluate(self) -> None:
        data = self.data if self.test is None else self.test
        loss, accuracy = evaluate(self.model, self.likelihood, data)
        self.history.append(
            {
                "epoch": self.epoch,
                "step": len(self.losses),
                "seconds": self.clock[-1] if self.clock else 0.0,
                "loss": loss,
                "accuracy": accuracy,
            }
        )

    # ---- state -----------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint, if there is one."""
        if self.path is None:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": states(),
            "epoch": self.epoch,
            "done": self.done,
            "losses": _joined(self.losses),
            "sizes": self.sizes,
            "clock": self.clock,
            "history": self.history,
            "scalars": self.scalars,
            "ended": self.ended,
        }
        checkpoint.write(self.path, self.settings.plain(), state)

    def resume(self) -> None:
        """Go on from the checkpoint.

        Raises:
            StorageError: If it cannot be read.
            ValueError: If it is of another model, or of other settings.
        """
        assert self.path is not None
        state = checkpoint.read(self.path, self.settings.plain())
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise ValueError(
                f"{self.path} is of another model: {error}. Give another folder."
            ) from None
        self._load(state)

    def _load(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.done = state["epoch"], state["done"]
        self.losses = list(state["losses"])
        self.sizes, self.clock = state["sizes"], state["clock"]
        self.history, self.scalars, self.ended = state["history"], state["scalars"], state["ended"]
        if self.done:
            restore(state["random"])

    def result(self) -> dict[str, Any]:
        """What happened, as plain numbers."""
        losses = _joined(self.losses).double()
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        last = self.history[-1]
        assert self.ended is not None
        return {
            "optimizer": self.settings.entry.label,
            "lr": self.optimizer.defaults["lr"],
            "seed": self.settings.seed,
            "epochs": self.epoch,
            "steps": len(losses),
            "seconds": last["seconds"],
            "train_loss": self.ended["loss"],
            "train_accuracy": self.ended["accuracy"],
            "test_loss": None if self.test is None else last["loss"],
            "test_accuracy": None if self.test is None else last["accuracy"],
            "curve": self._curve(losses),
            "history": self.history,
            "scalars": self.scalars,
            "non_finite": {"count": len(bad), "first_step": bad[0] + 1 if bad else None},
            "diverged": self.diverged,
        }

    def _curve(self, losses: Tensor) -> list[dict[str, float]]:
        """Mean loss in windows of steps; at the last step of each."""
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        width = -(-len(losses) // POINTS)
        points, end = [], 0
        for loss, size in zip(losses.split(width), sizes.split(width), strict=True):
            end += len(loss)
            mean = float((loss * size).sum() / size.sum())
            points.append({"step": end, "seconds": self.clock[end - 1], "loss": mean})
        return points


def _joined(losses: list[Tensor]) -> Tensor:
    """Losses of all steps `(steps,)` on the CPU."""
    return torch.stack(losses).cpu() if losses else torch.zeros(0)
