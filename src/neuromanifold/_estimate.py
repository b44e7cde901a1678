"""A value with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from neuromanifold._intervals import plus_minus, quantile
from neuromanifold._typing import Params

__all__ = ["Estimate", "Quantity", "plain"]

Quantity: TypeAlias = Tensor | Params
"""A tensor, or one for each parameter."""


@dataclass(frozen=True)
class Estimate:
    """A measured value, how far it may be off, and where the error comes from.

    Attributes:
        value: the estimate.
        variances: of the estimate, by source, of the value's kind: "data" because the inputs are a
            sample, "labels" because labels are drawn, "probes" because random vectors are.
        num_samples: N, inputs.
        draws: labels or probes for each input, or in all for probes that are not bound to inputs.

    Example:
        >>> import torch
        >>> trace = Estimate(torch.tensor(10.0), {"data": torch.tensor(0.36)}, num_samples=100)
        >>> print(trace)
        10.00 ± 0.60 (100 samples)
        >>> low, high = trace.interval()
        >>> print(f"{float(low):.2f} to {float(high):.2f}")
        8.82 to 11.18
    """

    value: Quantity
    variances: Mapping[str, Quantity] = field(default_factory=dict)
    num_samples: int = 0
    draws: int = 1

    @property
    def stderr(self) -> Quantity:
        """Standard error of all sources together."""
        return _map(lambda *parts: _root(sum(parts)), *self.variances.values())

    def error(self, source: str) -> Quantity:
        """Standard error of one source.

        Raises:
            KeyError: If there is no such source; the message lists them.
        """
        if source not in self.variances:
            raise KeyError(f"no error from {source!r}; there is {list(self.variances)}")
        return _map(_root, self.variances[source])

    @property
    def relative(self) -> Quantity:
        """Standard error over the magnitude of the value; 0 where both are zero."""

        def ratio(stderr: Tensor, value: Tensor) -> Tensor:
            return torch.where(stderr == 0, 0, stderr / value.abs())

        return _map(ratio, self.stderr, self.value)

    def interval(
        self, confidence: float = 0.95, *, positive: bool = False
    ) -> tuple[Quantity, Quantity]:
        """Ends of the interval that covers the truth with this confidence, if errors are normal.

        A few inputs, or rare labels, often make most of a diagonal or a trace. Where they are
        missed by chance, both the value and its standard error are too small, and the symmetric
        interval lies below the truth. `positive` is for numbers that cannot be negative, such as
        these: the error of the logarithm is taken for normal, which reaches farther upwards and
        never below zero.

        Args:
            confidence: how often the interval covers the truth.
            positive: whether to take the logarithm for normal, `value · exp(± width · relative)`.

        Returns:
            Lower and upper ends, of the value's kind.

        Raises:
            ValueError: If the confidence is not between 0 and 1, or a value is negative where
                `positive` says that none is.

        Example:
            >>> import torch
            >>> found = Estimate(torch.tensor(10.0), {"data": torch.tensor(9.0)})
            >>> for ends in (found.interval(), found.interval(positive=True)):
            ...     print(*(f"{float(end):.1f}" for end in ends))
            4.1 15.9
            5.6 18.0
        """
        width = quantile(confidence)
        ends = _around_logarithm if positive else _around
        low, high = (_map(partial(ends, side * width), self.value, self.stderr) for side in (-1, 1))
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: numbers, or lists of them; what is not finite is None."""
        return {
            "value": plain(self.value),
            "stderr": plain(self.stderr),
            "errors": {source: plain(self.error(source)) for source in self.variances},
            "num_samples": self.num_samples,
            "draws": self.draws,
        }

    def __str__(self) -> str:
        if isinstance(self.value, Tensor) and self.value.ndim == 0:
            stderr = self.stderr
            assert isinstance(stderr, Tensor)
            return f"{plus_minus(float(self.value), float(stderr))} ({self.num_samples} samples)"
        entries = self.value.values() if isinstance(self.value, Mapping) else [self.value]
        count = sum(entry.numel() for entry in entries)
        return f"<Estimate of {count} numbers from {self.num_samples} samples>"


def _map(function: Callable[..., Tensor], *quantities: Quantity) -> Quantity:
    first = quantities[0]
    if isinstance(first, Tensor):
        return function(*quantities)
    return {
        name: function(
            *(quantity[name] for quantity in quantities if not isinstance(quantity, Tensor))
        )
        for name in first
    }


def _around(width: float, value: Tensor, stderr: Tensor) -> Tensor:
    return value + width * stderr


def _around_logarithm(width: float, value: Tensor, stderr: Tensor) -> Tensor:
    if bool((value < 0).any()):
        raise ValueError(
            f"A value is {float(value.min()):g}, but positive=True is for numbers that cannot be "
            f"negative. Use the symmetric interval, positive=False."
        )
    end = value * (width * stderr / value).exp()
    # A value of zero has no logarithm; its error, if there is one, still counts upwards.
    return torch.where(value == 0, max(width, 0) * stderr, end)


def _root(variance: Any) -> Tensor:
    root: Tensor = torch.as_tensor(variance).clamp(min=0).sqrt()
    return root


def plain(value: Any) -> Any:
    """Tensors as lists, and None for NaN and infinity, which JSON does not have.

    Example:
        >>> plain({"errors": torch.tensor([1.0, float("inf")]), "draws": 1})
        {'errors': [1.0, None], 'draws': 1}
    """
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
