"""Estimates that run until they are sure enough: `estimate(model, likelihood, data, ...)`.

Every number here is a mean over inputs of something that varies with the label that is drawn: the
squared norm of a score, of a part of it, or its product with a vector. A round over the data draws
several labels for each input. How much the numbers of one input vary is the noise of labels; what
the means of the inputs vary beyond that is the noise of data (analysis of variance). Sums are all
that is kept, so that data may be of any length, and a round may have another order than the last.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from neuromanifold._estimate import Estimate, Quantity
from neuromanifold._estimation.numbers import Entries, Numbers, Quadratic, Traces
from neuromanifold._files import atomic_path
from neuromanifold._fisher import requested
from neuromanifold._intervals import quantile
from neuromanifold.capture import Batch, Data, Forward, Tape
from neuromanifold.errors import StorageError
from neuromanifold.estimators import Estimator, RandomSigns
from neuromanifold.likelihoods import Likelihood
from neuromanifold.linalg import Vector, memory
from neuromanifold.structures import Progress, Source
from neuromanifold.structures._base import SWEEP_BYTES, require_finite
from neuromanifold.structures.cost import load

__all__ = ["Estimated", "Wanted", "estimate", "shares"]

Wanted: TypeAlias = Literal["trace", "layers", "diagonal", "quadratic"]

DRAWS = 2
"""Of the estimator for each input in a round: the fewest that show how much they differ."""
PATIENCE = 4
"""Rounds after which the noise of the data is taken for known."""
ROUNDING = 1e-12
"""No number is known better than that."""
VERSION = 1
KEY = "neuromanifold.estimate"


@dataclass(frozen=True)
class Estimated(Estimate):
    """An estimate that was run to a tolerance.

    Attributes:
        reached: whether every number that was asked for is within the tolerance.
        note: why not, and what would help.
    """

    reached: bool = True
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**super().to_dict(), "reached": self.reached, "note": self.note}

    def __str__(self) -> str:
        return super().__str__() if self.reached else f"{super().__str__()}. {self.note}"


def estimate(
    model: nn.Module,
    likelihood: Likelihood,
    data: Any,
    quantity: Wanted = "trace",
    *,
    rtol: float = 0.05,
    confidence: float = 0.95,
    estimator: Estimator | None = None,
    vector: Vector | None = None,
    params: Iterable[str] | None = None,
    forward: Forward | None = None,
    uncovered: Literal["generic", "error"] = "generic",
    generator: torch.Generator | None = None,
    progress: bool | Progress = False,
    path: str | os.PathLike[str] | None = None,
    max_draws: int = 1000,
) -> Estimated:
    """Draw labels until a number that the Fisher matrix implies is known well enough.

    Each round goes over the data once, with two draws of the estimator for each input. It ends when
    half the width of the interval is below `rtol` times the value, for each number asked for; or
    when it never will be, because the inputs are too few: then `reached` is False and `note` says
    how many inputs would do. The interval is for the distribution that the inputs come from;
    `error("labels")` alone is the error for these very inputs.

    | quantity | value | error that is compared |
    |---|---|---|
    | "trace" | `tr F`, a number | of it |
    | "layers" | trace of each layer's block, by the layer's name | of each |
    | "diagonal" | of each parameter tensor, its shape | of each tensor, in the Euclidean norm |
    | "quadratic" | `vᵀ F v`, a number | of it |

    An interrupted run (Ctrl-C) loses nothing if it has a `path`: call it again with the same
    arguments, and it goes on; the result is that of a run without interruption. A file also serves
    a later call with a smaller `rtol`. With a loader that shuffles, the round that was interrupted
    is drawn anew.

    Args:
        model: as for `nm.fisher`.
        likelihood: what the outputs mean.
        data: inputs, with or without targets; they are read in each round.
        quantity: what is estimated.
        rtol: half the width of the interval over the value, at most.
        confidence: how often the interval covers the truth.
        estimator: `nm.MonteCarlo(1)` by default. `nm.Exact()` draws nothing: one round gives the
            exact value for these inputs, and the noise of the data.
        vector: v of "quadratic", a dict by parameter or flat `(P,)`.
        params: names or patterns of the parameters.
        forward: how the model is called.
        uncovered: what to do about parameters without a layer rule.
        generator: source of the labels; a run that goes on sets it to where it stopped.
        progress: True shows a progress bar; a function is told `(batches done, batches in all)`,
            where the latter is a forecast, None in the first round.
        path: file in which the draws are kept.
        max_draws: labels or probes for each input, at most.

    Returns:
        Value and variances by source, "data" and "labels" (or "probes"), in nats/parameter²; for
        "quadratic" in nats. `draws` is the number of labels for each input.

    Raises:
        ValueError: If an argument makes no sense, or there is one input only.
        StorageError: If the file is of another request, or no file of this function.
        UnsupportedError: If the data can be read only once.
        NonFiniteError: If outputs or scores hold NaN or infinity.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(4, 3), torch.randn(2000, 4)
        >>> rng = torch.Generator().manual_seed(0)
        >>> trace = nm.estimate(model, nm.Categorical(), x, rtol=0.1, generator=rng)
        >>> trace.reached, sorted(trace.variances)
        (True, ['data', 'labels'])
        >>> low, high = trace.interval(0.95)
        >>> bool(high - low <= 2 * 0.1 * trace.value)
        True
    """
    goal = _Goal(rtol, confidence, max_draws)
    if quantity not in get_args(Wanted):
        raise ValueError(f"quantity is one of {list(get_args(Wanted))}, got {quantity!r}.")
    if (quantity == "quadratic") != (vector is not None):
        raise ValueError(
            'quantity="quadratic" is vᵀ F v: give vector=v, a dict by parameter or flat (P,). '
            "Other quantities take no vector."
        )
    request = requested(
        model,
        likelihood,
        data,
        estimator=estimator,
        params=params,
        forward=forward,
        uncovered=uncovered,
        generator=generator,
        progress=progress,
    )
    with request as (_, source):
        if source.estimator.random:
            source.require_repeatable("nm.estimate(...)")
        run = _Run.prepare(source, quantity, vector, None if path is None else Path(path))
        return run.until(goal)


def shares(estimate: Estimate) -> tuple[list[str], Tensor]:
    """Of each number that was asked for: its name and, `(3, M)`, its square and two variances.

    Of a tensor by parameter it is the squared Euclidean norm and the sums of its variances. The
    variances are that from data, and that from what is drawn.
    """
    names = list(estimate.value) if not isinstance(estimate.value, Tensor) else [""]

    def by_name(quantity: Quantity) -> list[Tensor]:
        return [quantity] if isinstance(quantity, Tensor) else [quantity[name] for name in names]

    squares = [entry.double().square().sum() for entry in by_name(estimate.value)]
    sums = {
        source: torch.stack([entry.double().sum() for entry in by_name(variance)])
        for source, variance in estimate.variances.items()
    }
    data = sums.pop("data")
    drawn = torch.stack([*sums.values(), torch.zeros_like(data)]).sum(dim=0)
    return names, torch.stack([torch.stack(squares), data, drawn]).cpu()


@dataclass(frozen=True)
class _Goal:
    """When to stop."""

    rtol: float
    confidence: float
    max_draws: int

    def __post_init__(self) -> None:
        if not ROUNDING <= self.rtol < math.inf:
            raise ValueError(
                f"rtol is a positive number such as 0.05, not below {ROUNDING:g}; got {self.rtol}."
            )
        quantile(self.confidence)
        if self.max_draws < DRAWS:
            raise ValueError(
                f"max_draws is at least {DRAWS}: how much labels vary is seen from two of them "
                f"for each input. Got {self.max_draws}."
            )

    def allowed(self, squares: Tensor) -> Tensor:
        """The largest variance of numbers with these squares."""
        return squares * (self.rtol / quantile(self.confidence)) ** 2


@dataclass(frozen=True)
class _State:
    """All that was drawn.

    Attributes:
        totals: over whole rounds, `(4, K)`: of the numbers, of their squares, of squared sums over
            the draws of an input, and of squared sums over a round.
        partial: the first three of the round that goes on.
        rounds: whole ones.
        batches: done in the round that goes on.
        samples: in these batches.
        num_samples: N, in a whole round.
        generator: its state after these draws.
    """

    totals: Tensor
    partial: Tensor
    rounds: int
    batches: int
    samples: int
    num_samples: int
    generator: Tensor

    @classmethod
    def empty(cls, numel: int, generator: torch.Generator, device: torch.device) -> _State:
        totals = torch.zeros(4, numel, dtype=torch.float64, device=device)
        return cls(totals, totals[:3], 0, 0, 0, 0, generator.get_state())

    def after_batch(self, sums: Tensor, samples: int, generator: torch.Generator) -> _State:
        return replace(
            self,
            partial=self.partial + sums,
            batches=self.batches + 1,
            samples=self.samples + samples,
            generator=generator.get_state(),
        )

    def after_round(self) -> _State:
        if self.samples < 2:
            raise ValueError(
                "One input says nothing of others: nm.estimate(...) needs at least 2 inputs."
            )
        if self.num_samples not in (0, self.samples):
            raise ValueError(
                f"A round over the data had {self.num_samples} inputs, the next {self.samples}: "
                f"pass data that are the same each time they are read."
            )
        return replace(
            self,
            totals=self.totals + torch.cat([self.partial, self.partial[:1].square()]),
            partial=torch.zeros_like(self.partial),
            rounds=self.rounds + 1,
            batches=0,
            samples=0,
            num_samples=self.samples,
        )

    def variances(self, draws: int) -> tuple[Tensor, Tensor, Tensor]:
        """The mean, and its variances from data and from draws, `(K,)` each."""
        n, rounds = self.num_samples, self.rounds
        total, squares, of_inputs, of_rounds = self.totals
        within = torch.zeros_like(total)
        if draws > 1:
            within = (squares - of_inputs / draws).clamp(min=0) / (n * rounds * (draws - 1))
        between = (of_inputs - of_rounds / n) / (draws**2 * rounds * (n - 1))
        data = (between - within / draws).clamp(min=0) / n
        return total / (n * rounds * draws), data, within / (n * rounds * draws)


class _Run:
    """Rounds over the data, from a state that may come from a file."""

    def __init__(
        self,
        source: Source,
        numbers: Numbers,
        sweeps: int,
        path: Path | None,
        request: dict[str, Any],
    ) -> None:
        self.source = source
        self.numbers = numbers
        self.draws = DRAWS if source.estimator.random else 1
        self.labels = self.draws * sweeps if source.estimator.random else 1
        self.path = path
        self.request = request
        if source.generator is None:
            source.generator = source.frozen_randomness()()
        self.generator = source.generator
        self.state = _State.empty(numbers.numel, self.generator, source.device)
        self._done = 0  # batches in this call, of what is forecast
        self._in_all: int | None = None
        self._per_round: int | None = None
        if path is not None and path.exists():
            self.state = _read(path, request, self.state)
            self.generator.set_state(self.state.generator)

    @classmethod
    def prepare(
        cls, source: Source, quantity: Wanted, vector: Vector | None, path: Path | None
    ) -> _Run:
        """Run the first samples, to see what a batch costs and which layers there are."""
        batch, data = source.data.peek()
        loaded = load(source, batch, memory.available(source.device))
        draws = DRAWS if source.estimator.random else 1
        # All sweeps of a batch travel together: the draws of an input are compared.
        fitting = max(SWEEP_BYTES // (4 * loaded.sweep_numel * loaded.sweeps * draws + 1), 1)
        source = replace(
            source,
            plan=loaded.plan,
            data=data.cut(lambda batch: min(fitting, batch.num_samples)),
        )
        numbers: Numbers
        if quantity == "diagonal":
            numbers = Entries(loaded.plan)
        elif vector is not None:
            numbers = Quadratic(loaded.plan, vector)
        else:
            numbers = Traces(loaded.plan, by_layer=quantity == "layers")
        request = {} if path is None else _request(source, data, batch, quantity, vector)
        return cls(source, numbers, loaded.sweeps, path, request)

    def until(self, goal: _Goal) -> Estimated:
        """Draw until the goal is reached, or cannot be."""
        if self.labels > goal.max_draws:
            raise ValueError(
                f"A round draws {self.labels} labels for each input, but max_draws is "
                f"{goal.max_draws}. Use nm.MonteCarlo(1), or a larger max_draws."
            )
        start = self.state
        self._save(start)
        try:
            while (found := self._judged(goal)) is None:
                self._round()
                self._save(start := self.state)
        except BaseException:
            # The batches of a round that was cut short count if the next call reads them alike.
            self._save(start if self.source.data.shuffles else self.state)
            raise
        return found

    def _round(self) -> None:
        source, before = self.source, self.state.batches
        with Tape(source.plan, source.forward, source.likelihood.canonical) as tape:
            for index, batch in enumerate(source.data):
                if index < before:  # drawn before an interruption
                    continue
                outputs, targets = source.outputs(tape, batch)
                cotangents = chain.from_iterable(
                    source.estimator.cotangents(
                        source.likelihood, outputs, targets, generator=self.generator
                    )
                    for _ in range(self.draws)
                )
                sums = self.numbers.sums(tape.records(torch.stack(list(cotangents))), self.draws)
                require_finite({"the scores": {"sums": sums}})
                # One assignment: an interruption comes before it or after it.
                self.state = self.state.after_batch(sums, len(outputs), self.generator)
                self._done += 1
                if source.progress is not None:
                    source.progress(self._done, self._in_all)
        self._per_round = self.state.batches
        self.state = self.state.after_round()

    def _judged(self, goal: _Goal) -> Estimated | None:
        """The estimate, if there is a reason to stop."""
        state = self.state
        if state.rounds == 0:
            return None
        found = self._estimate()
        names, (squares, data, drawn) = shares(found)
        allowed = goal.allowed(squares)
        open_ = data + drawn > allowed
        if not bool(open_.any()):
            return found
        hopeless = open_ & (data >= allowed)
        exhausted = not self.source.estimator.random or found.draws + self.labels > goal.max_draws
        needed = torch.where(open_, drawn * state.rounds / (allowed - data), 0).max()
        if bool(hopeless.any()) and (state.rounds >= PATIENCE or exhausted):
            worst = int(torch.where(hopeless, data / allowed, 0).argmax())
            more = math.ceil(state.num_samples * float(data[worst] / allowed[worst]))
            part = float((data[worst] / squares[worst]).sqrt()) * quantile(goal.confidence)
            note = (
                f"With these {state.num_samples:,} inputs the data alone leave {part:.1%}"
                f"{_of(names[worst])}, more than rtol={goal.rtol:g}, however many labels are "
                f"drawn: more than {more:,} inputs would be needed."
            )
        elif exhausted:
            worst = int(torch.where(open_, (data + drawn) / allowed, 0).argmax())
            half = float(((data + drawn)[worst] / squares[worst]).sqrt())
            half *= quantile(goal.confidence)
            labels = math.ceil(float(needed) * self.labels)
            note = (
                f"After {found.draws} labels for each input, max_draws, the error is {half:.1%}"
                f"{_of(names[worst])}, more than rtol={goal.rtol:g}: about {labels:,} labels, or "
                f"more inputs, would be needed."
            )
        else:
            if self._per_round is not None:
                most = goal.max_draws // self.labels
                ahead = min(max(float(needed), state.rounds + 1), most) - state.rounds
                self._in_all = self._done + math.ceil(ahead) * self._per_round
            return None
        return replace(found, reached=False, note=note)

    def _estimate(self) -> Estimated:
        value, data, drawn = self.state.variances(self.draws)
        variances = {"data": self.numbers.named(data)}
        if self.source.estimator.random:
            signs = isinstance(self.source.estimator, RandomSigns)
            variances["probes" if signs else "labels"] = self.numbers.named(drawn)
        return Estimated(
            self.numbers.named(value.to(self.source.dtype)),
            variances,
            num_samples=self.state.num_samples,
            draws=self.state.rounds * self.labels,
        )

    def _save(self, state: _State) -> None:
        if self.path is None:
            return
        fields = {field: getattr(state, field) for field in state.__dataclass_fields__}
        tensors = {k: v.cpu().clone() for k, v in fields.items() if isinstance(v, Tensor)}
        counts = {k: v for k, v in fields.items() if not isinstance(v, Tensor)}
        manifest = {"version": VERSION, "request": self.request, "counts": counts}
        with atomic_path(self.path) as partial:
            save_file(tensors, partial, metadata={KEY: json.dumps(manifest, sort_keys=True)})


def _of(name: str) -> str:
    return f" for {name!r}" if name else ""


def _request(
    source: Source, data: Data, batch: Batch, quantity: Wanted, vector: Vector | None
) -> dict[str, Any]:
    """What draws must have in common to be put together; the tolerance is free."""
    model = source.plan.model
    return {
        "quantity": quantity,
        "likelihood": _written(source.likelihood),
        "estimator": _written(source.estimator),
        "params": _digest(list(source.plan.layout.shapes.items())),
        "model": _digest(dict(chain(model.named_parameters(), model.named_buffers()))),
        "data": None if data.shuffles else _digest(asdict(batch)),
        "vector": None if vector is None else _digest(source.plan.layout.rows(vector)[0]),
    }


def _written(value: Any) -> str:
    """As it is written, without addresses in memory, which another process has elsewhere."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _digest(tree: Any) -> str:
    digest = hashlib.sha256()
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            flat = leaf.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
        else:
            digest.update(_written(leaf).encode())
    return digest.hexdigest()[:16]


def _read(path: Path, request: dict[str, Any], like: _State) -> _State:
    """The state in a file of the same request.

    Raises:
        StorageError: If it is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            manifest = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise StorageError(
            f"{os.fspath(path)!r} was not written by nm.estimate(..., path=...), or is damaged "
            f"({error}). Give another path, or delete it."
        ) from error
    if manifest["version"] > VERSION:
        raise StorageError(
            f"{os.fspath(path)!r} was written by a newer version of neuromanifold. Upgrade with "
            f"pip install -U neuromanifold."
        )
    differing = [key for key, value in request.items() if manifest["request"].get(key) != value]
    if differing:
        raise StorageError(
            f"{os.fspath(path)!r} keeps the draws of another request: {differing} differ. Give "
            f"another path, or what it was written for."
        )
    generator = tensors.pop("generator")
    on_device = {name: tensor.to(like.totals.device) for name, tensor in tensors.items()}
    return _State(**on_device, generator=generator, **manifest["counts"])
