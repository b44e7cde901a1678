"""The spectrum along training, within a share of its time."""

from __future__ import annotations

import contextlib
import math
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neuromanifold._writing import Write, writer
from neuromanifold.capture import Batch, Data, Forward, buffers_kept
from neuromanifold.errors import NonFiniteError
from neuromanifold.estimators import Estimator
from neuromanifold.likelihoods import Likelihood
from neuromanifold.spectral.choice import operator
from neuromanifold.spectral.quadrature import require_damping
from neuromanifold.spectral.quantities import Summary, summary

__all__ = ["Measured", "Monitor"]

GROWTH = 8
"""What twice the samples add to the time grows at most by that: an eigendecomposition is cubic."""

USED = 0.8
"""Share of the budget that its own time may take: steps after a measurement find caches cold."""

RECENT = 3
"""Measurements of which the slowest says what the next one will cost."""


@dataclass(frozen=True)
class Measured:
    """The spectrum after some steps of training, in numbers.

    Attributes:
        step: how many had been done.
        seconds: what the measurement took.
        values: numbers of `nm.spectral.Summary` by name, of layers as `NAME/LAYER`.
        errors: of these: standard errors and bounds together, 0 where exact.
        method: what was done.
    """

    step: int
    seconds: float
    values: Mapping[str, float]
    errors: Mapping[str, float]
    method: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON and checkpoints."""
        return asdict(self)


class Monitor:
    """Trace, norm, dimensions and largest eigenvalue along training, within a budget of its time.

    Call `step()` once after each training step, with whatever optimizer. It measures when that
    keeps its own time below `budget` times the training's, which is all the time between calls; a
    fifth of the budget is left for what it slows down besides. What a measurement will cost is
    known before the first one from trials on 1, 2, 4, ... samples, which count as well. `measure()`
    does not wait, and its cost has to be saved up for afterwards.

    All measurements see the same samples, the same random vectors, and the model as it predicts:
    in evaluation mode. Training goes on as if they had not been: modes, buffers, gradients and
    random numbers are what they were.

    Args:
        model: any module; a trial on one sample says at once if it cannot be measured.
        likelihood: what its outputs mean.
        data: some hundred samples are enough for most purposes; they are kept.
        budget: seconds of measurement per second of training.
        damping: positive, of dimension and condition number, in nats/parameter².
        per_layer: measure the blocks of layers too.
        write: a `torch.utils.tensorboard.SummaryWriter`, a folder to write such events into, or a
            function `write(step, scalars)`; None keeps `history` only. Besides the numbers it gets
            `seconds`, and `share`, the measurements' time over that of training so far.
        prefix: of the names that TensorBoard shows.
        estimator: as for `nm.spectral.operator`, like all that follow. `nm.MonteCarlo(1)` takes
            C times fewer gradients for C classes than the default, `nm.Exact()`; once a classifier
            is confident, labels that are rarely drawn then make numbers jump.
        per: divide by samples, or by positions.
        forward: how the model is called.
        generator: a seed is drawn from it once, for labels and random vectors.
        max_bytes: of the Gram matrix; without it, numbers are estimates.
        clock: tells seconds.

    Raises:
        ValueError: If an argument makes no sense, or the model cannot be measured.
        UnsupportedError: If a folder is given, and TensorBoard is not installed.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x, y = torch.nn.Linear(4, 3), torch.randn(32, 4), torch.randint(3, (32,))
        >>> opt = torch.optim.AdamW(model.parameters())
        >>> monitor = nm.spectral.Monitor(model, nm.Categorical(), x, budget=0.05)
        >>> start = monitor.measure()
        >>> for _ in range(4):
        ...     opt.zero_grad()
        ...     torch.nn.functional.cross_entropy(model(x), y).backward()
        ...     opt.step()
        ...     found = monitor.step()  # None until there was time enough
        >>> monitor.history[0].step, start.values["trace"] > 0
        (0, True)
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        data: Any,
        budget: float = 0.05,
        *,
        damping: float = 1e-3,
        per_layer: bool = False,
        write: Any = None,
        prefix: str = "spectrum/",
        estimator: Estimator | None = None,
        per: Literal["sample", "position"] = "sample",
        forward: Forward | None = None,
        generator: torch.Generator | None = None,
        max_bytes: int | str = "1 GiB",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        require_damping(damping)
        if not (isinstance(budget, (int, float)) and 0 < budget < math.inf):
            raise ValueError(
                f"budget is a share of the training time, such as 0.05; got {budget!r}."
            )
        self.budget = float(budget)
        self.damping = damping
        self.per_layer = per_layer
        self.history: list[Measured] = []
        """All measurements so far, in order."""
        self.steps = 0
        """Of training, counted by `step()`."""
        self.training_seconds = 0.0
        """Between calls of `step()`, without the measurements."""
        self.seconds = 0.0
        """Spent on measurements, trials among them."""
        self.failed = 0
        """Measurements that were left out because a number was NaN or infinite."""
        self._model = model
        self._device = _device(model)
        self._write: Write | None = None if write is None else writer(write, prefix)
        self._clock = clock
        with _undisturbed(model):  # the default generator stays where it is
            self._seed = int(torch.randint(2**62, (), generator=generator))
            self._batches = list(Data(data))
        self._num_samples = sum(batch.num_samples for batch in self._batches)
        self._operator = partial(
            operator,
            model,
            likelihood,
            estimator=estimator,
            per=per,
            forward=forward,
            max_bytes=max_bytes,
        )
        self._since: float | None = None
        self._last = 0.0  # training_seconds at the last measurement
        self._costs: deque[float] = deque(maxlen=RECENT)
        self._trial = 1  # samples of the next one, until it is all of them
        with self._counted():
            self._summary(1)
        self._since = None  # what happens before the first step is no training
        self._set_up = self._expected = self.seconds

    @property
    def share(self) -> float:
        """Of measurements in the time of training so far: seconds over seconds; 0 before any."""
        return self.seconds / self.training_seconds if self.training_seconds > 0 else 0.0

    def step(self) -> Measured | None:
        """Count a step of training, and measure if the budget allows it.

        Returns:
            What was measured, if so.

        Raises:
            ValueError: As `nm.fisher`, but for numbers that are not finite: those are counted in
                `failed`, with a warning, and training goes on.
        """
        self.steps += 1
        self._until_now()
        if not self._affordable():
            return None
        if self._trial < self._num_samples:
            self._try()
            return None
        return self.measure()

    def measure(self) -> Measured | None:
        """Measure now, whatever the budget says: before the first step, or after the last.

        Returns:
            What was measured; None if a number was not finite.

        Raises:
            ValueError: As `step`.
        """
        self._trial = self._num_samples
        found = None
        with self._counted() as began:
            numbers = self._finite(self._num_samples)
            if numbers is not None:
                found = self._record(numbers, began)
        self._costs.append(self._cost)
        self._expected = max(self._costs)
        self._last = self.training_seconds
        return found

    def _try(self) -> None:
        """Find out what a measurement costs on a part of the samples."""
        before = 0.0 if self._trial == 1 else self._cost
        with self._counted():
            self._finite(self._trial)
        self._trial = min(2 * self._trial, self._num_samples)
        added = GROWTH * (self._cost - before)
        self._expected = self._cost + min(max(added, self._cost), (GROWTH - 1) * self._cost)

    def _affordable(self) -> bool:
        """Whether the next measurement stays within the budget: of all time, and since the last.

        The latter spreads measurements evenly after a time without any.
        """
        rate = USED * self.budget
        allowed, since = rate * self.training_seconds, rate * (self.training_seconds - self._last)
        return self.seconds + self._expected <= allowed and self._expected <= since

    # ---- time ------------------------------------------------------------------------------

    def _until_now(self) -> None:
        """Count the time since the last look at the clock as training."""
        now = self._clock()
        if self._since is not None:
            self.training_seconds += now - self._since
        self._since = now

    @contextlib.contextmanager
    def _counted(self) -> Iterator[float]:
        """Count the time inside as spent on measuring; yields when it began."""
        # What the device still has to do is training.
        torch.get_device_module(self._device).synchronize()
        if self.steps:
            self._until_now()
        began = self._clock()
        try:
            yield began
        finally:
            self._since = self._clock()
            self._cost = self._since - began
            self.seconds += self._cost

    # ---- numbers ---------------------------------------------------------------------------

    def _finite(self, num_samples: int) -> Summary | None:
        try:
            return self._summary(num_samples)
        except NonFiniteError as error:
            self.failed += 1
            warnings.warn(
                f"A measurement of the spectrum was left out: {error}", UserWarning, stacklevel=4
            )
            return None

    def _summary(self, num_samples: int) -> Summary:
        seeded = torch.Generator().manual_seed(self._seed)
        with _undisturbed(self._model):
            F = self._operator(list(_first(self._batches, num_samples)), generator=seeded)
            return summary(F, damping=self.damping, per_layer=self.per_layer, generator=seeded)

    def _record(self, found: Summary, began: float) -> Measured:
        values, errors = {}, {}
        parts = [("", found)]
        parts += [(f"/{name or '(root)'}", layer) for name, layer in found.layers.items()]
        for suffix, part in parts:
            for name, number in part.numbers.items():
                assert isinstance(number.value, Tensor)
                assert isinstance(number.stderr, Tensor)
                values[name + suffix] = float(number.value)
                errors[name + suffix] = float(number.stderr)
        cost = self._clock() - began
        measured = Measured(self.steps, cost, values, errors, found.method)
        self.history.append(measured)
        if self._write is not None:
            share = (self.seconds + cost) / self.training_seconds if self.training_seconds else 0.0
            self._write(self.steps, {**values, "seconds": cost, "share": share})
        return measured

    # ---- state -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Steps, times and history, as plain data."""
        return {
            "steps": self.steps,
            "training_seconds": self.training_seconds,
            "seconds": self.seconds,
            "failed": self.failed,
            "last": self._last,
            "costs": list(self._costs),
            "expected": self._expected,
            "trial": self._trial,
            "seed": self._seed,
            "history": [measured.to_dict() for measured in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another monitor stopped; setting up this one counts too."""
        self.steps = state["steps"]
        self.training_seconds = state["training_seconds"]
        self.seconds = state["seconds"] + self._set_up
        self.failed = state["failed"]
        self._last = state["last"]
        self._costs = deque(state["costs"], maxlen=RECENT)
        self._expected = state["expected"]
        self._trial = min(state["trial"], self._num_samples)
        self._seed = state["seed"]
        self.history = [Measured(**measured) for measured in state["history"]]
        self._since = None


def _first(batches: list[Batch], num_samples: int) -> Iterator[Batch]:
    """As many samples from the start."""
    for batch in batches:
        size = batch.num_samples
        if size >= num_samples:
            yield batch if size == num_samples else batch.samples(0, num_samples)
            return
        yield batch
        num_samples -= size


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Let a model be measured as it predicts, with no effect on the training around it.

    Modes are set directly: a model's own `eval` may do more, such as merging weights.
    """
    modes = {module: module.training for module in model.modules()}
    device = _device(model)
    forked = [] if device.type == "cpu" else [device]
    kind = device.type if forked else "cuda"
    # Buffers are those of training: in evaluation mode, too, a module may count its calls.
    with buffers_kept(model), _eager(), torch.random.fork_rng(forked, device_type=kind):
        for module in modes:
            module.training = False
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Nothing that is compiled runs compiled; the import of the compiler takes a second."""
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()
