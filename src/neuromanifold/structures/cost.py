"""What a measurement costs: tried on a few samples, and extrapolated to all of them.

Bytes and seconds are affine in the samples of a batch and in the sweeps, apart from temporaries of
bounded size. So a measurement is run on one sample, two, three, six, twelve, ... until one more run
does not change what follows for all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from neuromanifold.capture import Batch, Data, Plan, Tape
from neuromanifold.errors import CaptureError, TooLargeError
from neuromanifold.linalg import memory
from neuromanifold.linalg.allocations import Usage, watching
from neuromanifold.structures._base import Source, Structure

__all__ = ["Costs", "Load", "Size", "Trial", "costs", "fitting", "load", "within"]

PATIENCE = 0.25
"""Seconds that are not worth saving: as long as timed trials take less, they go on."""
SHARE = 8
"""Part of the samples, one in so many, up to which timed trials go on in any case."""
MOST_SWEEPS = 8
"""Sweeps in a trial."""
LARGE = 2**27
"""Bytes from which time grows evenly: the system hands out smaller ones faster."""
ARRAYS = 4
"""Temporaries as large as a part of a record that are alive together."""
MARGIN = 0.9
"""Part of a budget that an extrapolated peak may fill."""


@dataclass(frozen=True)
class Load:
    """What one batch is to the model, whatever structure is measured.

    Attributes:
        kept: numbers of samples, and the bytes that a forward pass of them keeps for the sweeps.
        sweeps: how many cotangents the estimator sends back.
        sweep_numel: numbers that a sweep keeps alive for each sample.
        plan: which parameters are measured, as the first pass found it.
    """

    kept: tuple[tuple[int, float], ...]
    sweeps: int
    sweep_numel: int
    plan: Plan

    def activations(self, samples: int) -> int:
        """Bytes that a forward pass keeps for the sweeps."""
        points = self.kept if len(self.kept) > 1 else ((0, 0), *self.kept)
        return round(_line(points, samples))


def load(source: Source, batch: Batch, free: int) -> Load:
    """Run one sample, and two if they fit, to see what they are to the model.

    Raises:
        CaptureError: If a sample is not the same alone and in company.
        UnsupportedError: If it is not known which axis has the samples.
    """
    alone, eps, sweep_numel, plan, usage = _run(source, batch, 1)
    kept = [(1, usage.kept)]
    if batch.num_samples > 1 and 2 * usage.peak <= free:
        together, eps, _, plan, usage = _run(source, batch, 2)
        kept.append((2, usage.kept))
        changed = len(together) != 2 or not _alike(together[:1], alone, eps)
        # A random model (dropout in training) has other outputs anyway.
        if changed and _alike(_run(source, batch, 1)[0], alone, eps):
            raise CaptureError(
                "The first sample has other outputs alone than together with the second one, so a "
                "part of the batch does not tell of the whole. Does the model mix samples, or is "
                "an input without a sample axis as long as the batch? Give batches of the size "
                "that you want, without max_bytes=..."
            )
    sweeps = source.estimator.num_sweeps(source.likelihood, alone)
    return Load(tuple(kept), sweeps, sweep_numel, plan)


def _run(source: Source, batch: Batch, samples: int) -> tuple[Tensor, float, int, Plan, Usage]:
    """Outputs of some samples, their rounding, the numbers in a sweep, the plan, and memory."""
    source = _cold(source)
    micro = batch.samples(0, samples)
    with Tape(source.plan, source.forward, source.likelihood.canonical) as tape:
        with watching(source.device) as usage:
            outputs = tape.run(micro)
        return outputs.detach(), tape.eps, tape.sweep_numel, source.plan, usage


def _alike(one: Tensor, other: Tensor, eps: float) -> bool:
    """Whether outputs are the same but for rounding: in half of the digits."""
    tolerance = eps**0.5 * other.abs().amax()
    return one.shape == other.shape and bool(((one - other).abs() <= tolerance).all())


def _cold(source: Source) -> Source:
    """The same source as it is the first time, with a plan of its own."""
    forward = source.forward
    plan = replace(source.plan, sites=dict(source.plan.sites), generic=dict(source.plan.generic))
    # What is known of a model from earlier passes is kept for `call_model` itself only.
    return replace(
        source, plan=plan, forward=lambda model, inputs: forward(model, inputs), reducer=None
    )


@dataclass(frozen=True)
class Trial:
    """One run of a measurement on a few samples.

    Attributes:
        samples: in each batch.
        sweeps: sent back in each batch.
        together: how many of them at once.
        segments: bytes alive at the start and at most, from one record to the next.
        kept: bytes of the result.
        total: seconds.
        later: seconds of these that a further batch takes.
    """

    samples: int
    sweeps: int
    together: int
    segments: tuple[tuple[int, int], ...]
    kept: int
    total: float
    later: float

    @property
    def peak(self) -> int:
        """Bytes."""
        return max(peak for _, peak in self.segments)


@dataclass(frozen=True)
class Costs:
    """What was tried, and what follows for more samples and sweeps.

    Attributes:
        source: what is measured.
        load: what a batch is to the model.
        batches: 1, or 2 if there are more.
        trials: with few sweeps, by number of samples.
        fewer: the last one with half as many sweeps; None if the trials have all sweeps.
        constant: bytes kept of any data.
        most: bytes that the temporaries of one record take at most, None if there is no bound.
    """

    source: Source
    load: Load
    batches: int
    trials: tuple[Trial, ...]
    fewer: Trial | None
    constant: int
    most: int | None

    @property
    def tried(self) -> int:
        """The largest number of samples that was tried."""
        return self.trials[-1].samples

    def peak(self, samples: int) -> int:
        """Bytes that batches of some samples need at most.

        What decides it with few samples need not be what decides it with many, so each segment of
        the run is extrapolated for itself.
        """
        known = [trial for trial in self.trials if trial.samples == samples]
        if known and self.fewer is None:
            return known[0].peak
        count = len(self.trials[-1].segments)
        alike = [trial for trial in self.trials if len(trial.segments) == count]
        segments = max(self._segment(alike, i, samples) for i in range(count))
        return round(max(segments, self.kept(samples)))

    def _segment(self, trials: Sequence[Trial], i: int, samples: int) -> float:
        starts, rises = [], []
        for trial in trials:
            alive, peak = trial.segments[i]
            starts.append((trial.samples, float(alive)))
            rises.append((trial.samples, float(peak - alive)))
        if len(trials) == 1 and samples != trials[0].samples:
            starts.insert(0, (0, min(float(self.constant), starts[0][1])))
            rises.insert(0, (0, 0.0))
        start, rise = _line(starts, samples), _line(rises, samples)
        if i > 0 and self.most is not None:
            rise = min(rise, max(self.most, rises[-1][1]))
        return start + rise + self._of_more_sweeps(i, samples)

    def _of_more_sweeps(self, i: int, samples: int) -> float:
        """What a segment has more than in the trials, because more sweeps travel together."""
        full, half = self.trials[-1], self.fewer
        if half is None or len(half.segments) != len(full.segments):
            return 0
        if full.together == half.together:
            return 0
        together = min(
            self.load.sweeps, self.source.sweeps_together(self.load.sweep_numel * samples)
        )
        slope = (full.segments[i][1] - half.segments[i][1]) / (full.together - half.together)
        return max(slope, 0) * (together - full.together) * samples / full.samples

    def kept(self, samples: int) -> int:
        """Bytes of the result."""
        return round(self._with_all_sweeps("kept", samples, self.constant))

    def seconds(self, samples: int, batches: int) -> float:
        """Time for batches of some samples each."""
        later = self._with_all_sweeps("later", samples)
        return self._with_all_sweeps("total", samples) + (batches - self.batches) * later

    def _with_all_sweeps(self, quantity: str, samples: int, at_zero: float = 0) -> float:
        value = self._extrapolate(quantity, samples, at_zero)
        if self.fewer is not None:
            full, half = self.trials[-1], self.fewer
            slope = getattr(full, quantity) - getattr(half, quantity)
            slope = max(slope, 0) / (full.sweeps - half.sweeps)
            value += slope * (self.load.sweeps - full.sweeps) * samples / full.samples
        return value

    def _extrapolate(self, quantity: str, samples: int, at_zero: float) -> float:
        points = [(trial.samples, float(getattr(trial, quantity))) for trial in self.trials]
        if len(points) == 1 and samples != points[0][0]:
            points.insert(0, (0, min(at_zero, points[0][1])))
        return _line(points, samples)


def _line(points: Sequence[tuple[int, float]], x: int) -> float:
    """Through points with ascending x, piecewise linear; beyond the last, on and never down."""
    if len(points) == 1:
        return points[0][1]
    pairs = pairwise(points)
    (x0, y0), (x1, y1) = next((pair for pair in pairs if x <= pair[1][0]), points[-2:])
    if x <= x1:
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return y1 + max(y1 - y0, 0) * (x - x1) / (x1 - x0)


def costs(
    structure: Structure,
    source: Source,
    batch: Batch,
    batches: int,
    free: int,
    *,
    timed: bool,
) -> Costs:
    """Try a measurement on a few samples of a batch.

    Args:
        structure: what is measured.
        source: the measurement; its data are left alone.
        batch: the samples to take.
        batches: 1, or 2 if there are more than one.
        free: bytes that the trials may use.
        timed: go on until seconds are known too, which takes more samples than bytes do.

    Raises:
        TooLargeError: If no data could make it fit, or one sample does not.
    """
    loaded = load(source, batch, free)
    structure.require_fits(replace(source, plan=loaded.plan), free)
    constant = structure.constant_numel(loaded.plan) * source.dtype.itemsize
    sweeps = min(loaded.sweeps, MOST_SWEEPS)

    def tried(size: int, sweeps: int) -> Trial:
        return _try(structure, source, loaded, batch.samples(0, size), size, sweeps, batches)

    def fewer(size: int) -> Trial | None:
        return tried(size, sweeps // 2) if loaded.sweeps > sweeps else None

    most = None
    part = structure.part_numel(loaded.plan)
    if part is not None:
        most = ARRAYS * part * source.dtype.itemsize
    found = Costs(source, loaded, batches, (), None, constant, most)
    started, settled = time.perf_counter(), False
    for size in _sizes(batch.num_samples):
        if found.trials and found.peak(size) > free:
            break
        if len(found.trials) > 2:
            spent = time.perf_counter() - started
            if _long_enough(found, batch.num_samples, spent) if timed else settled:
                break
        before, trial = found, tried(size, sweeps)
        if size == 1 and trial.total < PATIENCE:  # the first run of all sets things up
            again = tried(size, sweeps)
            trial = replace(trial, total=again.total, later=again.later)
        found = replace(found, trials=(*found.trials, trial), fewer=fewer(size))
        if len(before.trials) > 1:
            settled = math.isclose(
                before.peak(batch.num_samples), found.peak(batch.num_samples), rel_tol=0.02
            )
    return found


def _long_enough(found: Costs, num_samples: int, spent: float) -> bool:
    """Whether seconds are known well enough."""
    large = found.trials[-1].peak >= LARGE
    return spent > PATIENCE and found.tried * SHARE >= num_samples and large


def _sizes(num_samples: int) -> Iterator[int]:
    """1, 2, 3, 6, 12, ... and the number of samples.

    Growth is not read off a single sample: a batch of one takes short cuts.
    """
    size = 1
    while size < num_samples:
        yield size
        size = size + 1 if size < 3 else 2 * size
    yield num_samples


def _try(
    structure: Structure,
    source: Source,
    loaded: Load,
    micro: Batch,
    samples: int,
    sweeps: int,
    batches: int,
) -> Trial:
    ticks: list[float] = []
    random = source.device if source.generator is None else source.generator.device
    trial = replace(
        _cold(source),
        data=Data([micro] * batches),
        generator=torch.Generator(random).manual_seed(0),  # the caller's stays where it is
        progress=lambda *_: ticks.append(time.perf_counter()),
        most_sweeps=sweeps,
    )
    with watching(source.device) as usage:
        trial.mark = usage.mark
        started = time.perf_counter()
        result = structure.build(trial)
        if source.device.type == "cuda":
            torch.cuda.synchronize(source.device)
        total = time.perf_counter() - started
    del result
    later = sum(ticks[i] - ticks[i - 1] for i in range(1, len(ticks), 2)) if batches > 1 else 0
    together = min(sweeps, source.sweeps_together(loaded.sweep_numel * samples))
    return Trial(samples, sweeps, together, tuple(usage.segments), usage.kept, total, later)


def within(structure: Structure, source: Source, max_bytes: int) -> Source:
    """The same measurement with its batches cut so that it stays under some bytes.

    The first batch is read twice, once for trials.

    Raises:
        TooLargeError: If not even one sample at a time would.
    """
    first, data = source.data.peek()
    size = fitting(structure, source, first, max_bytes, timed=False)
    return replace(size.costs.source, data=data.cut(size))


def fitting(
    structure: Structure, source: Source, batch: Batch, max_bytes: int, *, timed: bool
) -> Size:
    """How many samples at a time stay under some bytes.

    Raises:
        TooLargeError: If not even one does.
    """
    source = replace(source, sweep_bytes=min(source.sweep_bytes, max_bytes // 4))
    found = costs(structure, source, batch, 2, max_bytes, timed=timed)
    if found.peak(1) > max_bytes:
        raise TooLargeError(
            f"{structure!r} needs {memory.readable(found.peak(1))} with one sample at a time "
            f"({memory.readable(found.kept(1))} of them for what is kept), more than the "
            f"{memory.readable(max_bytes)} that it may use. "
            f"{structure.smaller(source, found.constant)}",
            bytes_needed=found.peak(1),
            bytes_available=max_bytes,
        )
    return Size(found, batch, max_bytes)


@dataclass(frozen=True)
class Size:
    """How many samples of a batch go through the model at once.

    Samples that are larger than the ones that were tried, such as longer sequences, are taken to
    need more by the square of the ratio, as attention does.
    """

    costs: Costs
    tried: Batch
    max_bytes: int

    def __call__(self, batch: Batch) -> int:
        """At least 1."""
        larger = max(_sample_numel(batch) / max(_sample_numel(self.tried), 1), 1.0)
        wanted = math.ceil(batch.num_samples * larger**2)
        return max(int(self._fitting(wanted) / larger**2), 1)

    def _fitting(self, wanted: int) -> int:
        """The largest number of tried samples, `wanted` at most, that fits."""
        known = [t.samples for t in self.costs.trials if t.peak <= self.max_bytes]
        if wanted in known:
            return wanted
        low, high = 1, wanted + 1  # low fits, high does not
        while high - low > 1:
            middle = (low + high) // 2
            if self.costs.peak(middle) <= MARGIN * self.max_bytes:
                low = middle
            else:
                high = middle
        return low


def _sample_numel(batch: Batch) -> float:
    """Numbers in the inputs of one sample."""
    leaves = tree_leaves(batch.inputs)
    return sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor)) / batch.num_samples
