"""Several passes over the same data, as one measurement."""

from __future__ import annotations

from dataclasses import replace

from neuromanifold.structures._base import Progress, Source

__all__ = ["sources_of_passes"]


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
