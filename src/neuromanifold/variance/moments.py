"""Moments of per-sample Fisher diagonals, from which every variance of the diagonal follows.

With `γ_c = j_i · s_c` the component of a parameter's gradient along column c of the output Fisher,
a sample's information is `I = Σ_c γ_c²`. Its estimate from one label has the variance `κ₄ + 2 I²`,
from random signs `2 I² − 2 Σ_c γ_c⁴`; κ₄ is a sum over columns too (papers.md §3.2, §3.6). So four
sums over samples are enough: of `I`, `I²`, `Σ_c γ_c⁴` and `κ₄`.
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

__all__ = ["moments"]


def moments(source: Source) -> Moments:
    """Measure them in one pass with all columns of the output Fisher.

    Raises:
        UnsupportedError: If the likelihood has no closed form.
    """
    layout = source.plan.layout
    sums: dict[str, dict[str, Tensor]] = {}
    source = replace(source, estimator=Exact())
    batches = _cut(source)
    with Tape(source.plan, source.forward, source.likelihood.canonical) as tape:
        for done, batch in enumerate(batches, start=1):
            for name, part in _batch_sums(source, tape, batch):
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
        for key in ("information", "squared", "quartic", "cumulant")
    }
    for block in source.plan.blocks:
        for key, value in sums[block.name].items():
            block.write(value[None], rows[key], layout)
    normaliser = source.num_samples
    return Moments(
        normaliser, **{key: layout.unflatten(row[0] / normaliser) for key, row in rows.items()}
    )


def _cut(source: Source) -> Iterator[Batch]:
    """Batches so small that all columns of a batch travel together: `I²` needs them all."""
    first, data = source.data.peek()
    loaded = load(source, first, memory.available(source.device))
    numel = loaded.sweep_numel * loaded.sweeps
    fitting = max(SWEEP_BYTES // (4 * numel + 1), 1)
    return iter(data.cut(lambda batch: min(fitting, batch.num_samples)))


def _batch_sums(
    source: Source, tape: Tape, batch: Batch
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
            yield record.block.name, _sums(part, some)


def _sums(record: Record, cumulants: ColumnCumulants) -> dict[str, Tensor]:
    """Sums over the samples of a record, each `(G, O, I)`."""
    part = record.single
    if isinstance(part, Factored) and part.num_positions == 1:
        # γ_c = g_c a: powers of inputs and of cotangents apart, so that sums are matrix products.
        inputs = part.augmented.squeeze(2).square()  # (G, N, I)
        powers = _powers(part.g.squeeze(3).square(), cumulants)
        return {
            key: psd.product(
                value.mT,
                inputs if key == "information" else inputs.square(),
                psd.aligned_empty(value, len(value), value.shape[2], inputs.shape[2]),
            )
            for key, value in powers.items()
        }
    powers = _powers(record.per_sample().square_(), cumulants)
    return {key: value.sum(dim=1) for key, value in powers.items()}


def _powers(squares: Tensor, cumulants: ColumnCumulants) -> dict[str, Tensor]:
    """`γ_c²` as `(V, G, N, ...)` to sums over columns, each `(G, N, ...)`."""
    information = squares.sum(dim=0)
    fourth = squares.square()
    shape = (len(squares), 1, squares.shape[2]) + (1,) * (squares.ndim - 3)
    cumulant = (fourth * cumulants.quartic.reshape(shape)).sum(dim=0)
    quartic = fourth.sum(dim=0)
    if cumulants.squared:
        if cumulants.num_groups == 1:
            groups = information.square()
        else:
            of_groups = squares.new_zeros(cumulants.num_groups, *squares.shape[1:])
            of_groups.index_add_(0, cumulants.group, squares)
            groups = of_groups.square_().sum(dim=0)
        cumulant += cumulants.squared * groups
    return {
        "information": information,
        "squared": information.square(),
        "quartic": quartic,
        "cumulant": cumulant,
    }
