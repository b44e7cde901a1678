"""Where depth leads: fixed points of variance and correlation, and the edge of chaos.

Iterated over layers, the variance τ of a signal goes to `q = σ_w² E φ² + σ_b²`, the correlation of
two inputs to `c = (σ_w² E φ(a) φ(b) + σ_b²) / q`. One input seen twice stays so, `c = 1`; two that
are close come closer if `χ = σ_w² E φ'² < 1`, which is also the gain of squared errors on their way
down. `χ = 1` is the edge between order and chaos.

Sources: Amari, Karakida and Oizumi, arXiv 1808.07172; Poole et al., arXiv 1606.05340, and
Schoenholz et al., arXiv 1611.01232, for the depth scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from neuromanifold._estimate import plain
from neuromanifold.errors import UnsupportedError
from neuromanifold.meanfield.kernels import Activation, Kernel, kernel

__all__ = ["FixedPoint", "PhaseDiagram", "edge_of_chaos", "fixed_point", "phase_diagram"]

LARGEST = 1e8
"""Variance from which on the signal counts as growing without end."""

SMALLEST = 2.0**-60
"""Variance down to which a fixed point is looked for, if 0 is one."""

STEPS = 100
"""Of Newton's iteration, which takes fewer than ten but near the edge of chaos."""

FLAT = 1e-12
"""Relative change of the variance below which it counts as unchanged."""

ROUNDING = 1e-15
"""Relative change that Newton's iteration cannot improve on."""

Numbers = float | Sequence[float] | Tensor


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """Where signals of a deep random network end, and how fast; float64, of the variances' shape.

    Attributes:
        name: of the activation.
        weight_variance: σ_w².
        bias_variance: σ_b².
        variance: q*, of the pre-activations; infinite if they grow without end.
        correlation: c*, of two inputs' signals, where they end unless they begin as one.
        gain: χ of one input: below 1 inputs become alike and errors vanish, above 1 they part and
            errors explode.
        slope: by which the distance from c* shrinks per layer, near c*. The same as the gain if c*
            is 1, and the variance has come to rest.
        variance_depth: ξ_q, layers in which the distance from q* falls by 1/e; infinite if slower
            than any exponential, or if there is nowhere to go.
        correlation_depth: ξ_c, the same of the correlation: how deep a network can be and still
            tell its inputs apart by their signals.

    Where signals die out, `variance = 0`, the correlation is that of what is left of them, which
    then hardly changes: its slope is 1. Where the variance grows without end, relu and its kin have
    a correlation and a gain all the same, as they do not depend on it; others have NaN there.
    """

    name: str
    weight_variance: Tensor
    bias_variance: Tensor
    variance: Tensor
    correlation: Tensor
    gain: Tensor
    slope: Tensor
    variance_depth: Tensor
    correlation_depth: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; what is NaN or infinite is None."""
        return {part.name: plain(getattr(self, part.name)) for part in fields(self)}

    @property
    def phase(self) -> str:
        """Of a single point: "ordered", "edge of chaos", "chaotic", or "unbounded".

        Raises:
            ValueError: If there are several.
        """
        if self.gain.numel() != 1:
            raise ValueError(f"There are {self.gain.numel()} points; look at their gain instead.")
        gain = float(self.gain)
        if gain != gain or (not self.variance.isfinite() and gain > 1 + 1e-6):
            return "unbounded"
        if abs(gain - 1) <= 1e-6:
            return "edge of chaos"
        return "ordered" if gain < 1 else "chaotic"

    def __str__(self) -> str:
        if self.gain.numel() != 1:
            return f"Fixed points of {self.name} at {tuple(self.gain.shape)} pairs of variances"
        rows = [
            ("variance q*", self.variance, "layers to reach it", self.variance_depth),
            ("correlation c*", self.correlation, "layers to reach it", self.correlation_depth),
            ("gain", self.gain, "slope at c*", self.slope),
        ]
        head = (
            f"{self.name}, weight variance {float(self.weight_variance):.4g}, bias variance "
            f"{float(self.bias_variance):.4g}: {self.phase}"
        )
        lines = [
            f"{left:<16}{_word(one):<12}{right:<20}{_word(two)}" for left, one, right, two in rows
        ]
        return "\n".join([head, *lines])


@dataclass(frozen=True, eq=False)
class PhaseDiagram:
    """Fixed points on a grid, and the edge of chaos through it.

    Attributes:
        points: fixed points; rows are bias variances, columns weight variances, `(B, W)`.
        edge: weight variance of the edge of chaos for each bias variance, `(B,)`; NaN if there is
            none.
    """

    points: FixedPoint
    edge: Tensor

    @property
    def weight_variances(self) -> Tensor:
        """`(W,)`."""
        return self.points.weight_variance[0]

    @property
    def bias_variances(self) -> Tensor:
        """`(B,)`."""
        return self.points.bias_variance[:, 0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; what is NaN or infinite is None."""
        return {
            **self.points.to_dict(),
            "weight_variance": plain(self.weight_variances),
            "bias_variance": plain(self.bias_variances),
            "edge": plain(self.edge),
        }

    def __str__(self) -> str:
        heads = [f"{float(value):.3g}" for value in self.weight_variances]
        rows = [["σ_b² \\ σ_w²", *heads, "edge at"]]
        for bias, gains, edge in zip(self.bias_variances, self.points.gain, self.edge, strict=True):
            rows.append([f"{float(v):.3g}" for v in (bias, *gains, edge)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(map(str.rjust, row, widths)) for row in rows]
        return "\n".join([f"Gain of {self.points.name}: below 1 order, above 1 chaos", *table])


def fixed_point(
    activation: Activation,
    weight_variance: Numbers,
    bias_variance: Numbers = 0.0,
    *,
    start: float = 1.0,
) -> FixedPoint:
    """Where variance and correlation of signals go as a random network gets deeper.

    Of several fixed points of the variance it is the first that a signal meets on its way from
    `start`; the correlation is that of inputs whose own is not negative.

    Relu and its kin are linear in the variance: for σ_w² below 2 it ends at `σ_b² / (1 − σ_w²/2)`,
    above it grows without end; at 2, without biases, every variance is a fixed point, and the one
    reported is the start.

    Args:
        activation: as for `kernel`.
        weight_variance: σ_w², a number or several; a weight has `σ_w² / fan_in`.
        bias_variance: σ_b², broadcast against it.
        start: variance of the pre-activations of the first layer, > 0.

    Raises:
        ValueError: If a variance is negative or not finite, or the start is not positive.

    Example:
        >>> print(fixed_point("tanh", 1.5, 0.05))
        tanh, weight variance 1.5, bias variance 0.05: ordered
        variance q*     0.418       layers to reach it  1.683
        correlation c*  1           layers to reach it  15.79
        gain            0.9386      slope at c*         0.9386
    """
    phi = kernel(activation)
    weight, bias = torch.broadcast_tensors(
        _variances(weight_variance, "weight_variance"), _variances(bias_variance, "bias_variance")
    )
    if not start > 0:
        raise ValueError(f"start must be > 0, got {start}.")
    variance = _root(phi, weight.ravel(), bias.ravel(), start).reshape(weight.shape)
    # Relu has no scale: for a variance of 0 or infinity the equations hold at 1, without biases.
    # Others have theirs at 0 as a limit: a derivative at a kink would be a convention of torch.
    scaleless = ((variance == 0) | variance.isinf()) & phi.homogeneous
    at = variance.clamp(min=SMALLEST).where(variance.isfinite(), torch.nan)
    at, ground = torch.where(scaleless, 1.0, at), torch.where(scaleless, 0.0, bias)
    gain = weight * phi.slope.square(at).value
    grown = weight * phi.value.square(at).value + ground
    correlation, slope = _correlation(phi, at, weight, ground, grown)
    return FixedPoint(
        name=phi.name,
        weight_variance=weight,
        bias_variance=bias,
        variance=variance,
        correlation=correlation,
        gain=gain,
        slope=slope,
        variance_depth=_depth(_change(phi, at, weight)),
        correlation_depth=_depth(slope),
    )


def edge_of_chaos(activation: Activation, bias_variance: Numbers = 0.0) -> Tensor:
    """The weight variance for which the gain is 1: inputs neither become alike nor part.

    Errors then neither vanish nor explode with depth, and correlations settle slower than any
    exponential: the usual choice for deep networks. For relu it is 2 whatever the biases, of which
    any make the variance grow without end there, by σ_b² per layer.

    Args:
        activation: as for `kernel`.
        bias_variance: σ_b², a number or several.

    Returns:
        σ_w², float64, of the shape of the bias variance; a weight has `σ_w² / fan_in`.

    Raises:
        UnsupportedError: If the activation has no edge of chaos at one of the bias variances.
        ValueError: If a variance is negative or not finite.

    Example:
        >>> edge_of_chaos("tanh")
        tensor(1., dtype=torch.float64)
        >>> round(float(edge_of_chaos("tanh", 0.05)), 4)
        1.761
    """
    phi = kernel(activation)
    bias = _variances(bias_variance, "bias_variance")
    found = _edge(phi, bias)
    if found.isnan().any():
        missing = bias[found.isnan()].tolist()
        raise UnsupportedError(
            f"{phi.name} has no edge of chaos at bias variances {missing[:5]}: at no fixed point "
            f"of the variance the gain is 1. fixed_point says where its signals go."
        )
    return found


def phase_diagram(
    activation: Activation, weight_variances: Numbers, bias_variances: Numbers
) -> PhaseDiagram:
    r"""Fixed points for all pairs of a weight and a bias variance.

    Args:
        activation: as for `kernel`.
        weight_variances: `(W,)`.
        bias_variances: `(B,)`.

    Raises:
        ValueError: If a variance is negative or not finite, or they are not lists of numbers.

    Example:
        >>> print(phase_diagram("tanh", [0.5, 1.0, 2.0], [0.0, 0.1]))
        Gain of tanh: below 1 order, above 1 chaos
        σ_b² \ σ_w²    0.5      1     2  edge at
                  0    0.5      1  1.11        1
                0.1  0.393  0.689     1     1.99
    """
    weight = _variances(weight_variances, "weight_variances")
    bias = _variances(bias_variances, "bias_variances")
    if weight.dim() != 1 or bias.dim() != 1:
        raise ValueError(
            f"Give a list of weight variances and one of bias variances, got shapes "
            f"{tuple(weight.shape)} and {tuple(bias.shape)}; for one point use fixed_point."
        )
    phi = kernel(activation)
    return PhaseDiagram(fixed_point(phi, weight, bias[:, None]), _edge(phi, bias))


def _variances(given: Numbers, name: str) -> Tensor:
    values = torch.as_tensor(given, dtype=torch.float64).detach()
    if not (values.isfinite() & (values >= 0)).all():
        raise ValueError(f"{name} must be ≥ 0 and finite, got {given}.")
    return values


def _root(phi: Kernel, weight: Tensor, bias: Tensor, start: float) -> Tensor:
    """The first fixed point of the variance that is met from the start; 0 or infinite if none is.

    Powers of 4 bracket it; Newton's iteration, kept inside of the bracket, finds it. Each step is
    computed only where it is still needed.
    """

    def excess(q: Tensor, at: Tensor) -> Tensor:
        return weight[at] * phi.value.square(q).value + bias[at] - q

    def settled(value: Tensor, q: Tensor) -> Tensor:
        # Rounding must not make a root of what only comes close to one.
        return value.abs() <= FLAT * q

    found = torch.full_like(weight, start)
    at = torch.arange(len(weight))
    first = excess(found, at)
    at = at[~settled(first, found)]
    up = first > 0
    low, high = found.clone(), found.clone()
    # If the image of 0 is positive, 0 is a lower end; else it is a fixed point itself.
    ground = ~up[at] & (excess(torch.zeros_like(low[at]), at) > 0)
    low[at[ground]] = 0.0
    inside, search = [at[ground]], at[~ground]
    while len(search):
        rising = up[search]
        q = torch.where(rising, 4 * high[search], low[search] / 4)
        high[search], low[search] = q.where(rising, high[search]), q.where(~rising, low[search])
        value = excess(q, search)
        beyond = torch.where(rising, q > LARGEST, q < SMALLEST)
        found[search[beyond]] = torch.where(rising, torch.inf, 0.0)[beyond].to(found)
        turned = torch.where(rising, value <= 0, (value > 0) & ~settled(value, q)) & ~beyond
        inside.append(search[turned])
        search = search[~turned & ~beyond]
    at = torch.cat(inside)
    found[at] = (low[at] + high[at]) / 2
    for _ in range(STEPS):
        if not len(at):
            break
        q = found[at]
        with torch.enable_grad():
            leaf = q.clone().requires_grad_()
            value = excess(leaf, at)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        value = value.detach()
        low[at], high[at] = (
            torch.where(value > 0, q, low[at]),
            torch.where(value > 0, high[at], q),
        )
        new = q - value / slope
        new = torch.where((new > low[at]) & (new < high[at]), new, (low[at] + high[at]) / 2)
        done = (value.abs() <= ROUNDING * q) | ((new - q).abs() <= ROUNDING * q)
        found[at] = torch.where(value.abs() <= ROUNDING * q, q, new)
        at = at[~done]
    return found


def _correlation(
    phi: Kernel, at: Tensor, weight: Tensor, ground: Tensor, grown: Tensor
) -> tuple[Tensor, Tensor]:
    """c*, and the slope of the map there.

    On [0, 1] the map is a power series with coefficients ≥ 0, hence convex, and 1 is a fixed point
    of it. If its slope at 1 is above 1, there is one more, which Newton's iteration from 0 meets
    from below, without overshooting.
    """
    value, slope = phi.value.curve(at, at), phi.slope.curve(at, at)
    end = weight * phi.slope.square(at).value * at / grown
    chaotic = end > 1 + FLAT
    c = torch.where(chaotic, 0.0, torch.ones_like(at))
    for _ in range(STEPS):
        residual = (weight * value(c).value + ground) / grown - c
        if not (chaotic & (residual.abs() > ROUNDING)).any():
            break
        step = residual / (1 - weight * slope(c).value * at / grown)
        c = torch.where(chaotic & step.isfinite(), c + step, c).clamp(0, 1)
    c = torch.where(end.isnan(), torch.nan, c)
    return c, torch.where(chaotic, weight * slope(c).value * at / grown, end)


def _change(phi: Kernel, at: Tensor, weight: Tensor) -> Tensor:
    """By which the variance map stretches distances at its fixed point."""
    with torch.enable_grad():
        leaf = at.clamp(min=SMALLEST).requires_grad_()
        image = weight * phi.value.square(leaf).value
        (slope,) = torch.autograd.grad(image.sum(), leaf)
    return slope


def _depth(slope: Tensor) -> Tensor:
    """Layers in which a distance falls by 1/e, if each multiplies it by the slope."""
    size = slope.abs()
    return torch.where(size >= 1 - FLAT, torch.inf, -1 / size.log())


def _edge(phi: Kernel, bias: Tensor) -> Tensor:
    """σ_w² of the edge; NaN if there is none.

    At the edge `σ_w² = 1 / E φ'²`, and the variance q is a fixed point if
    `q − E φ² / E φ'² = σ_b²`: the roots of one curve. Not every one is where signals go.
    """
    if phi.homogeneous:
        return 1 / phi.slope.square(torch.ones_like(bias)).value

    def missing(q: Tensor) -> Tensor:
        found = q - phi.value.square(q).value / phi.slope.square(q).value
        return torch.where(found.abs() <= FLAT * q, 0.0, found)

    grid = torch.logspace(-8, 6, 225, dtype=bias.dtype)
    heights = missing(grid) - bias.reshape(-1, 1)
    below = heights < 0
    which, place = (below[:, 1:] != below[:, :-1]).nonzero(as_tuple=True)
    # Without biases, 0 may be a fixed point.
    none = (bias.ravel() == 0).nonzero().ravel()
    sigma_b = bias.ravel()[torch.cat([none, which])]
    low, high = grid[place], grid[place + 1]
    rising = below[which, place]
    for _ in range(60):
        middle = (low + high) / 2
        left = ((missing(middle) - bias.ravel()[which]) < 0) == rising
        low, high = torch.where(left, middle, low), torch.where(left, high, middle)
    q = torch.cat([torch.full_like(sigma_b[: len(none)], SMALLEST), (low + high) / 2])
    weight = 1 / phi.slope.square(q).value
    reached = fixed_point(phi, weight, sigma_b).gain
    weight = torch.where((reached - 1).abs() < 1e-6, weight, torch.inf)
    edge = torch.full_like(bias.ravel(), torch.inf)
    edge = edge.scatter_reduce(0, torch.cat([none, which]), weight, "amin")
    return torch.where(edge.isfinite(), edge, torch.nan).reshape(bias.shape)


def _word(value: Tensor) -> str:
    """Without the rounding of what is 0."""
    return f"{round(float(value), 15):.4g}"
