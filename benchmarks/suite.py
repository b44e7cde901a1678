"""A workload measured: ours and every peer's prepared, checked, and timed together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch

from benchmarks import floors
from benchmarks.harness import clock_of, interleave, quartiles
from benchmarks.peers import Peer
from benchmarks.quantities import QUANTITIES, Drawn, check, check_drawn
from benchmarks.reference import Reference, reference
from benchmarks.rows import LIKELIHOOD, Row
from benchmarks.workloads import WORKLOADS, Batch, forward_backward

__all__ = ["MODES", "OURS", "Mode", "Scene", "measure"]

OURS = "neuromanifold"
UNIT = "forward + backward"
SEED = 0
DRAWS = 8
"""Of labels, to judge a library that draws its own."""


@dataclass(frozen=True)
class Mode:
    """How often calls are timed.

    Attributes:
        rounds: of most.
        slow_rounds: of those that take more than SLOW units.
        step_rounds: of optimizer steps.
    """

    rounds: int
    slow_rounds: int
    step_rounds: int


MODES = {"smoke": Mode(3, 3, 3), "quick": Mode(9, 3, 50), "full": Mode(31, 9, 200)}
SLOW = 25.0
ONCE = 250.0
"""Units from which the first call is all that is timed."""


@dataclass(frozen=True)
class Scene:
    """A workload on a device, with sampled labels.

    Attributes:
        workload: key of `WORKLOADS`.
        device: where it is.
    """

    workload: str
    device: torch.device

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
        task: the timed call; None if it failed.
        problem: what failed, or is wrong with the answer; "" if nothing.
        first_seconds: of the first call.
    """

    who: str
    row: Row
    prepare: Callable[[], Callable[[], Any]]
    task: Callable[[], Any] | None = None
    problem: str = ""
    first_seconds: float = 0.0

    @property
    def name(self) -> str:
        """Unique on a workload."""
        return f"{self.row.quantity}: {self.who}"

    def make(self, scene: Scene, expected: Callable[[], Any]) -> None:
        """Prepare, run once, and check the answer: it is the one with the reference's labels."""
        clock, quantity = clock_of(scene.device), QUANTITIES[self.row.quantity]
        try:
            task = self.prepare()
            start = clock()
            answer = task()
            self.first_seconds = clock() - start
        except Exception as error:  # whatever a peer raises is its result
            self.problem = f"{type(error).__name__}: {_first_line(error)}"
            return
        self.task = task
        try:
            if isinstance(answer, Drawn):
                check_drawn(quantity, answer, scene.other_references())
            else:
                check(quantity, answer, expected(), scene.reference)
        except Exception as error:  # an answer of another form may fail anywhere in the check
            self.problem = f"wrong: {_first_line(error)}"


def measure(
    workload: str,
    rows: Sequence[Row],
    peers: Sequence[Peer],
    mode: Mode,
    device: torch.device,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """All rows of one workload, by everyone who has them, in units of forward and backward."""
    scene = Scene(workload, device)
    attempts = []
    for row in rows:
        expected = cache(partial(QUANTITIES[row.quantity].expected, scene.reference))
        for attempt in _attempts(row, peers, scene):
            tell(f"{workload}: {attempt.name}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                attempt.make(scene, expected)
            attempts.append(attempt)
    del expected, scene.__dict__["reference"]
    tell(f"{workload}: timing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        times = _times(attempts, scene, mode)
    counts = floors.counts(scene.batch)
    return [
        _result(row, [a for a in attempts if a.row is row], times, counts, scene) for row in rows
    ]


def _attempts(row: Row, peers: Sequence[Peer], scene: Scene) -> Iterator[Attempt]:
    yield Attempt(OURS, row, partial(row.prepare, scene.batch, scene.generator()))
    for peer in peers:
        theirs = peer.rows.get((row.workload, row.quantity))
        if theirs is not None:
            yield Attempt(peer.name, row, partial(theirs, scene.batch, scene.labels))


def _times(
    attempts: Sequence[Attempt], scene: Scene, mode: Mode
) -> Mapping[str, tuple[list[float], list[float]]]:
    """Seconds of every call, and of the unit in the same rounds."""
    unit = partial(forward_backward, scene.batch)
    clock = clock_of(scene.device)
    unit()
    started = clock()
    unit()
    usual = clock() - started
    found: dict[str, tuple[list[float], list[float]]] = {}
    groups: dict[bool, dict[str, Callable[[], object]]] = {False: {}, True: {}}
    for a in attempts:
        if a.task is None:
            continue
        if a.first_seconds > ONCE * usual:
            found[a.name] = [a.first_seconds] * 2, [usual] * 2
        else:
            groups[a.first_seconds > SLOW * usual][a.name] = a.task
    for slow, rounds in ((False, mode.rounds), (True, mode.slow_rounds)):
        group = groups[slow]
        if group:
            tasks: dict[str, Callable[[], object]] = {UNIT: unit, **group}
            seconds = interleave(tasks, rounds, clock, warm_up=1 if slow else 3)
            found |= {name: (seconds[name], seconds[UNIT]) for name in group}
    return found


def _result(
    row: Row,
    attempts: Sequence[Attempt],
    times: Mapping[str, tuple[list[float], list[float]]],
    counts: floors.Counts,
    scene: Scene,
) -> dict[str, Any]:
    """For a JSON file."""
    ours = attempts[0]
    counted = None if ours.task is None else floors.operations(ours.task) / counts.unit
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
    answer: dict[str, Any] = {"problem": attempt.problem}
    if attempt.name in times:
        seconds, unit = times[attempt.name]
        answer |= {"quartiles": quartiles(seconds, unit), "seconds": seconds, "unit_seconds": unit}
    return answer


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
