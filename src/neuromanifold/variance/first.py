"""The diagonal with its standard error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from neuromanifold._estimate import Estimate
from neuromanifold._fisher import requested
from neuromanifold._typing import Params
from neuromanifold.capture import Forward
from neuromanifold.estimators import Estimator, MonteCarlo
from neuromanifold.likelihoods import Likelihood
from neuromanifold.structures import Progress, Reducer
from neuromanifold.variance.moments import moments

__all__ = ["DiagonalEstimate", "diagonal"]


@dataclass(frozen=True)
class DiagonalEstimate(Estimate):
    """A diagonal with its error, and the error of that error where it was measured.

    Attributes:
        variance_errors: standard errors of `variances`, by source; none of closed forms.
    """

    variance_errors: Mapping[str, Params] = field(default_factory=dict)


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
    generator: torch.Generator | None = None,
    progress: bool | Progress = False,
) -> DiagonalEstimate:
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

    An `nm.FromDistribution` has these forms if its support is finite. Otherwise `E (j·z)⁴` is
    measured from 64 labels for each input, at the cost of as many sweeps more, and
    `variance_errors` says how far off the variance is. If the output Fisher has no exact form
    either, the value too is measured from them, with an error √(s/64) times that from "labels".

    Args:
        model: as for `nm.fisher`, like all that follow.
        likelihood: what the outputs mean.
        data: inputs, with or without targets.
        estimator: whose error is asked for; `nm.MonteCarlo(1)` by default.
        params: names or patterns of the parameters.
        forward: how the model is called.
        uncovered: what to do about parameters without a layer rule.
        reducer: sums over processes.
        generator: source of the labels that moments are measured from.
        progress: True shows a progress bar.

    Returns:
        Value and variances by parameter, in nats/parameter².

    Raises:
        UnsupportedError: If the estimator has no closed form, or needs one of the output Fisher.
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
        generator=generator,
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
    return DiagonalEstimate(
        found.information,
        variances,
        num_samples=found.num_samples,
        draws=estimator.draws,
        variance_errors=estimator.noise_errors(found),
    )
