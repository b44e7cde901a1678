"""What random weights do to signals and errors on their way through depth (papers.md §2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from neuromanifold._estimate import plain
from neuromanifold.meanfield.kernels import Activation, Kernel, kernel

__all__ = ["Propagation", "propagate"]

Numbers = float | Sequence[float] | Tensor


@dataclass(frozen=True, eq=False)
class Propagation:
    """Signals and errors in the layers of a random network; `print` shows a table.

    L layers; activity and overlap begin with the input. `...` is the shape of the given activity
    `()` or `(T,)`; of pairs, that of the given overlap, `()` or `(T, T)`.

    Attributes:
        names: of the activations behind the layers, L of them.
        widths: of the input and all layers, L + 1 of them; None if they were not given.
        weight_variance: `(L,)`, times the fan-in: a weight has `weight_variance / fan_in`.
        bias_variance: `(L,)`.
        variance: τ of pre-activations, `(L, ...)`.
        covariance: ρ of those of two inputs, `(L, ...)`, pairs.
        activity: A, the mean square of what a layer sends on, `(L + 1, ...)`.
        overlap: R, the mean product for two inputs, `(L + 1, ...)`, pairs.
        correlation: R over the root of both activities, `(L + 1, ...)`, pairs.
        gain: χ, by which the squared error grows on its way down to each layer but the last:
            `σ_w² E φ'²` with the weights above, `(L - 1, ...)`.
        error: q̃, squared derivative of one output by a layer's pre-activations, summed over the
            layer, `(L, ...)`; 1 for the last layer if its outputs are linear.
        error_overlap: q̃_st, the product of those of two inputs, `(L, ...)`, pairs.
        quadrature_error: largest of all the integrals', relative to 1 or the integral, whichever
            is larger; 0 if all are closed.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...] | None
    weight_variance: Tensor
    bias_variance: Tensor
    variance: Tensor
    covariance: Tensor
    activity: Tensor
    overlap: Tensor
    correlation: Tensor
    gain: Tensor
    error: Tensor
    error_overlap: Tensor
    quadrature_error: float

    @property
    def depth(self) -> int:
        """L, the number of layers."""
        return len(self.names)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {part.name: plain(getattr(self, part.name)) for part in fields(self)}

    def __str__(self) -> str:
        head = ("layer", "activation", "variance", "activity", "correlation", "gain", "error")
        lines: list[tuple[str, ...]] = [
            head,
            ("input", "", "", _word(self.activity[0]), _word(self.correlation[0]), "", ""),
        ]
        gains = [*map(_word, self.gain), ""]
        for layer, (name, gain) in enumerate(zip(self.names, gains, strict=True)):
            cells = (self.variance[layer], self.activity[layer + 1], self.correlation[layer + 1])
            words = (str(layer + 1), name, *map(_word, cells), gain, _word(self.error[layer]))
            lines.append(words)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        several = self.activity[0].numel() > 1 or self.overlap[0].numel() > 1
        caption = f"Random network of {self.depth} layers" + (
            ", means over inputs and pairs" if several else ""
        )
        return "\n".join([caption, "", *table])


def propagate(
    activation: Activation | Sequence[Activation],
    *,
    weight_variance: Numbers,
    bias_variance: Numbers = 0.0,
    depth: int | None = None,
    widths: Sequence[int] | None = None,
    activity: float | Tensor = 1.0,
    overlap: float | Tensor = 0.0,
) -> Propagation:
    """Follow the signals of inputs up through a wide random network, and errors back down.

    Weights are independent, of mean 0 and variance `weight_variance / fan_in`, biases of variance
    `bias_variance`; the equations are those of the limit of infinite width. `variances` has both
    numbers for the usual initialisations, `measured` reads them off a model.

    A convolution counts per channel: fan-in is channels times kernel entries, activity the mean
    over channels and positions, overlap that of two inputs at the same position, errors the sum
    over channels and positions. That is exact in the limit of many channels as long as activity is
    the same everywhere; zero padding lowers it at the borders.

    Args:
        activation: behind each layer but the last, whose outputs are linear; as for `kernel`. Or
            one for each layer, including the last.
        weight_variance: σ_w², a number or one per layer.
        bias_variance: σ_b², likewise.
        depth: L, the number of layers, hidden and output.
        widths: of the input and of each layer, in place of `depth`. They do not change the
            equations; the statistics of the spectrum need them.
        activity: A⁰, mean square of an input's entries: a number, or one per input `(T,)`.
        overlap: R⁰, mean product of two inputs' entries: a number, or `(T, T)`. The default is
            that of independent, centred inputs.

    Returns:
        Numbers per layer, in float64, or in the dtype of `activity` if it is a tensor.

    Raises:
        ValueError: If depth and widths are missing or at odds, numbers per layer do not fit, or a
            variance is negative, or an overlap is larger than the activities allow.

    Example:
        >>> net = propagate("tanh", weight_variance=1.0, depth=3)
        >>> print(net)
        Random network of 3 layers
        <BLANKLINE>
        layer  activation  variance  activity  correlation  gain    error
        input                        1         0
        1      tanh        1         0.3943    0            0.4644  0.2956
        2      tanh        0.3943    0.2365    0            0.6365  0.6365
        3      linear      0.2365    0.2365    0                    1
    """
    depth, sizes = _depth(depth, widths)
    kernels = _kernels(activation, depth)
    given = activity.dtype if isinstance(activity, Tensor) else None
    first = torch.as_tensor(
        activity, dtype=given if given and given.is_floating_point else torch.float64
    ).detach()
    pair = _pairs(first, overlap)
    weight = _per_layer(weight_variance, depth, "weight_variance", first)
    bias = _per_layer(bias_variance, depth, "bias_variance", first)

    left, right = _sides(first)
    # Inputs that are one and the same stay so: rounding must not part them, for which the slope of
    # relu is infinitely sensitive.
    same = (pair == left) & (pair == right)
    signals, pairs, correlations = [first], [pair], [_correlation(first, pair)]
    variances: list[Tensor] = []
    covariances: list[Tensor] = []
    slopes: list[Tensor] = []
    slope_pairs: list[Tensor] = []
    worst = first.new_zeros(())
    for sigma_w, sigma_b, phi in zip(weight, bias, kernels, strict=True):
        variances.append(sigma_w * signals[-1] + sigma_b)
        covariances.append(sigma_w * pairs[-1] + sigma_b)
        sides = _sides(variances[-1])
        for form, alone, together in (
            (phi.value, signals, pairs),
            (phi.slope, slopes, slope_pairs),
        ):
            square, product = form.square(variances[-1]), form.product(*sides, covariances[-1])
            alone.append(square.value)
            together.append(torch.where(same, _sides(square.value)[0], product.value))
            for value, error in (square, product):
                worst = torch.maximum(worst, (error / value.abs().clamp(min=1)).max())
        correlations.append(_correlation(signals[-1], pairs[-1]))

    # Down again: the error at a layer's activations comes through the weights above.
    errors, error_pairs = [slopes[-1]], [slope_pairs[-1]]
    for layer in range(depth - 2, -1, -1):
        errors.append(errors[-1] * weight[layer + 1] * slopes[layer])
        error_pairs.append(error_pairs[-1] * weight[layer + 1] * slope_pairs[layer])
    above = weight[1:].reshape(-1, *(1,) * first.dim())
    return Propagation(
        names=tuple(phi.name for phi in kernels),
        widths=sizes,
        weight_variance=weight,
        bias_variance=bias,
        variance=torch.stack(variances),
        covariance=torch.stack(covariances),
        activity=torch.stack(signals),
        overlap=torch.stack(pairs),
        correlation=torch.stack(correlations),
        gain=above * torch.stack(slopes)[:-1],
        error=torch.stack(errors[::-1]),
        error_overlap=torch.stack(error_pairs[::-1]),
        quadrature_error=float(worst),
    )


def _sides(variance: Tensor) -> tuple[Tensor, Tensor]:
    """Of the two inputs of all pairs."""
    return (variance[:, None], variance[None, :]) if variance.dim() else (variance, variance)


def _correlation(square: Tensor, product: Tensor) -> Tensor:
    """0 if a signal is dead."""
    left, right = _sides(square)
    scale = (left * right).sqrt()
    return torch.where(scale > 0, product / scale, 0.0)


def _depth(depth: int | None, widths: Sequence[int] | None) -> tuple[int, tuple[int, ...] | None]:
    if (depth is None) == (widths is None):
        raise ValueError(
            f"Give either depth or widths, got depth={depth} and widths={widths}. Widths count the "
            f"input: [784, 1000, 10] has depth 2."
        )
    sizes = None if widths is None else tuple(widths)
    found = depth if sizes is None else len(sizes) - 1
    assert found is not None
    if found < 1 or any(size < 1 for size in sizes or ()):
        raise ValueError(
            f"A network has at least one layer, and layers at least one unit, got "
            f"{f'depth={depth}' if sizes is None else f'widths={sizes}'}."
        )
    return found, sizes


def _kernels(activation: Activation | Sequence[Activation], depth: int) -> list[Kernel]:
    if isinstance(activation, Sequence) and not isinstance(activation, str):
        if len(activation) != depth:
            raise ValueError(
                f"Got {len(activation)} activations for {depth} layers. Give one for each, with "
                f"'linear' for a last layer without one, or one for all hidden layers."
            )
        return [kernel(each) for each in activation]
    return [kernel(activation)] * (depth - 1) + [kernel("linear")]


def _per_layer(given: Numbers, depth: int, name: str, like: Tensor) -> Tensor:
    """`(L,)`."""
    values = torch.as_tensor(given, dtype=like.dtype, device=like.device).detach()
    if values.dim() > 1 or (values.dim() == 1 and len(values) != depth):
        raise ValueError(
            f"{name} is a number or one per layer: {depth} here, got {tuple(values.shape)}."
        )
    if not (values.isfinite() & (values >= 0)).all():
        raise ValueError(f"{name} must be ≥ 0 and finite, got {values.tolist()}.")
    return values.expand(depth)


def _pairs(activity: Tensor, overlap: float | Tensor) -> Tensor:
    """The overlap, of the shape of pairs."""
    pair = torch.as_tensor(overlap, dtype=activity.dtype, device=activity.device).detach()
    size = activity.shape[0] if activity.dim() else (pair.shape[0] if pair.dim() else 1)
    if activity.dim() > 1 or pair.shape not in ((), (size, size)):
        raise ValueError(
            f"The activity is a number or one per input (T,), the overlap a number or (T, T), got "
            f"{tuple(activity.shape)} and {tuple(pair.shape)}."
        )
    if activity.dim():
        pair = pair.expand(size, size)
    left, right = _sides(activity)
    slack = 8 * torch.finfo(activity.dtype).eps
    allowed = (activity.isfinite() & (activity >= 0)).all() and (
        pair.abs() <= (1 + slack) * (left * right).sqrt()
    ).all()
    if not allowed:
        raise ValueError(
            f"The activity is a mean square: ≥ 0 and finite; an overlap is at most the root of "
            f"two inputs' activities. Got activities up to {float(activity.max()):.4g} and "
            f"overlaps up to {float(pair.abs().max()):.4g}."
        )
    return pair


def _word(value: Tensor) -> str:
    """The mean, without the rounding of what is 0 by symmetry."""
    return f"{round(float(value.mean()), 15):.4g}"
