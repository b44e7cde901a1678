"""What a measurement will cost, before it is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from neuromanifold._fisher import requested
from neuromanifold.capture import Batch, Forward
from neuromanifold.errors import TooLargeError
from neuromanifold.estimators import Estimator
from neuromanifold.likelihoods import Likelihood
from neuromanifold.linalg import memory
from neuromanifold.structures import Source, Structure
from neuromanifold.structures.cost import costs, fitting, load

__all__ = ["Forecast", "forecast"]


@dataclass(frozen=True)
class Forecast:
    """What `nm.fisher` will need, over what is allocated already.

    Attributes:
        bytes: the most that is alive at once.
        seconds: wall time for all batches, or for one if their number is not known; None if no
            trial was possible, because what is kept does not fit.
        statistics: bytes of what is kept, part of `bytes`.
        activations: bytes of a forward pass, part of `bytes`.
        temporaries: bytes of the rest, cotangents and what is made of them.
        available: bytes free at present, or `max_bytes`.
        samples: in the first batch.
        batches: how many there are, None if the data do not tell.
        at_once: samples of a batch that go through the model together.
        tried: samples of the largest trial; the numbers are extrapolated from it.
    """

    bytes: int
    seconds: float | None
    statistics: int
    activations: int
    temporaries: int
    available: int
    samples: int
    batches: int | None
    at_once: int
    tried: int

    @property
    def fits(self) -> bool:
        """Whether there is enough memory."""
        return self.bytes <= self.available

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {**asdict(self), "fits": self.fits}

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {memory.readable(size)}"
            for name, size in (
                ("statistics", self.statistics),
                ("activations", self.activations),
                ("temporaries", self.temporaries),
            )
        )
        duration = "time unknown" if self.seconds is None else _duration(self.seconds)
        if self.batches is None:
            duration += " for one batch"
        room = "" if self.fits else f"; only {memory.readable(self.available)} are available"
        return f"{memory.readable(self.bytes)}, {duration}: {parts}{room}"


def forecast(
    model: nn.Module,
    likelihood: Likelihood,
    data: Any,
    structure: Structure | Mapping[str, Structure] | None = None,
    *,
    estimator: Estimator | None = None,
    params: Iterable[str] | None = None,
    per: Literal["sample", "position"] = "sample",
    forward: Forward | None = None,
    uncovered: Literal["generic", "error"] = "generic",
    max_bytes: int | str | None = None,
) -> Forecast:
    """Predict the memory and the time that `nm.fisher` needs with the same arguments.

    It is tried: on one sample of the first batch, on two, three, six, ... up to about an eighth of
    them, or more if that takes no time. What cannot fit is counted and not tried.

    Args:
        model: as for `nm.fisher`, like all that follow.
        likelihood: what the outputs mean.
        data: of a loader, the first batch is read.
        structure: what would be kept.
        estimator: which vectors would be sent back.
        params: names or patterns of the parameters.
        per: as for `nm.fisher`.
        forward: how the model is called.
        uncovered: what to do about parameters without a layer rule.
        max_bytes: how far batches would be cut.

    Returns:
        Bytes and seconds. `print` shows them on one line.

    Raises:
        ValueError: As `nm.fisher`.
        CaptureError: If a sample has other outputs alone than in company.
        UnsupportedError: If the data can be read only once, or a profiler is running.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(300, 10), torch.randn(64, 300)
        >>> cost = nm.forecast(model, nm.Categorical(), x, nm.Diagonal())
        >>> cost.fits, cost.statistics >= 4 * 3010  # rows of 301 numbers start 304 apart
        (True, True)
    """
    request = requested(
        model,
        likelihood,
        data,
        structure,
        estimator=estimator,
        params=params,
        per=per,
        forward=forward,
        uncovered=uncovered,
    )
    with request as (structure, source):
        source.require_repeatable("A forecast")
        batch, _ = source.data.peek()
        budget = None if max_bytes is None else memory.parse(max_bytes)
        return _forecast(structure, source, batch, budget)


def _forecast(
    structure: Structure, source: Source, batch: Batch, max_bytes: int | None
) -> Forecast:
    samples, batches = batch.num_samples, source.data.num_batches
    free = memory.available(source.device) if max_bytes is None else max_bytes
    at_once = samples
    try:
        if max_bytes is None:
            found = costs(structure, source, batch, 1 if batches == 1 else 2, free, timed=True)
        else:
            size = fitting(structure, source, batch, max_bytes, timed=True)
            found, at_once = size.costs, size(batch)
    except TooLargeError as error:
        loaded = load(source, batch, free)
        kept = structure.constant_numel(loaded.plan) * source.dtype.itemsize
        activations = loaded.activations(at_once)
        more = max(error.bytes_needed - kept, 0)
        total = kept + activations + more
        return Forecast(
            total, None, kept, activations, more, free, samples, batches, at_once, tried=0
        )
    peak, kept = found.peak(at_once), found.kept(at_once)
    activations = min(found.load.activations(at_once), peak - kept)
    return Forecast(
        bytes=peak,
        seconds=found.seconds(at_once, (batches or 1) * -(-samples // at_once)),
        statistics=kept,
        activations=activations,
        temporaries=peak - kept - activations,
        available=free,
        samples=samples,
        batches=batches,
        at_once=at_once,
        tried=min(found.tried, at_once),
    )


def _duration(seconds: float) -> str:
    """Time for people.

    Example:
        >>> _duration(0.0123), _duration(41.2), _duration(7300)
        ('12 ms', '41 s', '2.0 h')
    """
    for limit, unit, name in ((1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 3600:.1f} h"
