"""What the outputs of a component mean, where they are means or are read by what comes above.

A deterministic component has no distribution: its response is a choice, and each choice gives a
metric of its own (Sun and Nielsen, arXiv 1606.06069). `nm.Gaussian`, `nm.Bernoulli` and
`nm.Categorical` are responses too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, constraints

from neuromanifold._typing import Outputs
from neuromanifold.capture import logits_of
from neuromanifold.capture.layout import _refuse_batch_statistics
from neuromanifold.errors import UnsupportedError
from neuromanifold.likelihoods import Categorical, Likelihood
from neuromanifold.likelihoods._base import (
    ColumnCumulants,
    at_least_float32,
    evenly,
    rademacher,
    random_device,
    sum_event,
)
from neuromanifold.likelihoods._diagonal import DiagonalLikelihood

__all__ = ["Binary", "Probabilities", "Through"]


@dataclass(frozen=True, eq=False)
class Binary(DiagonalLikelihood):
    """One of two values, with the component's output as its mean: outputs `(N, *K)`.

    With values a and b the metric of an output μ is `1 / ((μ − a)(b − μ))`. Behind a sigmoid, with
    values 0 and 1, a unit's metric is `σ(1 − σ) x̃ x̃ᵀ`; behind tanh, with values −1 and 1, it is
    `sech² x̃ x̃ᵀ`. A saturated output has a finite metric, so that a slope of zero makes it zero.

    Args:
        support: the two values, the smaller one first.

    Raises:
        ValueError: If the values are not finite or not in this order.

    Example:
        >>> import torch, neuromanifold as nm
        >>> from neuromanifold.relative import Binary
        >>> x, unit = torch.zeros(1, 1), torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Tanh())
        >>> _ = torch.nn.init.zeros_(unit[0].bias)
        >>> F = nm.fisher(unit, Binary((-1, 1)), x, nm.Diagonal(), estimator=nm.Exact())
        >>> F.diagonal()["0.bias"]
        tensor([1.])
    """

    support: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        low, high = self.support
        if not -torch.inf < low < high < torch.inf:
            raise ValueError(
                f"support is two finite values, the smaller one first, such as (0, 1) or (-1, 1); "
                f"got {self.support}."
            )

    @property
    def target_values(self) -> str:  # type: ignore[override]
        """What a target may be."""
        low, high = self.support
        return f"{low:g} or {high:g}"

    def distribution(self, outputs: Outputs) -> Distribution:
        """Independent targets that take one of two values."""
        mean = at_least_float32(self.canonical(outputs))
        return Independent(_TwoValues(mean, self.support), mean.ndim - 1)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`1 / (μ − a)` at the upper value, `−1 / (b − μ)` at the lower one."""
        mean = self._means(self.canonical(outputs))
        low, high = self.support
        floor = torch.finfo(outputs.dtype).tiny
        upper, lower = (gap.clamp(min=floor).reciprocal() for gap in (mean - low, high - mean))
        return torch.where(targets > (low + high) / 2, upper, -lower).to(outputs.dtype)

    def sample(
        self, outputs: Outputs, num: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Targets `(num, N, *K)`."""
        p, _ = self._upper_and_spread(self.canonical(outputs))
        drawn_from = p.to(random_device(generator, p)).expand(num, *p.shape)
        return self._values(torch.bernoulli(drawn_from, generator=generator).to(p.device))

    def column_cumulants(self, outputs: Tensor) -> ColumnCumulants:
        """The excess kurtosis of each entry, `(1 − 6 p q) / (p q)`."""
        _, spread = self._upper_and_spread(self.canonical(outputs))
        # Written out: by cumulants over squared information it is ∞/∞ where an output saturates.
        quartic = ((1 - 6 * spread) / spread).reshape(len(spread), -1).T
        group = torch.arange(len(quartic), device=quartic.device)
        return ColumnCumulants(quartic, group, len(quartic), 0.0)

    def _even_targets(
        self, outputs: Tensor, num: int, generator: torch.Generator | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        p, _ = self._upper_and_spread(outputs)
        for labels in evenly(torch.stack((1 - p, p), dim=-1), num, generator):
            yield self._values(labels.to(p.dtype)), rademacher(p.shape, p, generator)

    def _information(self, outputs: Tensor) -> Tensor:
        low, high = self.support
        _, spread = self._upper_and_spread(outputs)
        return 1 / ((high - low) ** 2 * spread)

    def _fourth_cumulants(self, outputs: Tensor, j: Tensor) -> Tensor:
        _, spread = self._upper_and_spread(outputs)
        low, high = self.support
        # The root first: j is small where it is large, and the fourth power of either overflows.
        scaled = j / ((high - low) * spread.sqrt())
        return scaled**4 * ((1 - 6 * spread) / spread)

    def _upper_and_spread(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Probability p of the upper value, and `p (1 − p)`, large enough to be inverted."""
        mean = self._means(outputs)
        low, high = self.support
        p, q = (mean - low) / (high - low), (high - mean) / (high - low)
        return p, (p * q).clamp(min=torch.finfo(outputs.dtype).tiny)

    def _values(self, labels: Tensor) -> Tensor:
        """From 0 and 1 to the two values."""
        low, high = self.support
        return torch.where(labels > 0.5, high, low).to(labels.dtype)

    def _means(self, outputs: Tensor) -> Tensor:
        """The outputs without a graph, refused where they cannot be means."""
        low, high = self.support
        mean = at_least_float32(outputs.detach())
        _refuse_outside(self, mean, low, high, "Take nm.Bernoulli() for logits, nm.Gaussian() else")
        return mean.clamp(low, high)


class _TwoValues(Distribution):
    """Two values with a given mean."""

    has_enumerate_support = True
    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (as torch has it)

    def __init__(self, mean: Tensor, values: tuple[float, float]) -> None:
        self._mean = mean
        self._values = values
        super().__init__(mean.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self._mean

    @property
    def support(self) -> constraints.Constraint:
        return _OneOf(self._values)

    def log_prob(self, value: Tensor) -> Tensor:
        low, high = self._values
        upper = value > (low + high) / 2
        probability = torch.where(upper, self._mean - low, high - self._mean) / (high - low)
        return probability.clamp(min=torch.finfo(probability.dtype).tiny).log()

    def enumerate_support(self, expand: bool = True) -> Tensor:
        values = torch.tensor(self._values, dtype=self._mean.dtype, device=self._mean.device)
        values = values.reshape(-1, *[1] * self._mean.ndim)
        return values.expand(-1, *self._mean.shape) if expand else values


class _OneOf(constraints.Constraint):
    is_discrete = True

    def __init__(self, values: tuple[float, float]) -> None:
        self._values = values
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        low, high = self._values
        return (value == low) | (value == high)


class _PulledBack(Likelihood):
    """A likelihood of what a differentiable function makes of the outputs, sample by sample.

    Everything that is linear in the score is the response's own, sent back through the function.

    Attributes:
        response: what the values of the function mean.
    """

    response: Likelihood

    @abstractmethod
    def _values(self, outputs: Tensor) -> Tensor:
        """What the response works on, `(N, ...)`, differentiable in the outputs."""

    def distribution(self, outputs: Outputs) -> Distribution:
        """Of the response."""
        return self.response.distribution(self._values(self.canonical(outputs)))

    def check(self, outputs: Outputs, targets: Tensor) -> None:
        """Refuse targets that do not fit the response."""
        self.response.check(self._constant(outputs), targets)

    def log_prob(self, outputs: Outputs, targets: Tensor) -> Tensor:
        """Of the response, `(N,)` nats."""
        return self.response.log_prob(self._values(self.canonical(outputs)), targets)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The response's, pulled back."""
        values, pull = self._attached(outputs)
        return pull(self.response.score(values, targets))

    def sample(
        self, outputs: Outputs, num: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Targets of the response."""
        return self.response.sample(self._constant(outputs), num, generator=generator)

    def fisher_columns(self, outputs: Tensor) -> Iterator[Tensor]:
        """The response's columns, pulled back: one vector-Jacobian product each."""
        values, pull = self._attached(outputs)
        yield from map(pull, self.response.fisher_columns(values))

    def num_columns(self, outputs: Outputs) -> int:
        """As many as the response has."""
        return self.response.num_columns(self._constant(outputs))

    def random_signs(
        self, outputs: Tensor, num: int, *, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """The response's, pulled back."""
        values, pull = self._attached(outputs)
        yield from map(pull, self.response.random_signs(values, num, generator=generator))

    def even_scores(
        self,
        outputs: Tensor,
        num: int,
        *,
        weighted: bool = False,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """The response's, pulled back; weights are by what a target adds there."""
        values, pull = self._attached(outputs)
        scores = self.response.even_scores(values, num, weighted=weighted, generator=generator)
        yield from map(pull, scores)

    def observed(self, outputs: Outputs, targets: Tensor | None) -> Tensor | None:
        """Which positions of the response count."""
        return None if targets is None else self.response.observed(self._constant(outputs), targets)

    def observing(self, outputs: Outputs, observed: Tensor) -> Tensor | None:
        """Stand-ins for targets of the response."""
        return self.response.observing(self._constant(outputs), observed)

    def num_positions(self, outputs: Outputs, targets: Tensor | None) -> Tensor:
        """How many positions of the response count."""
        return self.response.num_positions(self._constant(outputs), targets)

    def column_cumulants(self, outputs: Tensor) -> ColumnCumulants | None:
        """The response's: `j · Jᵀ s = (J j) · s` for each column s."""
        return self.response.column_cumulants(self._constant(outputs))

    def score_fourth_moment(self, outputs: Tensor, j: Tensor) -> Tensor:
        """`E (j · score)⁴`, `(..., N)`, from the cumulants along the columns.

        Raises:
            UnsupportedError: If the response has no closed form.
        """
        outputs = self.canonical(outputs).detach()
        cumulants = self.column_cumulants(outputs)
        if cumulants is None:
            return super().score_fourth_moment(outputs, j)
        columns = self.fisher_columns(outputs)
        j = at_least_float32(j)
        squares = torch.stack([sum_event(s * j, outputs.ndim - 1).square() for s in columns])
        quartic = cumulants.quartic.reshape(len(squares), *[1] * (squares.ndim - 2), -1)
        groups = squares.new_zeros(cumulants.num_groups, *squares.shape[1:])
        groups.index_add_(0, cumulants.group, squares)
        cumulant = (quartic * squares.square()).sum(0)
        cumulant += cumulants.squared * groups.square().sum(0)
        return cumulant + 3 * squares.sum(0).square()

    def _constant(self, outputs: Outputs) -> Tensor:
        """The values without a graph."""
        with torch.no_grad():
            return self._values(self.canonical(outputs).detach())

    def _attached(self, outputs: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The values without a graph, and the product of a cotangent at them with the Jacobian."""
        leaf = self.canonical(outputs).detach().requires_grad_()
        with torch.enable_grad():
            values = self._values(leaf)
        if not values.requires_grad:
            raise UnsupportedError(
                f"What {self!r} makes of the outputs does not depend on them by a differentiable "
                f"path. Does it run under torch.no_grad(), or detach them?"
            )

        def pull(u: Tensor) -> Tensor:
            return torch.autograd.grad(values, leaf, u.to(values), retain_graph=True)[0]

        return values.detach(), pull


@dataclass(frozen=True, eq=False)
class Probabilities(_PulledBack):
    """A label whose class probabilities are the component's output, as behind a softmax.

    Outputs `(N, *T, C)` with the class axis last, integer targets `(N, *T)`. Probabilities η are
    divided by their sum, so the metric is `diag(1/η) − 1 1ᵀ`: that is `diag(1/η)` along every
    change which keeps the sum, and so behind a softmax.

    Args:
        ignore_index: target of the positions that do not count.

    Example:
        >>> import torch, neuromanifold as nm
        >>> from neuromanifold.relative import Probabilities
        >>> layer = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Softmax(dim=-1))
        >>> x, exact = torch.randn(8, 2), nm.Exact()
        >>> F = nm.fisher(layer, Probabilities(), x, nm.Dense(), estimator=exact)
        >>> G = nm.fisher(layer[0], nm.Categorical(), x, nm.Dense(), estimator=exact)
        >>> torch.allclose(F.to_dense(), G.to_dense(), atol=1e-6)
        True
    """

    ignore_index: int = -100
    response: Categorical = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "response", Categorical(self.ignore_index))

    def canonical(self, outputs: Outputs) -> Tensor:
        """The probabilities, once their layout is known to make sense."""
        outputs = super().canonical(outputs)
        if outputs.ndim < 2 or outputs.shape[-1] < 2:
            raise ValueError(
                f"{self!r} takes the probabilities of two classes or more on the last axis, "
                f"(N, *T, C), got shape {tuple(outputs.shape)}. Use Binary() for one probability "
                f"per yes-or-no label."
            )
        return outputs

    def mask_cotangent(self, u: Tensor, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """Zero `u` at the positions to ignore."""
        return self.response.mask_cotangent(u, outputs, targets)

    def _values(self, outputs: Tensor) -> Tensor:
        """Their logarithms are logits; a probability of zero has a finite one, and no slope."""
        return at_least_float32(outputs).clamp(min=torch.finfo(outputs.dtype).tiny).log()

    def _constant(self, outputs: Outputs) -> Tensor:
        self._refuse_no_probabilities(outputs)
        return super()._constant(outputs)

    def _attached(self, outputs: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        self._refuse_no_probabilities(outputs)
        return super()._attached(outputs)

    def _refuse_no_probabilities(self, outputs: Outputs) -> None:
        p = self.canonical(outputs).detach()
        _refuse_outside(self, p, 0, 1, "Take nm.Categorical() for logits, else a softmax last")


@dataclass(frozen=True, eq=False)
class Through(_PulledBack):
    """The metric of a response, pulled back through what takes the component's outputs.

    `Jᵀ Σ J` with J the Jacobian of `above`, whose parameters are constants here. Positions of the
    response cannot be ignored, for they need not be positions of the component's outputs.

    Args:
        above: takes the component's outputs, one tensor, in the mode it has: usually `.eval()`.
        response: what the outputs of `above` mean.

    Raises:
        TypeError: If `above` is no module, or `response` no likelihood.

    Example:
        >>> import torch, neuromanifold as nm
        >>> from neuromanifold.relative import Through
        >>> below, above, x = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2), torch.randn(8, 4)
        >>> response = Through(above, nm.Categorical())
        >>> F = nm.fisher(below, response, x, nm.Dense(), estimator=nm.Exact())
        >>> both = torch.nn.Sequential(below, above)
        >>> G = nm.fisher(both, nm.Categorical(), x, nm.Dense(), estimator=nm.Exact())
        >>> torch.allclose(F.to_dense(), G.block("0").to_dense(), atol=1e-6)
        True
    """

    above: nn.Module
    response: Likelihood

    def __post_init__(self) -> None:
        for name, value, kind, example in (
            ("above", self.above, nn.Module, "a torch.nn.Module that takes the outputs"),
            ("response", self.response, Likelihood, "nm.Categorical() or nm.Gaussian()"),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"{name} is {example}; got {type(value).__name__}.")

    def __repr__(self) -> str:
        return f"Through({type(self.above).__name__}, {self.response!r})"

    def mask_cotangent(self, u: Tensor, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """Leave `u` as it is.

        Raises:
            UnsupportedError: If there are positions to ignore.
        """
        observed = self.observed(outputs, targets)
        if observed is not None and not bool(observed.all()):
            raise UnsupportedError(
                f"{int((~observed).sum())} of {observed.numel()} targets are to be ignored, but "
                f"{self!r} cannot tell which part of the component's outputs belongs to them. "
                f"Leave these samples out, or cut them off in a module at the end of `above` that "
                f"returns torch.where(mask, outputs, outputs.detach())."
            )
        return u

    def _values(self, outputs: Tensor) -> Tensor:
        _refuse_batch_statistics(self.above)
        dtype = next((p.dtype for p in self.above.parameters() if p.is_floating_point()), None)
        # A copy, as `above` may write into it.
        made: Any = self.above(outputs.to(dtype or outputs.dtype, copy=True))
        values = self.response.canonical(logits_of(made))
        if len(values) != len(outputs):
            raise ValueError(
                f"{type(self.above).__name__} makes {len(values)} rows of {len(outputs)} samples. "
                f"Give a module that keeps the samples on axis 0."
            )
        return values


def _refuse_outside(
    response: Likelihood, outputs: Tensor, low: float, high: float, advice: str
) -> None:
    """Refuse outputs outside an interval, by more than the rounding of their dtype."""
    slack = 8 * torch.finfo(outputs.dtype).eps * (high - low)
    if bool(((outputs < low - slack) | (outputs > high + slack)).any()):
        raise ValueError(
            f"{response!r} takes outputs in [{low:g}, {high:g}], got values from "
            f"{outputs.min().item():g} to {outputs.max().item():g}. {advice}."
        )
