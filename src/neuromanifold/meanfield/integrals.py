"""Gaussian integrals of one unit: how its Fisher information reweights its pre-activation.

`a_k = ∫ v^k ψ(μ + σv) Dv` for k = 0, 1, 2, where `Dv` is the standard normal measure and ψ the
information about the pre-activation: `φ'²`, or `p(1 − p)` for a stochastic binary unit (papers.md
§2.4). They are kept as the mass, mean and variance of the measure `ψ Dv`: the determinant
`a₀a₂ − a₁² = mass² · variance` is then never a difference of nearly equal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from neuromanifold.meanfield.kernels import Activation, derivative, kernel

__all__ = ["TiltedGaussian", "gaussian_integrals", "quadrature_error"]

_Closed: TypeAlias = Callable[[Tensor, Tensor], "TiltedGaussian"]
_Information: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class TiltedGaussian:
    """The measure `ψ(μ + σv) Dv` of each unit, by its first moments.

    Attributes:
        mass: `a₀`, the mean information about the pre-activation, `(*U)`.
        mean: `a₁/a₀`, `(*U)`.
        variance: `a₂/a₀ − (a₁/a₀)²`, `(*U)`.
    """

    mass: Tensor
    mean: Tensor
    variance: Tensor

    def raw(self) -> tuple[Tensor, Tensor, Tensor]:
        """The integrals `a₀, a₁, a₂`, each `(*U)`."""
        second = self.mass * (self.variance + self.mean.square())
        return self.mass, self.mass * self.mean, second


def gaussian_integrals(activation: Activation, mean: Tensor, scale: Tensor) -> TiltedGaussian:
    """The integrals of units whose pre-activations are normal.

    Closed for relu, leaky relu, linear, erf and the normal distribution function; for all others
    Gauss-Legendre quadrature on panels that meet where the pre-activation is zero, so that a kink
    there does no harm. `quadrature_error` says how good that is.

    Args:
        activation: whatever `kernel` takes: a name, a function, a module or a kernel. Also
            "normal_cdf", and "bernoulli": a binary unit that is one with probability sigmoid(u).
        mean: μ of the pre-activations, `(*U)`.
        scale: σ of the pre-activations, their standard deviations, `(*U)`, not negative.

    Raises:
        ValueError: If the name is unknown, or the function does not act entry by entry.

    Example:
        >>> half = gaussian_integrals("relu", torch.zeros(1), torch.ones(1))
        >>> print(*(round(float(a), 4) for a in half.raw()))
        0.5 0.3989 0.5
    """
    closed = _closed_form(activation)
    if closed is not None:
        return closed(mean, scale)
    return _by_quadrature(_information(activation), mean, scale, _ORDER)


def quadrature_error(activation: Activation, mean: Tensor, scale: Tensor) -> Tensor:
    """How far the integrals move if a quarter of the nodes are left out: the largest of the three.

    Zero for closed forms. For smooth activations the error of the integrals themselves is far less;
    for functions with kinks elsewhere than at zero it is about this.

    Args:
        activation: as in `gaussian_integrals`.
        mean: μ `(*U)`.
        scale: σ `(*U)`.

    Returns:
        Absolute errors `(*U)`.

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> bool(quadrature_error("tanh", one, one) < 1e-10)
        True
    """
    if _closed_form(activation) is not None:
        return torch.zeros_like(mean + scale)
    information = _information(activation)
    fine, coarse = (
        torch.stack(_by_quadrature(information, mean, scale, order).raw())
        for order in (_ORDER, 3 * _ORDER // 4)
    )
    return (fine - coarse).abs().amax(dim=0)


def _error_function(mean: Tensor, scale: Tensor, *, slope: float, height: float) -> TiltedGaussian:
    """φ = height · erf(slope · u): ψ is a Gaussian, and so is its product with `Dv`."""
    spread = 1 + (2 * slope * scale).square()
    peak = (2 * slope * height) ** 2 / math.pi
    mass = peak * spread.rsqrt() * torch.exp(-2 * (slope * mean).square() / spread)
    return TiltedGaussian(mass, -((2 * slope) ** 2) * scale * mean / spread, 1 / spread)


def _half_lines(mean: Tensor, scale: Tensor, *, above: float, below: float) -> TiltedGaussian:
    """Slopes above and below zero: a mixture of `Dv` and of its half `u > 0`."""
    tiny = torch.finfo(mean.dtype).tiny
    c = (mean / scale.clamp(min=tiny)).clamp(-_CLIP, _CLIP)
    half_mean, half_variance = _truncated_normal(-c)
    # Φ(c) by erfc: `torch.special.ndtr` loses its digits from c = −5 on, and is 0 at −10.
    extra = (above**2 - below**2) * torch.special.erfc(-c / math.sqrt(2)) / 2
    mass = below**2 + extra
    share = torch.where(mass > 0, extra / mass.clamp(min=tiny), 1)
    between = share * (1 - share) * half_mean.square()
    return TiltedGaussian(mass, share * half_mean, 1 - share + share * half_variance + between)


def _truncated_normal(start: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a standard normal variable that is known to exceed `start`."""
    mean = math.sqrt(2 / math.pi) / torch.special.erfcx(start / math.sqrt(2))
    variance = 1 - mean * (mean - start)
    # Far out, 1 − r(r − t) cancels. Laplace's continued fraction N/Q = t + 1/(t + 2/(t + ...)) has
    # the excess d₁ = 1/(t + d₂) of the mean as its tail, and the variance is d₁(d₂ − d₁).
    t = start.clamp(min=_FAR)
    second = torch.zeros_like(t)
    for k in range(_FRACTIONS, 1, -1):
        second = k / (t + second)
    first = 1 / (t + second)
    far = start > _FAR
    return torch.where(far, t + first, mean), torch.where(far, first * (second - first), variance)


_FAR, _FRACTIONS = 4.0, 32  # relative error of the variance: 4e-14 at t = 4, less beyond
_CLIP = 50.0  # standard deviations: beyond, a rectifier is always off or always on


def _closed_form(activation: Activation) -> _Closed | None:
    if activation == "bernoulli":
        return None
    if activation == "normal_cdf" or activation is torch.special.ndtr:
        return partial(_error_function, slope=math.sqrt(0.5), height=0.5)
    found = kernel(activation)
    if found is kernel("erf"):
        return partial(_error_function, slope=1.0, height=1.0)
    if found.homogeneous:
        above, below = found.function(torch.tensor([1.0, -1.0], dtype=torch.float64)).tolist()
        return partial(_half_lines, above=above, below=-below)
    return None


def _information(activation: Activation) -> _Information:
    """ψ: the information that a unit carries about its pre-activation."""
    if activation == "bernoulli":
        return lambda u: torch.sigmoid(u) * torch.sigmoid(-u)
    slope = derivative(kernel(activation).function)
    return lambda u: slope(u).square()


def _by_quadrature(
    information: _Information, mean: Tensor, scale: Tensor, order: int
) -> TiltedGaussian:
    tiny = torch.finfo(mean.dtype).tiny
    zero = (-mean / scale.clamp(min=tiny)).clamp(-_REACH, _REACH)[..., None]  # where u = 0
    nodes, widths = (torch.from_numpy(a).to(mean) for a in _panels(order))
    left, right = _REACH + zero, _REACH - zero
    v = torch.cat([zero - left * nodes, zero + right * nodes], dim=-1)  # (*U, Q)
    density = torch.exp(-v.square() / 2) / math.sqrt(2 * math.pi)
    measure = torch.cat([left * widths, right * widths], dim=-1) * density
    measure = measure * information(mean[..., None] + scale[..., None] * v)
    mass = measure.sum(-1)
    share = measure / mass.clamp(min=tiny)[..., None]
    centre = (share * v).sum(-1)
    variance = (share * (v - centre[..., None]).square()).sum(-1)
    return TiltedGaussian(mass, centre, torch.where(mass > 0, variance, 1))


def _panels(order: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights on [0, 1], in panels that halve towards zero.

    Activations change over a length of about 1/σ around u = 0; the halving resolves that up to
    σ of about 20, and the widest panel still resolves the normal density.
    """
    edges = np.array([0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1])
    nodes, weights = np.polynomial.legendre.leggauss(order)
    widths = np.diff(edges)[:, None]
    return (edges[:-1, None] + widths * (nodes + 1) / 2).ravel(), (widths * weights / 2).ravel()


_ORDER = 16  # per panel
_REACH = 9.0  # standard deviations: less than rounding lies beyond
