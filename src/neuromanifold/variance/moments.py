"""Moments of per-sample Fisher diagonals, from which every variance of the diagonal follows.

With `γ_c = j_i · s_c` the component of a parameter's gradient along column c of the output Fisher,
a sample's information is `I = Σ_c γ_c²`. Its estimate from one label has the variance `κ₄ + 2 I²`,
from random signs `2 I² − 2 Σ_c γ_c⁴`; κ₄ is a sum over columns too (papers.md §3.2, §3.6). So four
sums over samples are enough: of `I`, `I²`, `Σ_c γ_c⁴` and `κ₄`. A bound on κ₄ is a fifth one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from neuromanifold.capture import Batch, Tape
from neuromanifold.errors import UnsupportedError
from neuromanifold.estimators import Exact, Moments
from neuromanifold.layers import Factored, Record
from neuromanifold.likelihoods import ColumnCumulants
from neuromanifold.linalg import memory, psd
from neuromanifold.structures import Source
from neuromanifold.structures._base import RECORD_NUMEL, SWEEP_BYTES, require_finite
from neuromanifold.structures.cost import load

__all__ = ["column_batches", "moments"]

KEYS = ("information", "squared", "quartic", "cumulant")


def moments(source: Source, *, bounds: bool = False) -> Moments:
    """Measure them in one pass with all columns of the output Fisher.

    Args:
        source: the measurement; its estimator does not matter.
        bounds: whether to bound κ₄ too (see `bounds.py`).

    Raises:
        UnsupportedError: If the likelihood has no closed form.
    """
    layout = source.plan.layout
    sums: dict[str, dict[str, Tensor]] = {}
    source = replace(source, estimator=Exact())
    batches = column_batches(source)
    with Tape(source.plan, source.forward, source.likelihood.canonical) as tape:
        for done, batch in enumerate(batches, start=1):
            for name, part in _batch_sums(source, tape, batch, bounds):
                total = sums.setdefault(name, part)
                if total is not part:
                    for key, value in part.items():
                        total[key] += value
            if source.progress is not None:
                source.progress(done, None)
    source.reduce([value for block in sums.values() for value in block.values()])
    require_finite(sums)
    rows = {
        key: torch.empty(1, layout.num_parameters, dtype=source.dtype, device=source.device)
        for key in KEYS + ("cumulant_bound",) * bounds
    }
    for block in source.plan.blocks:
        for key, value in sums[block.name].items():
            block.write(value[None], rows[key], layout)
    normaliser = source.num_samples
    return Moments(
        normaliser, **{key: layout.unflatten(row[0] / normaliser) for key, row in rows.items()}
    )


def column_batches(source: Source) -> Iterator[Batch]:
    """Batches so small that all columns of a batch travel together: `I²` needs them all."""
    first, data = source.data.peek()
    loaded = load(source, first, memory.available(source.device))
    numel = loaded.sweep_numel * loaded.sweeps
    fitting = max(SWEEP_BYTES // (4 * numel + 1), 1)
    return iter(data.cut(lambda batch: min(fitting, batch.num_samples)))


def _batch_sums(
    source: Source, tape: Tape, batch: Batch, bounds: bool
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    outputs, targets = source.outputs(tape, batch)
    cumulants = source.likelihood.column_cumulants(outputs)
    if cumulants is None:
        raise UnsupportedError(
            f"{source.likelihood!r} has no closed form for the fourth moment of its score, so the "
            f"variance of sampled labels has none. Estimate it from draws: nm.estimate(...)."
        )
    columns = source.estimator.cotangents(source.likelihood, outputs, targets)
    for record in tape.records(torch.stack(list(columns))):
        start = 0
        for part in record.split(RECORD_NUMEL, across_sweeps=False):
            samples = slice(start, start := start + part.num_samples)
            some = replace(cumulants, quartic=cumulants.quartic[:, samples].to(record.dtype))
            yield record.block.name, _sums(part, some, bounds)


def _sums(record: Record, cumulants: ColumnCumulants, bounds: bool) -> dict[str, Tensor]:
    """Sums over the samples of a record, each `(G, O, I)`."""
    part = record.single
    if isinstance(part, Factored) and part.num_positions == 1:
        # γ_c = g_c a: powers of inputs and of cotangents apart, so that sums are matrix products.
        inputs = part.augmented.squeeze(2).square()  # (G, N, I)
        powers = _powers(part.g.squeeze(3), cumulants, bounds)
        return {
            key: psd.product(
                value.mT,
                inputs if key == "information" else inputs.square(),
                psd.aligned_empty(value, len(value), value.shape[2], inputs.shape[2]),
            )
            for key, value in powers.items()
        }
    powers = _powers(record.per_sample(), cumulants, bounds)
    return {key: value.sum(dim=1) for key, value in powers.items()}


def _powers(components: Tensor, cumulants: ColumnCumulants, bounds: bool) -> dict[str, Tensor]:
    """`γ_c` as `(V, G, N, ...)` to sums over columns, each `(G, N, ...)`."""
    a = cumulants.quartic.reshape(len(components), 1, -1, *[1] * (components.ndim - 3))
    squares = components.square()
    information = squares.sum(dim=0)
    fourth = squares.square()
    powers = {
        "information": information,
        "squared": information.square(),
        "quartic": fourth.sum(dim=0),
        "cumulant": (fourth * a).sum(dim=0),
    }
    targets = information[None]  # of each target, (K, G, N, ...)
    if cumulants.squared and cumulants.num_groups > 1:
        targets = squares.new_zeros(cumulants.num_groups, *squares.shape[1:])
        targets.index_add_(0, cumulants.group, squares)
    if cumulants.squared:
        powers["cumulant"] += cumulants.squared * targets.square().sum(dim=0)
    if bounds and cumulants.classes:
        score = (components * a.sqrt()).unflatten(0, (len(targets), -1))
        extremes = score.amax(dim=1).square_() + score.amin(dim=1).square_()
        powers["cumulant_bound"] = (targets * (extremes - 4 * targets)).sum(dim=0)
    elif bounds:
        powers["cumulant_bound"] = powers["quartic"] * a.amax(dim=0)
        if cumulants.squared:
            powers["cumulant_bound"] += cumulants.squared * targets.square().sum(dim=0)
    return powers
