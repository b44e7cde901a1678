"""A workload measured: ours and every peer's prepared, checked, and timed together."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any

import torch

from benchmarks import floors
from benchmarks.harness import (
    Guarded,
    clock_of,
    described,
    first_line,
    interleave,
    quartiles,
)
from benchmarks.peers import Peer
from benchmarks.progress import Progress
from benchmarks.quantities import QUANTITIES, Drawn, Quantity, check, check_drawn
from benchmarks.reference import Reference, reference
from benchmarks.rows import LIKELIHOOD, Row
from benchmarks.workloads import WORKLOADS, Batch, forward_backward

__all__ = ["MODES", "OURS", "UNIT", "Mode", "Scene", "guesses", "measure", "unit_seconds"]

OURS = "neuromanifold"
UNIT = "forward + backward"
SEED = 0
USUAL = 3.0
"""Units that a task takes, to guess how long a run will."""
DRAWS = 8
"""Of labels, to judge a library that draws its own."""


@dataclass(frozen=True)
class Mode:
    """How often calls are timed, and how long that may take.

    Attributes:
        rounds: of every task that is fast enough.
        seconds: that all rounds of a task may take, but there are at least LEAST_ROUNDS. A task
            whose first call takes longer is not called again.
        step_rounds: of optimizer steps.
    """

    rounds: int
    seconds: float
    step_rounds: int

    def rounds_of(self, seconds: float) -> int:
        """Of a task that takes some seconds."""
        return max(LEAST_ROUNDS, min(self.rounds, int(self.seconds / seconds)))


MODES = {
    "smoke": Mode(rounds=3, seconds=3.0, step_rounds=3),
    "quick": Mode(rounds=9, seconds=10.0, step_rounds=50),
    "full": Mode(rounds=31, seconds=100.0, step_rounds=200),
}
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Scene:
    """A workload on a device, with sampled labels.

    Attributes:
        workload: key of `WORKLOADS`.
        device: where it is.
    """

    workload: str
    device: torch.device
    _answers: dict[Callable[[Reference], Any], Any] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @cached_property
    def batch(self) -> Batch:
        """Always the same."""
        torch.manual_seed(SEED)
        return WORKLOADS[self.workload].build().to(self.device)

    @cached_property
    def labels(self) -> torch.Tensor:
        """The first that a seeded generator draws, (N, *T)."""
        return self._draw(self.generator())

    @cached_property
    def reference(self) -> Reference:
        """For these labels."""
        return reference(self.batch, self.labels)

    def expected(self, quantity: Quantity) -> Any:
        """By the reference; quantities that ask it for the same thing share the answer."""
        if quantity.expected not in self._answers:
            self._answers[quantity.expected] = quantity.expected(self.reference)
        return self._answers[quantity.expected]

    def forget(self) -> None:
        """Free what the reference takes."""
        self.__dict__.pop("reference", None)
        self._answers.clear()

    def other_references(self) -> Iterator[Reference]:
        """For other labels, one at a time."""
        generator = self.generator()
        for _ in range(DRAWS):
            yield reference(self.batch, self._draw(generator))

    def generator(self) -> torch.Generator:
        """Seeded."""
        return torch.Generator(self.device).manual_seed(SEED)

    def _draw(self, generator: torch.Generator) -> torch.Tensor:
        outputs = self.batch.model(self.batch.inputs).detach()
        return LIKELIHOOD.sample(outputs, 1, generator=generator)[0]


@dataclass
class Attempt:
    """One library at one row.

    Attributes:
        who: its name.
        row: what it is to compute.
        prepare: makes the timed call.
        task: the timed call; it may have failed.
        problem: what is wrong with the answer, or what failed; "" if nothing.
        seconds: of the latest call.
        once: whether it is too slow to be called again.
    """

    who: str
    row: Row
    prepare: Callable[[], Callable[[], Any]]
    task: Guarded | None = None
    problem: str = ""
    seconds: float = 0.0
    once: bool = False

    @property
    def name(self) -> str:
        """Unique on a workload."""
        return f"{self.row.quantity}: {self.who}"

    @property
    def works(self) -> bool:
        """Whether it gives an answer, right or wrong."""
        return self.task is not None and not self.task.problem

    def make(self, scene: Scene, longest: float) -> None:
        """Prepare, run, check the answer, and run again.

        What takes longer than `longest` seconds is not called again.
        """
        prepared = Guarded(self.prepare)
        task = prepared()
        self.problem = prepared.problem
        if self.problem:
            return
        self.task = Guarded(task)
        answer = self._timed(clock_of(scene.device))
        if not self.works:
            return
        quantity = QUANTITIES[self.row.quantity]
        try:
            if isinstance(answer, Drawn):
                check_drawn(quantity, answer, scene.other_references())
            else:
                check(quantity, answer, scene.expected(quantity), scene.reference)
        except AssertionError as error:
            self.problem = f"wrong: {first_line(error)}"
        except Exception as error:  # an answer of another form may fail anywhere in the check
            self.problem = f"not checked: {described(error)}"
        self.once = self.seconds > longest
        if not self.once:
            self._timed(clock_of(scene.device))

    def _timed(self, clock: Callable[[], float]) -> Any:
        assert self.task is not None
        start = clock()
        answer = self.task()
        self.seconds = clock() - start
        return answer


def measure(
    workload: str,
    rows: Sequence[Row],
    peers: Sequence[Peer],
    mode: Mode,
    device: torch.device,
    progress: Progress,
) -> list[dict[str, Any]]:
    """All rows of one workload, by everyone who has them, in units of forward and backward."""
    scene = Scene(workload, device)
    attempts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in rows:
            for attempt in _attempts(row, peers, scene):
                progress.start(f"{workload}: {attempt.name}")
                attempt.make(scene, mode.seconds)
                attempts.append(attempt)
        scene.forget()
        progress.start(f"{workload}: timing", _seconds(attempts, mode))
        times = _times(attempts, scene, mode)
    counts = floors.counts(scene.batch)
    return [
        _result(row, [a for a in attempts if a.row is row], times, counts, scene) for row in rows
    ]


def guesses(
    workload: str, rows: Sequence[Row], peers: Sequence[Peer], mode: Mode, device: torch.device
) -> dict[str, float]:
    """Seconds that the parts of `measure` may take, by the names that they have there."""
    usual = USUAL * unit_seconds(workload, device)
    attempts = [a for row in rows for a in _attempts(row, peers, Scene(workload, device))]
    found = {f"{workload}: {attempt.name}": 5 * usual for attempt in attempts}
    found[f"{workload}: timing"] = len(attempts) * usual * (1 + mode.rounds_of(usual))
    return found


@cache
def unit_seconds(workload: str, device: torch.device) -> float:
    """Of a warm forward and backward, once."""
    unit = partial(forward_backward, Scene(workload, device).batch)
    return interleave({UNIT: unit}, 1, clock_of(device), warm_up=1)[UNIT][0]


def _attempts(row: Row, peers: Sequence[Peer], scene: Scene) -> Iterator[Attempt]:
    yield Attempt(OURS, row, partial(row.prepare, scene.batch, scene.generator()))
    for peer in peers:
        theirs = peer.rows.get((row.workload, row.quantity))
        if theirs is not None:
            yield Attempt(peer.name, row, partial(theirs, scene.batch, scene.labels))


def _seconds(attempts: Sequence[Attempt], mode: Mode) -> float:
    """That timing will take."""
    again = [a.seconds for a in attempts if a.works and not a.once]
    return sum(seconds * (1 + mode.rounds_of(seconds)) for seconds in again)


def _times(
    attempts: Sequence[Attempt], scene: Scene, mode: Mode
) -> Mapping[str, tuple[list[float], list[float]]]:
    """Seconds of every call, and of the unit in the same rounds."""
    tasks: dict[str, Callable[[], object]] = {
        a.name: a.task for a in attempts if a.task and a.works and not a.once
    }
    rounds = {a.name: mode.rounds_of(a.seconds) for a in attempts if a.name in tasks}
    rounds[UNIT] = max(rounds.values(), default=LEAST_ROUNDS)
    tasks[UNIT] = partial(forward_backward, scene.batch)
    seconds = interleave(tasks, rounds, clock_of(scene.device), warm_up=1)
    unit = seconds[UNIT]
    found = {name: (some, unit[: len(some)]) for name, some in seconds.items()}
    usual = statistics.median(unit)
    return found | {a.name: ([a.seconds], [usual]) for a in attempts if a.works and a.once}


def _result(
    row: Row,
    attempts: Sequence[Attempt],
    times: Mapping[str, tuple[list[float], list[float]]],
    counts: floors.Counts,
    scene: Scene,
) -> dict[str, Any]:
    """For a JSON file."""
    task = attempts[0].task
    counted = None if task is None else floors.operations(task) / counts.unit
    return {
        "workload": row.workload,
        "title": WORKLOADS[row.workload].title,
        "quantity": row.quantity,
        "form": QUANTITIES[row.quantity].form,
        "device": str(scene.device),
        "target": row.target,
        "floor": None if row.floor is None else row.floor(counts) / counts.unit,
        "operations": counted,
        "answers": {a.who: _answer(a, times) for a in attempts},
    }


def _answer(
    attempt: Attempt, times: Mapping[str, tuple[list[float], list[float]]]
) -> dict[str, Any]:
    later = attempt.task.problem if attempt.task is not None else ""
    answer: dict[str, Any] = {"problem": attempt.problem or later}
    if attempt.works:
        seconds, unit = times[attempt.name]
        answer |= {"quartiles": quartiles(seconds, unit), "seconds": seconds, "unit_seconds": unit}
    return answer
