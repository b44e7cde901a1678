"""Moments of per-sample Fisher diagonals, from which every variance of the diagonal follows.

With `γ_c = j_i · s_c` the component of a parameter's gradient along column c of the output Fisher,
a sample's information is `I = Σ_c γ_c²`. Its estimate from one label has the variance `κ₄ + 2 I²`,
from random signs `2 I² − 2 Σ_c γ_c⁴`; κ₄ is a sum over columns too (papers.md §3.2, §3.6). So four
sums over samples are enough: of `I`, `I²`, `Σ_c γ_c⁴` and `κ₄`. A bound on κ₄ is a fifth one.

Where κ₄ has no such form, `κ₄ + 2 I² = Var (j·z)²` is the mean of `((j·z)² − I)²` over labels that
are sampled, and how much these vary says how far the mean may be off. Where the output Fisher has
no columns either, `I` is the mean of `(j·z)²` over the same labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from neuromanifold.capture import Batch, Tape
from neuromanifold.errors import UnsupportedError, listed
from neuromanifold.estimators import Estimator, Exact, Moments, MonteCarlo
from neuromanifold.layers import Factored, Record
from neuromanifold.likelihoods import ColumnCumulants, Likelihood
from neuromanifold.linalg import memory, psd
from neuromanifold.structures import Source
from neuromanifold.structures._base import RECORD_NUMEL, SWEEP_BYTES, require_finite
from neuromanifold.structures.cost import load

__all__ = ["column_batches", "moments"]

LABELS = 64
"""Sampled for each input where the likelihood has no fourth moment in closed form."""
FACTORS = {"information": 1, "label_variance": 4}
"""How many squares of a gradient each sum is a product of, where that is not 2."""

Powers = Callable[[Tensor], dict[str, Tensor]]
"""Components `(V, G, N, ...)` of gradients along cotangents to the terms of sums, `(G, N, ...)`."""


def moments(source: Source, *, bounds: bool = False) -> Moments:
    """Measure them in one pass with all columns of the output Fisher.

    Args:
        source: the measurement; its estimator does not matter.
        bounds: whether to bound κ₄ too (see `bounds.py`), where it has a closed form.

    Raises:
        UnsupportedError: If all squares of a parameter's information are zero by underflow.
    """
    layout = source.plan.layout
    sums: dict[str, dict[str, Tensor]] = {}
    source = replace(source, estimator=_ColumnsAndLabels())
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
    rows: dict[str, Tensor] = {}
    for block in source.plan.blocks:
        for key, value in sums[block.name].items():
            if key not in rows:
                rows[key] = torch.empty(
                    1, layout.num_parameters, dtype=source.dtype, device=source.device
                )
            block.write(value[None], rows[key], layout)
    normaliser = source.num_samples
    means = {key: layout.unflatten(row[0] / normaliser) for key, row in rows.items()}
    found = Moments(normaliser, **means)
    _require_squares(found)
    return found


def _require_squares(found: Moments) -> None:
    """Refuse parameters whose information is so little that its square is zero in this precision.

    Their variances would be zero, as if they were known without error.
    """
    names = list(found.information)
    most = torch.stack([v.max() for v in found.information.values()])
    lost = (most > 0) & (most.square() < torch.finfo(most.dtype).tiny)
    bad = [name for name, is_lost in zip(names, lost.tolist(), strict=True) if is_lost]
    if bad:
        raise UnsupportedError(
            f"The Fisher information of {listed(bad)} is at most {float(most[lost].max()):.1g} "
            f"nats/parameter², and its square, of which variances are made, is no number in "
            f"{most.dtype}. Measure in a wider precision (model.double()), or leave them out by "
            f"params=...; nm.estimate(...) sums in double precision."
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
    cotangents = torch.stack(
        list(
            source.estimator.cotangents(
                source.likelihood, outputs, targets, generator=source.generator
            )
        )
    )
    for record in tape.records(cotangents):
        start = 0
        for part in record.split(RECORD_NUMEL, across_sweeps=False):
            samples = slice(start, start := start + part.num_samples)
            powers: Powers = partial(_sampled_powers, num_columns=len(cotangents) - LABELS)
            if cumulants is not None:
                some = replace(cumulants, quartic=cumulants.quartic[:, samples].to(record.dtype))
                powers = partial(_powers, cumulants=some, bounds=bounds)
            yield record.block.name, _sums(part, powers)


class _ColumnsAndLabels(Estimator):
    """Columns of the output Fisher, if any; where κ₄ has no form along them, scores of labels."""

    random = True

    def cotangents(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor | None,
        *,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        with suppress(UnsupportedError):  # no exact form
            yield from Exact().cotangents(likelihood, outputs, targets)
        if likelihood.column_cumulants(outputs) is None:
            labels = MonteCarlo(LABELS)
            for u in labels.cotangents(likelihood, outputs, targets, generator=generator):
                yield LABELS**0.5 * u

    def num_sweeps(self, likelihood: Likelihood, outputs: Tensor) -> int:
        labels = LABELS if likelihood.column_cumulants(outputs) is None else 0
        return likelihood.num_columns(outputs) + labels


def _sums(record: Record, powers_of: Powers) -> dict[str, Tensor]:
    """Sums over the samples of a record, each `(G, O, I)`."""
    part = record.single
    if isinstance(part, Factored) and part.num_positions == 1:
        # γ_c = g_c a: powers of inputs and of cotangents apart, so that sums are matrix products.
        inputs = part.augmented.squeeze(2).square()  # (G, N, I)
        return {
            key: psd.product(
                value.mT,
                inputs ** FACTORS.get(key, 2),
                psd.aligned_empty(value, len(value), value.shape[2], inputs.shape[2]),
            )
            for key, value in powers_of(part.g.squeeze(3)).items()
        }
    return {key: value.sum(dim=1) for key, value in powers_of(record.per_sample()).items()}


def _sampled_powers(components: Tensor, num_columns: int) -> dict[str, Tensor]:
    """`γ_c` and, beyond the columns, `j·z` of sampled labels to unbiased terms."""
    squares = components.square()
    scores = squares[num_columns:]
    num = len(scores)
    powers = {}
    if num_columns:
        columns = squares[:num_columns]
        information = columns.sum(dim=0)
        powers["quartic"] = columns.square().sum(dim=0)
    else:
        information = scores.mean(dim=0)
    deviations = (scores - information).square()
    variance = deviations.mean(dim=0)
    spread = deviations.square().mean(dim=0) - variance.square()
    squared = information.square()
    if not num_columns:
        variance *= num / (num - 1)
        powers["information_variance"] = variance / num
        squared = squared - powers["information_variance"]
    return powers | {
        "information": information,
        "squared": squared,
        "cumulant": variance - 2 * squared,
        "label_variance": spread.clamp(min=0) / (num - 1),
    }


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
