"""Estimates that run until they are sure enough: `estimate(model, likelihood, data, ...)`.

Every number here is a mean over inputs of something that varies with the label that is drawn: the
squared norm of a score, of a part of it, or its product with a vector. A round over the data draws
several labels for each input. How much the numbers of one input vary is the noise of labels; what
the means of the inputs vary beyond that is the noise of data (analysis of variance). Sums are all
that is kept, so that data may be of any length, and a round may have another order than the last.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from neuromanifold._estimation.goal import Goal
from neuromanifold._estimation.numbers import Wanted, checked_share
from neuromanifold._estimation.result import Estimated
from neuromanifold._estimation.rounds import Rounds
from neuromanifold._fisher import requested
from neuromanifold.capture import Forward
from neuromanifold.estimators import Estimator
from neuromanifold.likelihoods import Likelihood
from neuromanifold.linalg import Vector
from neuromanifold.structures import Progress, Reducer

__all__ = ["estimate"]


def estimate(
    model: nn.Module,
    likelihood: Likelihood,
    data: Any,
    quantity: Wanted = "trace",
    *,
    rtol: float = 0.05,
    confidence: float = 0.95,
    estimator: Estimator | None = None,
    vector: Vector | None = None,
    quantile: float | None = None,
    params: Iterable[str] | None = None,
    forward: Forward | None = None,
    uncovered: Literal["generic", "error"] = "generic",
    reducer: Reducer | None = None,
    generator: torch.Generator | None = None,
    progress: bool | Progress = False,
    path: str | os.PathLike[str] | None = None,
    max_draws: int = 1000,
) -> Estimated:
    """Draw labels until a number that the Fisher matrix implies is known well enough.

    Each round goes over the data once, with two draws of the estimator for each input. It ends when
    half the width of the interval is below `rtol` times the value, for each number asked for; or
    when it never will be, because the inputs are too few: then `reached` is False and `note` says
    how many inputs would do. The interval is for the distribution that the inputs come from;
    `error("labels")` alone is the error for these very inputs.

    | quantity | value | error that is compared |
    |---|---|---|
    | "trace" | `tr F`, a number | of it |
    | "layers" | trace of each layer's block, by the layer's name | of each |
    | "diagonal" | of each parameter tensor, its shape | of each tensor, in the Euclidean norm |
    | "entries" | the same | of the best known half, or other `quantile`, of each tensor's entries |
    | "quadratic" | `vᵀ F v`, a number | of it |
    | "eigenvalue" | the largest one, a number | of it |

    For "eigenvalue", products with the exact matrix of these inputs give its eigenvector v first
    (an iteration that keeps up to 32 vectors, and starts anew if it is interrupted). Then `vᵀ F v`
    is estimated: to first order the eigenvalue moves as that does (Hampel, 1974). What the
    iteration may have missed is a source of its own, "iteration", and next to nothing. As v was
    chosen on the inputs that it is measured on, the value is a little large, by a term of second
    order that falls as 1/N and grows as the next eigenvalue comes near. The interval does not hold
    it, and means nothing for an eigenvalue that is degenerate.

    An interrupted run (Ctrl-C) loses nothing if it has a `path`: call it again with the same
    arguments, and it goes on; the result is that of a run without interruption. A file also serves
    a later call with a smaller `rtol`. With a loader that shuffles, the round that was interrupted
    is drawn anew.

    Args:
        model: as for `nm.fisher`.
        likelihood: what the outputs mean.
        data: inputs, with or without targets; they are read in each round.
        quantity: what is estimated.
        rtol: half the width of the interval over the value, at most.
        confidence: how often the interval covers the truth.
        estimator: `nm.MonteCarlo(1)` by default. `nm.Exact()` draws nothing: one round gives the
            exact value for these inputs, and the noise of the data.
        vector: v of "quadratic", a dict by parameter or flat `(P,)`.
        quantile: of "entries", the share of each tensor's entries that are within the tolerance,
            0.5 by default; those that are zero are left out.
        params: names or patterns of the parameters.
        forward: how the model is called.
        uncovered: what to do about parameters without a layer rule.
        reducer: sums over processes, each of which has a part of the data; all stop at the same
            time with the same answer. Give each a generator with a seed of its own, and a `path`.
        generator: source of the labels; a run that goes on sets it to where it stopped.
        progress: True shows a progress bar; a function is told `(batches done, batches in all)`,
            where the latter is a forecast, None in the first round.
        path: file in which the draws are kept.
        max_draws: labels or probes for each input, at most.

    Returns:
        Value and variances by source, "data" and "labels" (or "probes"), in nats/parameter²; for
        "quadratic" in nats if v is a step of the parameters. `draws` is the number of labels for
        each input.

    Raises:
        ValueError: If an argument makes no sense, or there is one input only.
        StorageError: If the file is of another request, or no file of this function.
        UnsupportedError: If the data can be read only once; for "eigenvalue", if
            there are no products with the exact matrix (see `nm.Implicit`).
        NonFiniteError: If outputs or scores hold NaN or infinity.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(4, 3), torch.randn(2000, 4)
        >>> rng = torch.Generator().manual_seed(0)
        >>> trace = nm.estimate(model, nm.Categorical(), x, rtol=0.1, generator=rng)
        >>> trace.reached, sorted(trace.variances)
        (True, ['data', 'labels'])
        >>> low, high = trace.interval(0.95)
        >>> bool(high - low <= 2 * 0.1 * trace.value)
        True
    """
    goal = Goal(rtol, confidence, max_draws)
    if quantity not in get_args(Wanted):
        raise ValueError(f"quantity is one of {list(get_args(Wanted))}, got {quantity!r}.")
    if (quantity == "quadratic") != (vector is not None):
        raise ValueError(
            'quantity="quadratic" is vᵀ F v: give vector=v, a dict by parameter or flat (P,). '
            "Other quantities take no vector."
        )
    share = checked_share(quantity, quantile)
    request = requested(
        model,
        likelihood,
        data,
        estimator=estimator,
        params=params,
        forward=forward,
        uncovered=uncovered,
        reducer=reducer,
        generator=generator,
        progress=progress,
    )
    with request as (_, source):
        if source.estimator.random or quantity == "eigenvalue":
            source.require_repeatable("nm.estimate(...)")
        kept = None if path is None else Path(path)
        return Rounds(source, quantity, vector, share, kept).until(goal)
