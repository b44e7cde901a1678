"""Several passes over the same data, as one measurement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from neuromanifold.layers import Record
from neuromanifold.structures._base import Progress, Source

__all__ = ["KeepingSource", "sources_of_passes"]


def sources_of_passes(source: Source, num: int) -> list[Source]:
    """One source for each pass over data that can be read again.

    All draw the same labels, if the data come in the same order. The caller's own generator serves
    the first, and moves on as in a single pass. Progress is that of all passes together.
    """
    generators = [source.generator] * num
    if num > 1 and source.estimator.random:
        fresh = source.frozen_randomness()
        generators = [source.generator or fresh(), *(fresh() for _ in range(num - 1))]
    return [
        replace(
            source,
            generator=generator,
            progress=_one_of(source.progress, done, num),
            num_samples=0,
            num_positions=0,
        )
        for done, generator in enumerate(generators)
    ]


def _one_of(progress: Progress | None, done: int, num: int) -> Progress | None:
    """Progress of one pass as that of all of them, where the number of batches is known."""
    if progress is None:
        return None

    def report(batches: int, total: int | None) -> None:
        if total is None:
            progress(batches, None)
        else:
            progress(done * total + batches, num * total)

    return report


@dataclass
class KeepingSource(Source):
    """A pass that keeps its records for another one, where all of them are alive together anyway.

    That is so with data of one batch whose sweeps travel together.

    Attributes:
        kept: the records.
        counts: samples and positions of this process.
    """

    kept: list[Record] = field(default_factory=list)
    counts: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, source: Source) -> KeepingSource:
        """The same source."""
        return cls(**vars(source))

    def sweeps(self) -> Iterator[Iterator[Record]]:
        """As they are."""
        alone = self.data.num_batches == 1
        for group, records in enumerate(super().sweeps()):
            self.kept.clear()
            yield self._keeping(records) if alone and group == 0 else records
        self.counts = self.num_samples, self.num_positions

    def _keeping(self, records: Iterator[Record]) -> Iterator[Record]:
        for record in records:
            # A view: what the record makes when it is asked is not kept.
            self.kept.append(record.samples(0, record.num_samples))
            yield record

    def again(self, source: Source) -> Source:
        """A source that gives what was kept, if anything was, in place of its own records."""
        if not self.kept:
            return source
        return _Kept(**vars(source), kept=self.kept, counts=self.counts)


@dataclass
class _Kept(Source):
    """Records of an earlier pass; they are forgotten one by one."""

    kept: list[Record] = field(default_factory=list)
    counts: tuple[int, int] = (0, 0)

    def sweeps(self) -> Iterator[Iterator[Record]]:
        """One group."""
        self.num_samples, self.num_positions = self.counts
        records = (self.kept.pop(0) for _ in range(len(self.kept)))
        yield records if self.mark is None else map(self._marked, records)
        if self.progress is not None:
            self.progress(1, 1)
