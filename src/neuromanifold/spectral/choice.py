"""Which operator to take spectra of: all samples in sample space where they fit, else products."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from neuromanifold._fisher import fisher, requested
from neuromanifold.capture import Data, Forward
from neuromanifold.estimators import Estimator, Exact
from neuromanifold.likelihoods import Likelihood
from neuromanifold.linalg import memory
from neuromanifold.operators import FisherOperator
from neuromanifold.structures import Gram, Implicit, Source

__all__ = ["operator"]

COPIES = 4
"""Gram matrices alive together when its eigenvalues are taken."""


def operator(
    model: nn.Module,
    likelihood: Likelihood,
    data: Any,
    *,
    estimator: Estimator | None = None,
    params: Iterable[str] | None = None,
    per: Literal["sample", "position"] = "sample",
    forward: Forward | None = None,
    uncovered: Literal["generic", "error"] = "generic",
    generator: torch.Generator | None = None,
    max_bytes: int | str = "1 GiB",
) -> FisherOperator:
    """The Fisher matrix of a model in the form that its spectrum is best taken of.

    `nm.Gram()`, which has all eigenvalues exactly, if its rows (samples times sweeps, N·C for the
    exact Fisher of C classes) are few enough; else `nm.Implicit()`, which has products only. One
    sample is measured to find out.

    Args:
        model: as for `nm.fisher`, like all that follow.
        likelihood: what the outputs mean.
        data: if an iterable, one that can be read again.
        estimator: which vectors are sent back; `nm.Exact()` by default.
        params: names or patterns of the parameters.
        per: as for `nm.fisher`.
        forward: how the model is called.
        uncovered: what to do about parameters without a layer rule.
        generator: source of the estimator's randomness.
        max_bytes: what rows and Gram matrix may take. It bounds the time as well: 8,192 rows in
            float32 have a Gram matrix of a quarter of the default.

    Returns:
        The matrix; `F.origin.notes` says what was chosen and why.

    Raises:
        ValueError: As `nm.fisher`.
        UnsupportedError: If the data can be read only once.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(300, 10), torch.randn(64, 300)
        >>> F = nm.spectral.operator(model, nm.Categorical(), x)
        >>> F.origin.structure, F.origin.notes
        ('Gram()', ('exact in sample space: 640 rows take 6.3 MiB of the 1.0 GiB allowed',))
    """
    budget = memory.parse(max_bytes)
    estimator = Exact() if estimator is None else estimator
    request = requested(
        model,
        likelihood,
        data,
        Gram(),
        estimator=estimator,
        params=params,
        forward=forward,
        uncovered=uncovered,
    )
    with request as (_, source):
        rows, needed = _size(source)
    fits = needed <= budget
    F = fisher(
        model,
        likelihood,
        data,
        Gram() if fits else Implicit(),
        estimator=estimator,
        params=params,
        per=per,
        forward=forward,
        uncovered=uncovered,
        generator=generator,
    )
    why = f"{rows:,} rows take {memory.readable(needed)} of the {memory.readable(budget)} allowed"
    if not fits:
        why = (
            f"{rows:,} rows would take {memory.readable(needed)}, more than the "
            f"{memory.readable(budget)} allowed"
        )
    note = f"exact in sample space: {why}" if fits else f"products only: {why}"
    F.origin = replace(F.origin, notes=(*F.origin.notes, note))
    return F


def _size(source: Source) -> tuple[int, int]:
    """Rows of the Gram matrix, and bytes, from one sample."""
    source.require_repeatable("nm.spectral.operator")
    num_samples = sum(batch.num_samples for batch in source.data)
    batch, _ = source.data.peek()
    seeded = torch.Generator(source.device).manual_seed(0)  # the caller's stays where it is
    trial = replace(source, data=Data([batch.samples(0, 1)]), generator=seeded)
    single = Gram().build(trial)
    rows = single.num_rows * num_samples
    kept = sum(tensor.nbytes for tensor in single._state()[1].values()) * num_samples
    return rows, kept + COPIES * rows**2 * source.dtype.itemsize
