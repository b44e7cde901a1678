"""Gaussian kernels of activations: `E φ(a) φ(b)` and `E φ'(a) φ'(b)` of a centred Gaussian pair.

Closed for relu, leaky relu, linear and erf (papers.md §2.2). Any other activation φ is expanded in
normalised Hermite polynomials, `φ(√q v) = Σ_k h_k(q) He_k(v) / √k!`, so that

    E φ(a) φ(b) = Σ_k h_k(q) h_k(r) cᵏ,      c the correlation of a and b (Mehler's formula).

One integral over a line per input then serves all its pairs, and what the terms left out can add up
to is known: at most `√(t_q t_r) |c|ᴷ`, where `t_q = E φ² − Σ_{k<K} h_k²`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Activation", "Form", "Integral", "Kernel", "Series", "derivative", "kernel"]

Function = Callable[[Tensor], Tensor]


class Integral(NamedTuple):
    """A Gaussian integral.

    Attributes:
        value: the integral.
        error: estimate of its absolute error, of the same shape; 0 for a closed form.
    """

    value: Tensor
    error: Tensor


class Form(ABC):
    """`E f(a) f(b)` of a centred Gaussian pair, as a function of its variances and correlation.

    Shapes broadcast; results have the dtype of the variances.
    """

    @abstractmethod
    def square(self, variance: Tensor) -> Integral:
        """`E f(a)²`, `a ~ N(0, variance)`. Differentiable where the variance is positive."""

    @abstractmethod
    def curve(self, first: Tensor, second: Tensor) -> Callable[[Tensor], Integral]:
        """`c -> E f(a) f(b)` for variances `first`, `second` and the correlation c in [-1, 1]."""

    def product(self, first: Tensor, second: Tensor, covariance: Tensor) -> Integral:
        """`E f(a) f(b)` for the covariance matrix `[[first, covariance], [covariance, second]]`.

        Where both variances are 0, what they are a limit of is taken as one input seen twice.
        """
        # The root of a square is exact: one input seen twice has a correlation of exactly 1.
        scale = (first * second).sqrt()
        alone = (first == second).to(scale.dtype)
        correlation = torch.where(scale > 0, covariance / scale, alone).clamp(-1, 1)
        return self.curve(first, second)(correlation)


@dataclass(frozen=True)
class Kernel:
    """What a random layer does to its inputs, through its activation.

    Attributes:
        name: of the activation.
        function: the activation φ, entry by entry.
        value: of φ itself: `kernel.value.product(q, r, p)` is `E φ(a) φ(b)`.
        slope: the same of its derivative.
        homogeneous: whether `φ(s u) = s φ(u)` for all `s > 0`: then no scale is preferred.
    """

    name: str
    function: Function
    value: Form
    slope: Form
    homogeneous: bool = False


Activation = str | Function | nn.Module | Kernel
"""A name, an entrywise function of tensors, a module without training state, or a kernel."""


def kernel(activation: Activation) -> Kernel:
    """The kernel of an activation.

    Closed forms are known for relu, leaky relu, erf (`torch.erf`, not the normal distribution
    function) and linear; for everything else a `Series` is made, accurate to about 1e-12 where the
    activation is smooth, or has its only kink at 0; its error says otherwise.

    Args:
        activation: a name ("tanh", "relu", "gelu", ..., any in `torch.nn.functional` or `torch`),
            an entrywise function such as `torch.sin`, a module such as `nn.LeakyReLU(0.2)`, or a
            kernel, which is given back.

    Raises:
        ValueError: If the name is unknown, or the function does not act entry by entry.
        TypeError: If it is none of these.

    Example:
        >>> one = torch.tensor(1.0, dtype=torch.float64)
        >>> kernel("relu").value.square(one).value
        tensor(0.5000, dtype=torch.float64)
        >>> value, error = kernel(nn.Tanh()).value.square(one)
        >>> f"{value:.8f}", bool(error < 1e-12)
        ('0.39429449', True)
    """
    if isinstance(activation, Kernel):
        return activation
    if isinstance(activation, nn.Module):
        return _of_module(activation)
    if isinstance(activation, str):
        return _of_name(activation)
    if not callable(activation):
        raise TypeError(
            f"An activation is a name, a function or a module, got {type(activation).__name__}."
        )
    if activation in _NAMES:
        return _of_name(_NAMES[activation])
    return _expanded(getattr(activation, "__name__", type(activation).__name__), activation)


def derivative(function: Function) -> Function:
    """The derivative of an entrywise function, by autograd; differentiable itself.

    Example:
        >>> derivative(torch.sin)(torch.zeros(2))
        tensor([1., 1.])
    """

    def slope(u: Tensor) -> Tensor:
        # The copy lets activations work in place.
        value, pullback, *_ = torch.func.vjp(lambda u: function(u.clone()), u)
        (found,) = pullback(torch.ones_like(value))
        return found

    return slope


# --- closed forms


@dataclass(frozen=True)
class _Closed(Form):
    """A formula in the variances and the correlation."""

    formula: Callable[[Tensor, Tensor, Tensor], Tensor]

    def square(self, variance: Tensor) -> Integral:
        return self.curve(variance, variance)(torch.ones_like(variance))

    def curve(self, first: Tensor, second: Tensor) -> Callable[[Tensor], Integral]:
        def at(correlation: Tensor) -> Integral:
            value = self.formula(first, second, correlation)
            return Integral(value, torch.zeros_like(value))

        return at


def _leaky(name: str, slope: float, function: Function) -> Kernel:
    """Of `φ(u) = m u + d |u|`: relu, leaky relu and linear are one family."""
    mean, half = ((1 + slope) / 2) ** 2, ((1 - slope) / 2) ** 2

    def value(q: Tensor, r: Tensor, c: Tensor) -> Tensor:
        bend = (1 - c * c).clamp(min=0).sqrt() + c * c.asin()
        return (q * r).sqrt() * (mean * c + half * (2 / math.pi) * bend)

    def squared_slope(q: Tensor, r: Tensor, c: Tensor) -> Tensor:
        c = c.expand(torch.broadcast_shapes(q.shape, r.shape, c.shape))
        return mean + half * (2 / math.pi) * c.asin()

    class Value(_Closed):
        def square(self, variance: Tensor) -> Integral:
            return Integral(variance * (mean + half), torch.zeros_like(variance))

    return Kernel(name, function, Value(value), _Closed(squared_slope), homogeneous=True)
