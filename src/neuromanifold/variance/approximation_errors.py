"""Error bars of `‖F − S‖ / ‖F‖`, how far an approximation is from what it approximates.

Where S is a part of F (its diagonal, its blocks), the error is a function of the mean F alone, and
its influences are closed forms. Where S has statistics of its own, as Kronecker factors have, it is
measured again with a group of samples left out, and again for the next group. The groups are summed
in one pass over the data, so that this costs one more measurement and not one for each group.

Source: Tukey, Bias and confidence in not quite large samples, 1958 (the jackknife).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from neuromanifold._fisher import requested
from neuromanifold.estimators import Estimator
from neuromanifold.likelihoods import Likelihood
from neuromanifold.operators import FisherOperator
from neuromanifold.operators.blocks import BlockOperator
from neuromanifold.structures import Source
from neuromanifold.structures._base import AdditiveStructure, Statistics, require_finite
from neuromanifold.structures.gram import GramOperator
from neuromanifold.variance.spectrum import from_rows

__all__ = [
    "Groups",
    "LeftOut",
    "gradients",
    "jackknife_error",
    "leave_groups_out",
    "overlaps_left",
    "projection_error",
    "quadratic",
]

GROUPS = 12
"""Left out in turn; a standard error from so many is itself good to about a fifth."""

RUNS = 4
"""Runs of neighbours that a group has in each batch, as data are often sorted."""

TOGETHER = 2**22
"""Entries of gradients that are multiplied at once."""


def gradients(F: GramOperator) -> Tensor:
    """The rows `û_r` of `F = Σ_r û_r û_rᵀ`, `(R, P)` in the layout's order: all in memory."""
    out = torch.empty(F.num_rows, F.num_parameters, dtype=F.dtype, device=F.device)
    start = 0
    for chunk in F._chunks:
        part = out[start : (start := start + chunk.rows[0].num_rows)]
        for block, rows in zip(F._blocks, chunk.rows, strict=True):
            block.write(rows.per_sample() * math.sqrt(chunk.weight), part, F.layout)
    return out


def quadratic(rows: Tensor, S: FisherOperator) -> Tensor:
    """`û_rᵀ S û_r` for rows `(R, P)`, `(R,)`."""
    step = max(TOGETHER // rows.shape[1], 1)
    return torch.cat([(part * S._matmat(part)).sum(dim=1) for part in rows.split(step)])


def projection_error(F: GramOperator, full: Tensor, kept: Tensor) -> float:
    """Standard error of `‖F − S‖ / ‖F‖` for an S that is a part of F.

    Args:
        F: the exact matrix.
        full: `û_rᵀ F û_r` of its rows, `(R,)`; their sum is `‖F‖²`.
        kept: `û_rᵀ S û_r`, likewise; their sum is `‖S‖²`.

    Returns:
        0 if S is F, or F is zero; infinite for one sample.
    """
    full, kept = full.double(), kept.double()
    norm, ratio = full.sum(), kept.sum() / full.sum()
    squared = 1 - ratio
    # A difference of numbers that were rounded: nothing is left out.
    if not bool(squared > len(full) * torch.finfo(F.dtype).eps):
        return 0.0
    stderr = from_rows(F, squared, (ratio * full - kept) / norm / squared.sqrt()).stderr
    assert isinstance(stderr, Tensor)
    return float(stderr)


@dataclass(frozen=True)
class Groups:
    """Which samples are left out together.

    Attributes:
        of_sample: group of each sample, `(N,)` integers.
        sizes: samples in each group.
    """

    of_sample: Tensor
    sizes: tuple[int, ...]

    @property
    def scales(self) -> list[float]:
        """N over what is left, by group."""
        total = sum(self.sizes)
        return [total / (total - size) for size in self.sizes]


@dataclass(frozen=True)
class LeftOut:
    """An approximation measured without each of the groups.

    Attributes:
        operators: one for each group.
        groups: which they are.
    """

    operators: tuple[FisherOperator, ...]
    groups: Groups

    def block(self, name: str) -> LeftOut:
        """What it is of one block.

        Raises:
            ValueError: If there is no such block.
        """
        parts = tuple(operator.block(name) for operator in self.operators)
        return LeftOut(parts, self.groups)


def leave_groups_out(
    model: nn.Module,
    likelihood: Likelihood,
    data: Any,
    structure: AdditiveStructure,
    *,
    estimator: Estimator,
    generator: torch.Generator,
) -> LeftOut | None:
    """Measure a structure without each group of samples in turn, in one pass over the data.

    Args:
        model: as for `nm.fisher`, like all that follow.
        likelihood: what the outputs mean.
        data: inputs, with or without targets.
        structure: one whose statistics are sums.
        estimator: draws the labels.
        generator: the same seed draws the same labels as `nm.fisher` does.

    Returns:
        None for a single sample.

    Raises:
        ValueError: As `nm.fisher`.
    """
    asked = requested(
        model,
        likelihood,
        data,
        structure,
        estimator=estimator,
        params=None,
        forward=None,
        uncovered="generic",
        generator=generator,
    )
    with asked as (_, source):
        return _measured(structure, source)


def _measured(structure: AdditiveStructure, source: Source) -> LeftOut | None:
    sums: dict[str, list[Statistics]] = {}
    numbers: list[Tensor] = []
    runs: list[_Run] = []
    counted = following = 0
    for records in source.sweeps():
        num_samples = source.num_samples - counted
        if num_samples:  # not just further sweeps of the same batch
            counted = source.num_samples
            runs = _runs(num_samples, following)
            following += len(runs)
            numbers += [torch.full((run.stop - run.start,), run.group) for run in runs]
        for record in records:
            of_groups = sums.setdefault(record.block.name, [{} for _ in range(GROUPS)])
            for run in runs:
                for part in structure.split(record.samples(run.start, run.stop)):
                    _add(of_groups[run.group], structure.statistics(part))
    if counted == 1:
        return None
    of_sample = torch.cat(numbers)
    sizes = of_sample.bincount().tolist()
    totals: dict[str, Statistics] = {}
    for name, of_groups in sums.items():
        for statistics in of_groups:
            _add(totals.setdefault(name, {}), statistics)
    require_finite(totals)
    coverage, origin = source.coverage(structure.represent), source.origin(structure)
    operators = []
    for group, size in enumerate(sizes):
        matrices = [
            structure.assemble(
                block, _without(totals[block.name], sums[block.name][group]), counted - size
            )
            for block in source.plan.blocks
        ]
        operators.append(BlockOperator(source.plan.layout, matrices, coverage, origin))
    return LeftOut(tuple(operators), Groups(of_sample.to(source.device), tuple(sizes)))


@dataclass(frozen=True)
class _Run:
    """Neighbouring samples of a batch that belong to one group."""

    start: int
    stop: int
    group: int


def _runs(num_samples: int, following: int) -> list[_Run]:
    """A batch in runs, which take their groups in turn, after those of earlier batches."""
    count = min(GROUPS * RUNS, num_samples)
    ends = [num_samples * i // count for i in range(count + 1)]
    runs = enumerate(pairwise(ends), start=following)
    return [_Run(start, stop, number % GROUPS) for number, (start, stop) in runs]


def _add(total: Statistics, part: Statistics) -> None:
    for key, value in part.items():
        total[key] = total[key] + value if key in total else value


def _without(total: Statistics, group: Statistics) -> Statistics:
    """New tensors, which may be written into."""
    return {
        key: value - group[key] if key in group else value.clone() for key, value in total.items()
    }


def overlaps_left(
    F: GramOperator, rows: Tensor, left_out: LeftOut, dense: Tensor | None = None
) -> list[Tensor]:
    """`⟨F, S⟩` without each of the groups in both, times the share that is left.

    Args:
        F: the exact matrix, with all samples.
        rows: its `gradients`.
        left_out: S without each of the groups.
        dense: F itself, `(P, P)`, where that is known: then rows are needed for one pass only.
    """
    of_row = left_out.groups.of_sample[F.sample_of_row]
    found = []
    for group, S in enumerate(left_out.operators):
        if dense is None:
            found.append(quadratic(rows[of_row != group], S).double().sum())
        else:
            whole = (dense * S.to_dense()).sum()
            found.append((whole - quadratic(rows[of_row == group], S).sum()).double())
    return found


def jackknife_error(
    F: GramOperator, overlaps: Sequence[Tensor], norms: Sequence[Tensor], groups: Groups
) -> float:
    """Standard error of `‖F − S‖ / ‖F‖` from what it is without each of the groups.

    Args:
        F: the exact matrix, with all samples.
        overlaps: by group, as `overlaps_left` gives them.
        norms: by group, `‖S‖` without it.
        groups: of samples.

    Returns:
        0 if F is zero.
    """
    of_row = groups.of_sample[F.sample_of_row]
    count = len(groups.sizes)
    # ‖F‖² as a sum over pairs of groups, of which leaving one out removes a row and a column.
    by_row = F.gram.new_zeros(count, F.num_rows).index_add_(0, of_row, F.gram.square())
    pairs = F.gram.new_zeros(count, count).index_add_(1, of_row, by_row).double()
    errors = []
    for group, scale in enumerate(groups.scales):
        squared = scale**2 * (pairs.sum() - 2 * pairs[group].sum() + pairs[group, group])
        distance = squared - 2 * scale * overlaps[group] + norms[group].double() ** 2
        errors.append(torch.where(squared > 0, distance / squared, 0).clamp(min=0).sqrt())
    spread = torch.stack(errors).var(correction=0)
    return float(((count - 1) * spread).sqrt())
