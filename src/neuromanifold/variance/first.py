"""The diagonal with its standard error."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from neuromanifold._estimate import Estimate
from neuromanifold._fisher import requested
from neuromanifold.capture import Forward
from neuromanifold.estimators import Estimator, MonteCarlo
from neuromanifold.likelihoods import Likelihood
from neuromanifold.structures import Progress, Reducer
from neuromanifold.variance.moments import moments

__all__ = ["diagonal"]


def diagonal(
    model: nn.Module,
    likelihood: Likelihood,
    data: Any,
    *,
    estimator: Estimator | None = None,
    params: Iterable[str] | None = None,
    forward: Forward | None = None,
    uncovered: Literal["generic", "error"] = "generic",
    reducer: Reducer | None = None,
    progress: bool | Progress = False,
) -> Estimate:
    """The diagonal of the Fisher matrix, and how far an estimator's diagonal is off.

    The value is what the estimator gives on average over its draws, computed with all columns of
    the output Fisher. Two sources of error are kept apart: "data", because the N inputs are a
    sample of all inputs (it stays whatever is drawn for them), and "labels" or "probes", because
    the estimator draws. Their variances are closed forms, not estimates from draws:

    | estimator | variance that it adds, for N inputs with s draws each |
    |---|---|
    | `nm.Exact()` | none |
    | `nm.MonteCarlo(s)` | mean of `E (j·z)⁴ − I²` over N s |
    | `nm.RandomSigns(s)` | mean of `2 I² − 2 Σ_c γ_c⁴` over N s |

    The cost is that of `nm.Exact()`: as many sweeps as the outputs have entries or classes.

    Args:
        model: as for `nm.fisher`, like all that follow.
        likelihood: what the outputs mean; one with a closed form, any but `nm.FromDistribution`.
        data: inputs, with or without targets.
        estimator: whose error is asked for; `nm.MonteCarlo(1)` by default.
        params: names or patterns of the parameters.
        forward: how the model is called.
        uncovered: what to do about parameters without a layer rule.
        reducer: sums over processes.
        progress: True shows a progress bar.

    Returns:
        Value and variances by parameter, in nats/parameter².

    Raises:
        UnsupportedError: If the likelihood or the estimator has no closed form.
        ValueError: As `nm.fisher`.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(4, 3), torch.randn(256, 4)
        >>> one, ten = (
        ...     nm.variance.diagonal(model, nm.Categorical(), x, estimator=nm.MonteCarlo(s))
        ...     for s in (1, 10)
        ... )
        >>> ratio = one.error("labels")["bias"] / ten.error("labels")["bias"]
        >>> torch.allclose(ratio, torch.tensor(10.0).sqrt())
        True
    """
    estimator = MonteCarlo(1) if estimator is None else estimator
    asked = requested(
        model,
        likelihood,
        data,
        estimator=estimator,
        params=params,
        forward=forward,
        uncovered=uncovered,
        reducer=reducer,
        progress=progress,
    )
    with asked as (_, source):
        found = moments(source)
        between = found.between_samples
        if found.num_samples == 1:  # one input says nothing of others
            between = {name: torch.full_like(v, torch.inf) for name, v in between.items()}
        variances = {
            "data": {name: v / found.num_samples for name, v in between.items()},
            **estimator.noise(found),
        }
    return Estimate(
        found.information,
        variances,
        num_samples=found.num_samples,
        draws=estimator.draws,
    )
