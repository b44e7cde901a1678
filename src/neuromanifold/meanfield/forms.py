"""What a Gaussian kernel answers: `E f(a) f(b)` of a centred Gaussian pair, with its error."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Closed", "Form", "Integral"]


class Integral(NamedTuple):
    """A Gaussian integral.

    Attributes:
        value: the integral.
        error: estimate of its absolute error, of the same shape; 0 for a closed form.
    """

    value: Tensor
    error: Tensor


Curve = Callable[[Tensor], Integral]
"""`c -> E f(a) f(b)`, for fixed variances and the correlation c in [-1, 1]."""


class Form(ABC):
    """`E f(a) f(b)` of a centred Gaussian pair, by its variances and its correlation.

    Shapes broadcast; results have the dtype of the variances.
    """

    @abstractmethod
    def square(self, variance: Tensor) -> Integral:
        """`E f(a)²`, `a ~ N(0, variance)`. Differentiable where the variance is positive."""

    @abstractmethod
    def curve(self, first: Tensor, second: Tensor) -> Curve:
        """`c -> E f(a) f(b)`: what does not depend on the correlation is computed once."""

    def product(self, first: Tensor, second: Tensor, covariance: Tensor) -> Integral:
        """`E f(a) f(b)` for the covariance matrix `[[first, covariance], [covariance, second]]`.

        Two variances of 0 are one input seen twice.
        """
        # The root of a square is exact: one input seen twice has a correlation of exactly 1.
        scale = (first * second).sqrt()
        alone = (first == second).to(scale.dtype)
        correlation = torch.where(scale > 0, covariance / scale, alone).clamp(-1, 1)
        return self.curve(first, second)(correlation)


@dataclass(frozen=True)
class Closed(Form):
    """A formula.

    Attributes:
        formula: of both variances and the correlation.
        diagonal: of the variance, for `a = b`.
    """

    formula: Callable[[Tensor, Tensor, Tensor], Tensor]
    diagonal: Callable[[Tensor], Tensor]

    def square(self, variance: Tensor) -> Integral:
        """The formula for `a = b`."""
        return _exact(self.diagonal(variance))

    def curve(self, first: Tensor, second: Tensor) -> Curve:
        """The formula, with its variances fixed."""
        return lambda correlation: _exact(self.formula(first, second, correlation))


def _exact(value: Tensor) -> Integral:
    return Integral(value, torch.zeros_like(value))
