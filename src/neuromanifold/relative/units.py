"""Closed forms of single units: the scalar ν(a) in the metric `ν(a) x̃ x̃ᵀ` of incoming weights.

`a = w·x̃` is the unit's pre-activation and `x̃ = (x, 1)` its input. What a deterministic unit emits
is a choice, and it changes the metric: tanh with a sign of that mean has ν = sech², tanh with
Gaussian noise has ν = sech⁴. The name of a function says which response it has. All take
pre-activations of any shape and give ν, of that shape and dtype, in nats per squared unit of `a`.

Source: Sun and Nielsen, arXiv 1606.06069.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["elu", "gaussian", "leaky_relu", "relu", "sigmoid", "smooth_relu", "tanh"]


def tanh(a: Tensor) -> Tensor:
    """A sign, -1 or +1, whose mean is the tanh: `ν = sech²(a)`.

    Args:
        a: pre-activations.

    Example:
        >>> tanh(torch.tensor([0.0, -500.0]))
        tensor([1., 0.])
    """
    # Not 1 - tanh², which has no correct digit where the unit saturates.
    twice = 2 * _checked(a)
    return 4 * twice.sigmoid() * (-twice).sigmoid()


def sigmoid(a: Tensor) -> Tensor:
    """A bit, 0 or 1, of mean σ(a): `ν = σ(a) (1 − σ(a))`.

    Args:
        a: pre-activations.

    Example:
        >>> sigmoid(torch.tensor([0.0, 500.0]))
        tensor([0.2500, 0.0000])
    """
    a = _checked(a)
    return a.sigmoid() * (-a).sigmoid()


def gaussian(
    activation: Callable[[Tensor], Tensor], a: Tensor, variance: float | Tensor = 1.0
) -> Tensor:
    """A real number of mean φ(a), for any activation φ: `ν = φ'(a)² / variance`.

    Args:
        activation: φ, entry by entry: a function or a module, with the derivative that torch has
            for it. A softmax is none; `layers.softmax` has its metric.
        a: pre-activations.
        variance: of the response, in squared units of φ; a number, or what broadcasts against `a`.

    Raises:
        ValueError: If the activation changes the shape, or the variance is not positive.

    Example:
        >>> gaussian(torch.tanh, torch.tensor([0.0, 1.0]), variance=4.0)
        tensor([0.2500, 0.0441])
    """
    a = _checked(a)
    if not (torch.as_tensor(variance) > 0).all():
        raise ValueError(f"variance must be > 0, got {variance}.")
    # The copy lets activations work in place.
    value, pullback, *_ = torch.func.vjp(lambda a: activation(a.clone()), a)
    if value.shape != a.shape:
        raise ValueError(
            f"The activation made {tuple(value.shape)} of {tuple(a.shape)}. Give one that acts "
            f"on each entry by itself; a layer that mixes them has a metric in relative.layers."
        )
    (slope,) = pullback(torch.ones_like(value))
    return (slope.square() / variance).to(a.dtype)


def relu(a: Tensor) -> Tensor:
    """A real number of mean max(a, 0) and variance 1: `ν = 1` where `a > 0`, else 0.

    Args:
        a: pre-activations.

    Example:
        >>> relu(torch.tensor([-2.0, 2.0]))
        tensor([0., 1.])
    """
    return leaky_relu(a, 0.0)


def leaky_relu(a: Tensor, slope: float = 0.01) -> Tensor:
    """The same with a slope below zero: `ν = 1` where `a > 0`, else slope².

    Args:
        a: pre-activations.
        slope: of the activation at `a ≤ 0`, the default that of `torch.nn.LeakyReLU`.

    Example:
        >>> leaky_relu(torch.tensor([-2.0, 2.0]), slope=0.5)
        tensor([0.2500, 1.0000])
    """
    a = _checked(a)
    return torch.where(a > 0, torch.ones_like(a), slope**2)


def smooth_relu(a: Tensor, leak: float = 0.0, width: float = 1.0) -> Tensor:
    """A smooth (leaky) relu and variance 1: `ν = [leak + (1 − leak) σ((1 − leak) a / width)]²`.

    The mean is `width · log(exp(leak · a / width) + exp(a / width))`; as the width goes to 0 it
    becomes the leaky relu. Without a leak and with width 1 it is the softplus, `ν = σ(a)²`.

    Args:
        a: pre-activations.
        leak: slope far below zero, in [0, 1).
        width: of the transition, > 0, in units of `a`.

    Raises:
        ValueError: If the leak or the width is out of range.

    Example:
        >>> smooth_relu(torch.tensor([-500.0, 0.0, 500.0]))
        tensor([0.0000, 0.2500, 1.0000])
    """
    a = _checked(a)
    if not 0 <= leak < 1:
        raise ValueError(f"leak must be in [0, 1), got {leak}. With leak 1 the unit is linear.")
    if not width > 0:
        raise ValueError(f"width must be > 0, got {width}. The limit is leaky_relu(a, leak).")
    return (leak + (1 - leak) * (a * ((1 - leak) / width)).sigmoid()).square()


def elu(a: Tensor, alpha: float = 1.0) -> Tensor:
    """An exponential linear mean and variance 1: `ν = 1` where `a ≥ 0`, else `(alpha eᵃ)²`.

    Args:
        a: pre-activations.
        alpha: minus the limit of the activation far below zero.

    Example:
        >>> elu(torch.tensor([-500.0, 0.0, 500.0]), alpha=2.0)
        tensor([0., 1., 1.])
    """
    a = _checked(a)
    # The exponent is clamped because both branches are computed.
    return torch.where(a >= 0, 1.0, (alpha * a.clamp(max=0).exp()).square())


def _checked(a: Tensor) -> Tensor:
    if not isinstance(a, Tensor) or not a.is_floating_point():
        given = a.dtype if isinstance(a, Tensor) else type(a).__name__
        raise TypeError(f"Pre-activations are a tensor of real numbers, got {given}.")
    return a
