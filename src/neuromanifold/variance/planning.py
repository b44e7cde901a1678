"""How many inputs and labels are enough, told beforehand.

With `n_x` inputs and `n_y` labels for each, an estimate has the variance `(D + L/n_y) / n_x`: D
between inputs, L of one label (papers.md §3.5). A pilot measures both.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from neuromanifold._estimate import Estimate
from neuromanifold._estimation import Estimated, Wanted, checked_share, estimate, shares
from neuromanifold._forecast import Forecast, forecast
from neuromanifold._intervals import quantile as half_width
from neuromanifold.capture import Forward
from neuromanifold.errors import UnsupportedError
from neuromanifold.estimators import Estimator, MonteCarlo, RandomSigns
from neuromanifold.likelihoods import Likelihood
from neuromanifold.linalg import Vector, memory
from neuromanifold.structures import Diagonal, Progress
from neuromanifold.variance.first import diagonal

__all__ = ["Demand", "Plan", "plan"]

PILOT_DRAWS = 8
"""Labels for each input of a pilot where there is no closed form."""
LEAST = 1e-9
"""A tolerance that no pilot reaches, so that it draws all of these."""
MOST_LABELS = 1024


@dataclass(frozen=True)
class Demand:
    """What one number, or the diagonal of one parameter, asks for.

    Attributes:
        data: variance between inputs over the squared value, D.
        drawn: variance of one label or probe over the squared value, L.
        relative: the largest standard error over the value that is good enough.
    """

    data: float
    drawn: float
    relative: float

    def inputs(self, labels: int) -> int:
        """How many inputs with so many labels each."""
        return max(math.ceil((self.data + self.drawn / labels) / self.relative**2), 1)

    def labels(self, inputs: int) -> int | None:
        """How many labels for each of so many inputs; None if no number of labels is enough."""
        spare = inputs * self.relative**2 - self.data
        if self.drawn <= 0 and spare >= 0:
            return 1
        return max(math.ceil(self.drawn / spare), 1) if spare > 0 else None


@dataclass(frozen=True)
class Plan:
    """How much to measure for a relative error.

    Attributes:
        inputs: how many, n_x.
        labels: for each of them, n_y.
        demands: of each number; by parameter, by layer, or under the name of the quantity.
        quantity: what is estimated.
        rtol: half the width of the interval over the value.
        confidence: how often the interval covers the truth.
        pilot: what the plan is made from.
        seconds: that drawing takes, None if that could not be tried.
        bytes: of memory it takes over what is allocated already.
    """

    inputs: int
    labels: int
    demands: Mapping[str, Demand]
    quantity: str
    rtol: float
    confidence: float
    pilot: Estimate
    seconds: float | None
    bytes: int

    @property
    def needed(self) -> dict[str, int]:
        """Inputs that each number asks for, with this many labels for each."""
        return {name: demand.inputs(self.labels) for name, demand in self.demands.items()}

    def labels_for(self, inputs: int) -> int | None:
        """Labels for each of so many inputs; None if the inputs are too few for any number of them.

        Example:
            >>> import torch, neuromanifold as nm
            >>> model, x = torch.nn.Linear(4, 3), torch.randn(400, 4)
            >>> plan = nm.variance.plan(model, nm.Categorical(), x, rtol=0.1)
            >>> plan.labels_for(plan.inputs) <= plan.labels, plan.labels_for(1)
            (True, None)
        """
        most = 1
        for demand in self.demands.values():
            labels = demand.labels(inputs)
            if labels is None:
                return None
            most = max(most, labels)
        return most

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "inputs": self.inputs,
            "labels": self.labels,
            "needed": self.needed,
            "quantity": self.quantity,
            "rtol": self.rtol,
            "confidence": self.confidence,
            "pilot": self.pilot.to_dict(),
            "seconds": self.seconds,
            "bytes": self.bytes,
        }

    def __str__(self) -> str:
        time = "time unknown" if self.seconds is None else f"{self.seconds:.2g} s"
        needed = sorted(self.needed.items(), key=lambda item: -item[1])
        width = max(len(name) for name, _ in needed)
        return "\n".join(
            [
                f"{self.quantity} within {self.rtol:.1%} at {self.confidence:.0%} confidence: "
                f"{self.inputs:,} inputs with {self.labels} label{'s'[: self.labels > 1]} each, "
                f"{time}, {memory.readable(self.bytes)}",
                *(f"  {name:{width}}  {inputs:>10,} inputs" for name, inputs in needed),
            ]
        )


def plan(
    model: nn.Module,
    likelihood: Likelihood,
    data: Any,
    *,
    rtol: float = 0.05,
    confidence: float = 0.95,
    quantity: Wanted = "diagonal",
    estimator: Estimator | None = None,
    vector: Vector | None = None,
    quantile: float | None = None,
    params: Iterable[str] | None = None,
    forward: Forward | None = None,
    uncovered: Literal["generic", "error"] = "generic",
    generator: torch.Generator | None = None,
    progress: bool | Progress = False,
) -> Plan:
    """How many inputs, and labels for each, a relative error asks for; and what that costs.

    The data are a pilot: some hundred inputs tell how much inputs and labels vary. For the diagonal
    and its entries the noise of labels is a closed form where the likelihood has one, or measured
    (`nm.variance.diagonal`); otherwise 8 labels are drawn for each input of the pilot. Of all pairs
    that are enough, the plan is the cheapest, if one label costs what the forward pass costs.

    The errors are taken for normal: a single entry that a rare input dominates needs more.

    Args:
        model: as for `nm.estimate`, like all that follow.
        likelihood: what the outputs mean.
        data: inputs of the pilot, at least two.
        rtol: half the width of the interval over the value.
        confidence: how often the interval covers the truth.
        quantity: what is estimated; of "diagonal", the Euclidean norm of each parameter's error; of
            "entries", the error of single ones, such that a share of them is within the tolerance.
        estimator: `nm.MonteCarlo(1)` by default; `nm.RandomSigns(1)`, or one that draws nothing.
        vector: v of "quadratic".
        quantile: of "entries", that share; 0.5 by default.
        params: names or patterns of the parameters.
        forward: how the model is called.
        uncovered: what to do about parameters without a layer rule.
        generator: source of the labels of a pilot that draws.
        progress: True shows a progress bar.

    Returns:
        Numbers of inputs and labels, by parameter too, seconds and bytes. `print` shows a table.

    Raises:
        ValueError: If an argument makes no sense, or there is one input only.
        UnsupportedError: If the data can be read only once.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(4, 3), torch.randn(400, 4)
        >>> one = nm.variance.plan(model, nm.Categorical(), x, rtol=0.1)
        >>> half = nm.variance.plan(model, nm.Categorical(), x, rtol=0.05)
        >>> sorted(one.needed)
        ['bias', 'weight']
        >>> 3.9 < half.inputs / one.inputs < 4.1  # half the error, four times the inputs
        True
    """
    estimator = MonteCarlo(1) if estimator is None else estimator
    if estimator.random and estimator not in (MonteCarlo(1), RandomSigns(1)):
        raise ValueError(
            f"A plan says how many draws are enough, so it starts from one: give nm.MonteCarlo(1) "
            f"or nm.RandomSigns(1), or an estimator that draws nothing; got {estimator!r}."
        )
    if not 0 < rtol < math.inf:
        raise ValueError(f"rtol is a positive number such as 0.05; got {rtol}.")
    relative = rtol / half_width(confidence)
    if quantity not in get_args(Wanted):
        raise ValueError(f"quantity is one of {list(get_args(Wanted))}, got {quantity!r}.")
    if params is not None and not isinstance(params, str):
        params = list(params)  # read more than once
    share = checked_share(quantity, quantile)
    how: dict[str, Any] = {"params": params, "forward": forward, "uncovered": uncovered}
    pilot = _pilot(
        model,
        likelihood,
        data,
        quantity,
        estimator,
        {**how, "progress": progress},
        {"vector": vector, "quantile": share, "generator": generator},
    )
    demands = _demands(pilot, quantity, relative)
    labels = _cheapest(demands.values()) if estimator.random else 1
    inputs = max(demand.inputs(labels) for demand in demands.values())
    drawing = MonteCarlo(labels) if estimator.random else estimator
    cost = forecast(model, likelihood, data, Diagonal(), estimator=drawing, **how)
    return Plan(
        inputs,
        labels,
        demands,
        quantity,
        rtol,
        confidence,
        pilot,
        _seconds(cost, inputs),
        cost.bytes,
    )


def _pilot(
    model: nn.Module,
    likelihood: Likelihood,
    data: Any,
    quantity: Wanted,
    estimator: Estimator,
    how: Mapping[str, Any],
    drawing: Mapping[str, Any],
) -> Estimate:
    """An estimate with both variances, without draws of its own if there is a way."""
    if quantity in ("diagonal", "entries") and drawing["vector"] is None:
        with suppress(UnsupportedError):  # no closed form; other reasons come up again below
            generator = drawing["generator"]
            closed = diagonal(
                model, likelihood, data, estimator=estimator, generator=generator, **how
            )
            return Estimated(
                closed.value,
                closed.variances,
                closed.num_samples,
                closed.draws,
                quantile=drawing["quantile"],
            )
    return estimate(
        model,
        likelihood,
        data,
        quantity,
        rtol=LEAST,
        max_draws=PILOT_DRAWS,
        estimator=estimator,
        **how,
        **drawing,
    )


def _demands(pilot: Estimate, quantity: str, relative: float) -> dict[str, Demand]:
    """What each number asks for; one that is zero whatever the input and label asks for nothing."""
    names, (squares, data, drawn) = shares(pilot)
    if not bool(data.isfinite().all()):
        raise ValueError("One input says nothing of others: a pilot has at least 2 inputs.")
    of_one = torch.stack([data, drawn * pilot.draws]) * pilot.num_samples
    between, within = torch.where(squares > 0, of_one / squares, 0).tolist()
    return {
        name or quantity: Demand(of_input, of_label, relative)
        for name, of_input, of_label in zip(names, between, within, strict=True)
    }


def _cheapest(demands: Collection[Demand]) -> int:
    """Labels for each input with which all demands cost least; one is a pass, like the forward."""

    def cost(labels: int) -> int:
        return max(demand.inputs(labels) for demand in demands) * (1 + labels)

    return min((2**k for k in range(MOST_LABELS.bit_length())), key=cost)


def _seconds(cost: Forecast, inputs: int) -> float | None:
    if cost.seconds is None:
        return None
    return cost.seconds * inputs / (cost.samples * (cost.batches or 1))
