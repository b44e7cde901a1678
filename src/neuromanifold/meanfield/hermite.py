"""Gaussian kernels of any function, by its expansion in Hermite polynomials.

With `f(√q v) = Σ_k h_k(q) He_k(v) / √k!`, Mehler's formula gives

    E f(a) f(b) = Σ_k h_k(q) h_k(r) cᵏ

for a Gaussian pair of variances q, r and correlation c. One integral over a line per input serves
all its pairs, and what the terms left out can add up to is known: at most `√(t_q t_r) |c|ᴷ`, where
`t_q = E f² − Σ_{k<K} h_k²`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from neuromanifold.meanfield.forms import Curve, Form, Integral

__all__ = ["Series", "expectation"]

REACH = 13
"""Standard deviations to either side that are integrated over: beyond, the density is 1e-37."""

ORDER = 20
"""Gauss-Legendre nodes per panel. Panels meet at 0, where most kinks of activations are."""

TERMS = (32, 64, 128, 256, 512)
"""How many terms of the series are kept: the first for which the rest is below the tolerance."""

TOLERANCE = 1e-13
"""Of an integral, relative to that of the absolute value."""

_PANELS = (1, 2, 4, 8, 16)
"""Per standard deviation, doubled until the integral stays."""


@dataclass(frozen=True)
class Series(Form):
    """`E f(a) f(b)` of any function of one variable. Computed in float64.

    Smooth functions, and those with a kink or a jump at 0, converge fast as long as the variance is
    small against the squared width of their features (up to about 10⁴ times); the error says so.

    Attributes:
        function: f, entry by entry.
    """

    function: Callable[[Tensor], Tensor]

    def square(self, variance: Tensor) -> Integral:
        """By Gauss-Legendre panels, doubled until the integral stays."""
        return expectation(lambda u: self.function(u).square(), variance)

    def curve(self, first: Tensor, second: Tensor) -> Curve:
        """The series, whose coefficients are computed once."""
        one = _coefficients(self.function, first)
        other = one if second is first else _coefficients(self.function, second)
        terms = min(one.terms.shape[-1], other.terms.shape[-1])
        products = one.terms[..., :terms] * other.terms[..., :terms]
        # In the norm of the coefficients, each factor is off by its error.
        off = (one.square * other.error.square()).sqrt() + (
            other.square * one.error.square()
        ).sqrt()
        rest = (one.rest * other.rest).sqrt()

        def at(correlation: Tensor) -> Integral:
            c = correlation.double()
            shape = torch.broadcast_shapes(c.shape, products.shape[:-1])
            total = products.new_zeros(shape)
            for coefficient in products.flip(-1).unbind(-1):
                total = total * c + coefficient
            # At c = 1, where the series is slowest, nothing has to be left out.
            whole = (c == 1) & (first == second)
            total = torch.where(whole, one.square, total)
            error = torch.where(whole, 0.0, rest * c.abs() ** terms) + off
            return Integral(total.to(first.dtype), error.to(first.dtype))

        return at


@dataclass(frozen=True)
class _Coefficients:
    """Of the series of one variance.

    Attributes:
        terms: `h_k`, `(..., K)`.
        square: `E f²`, the sum of all their squares, `(...)`.
        rest: how much of it the terms leave out, `(...)`.
        error: of the terms, in the norm, `(...)`.
    """

    terms: Tensor
    square: Tensor
    rest: Tensor
    error: Tensor


def expectation(function: Callable[[Tensor], Tensor], variance: Tensor) -> Integral:
    """`E f(a)`, `a ~ N(0, variance)`, in float64.

    Args:
        function: f, entry by entry.
        variance: of any shape.

    Returns:
        The integral, in the dtype of the variance; its error is what the last refinement changed,
        and what the ends of the range contribute.

    Example:
        >>> value, error = expectation(torch.cos, torch.tensor(1.0, dtype=torch.float64))
        >>> f"{value:.10f}", bool(error < 1e-12)
        ('0.6065306597', True)
    """
    deviation = variance.double().sqrt()[..., None]
    before: Tensor | None = None
    for panels in _PANELS:
        nodes, weights = _rule(panels)
        integrand = function(deviation * nodes.to(deviation)) * weights.to(deviation)
        value, parts = integrand.sum(-1), integrand.detach().abs()
        change = torch.full_like(value, torch.inf) if before is None else (value - before).abs()
        error = change.detach() + parts[..., 0] + parts[..., -1]
        if not (error > TOLERANCE * parts.sum(-1)).any():
            break
        before = value.detach()
    return Integral(value.to(variance.dtype), error.to(variance.dtype))


def _coefficients(function: Callable[[Tensor], Tensor], variance: Tensor) -> _Coefficients:
    deviation = variance.double().sqrt()[..., None]
    square = expectation(lambda u: function(u).square(), variance.double()).value
    before: Tensor | None = None
    for panels in _PANELS:
        nodes, weights = _rule(panels)
        values = function(deviation * nodes.to(deviation)) * weights.to(deviation)
        found = values @ _polynomials(panels).to(deviation)
        error = torch.linalg.vector_norm(found if before is None else found - before, dim=-1)
        if before is not None and not (error > TOLERANCE * square.sqrt()).any():
            break
        before = found
    tail = square[..., None] - found.square().cumsum(-1)
    for terms in TERMS:
        if not (tail[..., terms - 1] > TOLERANCE * square).any():
            break
    return _Coefficients(found[..., :terms], square, tail[..., terms - 1].clamp(min=0), error)


@lru_cache(maxsize=len(_PANELS))
def _rule(panels: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the standard normal measure, float64."""
    inner, share = np.polynomial.legendre.leggauss(ORDER)
    edges = np.arange(-REACH * panels, REACH * panels) / panels
    nodes = (edges[:, None] + (inner + 1) / (2 * panels)).ravel()
    weights = np.tile(share, len(edges)) / (2 * panels)
    weights = weights * np.exp(-(nodes**2) / 2) / math.sqrt(2 * math.pi)
    return torch.from_numpy(nodes), torch.from_numpy(weights)


@lru_cache(maxsize=len(_PANELS))
def _polynomials(panels: int) -> Tensor:
    """`He_k(v) / √k!` at the nodes, `(nodes, TERMS[-1])`."""
    v = _rule(panels)[0].numpy()
    found = np.empty((len(v), TERMS[-1]))
    found[:, 0], found[:, 1] = 1.0, v
    for k in range(1, TERMS[-1] - 1):
        found[:, k + 1] = (v * found[:, k] - math.sqrt(k) * found[:, k - 1]) / math.sqrt(k + 1)
    return torch.from_numpy(found)
