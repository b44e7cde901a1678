"""What the units of a layer are, given their inputs: Bernoulli, Gaussian or categorical.

Each is an exponential family with one natural parameter per unit, its logit η. Up to terms that do
not depend on η, `log p(x | η) = scale (t(x) · η − A(η))`; the score for η is `scale (t(x) − A'(η))`
and the Fisher matrix for η is `scale A''(η)`, in blocks of `group` units. All shapes may have any
leading axes in place of N.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from neuromanifold.errors import UnsupportedError

__all__ = ["BernoulliUnits", "CategoricalUnits", "GaussianUnits", "Units", "choose", "uniform"]


def uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers of the shape, dtype and device of `like`, drawn where the generator is."""
    device = like.device if generator is None else generator.device
    drawn = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=device)
    return drawn.to(like.device)


def choose(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw an index along the last axis, in proportion: `(..., C)` to `(...)`."""
    cumulative = probabilities.cumsum(-1)
    point = uniform(cumulative[..., :1], generator) * cumulative[..., -1:]
    # Rounding may bring the point to the very end, which belongs to the last index.
    return (cumulative <= point).sum(-1).clamp(max=cumulative.shape[-1] - 1)


class Units(ABC):
    """Units that are independent, group by group, given their logits.

    Attributes:
        scale: what multiplies the exponent.
    """

    scale: float = 1.0

    def group(self, units: int) -> int:
        """How many of the units of a layer make one variable."""
        return 1

    @abstractmethod
    def statistic(self, values: Tensor) -> Tensor:
        """t(x), `(N, n)`."""

    @abstractmethod
    def log_partition(self, logits: Tensor) -> Tensor:
        """A(η), summed over units, `(N,)`."""

    @abstractmethod
    def mean(self, logits: Tensor) -> Tensor:
        """A'(η), the mean of t, `(N, n)`: P(on), the mean, or class probabilities."""

    @abstractmethod
    def sample(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """Values `(N, n)`."""

    @abstractmethod
    def covariance(self, logits: Tensor) -> Tensor:
        """The Fisher matrix for the logits, `(N, B, c, c)`: B variables of c units."""

    def log_base(self, values: Tensor) -> Tensor:
        """The part of the log-probability without logits, `(N,)`."""
        return values.new_zeros(values.shape[:-1])

    def log_prob(self, logits: Tensor, values: Tensor) -> Tensor:
        """Log-probability in nats, summed over units, `(N,)`."""
        exponent = (self.statistic(values) * logits).sum(-1) - self.log_partition(logits)
        return self.scale * exponent + self.log_base(values)

    def log_prob_table(self, logits: Tensor, values: Tensor) -> Tensor:
        """Of all pairs: logits `(S, n)` and values `(N, n)` to `(N, S)`, one matrix product."""
        exponent = self.statistic(values) @ logits.mT - self.log_partition(logits)
        return self.scale * exponent + self.log_base(values)[..., None]

    def score(self, logits: Tensor, values: Tensor) -> Tensor:
        """Derivative of the log-probability for the logits, `(N, n)`."""
        return self.scale * (self.statistic(values) - self.mean(logits))

    def states(self, units: int) -> int | None:
        """Number of joint values of a layer, or None for a continuum."""
        return None

    def decode(self, index: Tensor, units: int, dtype: torch.dtype) -> Tensor:
        """Joint values by number, `(S,)` integers to `(S, n)`, for units with `states`.

        Raises:
            UnsupportedError: If the units have a continuum of values.
        """
        raise UnsupportedError(
            f"{type(self).__name__} have a continuum of values, which cannot be listed. Estimate "
            f"by samples: samples=... instead of enumeration."
        )


class BernoulliUnits(Units):
    """Units that are on with probability σ(η); the two values are those of the coding."""

    def __init__(self, coding: tuple[float, float] = (0, 1)) -> None:
        self.off, self.on = coding

    def statistic(self, values: Tensor) -> Tensor:
        """1 for on, 0 for off, whatever the coding (papers.md §5.2)."""
        return (values - self.off) / (self.on - self.off)

    def log_partition(self, logits: Tensor) -> Tensor:
        """`Σ log(1 + e^η)`."""
        return functional.softplus(logits).sum(-1)

    def mean(self, logits: Tensor) -> Tensor:
        """P(on)."""
        return logits.sigmoid()

    def sample(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """Coded values."""
        bits = uniform(logits, generator) < logits.sigmoid()
        return self._coded(bits, logits.dtype)

    def covariance(self, logits: Tensor) -> Tensor:
        """`σ(1 − σ)` of each unit."""
        # Not σ − σ²: it would lose all its digits for a large logit.
        return (logits.sigmoid() * (-logits).sigmoid())[..., None, None]

    def states(self, units: int) -> int:
        """Two for each unit."""
        return 2**units

    def decode(self, index: Tensor, units: int, dtype: torch.dtype) -> Tensor:
        """Binary digits, the last unit the fastest."""
        places = torch.arange(units - 1, -1, -1, device=index.device)
        return self._coded((index[:, None] >> places) & 1 == 1, dtype)

    def _coded(self, bits: Tensor, dtype: torch.dtype) -> Tensor:
        return bits.to(dtype) * (self.on - self.off) + self.off

    def __repr__(self) -> str:
        return f"BernoulliUnits(({self.off:g}, {self.on:g}))"


class GaussianUnits(Units):
    """Real-valued units with mean η and a fixed variance."""

    def __init__(self, variance: float = 1.0) -> None:
        if not variance > 0:
            raise ValueError(f"The variance of Gaussian units is > 0, got {variance}.")
        self.variance = variance
        self.scale = 1 / variance

    def statistic(self, values: Tensor) -> Tensor:
        """The value itself."""
        return values

    def log_partition(self, logits: Tensor) -> Tensor:
        """`Σ η² / 2`."""
        return logits.square().sum(-1) / 2

    def mean(self, logits: Tensor) -> Tensor:
        """η."""
        return logits

    def sample(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """`η + √variance · noise`."""
        device = logits.device if generator is None else generator.device
        noise = torch.randn(logits.shape, generator=generator, dtype=logits.dtype, device=device)
        return logits + math.sqrt(self.variance) * noise.to(logits.device)

    def covariance(self, logits: Tensor) -> Tensor:
        """`1 / variance`."""
        return torch.full_like(logits, self.scale)[..., None, None]

    def log_base(self, values: Tensor) -> Tensor:
        """`−Σ x² / (2 variance) − n log(2π variance) / 2`."""
        normaliser = values.shape[-1] * math.log(2 * math.pi * self.variance)
        return -(self.scale * values.square().sum(-1) + normaliser) / 2

    def __repr__(self) -> str:
        return f"GaussianUnits({self.variance:g})"


class CategoricalUnits(Units):
    """One-hot units: each run of `classes` units is one variable with softmax probabilities.

    Args:
        classes: of one variable; all units of the layer by default.
    """

    def __init__(self, classes: int | None = None) -> None:
        if classes is not None and classes < 2:
            raise ValueError(f"A categorical variable has at least 2 classes, got {classes}.")
        self.classes = classes

    def group(self, units: int) -> int:
        """The classes of one variable."""
        return units if self.classes is None else self.classes

    def statistic(self, values: Tensor) -> Tensor:
        """One-hot already."""
        return values

    def log_partition(self, logits: Tensor) -> Tensor:
        """Log of the sum of exponentials, summed over variables."""
        return self._grouped(logits).logsumexp(-1).sum(-1)

    def mean(self, logits: Tensor) -> Tensor:
        """Class probabilities."""
        return self._grouped(logits).softmax(-1).flatten(-2)

    def sample(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """One-hot values, by the inverse of the cumulative probabilities."""
        probabilities = self._grouped(logits).softmax(-1)
        index = choose(probabilities, generator)
        return functional.one_hot(index, probabilities.shape[-1]).flatten(-2).to(logits.dtype)

    def covariance(self, logits: Tensor) -> Tensor:
        """`diag(p) − p pᵀ` of each variable."""
        p = self._grouped(logits).softmax(-1)
        return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]

    def states(self, units: int) -> int:
        """Classes to the power of variables."""
        classes = self.group(units)
        return int(classes ** (units // classes))

    def decode(self, index: Tensor, units: int, dtype: torch.dtype) -> Tensor:
        """Digits to the base of the classes, the last variable the fastest."""
        classes = self.group(units)
        exponents = torch.arange(units // classes - 1, -1, -1, device=index.device)
        digits = index[:, None].div(classes**exponents, rounding_mode="floor") % classes
        return functional.one_hot(digits, classes).flatten(-2).to(dtype)

    def _grouped(self, logits: Tensor) -> Tensor:
        return logits.unflatten(-1, (-1, self.group(logits.shape[-1])))

    def __repr__(self) -> str:
        return f"CategoricalUnits({self.classes})"
