"""The contract of a structure, and the stream of records that structures are built from."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor

from neuromanifold.capture import Batch, Data, Forward, Plan, Tape, check_devices
from neuromanifold.errors import CaptureError, NonFiniteError, TooLargeError, UnsupportedError
from neuromanifold.estimators import Estimator
from neuromanifold.layers import Record
from neuromanifold.likelihoods import Likelihood
from neuromanifold.likelihoods._base import rademacher
from neuromanifold.linalg import Block, memory
from neuromanifold.operators import (
    BlockMatrix,
    BlockOperator,
    Coverage,
    CoverageEntry,
    FisherOperator,
    Origin,
)

__all__ = ["AdditiveStructure", "Progress", "Reducer", "Source", "Structure"]

Statistics = dict[str, Tensor]
Progress = Callable[[int, int | None], None]
"""`progress(batches done, batches in all or None)`."""
Reducer = Callable[[list[Tensor]], None]
"""Sums tensors over processes, in place."""

SWEEP_BYTES = 2**28
"""Cotangents of several sweeps travel together while they keep less than this alive."""
RECORD_NUMEL = 2**20
"""Records are reduced in parts of about this many numbers, which stay in the cache."""


@dataclass
class Source:
    """Everything a structure needs to ask for records: model, data, likelihood, estimator.

    Attributes:
        plan: which parameters, read by which rule.
        data: batches.
        likelihood: what the outputs mean.
        estimator: which cotangents are sent back.
        forward: how the model is called.
        per: "sample" or "position".
        generator: randomness of the estimator.
        reducer: sums over processes, None for one process.
        progress: told after each batch.
        most_sweeps: how many of the estimator's cotangents are sent back in each batch; None: all.
        sweep_bytes: what the cotangents of sweeps that travel together may keep alive.
        mark: called before each record is handed out.
        num_samples: N so far; over all processes after `reduce`.
        num_positions: observed positions, likewise.
    """

    plan: Plan
    data: Data
    likelihood: Likelihood
    estimator: Estimator
    forward: Forward
    per: str = "sample"
    generator: torch.Generator | None = None
    reducer: Reducer | None = None
    progress: Progress | None = None
    most_sweeps: int | None = None
    sweep_bytes: int = SWEEP_BYTES
    mark: Callable[[], None] | None = None
    num_samples: int = 0
    num_positions: int = 0

    def sweeps(self) -> Iterator[Iterator[Record]]:
        """Pass over the data once: per group of sweeps of a batch, one record for each block."""
        self.num_samples = self.num_positions = 0
        with Tape(self.plan, self.forward, self.likelihood.canonical) as tape:
            if self.estimator.independent_units:
                tape.on_the_way = self._with_signs
            for done, batch in enumerate(self.data, start=1):
                outputs, targets = self.outputs(tape, batch)
                cotangents = self.estimator.cotangents(
                    self.likelihood, outputs, targets, generator=self.generator
                )
                cotangents = islice(cotangents, self.most_sweeps)
                together = self.sweeps_together(tape.sweep_numel)
                while chunk := list(islice(cotangents, together)):
                    records = tape.records(torch.stack(chunk))
                    yield records if self.mark is None else map(self._marked, records)
                if self.progress is not None:
                    self.progress(done, self.data.num_batches)

    def _with_signs(self, gradient: Tensor) -> Tensor:
        return gradient * rademacher(gradient.shape, gradient, self.generator)

    def _marked(self, record: Record) -> Record:
        assert self.mark is not None
        self.mark()
        return record

    def sweeps_together(self, numel: int) -> int:
        """How many sweeps travel together, if each keeps this many numbers alive."""
        return max(self.sweep_bytes // (4 * numel + 1), 1)

    def outputs(self, tape: Tape, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Run one batch, check it, and count its samples; outputs are detached."""
        check_devices(batch, self.device)
        outputs = tape.run(batch).detach()
        targets = self.targets(outputs, batch)
        self.count(outputs, targets)
        return outputs, targets

    def targets(self, outputs: Tensor, batch: Batch) -> Tensor | None:
        """A batch's targets; stand-ins that say which positions count, if it knows only that."""
        if batch.observed is None or self.estimator.needs_targets:
            return batch.targets
        return self.likelihood.observing(outputs, batch.observed)

    def count(self, outputs: Tensor, targets: Tensor | None) -> None:
        """Check a batch's outputs and targets, and add its samples to the count."""
        if not bool(torch.isfinite(outputs).all()):
            raise NonFiniteError(
                f"The model's outputs hold NaN or infinity for {self._count_bad(outputs)} of "
                f"{outputs.shape[0]} samples. Check the inputs for NaN, and the parameters."
            )
        if targets is not None:
            self.likelihood.check(outputs, targets)
        self.num_samples += outputs.shape[0]
        self.num_positions += int(self.likelihood.num_positions(outputs, targets))

    @staticmethod
    def _count_bad(outputs: Tensor) -> int:
        return int((~torch.isfinite(outputs)).flatten(1).any(dim=1).sum())

    def reduce(self, tensors: list[Tensor]) -> None:
        """Sum tensors and counts over processes.

        Raises:
            CaptureError: If the processes have not measured the same.
        """
        if self.reducer is None:
            return
        self._require_agreement(tensors)
        counts = torch.tensor(
            [self.num_samples, self.num_positions], dtype=torch.float64, device=self.device
        )
        # Collectives take a view with gaps between its rows for a contiguous tensor.
        whole = [tensor.contiguous() for tensor in tensors]
        self.reducer([*whole, counts])
        for tensor, value in zip(tensors, whole, strict=True):
            if value is not tensor:
                tensor.copy_(value)
        self.num_samples, self.num_positions = (int(count) for count in counts)

    def _require_agreement(self, tensors: list[Tensor]) -> None:
        """Compare what the processes have, by a number that depends on it, before they sum it."""
        kept = [(block.name, block.shape) for block in self.plan.blocks]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if not self.same_everywhere(zlib.crc32(repr((kept, shapes)).encode()) % 2**20):
            raise CaptureError(
                f"The processes read the model's parameters differently, so their statistics "
                f"cannot be summed. Here {list(self.plan.generic)} have no layer rule: is a module "
                f"bypassed on some of the processes? Measure with params=... without it."
            )

    def same_everywhere(self, number: int) -> bool:
        """Whether all processes have the same number, below 2²⁰ so that sums of squares are exact.

        All of them have to ask.
        """
        if self.reducer is None:
            return True
        sums = torch.tensor([1, number, number**2], dtype=torch.float64, device=self.device)
        self.reducer([sums])
        processes, total, squares = sums.tolist()
        return bool(processes * squares == total**2)

    @property
    def normaliser(self) -> int:
        """What sums over samples are divided by.

        Raises:
            ValueError: If every position is ignored.
        """
        total = self.num_samples if self.per == "sample" else self.num_positions
        if total == 0:
            raise ValueError('per="position" found no observed position: all targets are ignored.')
        return total

    @property
    def device(self) -> torch.device:
        """Where the statistics are summed."""
        return self.plan.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the result."""
        return self.plan.dtype

    def origin(self, structure: Structure, notes: tuple[str, ...] = ()) -> Origin:
        """What the operator remembers of this measurement."""
        return Origin(
            num_samples=self.num_samples,
            structure=repr(structure),
            estimator=repr(self.estimator),
            likelihood=repr(self.likelihood),
            per=self.per,
            notes=notes,
        )

    def coverage(self, represent: Callable[[Block], tuple[str, bool, str]]) -> Coverage:
        """Coverage, given per block the structure's name, whether it is exact, and a note."""
        entries = {}
        for block in self.plan.blocks:
            structure, exact, note = represent(block)
            for name in block.parameters:
                site = self.plan.sites.get(block.name)
                reason = self.plan.generic.get(name, "")
                rule = site.rule if site is not None else "generic"
                entries[name] = CoverageEntry(
                    name, block.name, rule, structure, exact, reason or note
                )
        return Coverage(tuple(entries[name] for name in self.plan.layout.names))

    def require_repeatable(self, what: str) -> None:
        """Refuse data that can be read only once."""
        self.data.require_repeatable(what)

    def frozen_randomness(self) -> Callable[[], torch.Generator]:
        """Generators that all draw the same numbers, so that every pass sees the same labels."""
        if self.generator is None:
            start = torch.Generator(self.device)
            start.manual_seed(int(torch.randint(2**62, ())))
        else:
            start = self.generator
        state = start.get_state()

        def fresh() -> torch.Generator:
            generator = torch.Generator(start.device)
            generator.set_state(state)
            return generator

        return fresh


class Structure(ABC):
    """What is kept of a Fisher matrix, and how it is computed from records."""

    @abstractmethod
    def build(self, source: Source) -> FisherOperator:
        """Measure."""

    def part_numel(self, plan: Plan) -> int | None:
        """About how many numbers records are reduced at a time by; None if it is done at once."""
        return None

    def constant_numel(self, plan: Plan) -> int:
        """How many numbers are kept of any data; what grows with the data is not counted."""
        return 0

    def require_fits(self, source: Source, free: int | None = None) -> None:
        """Refuse, before anything is allocated, what no data could make fit.

        Args:
            source: the measurement.
            free: bytes that may be used; what the device has by default.

        Raises:
            TooLargeError: With the bytes needed, and those of smaller structures.
        """
        needed = self.constant_numel(source.plan) * source.dtype.itemsize
        what = f"{self!r} of {source.plan.layout.num_parameters} parameters"
        instead = partial(self.smaller, source, needed)
        if free is None:
            memory.require(needed, source.device, what=what, instead=instead)
        elif needed > free:
            raise TooLargeError(
                f"{what} needs {memory.readable(needed)}, more than the {memory.readable(free)} "
                f"that it may use. {instead()}",
                bytes_needed=needed,
                bytes_available=free,
            )

    def smaller(self, source: Source, needed: int) -> str:
        """Advice for who cannot have some bytes: which structures need less, and how much."""
        # Imported here: they are built on this module.
        from neuromanifold.structures import BlockDiagonal, Diagonal, Kronecker, UnitWise

        smaller = [
            f"nm.{type(structure).__name__}() would need {memory.readable(size)}"
            for structure in (BlockDiagonal(), UnitWise(), Kronecker(), Diagonal())
            if (size := structure.constant_numel(source.plan) * source.dtype.itemsize) < needed
        ]
        sizes = f"{', '.join(smaller)}. " if smaller else ""
        return (
            f"{sizes}Give params=[...] for a part of the model, or nm.Gram() or nm.Implicit(), "
            f"which keep no matrix. nm.forecast(...) tells bytes and seconds beforehand."
        )

    def __repr__(self) -> str:
        """As it is written: what is left at its default is left out."""
        options: tuple[Field[Any], ...] = fields(self) if is_dataclass(self) else ()
        given = [
            f"{option.name}={value!r}"
            for option in options
            if (value := getattr(self, option.name)) != _default(option)
        ]
        return f"{type(self).__name__}({', '.join(given)})"


def _default(option: Field[Any]) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()


class AdditiveStructure(Structure):
    """A structure whose statistics are sums over samples, block by block.

    Batching, accumulation and reduction over processes are written here; a structure says what is
    summed and what matrix it makes. Statistics of sequences of any length keep constant memory.
    """

    def part_numel(self, plan: Plan) -> int:
        """In the largest part of any block."""
        return max((self._part(block) for block in plan.blocks), default=RECORD_NUMEL)

    def _part(self, block: Block) -> int:
        """A part may take as much as the sum it is added to: many small ones make many passes."""
        return max(RECORD_NUMEL, self.numel(block))

    @abstractmethod
    def statistics(self, record: Record) -> Statistics:
        """Sums over the samples and sweeps of a record."""

    @abstractmethod
    def assemble(self, block: Block, statistics: Statistics, normaliser: float) -> BlockMatrix:
        """The block's matrix, from sums over all data; `normaliser` is N, or the positions."""

    @abstractmethod
    def numel(self, block: Block) -> int:
        """How many numbers are kept for a block."""

    def symmetric(self, block: Block) -> tuple[str, ...]:
        """Statistics that are symmetric matrices, by the last part of their name.

        Who keeps them for long keeps half of each.
        """
        return ()

    def represent(self, block: Block) -> tuple[str, bool, str]:
        """Coverage of a block: name of the structure, whether it is exact, a note."""
        return type(self).__name__, True, ""

    def split(self, record: Record) -> Iterator[Record]:
        """Parts of a record that are reduced one after the other."""
        return record.split(self._part(record.block), whole=self.whole_gradients)

    own_sweeps: ClassVar[bool] = False
    """Whether the sums run over other records than those of the estimator's sweeps."""

    def sweeps(self, source: Source) -> Iterator[Iterator[Record]]:
        """What the sums run over, batch by batch: the estimator's sweeps."""
        return source.sweeps()

    def at(self, parameters: Mapping[str, Tensor]) -> AdditiveStructure:
        """The structure where the model has these parameters, for one that depends on them.

        They are looked up when they are needed: those of a model in training move on.
        """
        return self

    def collect(self, source: Source) -> dict[str, Statistics]:
        """Stream over the data: sums by block, over all processes.

        Raises:
            NonFiniteError: If one holds NaN or infinity.
        """
        sums: dict[str, Statistics] = {}
        for records in self.sweeps(source):
            for record in records:
                for part in self.split(record):
                    accumulate(sums.setdefault(record.block.name, {}), self.statistics(part))
        blocks = source.plan.blocks  # an order that is the same in all processes
        source.reduce([tensor for block in blocks for tensor in sums[block.name].values()])
        require_finite(sums)
        return sums

    def build(self, source: Source) -> BlockOperator:
        """Stream over the data and assemble one matrix per block."""
        self.require_fits(source)
        here = self.at(source.plan.parameters)
        sums = here.collect(source)
        matrices = [
            here.assemble(block, sums[block.name], source.normaliser)
            for block in source.plan.blocks
        ]
        coverage = source.coverage(self.represent)
        return BlockOperator(source.plan.layout, matrices, coverage, source.origin(self))

    def constant_numel(self, plan: Plan) -> int:
        """The sum over blocks."""
        return sum(self.numel(block) for block in plan.blocks)

    whole_gradients: ClassVar[bool | None] = None
    """Whether the statistics need per-sample gradients; None: where squaring them does."""


def accumulate(total: Statistics, part: Statistics) -> None:
    """Add to sums that may not have begun."""
    for name, value in part.items():
        if name in total:
            total[name] += value
        else:
            total[name] = value


def require_finite(sums: dict[str, Statistics]) -> None:
    """Refuse statistics, by the name of the block or parameter, that hold NaN or infinity."""
    # One look in the usual case: NaN and infinity survive a sum, and only an overflowing sum of
    # finite numbers needs the second look.
    totals = [value.sum() for statistics in sums.values() for value in statistics.values()]
    if bool(torch.isfinite(torch.stack(totals).sum())):
        return
    bad = [
        name
        for name, statistics in sums.items()
        if not all(bool(torch.isfinite(value).all()) for value in statistics.values())
    ]
    if bad:
        raise NonFiniteError(
            f"NaN or infinity in the statistics of {bad}: a gradient overflowed. Measure in a "
            f"wider precision (model.double()), or look at the layers above these."
        )


def unsupported_reducer(what: str) -> UnsupportedError:
    """For structures whose statistics cannot be summed over processes."""
    return UnsupportedError(
        f"{what} keeps every sample and cannot be summed over processes. Use an additive "
        f"structure such as nm.Kronecker() or nm.Diagonal() with reducer=..."
    )
