"""Rounds over the data, from a state that may come from a file."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from neuromanifold._estimation.direction import top_direction
from neuromanifold._estimation.goal import DRAWS, Goal
from neuromanifold._estimation.numbers import Entries, Numbers, Quadratic, Traces, Wanted
from neuromanifold._estimation.result import Estimated
from neuromanifold._estimation.state import State
from neuromanifold._estimation.storage import Keep, fingerprint
from neuromanifold.capture import Tape
from neuromanifold.errors import StorageError
from neuromanifold.estimators import RandomSigns
from neuromanifold.linalg import Vector, memory
from neuromanifold.structures import Source
from neuromanifold.structures._base import SWEEP_BYTES, require_finite
from neuromanifold.structures.cost import load

__all__ = ["Rounds"]


class Rounds:
    """Draws for one request, and what follows from them.

    Args:
        source: the measurement.
        quantity: what is estimated.
        vector: v of "quadratic".
        share: of the entries that have to be known, for "entries".
        path: file in which draws are kept.
    """

    def __init__(
        self,
        source: Source,
        quantity: Wanted,
        vector: Vector | None,
        share: float | None,
        path: Path | None,
    ) -> None:
        drawing = source.estimator.random
        self._draws = DRAWS if drawing else 1
        batch, data = source.data.peek()
        loaded = load(source, batch, memory.available(source.device))
        # All sweeps of a batch travel together: the draws of an input are compared.
        numel = loaded.sweep_numel * loaded.sweeps * self._draws
        fitting = max(SWEEP_BYTES // (4 * numel + 1), 1)
        whole = replace(source, plan=loaded.plan, data=data)
        self._source = replace(whole, data=data.cut(lambda batch: min(fitting, batch.num_samples)))
        self._share = share
        self._labels = self._draws * loaded.sweeps if drawing else 1
        self._done = 0  # batches in this call, of what is forecast
        self._in_all: int | None = None
        self._per_round: int | None = None
        if source.generator is None:
            self._source.generator = source.frozen_randomness()()
        assert self._source.generator is not None
        self._generator = self._source.generator
        self._keep, kept = None, None
        if path is not None:
            self._keep = Keep(path, fingerprint(whole, data, batch, quantity, vector))
            kept = self._keep.read(source.device)
        self._prepared: dict[str, Tensor] = {} if kept is None else kept[1]
        self._numbers = self._of(whole, quantity, vector)
        if kept is None:
            self._state = State.empty(self._numbers.numel, self._generator, source.device)
        else:
            self._state = kept[0]
            self._generator.set_state(self._state.generator)
        self._require_same_round()

    def _of(self, source: Source, quantity: Wanted, vector: Vector | None) -> Numbers:
        if quantity in ("diagonal", "entries"):
            return Entries(source.plan)
        if quantity == "eigenvalue":
            if not self._prepared:
                direction, shortfall = top_direction(source)
                self._prepared = {"direction": direction, "shortfall": shortfall}
            fixed = {"iteration": self._prepared["shortfall"].double().square()[None]}
            return Quadratic(source.plan, self._prepared["direction"], fixed)
        if vector is not None:
            return Quadratic(source.plan, vector)
        return Traces(source.plan, by_layer=quantity == "layers")

    def _require_same_round(self) -> None:
        """Refuse files of processes of which one was stopped a round before another."""
        rounds = self._state.rounds
        if self._keep is not None and not self._source.same_everywhere(rounds):
            raise StorageError(
                f"The files of the processes have different numbers of rounds, {rounds} here: "
                f"they do not belong to one run, or it was stopped between two of them. Delete "
                f"them."
            )

    def until(self, goal: Goal) -> Estimated:
        """Draw until the goal is reached, or cannot be."""
        if self._labels > goal.max_draws:
            raise ValueError(
                f"A round draws {self._labels} labels for each input, but max_draws is "
                f"{goal.max_draws}. Use nm.MonteCarlo(1), or a larger max_draws."
            )
        start = self._state
        self._save(start)
        try:
            while True:
                if self._state.rounds:
                    found = self._estimate()
                    drawing = self._source.estimator.random
                    verdict = goal.judge(found, self._state.rounds, drawing=drawing)
                    if verdict.done:
                        return self._answer(found, verdict.note)
                    if self._per_round is not None:
                        ahead = math.ceil(verdict.rounds - self._state.rounds)
                        self._in_all = self._done + ahead * self._per_round
                self._round()
                self._save(start := self._state)
        except BaseException:
            # The batches of a round that was cut short count if the next call reads them alike.
            self._save(start if self._source.data.shuffles else self._state)
            raise

    def _round(self) -> None:
        source, before = self._source, self._state.batches
        with Tape(source.plan, source.forward, source.likelihood.canonical) as tape:
            for index, batch in enumerate(source.data):
                if index < before:  # drawn before an interruption
                    continue
                outputs, targets = source.outputs(tape, batch)
                cotangents = chain.from_iterable(
                    source.estimator.cotangents(
                        source.likelihood, outputs, targets, generator=self._generator
                    )
                    for _ in range(self._draws)
                )
                records = tape.records(torch.stack(list(cotangents)))
                sums = self._numbers.sums(records, self._draws)
                require_finite({"the scores": {"sums": sums}})
                # One assignment: an interruption comes before it or after it.
                self._state = self._state.after_batch(sums, len(outputs), self._generator)
                self._done += 1
                if source.progress is not None:
                    source.progress(self._done, self._in_all)
        self._per_round = self._state.batches
        # A copy: the round may still be interrupted while the processes sum it up.
        counted = replace(source, num_samples=self._state.samples)
        partial = self._state.partial.clone()
        counted.reduce([partial])
        self._state = self._state.after_round(partial, counted.num_samples)

    def _answer(self, found: Estimated, note: str) -> Estimated:
        """In the precision of the measurement."""
        value, _, _ = self._state.variances(self._draws)
        rounded = self._numbers.named(value.to(self._source.dtype))
        return replace(found, value=rounded, reached=not note, note=note)

    def _estimate(self) -> Estimated:
        """In double precision: a square that single precision has not is no value of zero."""
        named = self._numbers.named
        value, data, drawn = self._state.variances(self._draws)
        variances = {"data": named(data)}
        if self._source.estimator.random:
            signs = isinstance(self._source.estimator, RandomSigns)
            variances["probes" if signs else "labels"] = named(drawn)
        variances |= {name: named(variance) for name, variance in self._numbers.fixed.items()}
        return Estimated(
            named(value),
            variances,
            num_samples=self._state.num_samples,
            draws=self._state.rounds * self._labels,
            quantile=self._share,
        )

    def _save(self, state: State) -> None:
        if self._keep is not None:
            self._keep.write(state, self._prepared)
