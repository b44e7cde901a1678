"""Gaussian kernels of activations, by name, function or module (papers.md §2.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuromanifold.meanfield.forms import Closed, Form
from neuromanifold.meanfield.hermite import Series

__all__ = ["Activation", "Kernel", "derivative", "kernel"]

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Kernel:
    """What a random layer does to its inputs, through its activation.

    Attributes:
        name: of the activation.
        function: the activation φ, entry by entry.
        value: of φ itself: `kernel.value.product(q, r, p)` is `E φ(a) φ(b)` for a Gaussian pair
            of variances q, r and covariance p.
        slope: the same of its derivative.
        homogeneous: whether `φ(s u) = s φ(u)` for all `s > 0`: then no scale is preferred.
    """

    name: str
    function: Function
    value: Form
    slope: Form
    homogeneous: bool = False


Activation = str | Function | nn.Module | Kernel
"""A name, a function that acts entry by entry, a module of that kind, or a kernel."""


def kernel(activation: Activation) -> Kernel:
    """The kernel of an activation.

    Closed for relu, leaky relu, linear and erf (`torch.erf`, not the normal distribution function).
    Everything else is expanded in Hermite polynomials, to about 1e-12 where it is smooth or has its
    only kink at 0; elsewhere the error that comes with each integral says how far it got.

    Args:
        activation: a name ("tanh", "relu", "gelu", ...: any of `torch.nn.functional` or `torch`),
            a function such as `torch.sin`, a module such as `nn.LeakyReLU(0.2)`, or a kernel,
            which is given back.

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
    if isinstance(activation, str):
        return _by_name(activation)
    if isinstance(activation, nn.Module):
        return _by_module(activation)
    if not callable(activation):
        raise TypeError(
            f"An activation is a name, a function or a module, got {type(activation).__name__}."
        )
    for name, functions in _FUNCTIONS.items():
        if activation in functions:
            return _CLOSED[name]
    return _expanded(getattr(activation, "__name__", type(activation).__name__), activation)


def derivative(function: Function) -> Function:
    """The derivative of a function that acts entry by entry, by autograd.

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


def leaky_relu(slope: float = 0.01) -> Kernel:
    """The closed kernel of a leaky relu; relu is that of slope 0, linear that of slope 1.

    Args:
        slope: of the activation below 0.

    Example:
        >>> leaky_relu(0.5).slope.square(torch.tensor(2.0)).value  # (1 + 0.5²) / 2
        tensor(0.6250)
    """
    # φ(u) = m u + d |u|; the mixed term vanishes by symmetry.
    line, bend = ((1 + slope) / 2) ** 2, ((1 - slope) / 2) ** 2

    def value(q: Tensor, r: Tensor, c: Tensor) -> Tensor:
        bent = (1 - c * c).clamp(min=0).sqrt() + c * c.asin()
        return (q * r).sqrt() * (line * c + bend * (2 / math.pi) * bent)

    def squared_slope(q: Tensor, r: Tensor, c: Tensor) -> Tensor:
        angle = c.asin().expand(torch.broadcast_shapes(q.shape, r.shape, c.shape))
        return line + bend * (2 / math.pi) * angle

    return Kernel(
        f"leaky_relu({slope:g})",
        lambda u: F.leaky_relu(u, slope),
        Closed(value, lambda q: (line + bend) * q),
        Closed(squared_slope, lambda q: torch.full_like(q, line + bend)),
        homogeneous=True,
    )


def _erf() -> Kernel:
    def value(q: Tensor, r: Tensor, c: Tensor) -> Tensor:
        sine = 2 * (q * r).sqrt() * c / ((1 + 2 * q) * (1 + 2 * r)).sqrt()
        return (2 / math.pi) * sine.asin()

    def slope(q: Tensor, r: Tensor, c: Tensor) -> Tensor:
        # (1 + 2q)(1 + 2r) − 4p², without its cancellation at high variances.
        return (4 / math.pi) / (1 + 2 * (q + r) + 4 * q * r * (1 - c * c)).sqrt()

    return Kernel(
        "erf",
        torch.erf,
        # arcsin(x) = arctan(x / √(1 − x²)) keeps its digits as the activation saturates.
        Closed(value, lambda q: (2 / math.pi) * torch.atan2(2 * q, (1 + 4 * q).sqrt())),
        Closed(slope, lambda q: (4 / math.pi) / (1 + 4 * q).sqrt()),
    )


def _renamed(found: Kernel, name: str, function: Function) -> Kernel:
    return Kernel(name, function, found.value, found.slope, found.homogeneous)


_CLOSED = {
    "relu": _renamed(leaky_relu(0.0), "relu", torch.relu),
    "linear": _renamed(leaky_relu(1.0), "linear", lambda u: u),
    "leaky_relu": leaky_relu(),
    "erf": _erf(),
}
_FUNCTIONS: dict[str, tuple[Function, ...]] = {
    "relu": (torch.relu, F.relu, torch.Tensor.relu),
    "leaky_relu": (F.leaky_relu,),
    "erf": (torch.erf, torch.special.erf, torch.Tensor.erf),
}


def _by_name(name: str) -> Kernel:
    asked = {"identity": "linear", "none": "linear"}.get(name.lower(), name.lower())
    if asked in _CLOSED:
        return _CLOSED[asked]
    for home in (F, torch):
        function = getattr(home, asked, None)
        if callable(function) and not asked.startswith("_"):
            return _expanded(asked, function)
    raise ValueError(
        f"No activation is called {name!r}. Closed kernels are {sorted(_CLOSED)}; other names are "
        f"those of torch.nn.functional or torch, such as 'tanh'. A function can be given as it is."
    )


def _by_module(module: nn.Module) -> Kernel:
    if isinstance(module, nn.ReLU):
        return _CLOSED["relu"]
    if isinstance(module, nn.Identity):
        return _CLOSED["linear"]
    if isinstance(module, nn.LeakyReLU):
        return leaky_relu(module.negative_slope)
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return leaky_relu(float(module.weight.detach()))
    return _expanded(type(module).__name__.lower(), module)


def _expanded(name: str, function: Function) -> Kernel:
    """By a series, for functions that act entry by entry."""
    probe = torch.linspace(-2, 2, 6, dtype=torch.float64).reshape(2, 3)
    try:
        whole = function(probe.clone())
        single = torch.stack([function(u.clone()) for u in probe.ravel()]).reshape(probe.shape)
        acts = whole.shape == probe.shape and torch.equal(whole, single)
    except (TypeError, RuntimeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{name!r} could not be called with a float64 tensor alone: {error}. Give a function "
            f"of one tensor, such as lambda u: F.elu(u, alpha=2.0)."
        ) from error
    if not acts:
        raise ValueError(
            f"{name!r} does not act on each entry by itself (or not twice in the same way). Give "
            f"an activation such as torch.tanh; what mixes entries has no kernel of this kind."
        )
    return Kernel(name, function, Series(function), Series(derivative(function)))
