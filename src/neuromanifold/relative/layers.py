"""Closed forms of layers: metrics that keep a few numbers per sample, and no matrix.

The parameters of a layer are its weights and bias, unit-major, the bias last: `(O, I)` with
`I = fan-in + 1`. Responses of different samples are independent, and metrics are means over samples
(sums over positions inside a sample), in nats/parameter².

Source: Sun and Nielsen, arXiv 1606.06069.

Example:
    A layer of tanh units that emit signs, by the closed form and by nothing but products:

    >>> from neuromanifold.relative import units
    >>> layer, x = nn.Linear(3, 2), torch.ones(5, 3)
    >>> metric = nonlinear(x, units.tanh(layer(x)))
    >>> metric.matmul(torch.ones(2, 4)).shape, metric.units().shape
    (torch.Size([2, 4]), torch.Size([2, 4, 4]))
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn

from neuromanifold.layers import ConvRule
from neuromanifold.relative.forms import (
    BatchNormMetric,
    LayerMetric,
    TwoLayerMetric,
    UnitMetric,
)

__all__ = [
    "batch_norm",
    "convolution",
    "linear",
    "linear_batch_norm",
    "nonlinear",
    "softmax",
    "two_layers",
]

Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


def linear(
    x: Tensor, num_outputs: int, variance: float | Tensor = 1.0, *, bias: bool = True
) -> LayerMetric:
    """Linear outputs with Gaussian noise: `(1/variance) I_O ⊗ x̃x̃ᵀ`.

    Args:
        x: inputs `(N, *T, I)`, without a column of ones.
        num_outputs: O.
        variance: of the response, in squared units of the output; a number, or `(O,)`.
        bias: whether the layer has one.

    Example:
        >>> linear(torch.ones(5, 2), 3, variance=0.5).units()[0]
        tensor([[2., 2., 2.],
                [2., 2., 2.],
                [2., 2., 2.]])
    """
    rows = _rows(x, bias)
    variance = torch.as_tensor(variance, dtype=rows.dtype, device=rows.device)
    if not (variance > 0).all():
        raise ValueError(f"variance must be > 0, got {variance.tolist()}.")
    weights = variance.reciprocal().expand(len(rows), num_outputs)
    return LayerMetric(rows[None], weights[None], len(x))


def nonlinear(x: Tensor, sensitivities: Tensor, *, bias: bool = True) -> LayerMetric:
    """Independent units: `diag(ν_1, ..., ν_O) ⊗ x̃x̃ᵀ`.

    Args:
        x: inputs `(N, *T, I)`, without a column of ones.
        sensitivities: ν of every unit `(N, *T, O)`, such as `units.tanh(layer(x))`.
        bias: whether the layer has one.

    Raises:
        ValueError: If both are not of the same samples and positions.

    Example:
        >>> nonlinear(torch.ones(5, 2), torch.ones(5, 3)).trace()
        tensor(9.)
    """
    _require_same_rows(x, sensitivities, "sensitivities")
    weights = _kept(sensitivities).flatten(0, -2)
    return LayerMetric(_rows(x, bias)[None], weights[None], len(x))


def softmax(x: Tensor, logits: Tensor, *, bias: bool = True) -> LayerMetric:
    """Class labels of probabilities `η` from logits W x̃: `(diag(η) − ηηᵀ) ⊗ x̃x̃ᵀ`.

    As the last layer of a network this is the exact block of its Fisher matrix.

    Args:
        x: inputs `(N, *T, I)` of the last layer, without a column of ones.
        logits: W x̃ `(N, *T, O)`.
        bias: whether the layer has one.

    Raises:
        ValueError: If both are not of the same samples and positions.

    Example:
        >>> softmax(torch.ones(5, 2), torch.zeros(5, 4)).units()[0, 0, 0]
        tensor(0.1875)
    """
    _require_same_rows(x, logits, "logits")
    weights = _kept(logits).softmax(-1).flatten(0, -2)
    return LayerMetric(_rows(x, bias)[None], weights[None], len(x), centred=True)


def convolution(x: Tensor, sensitivities: Tensor, conv: Conv) -> LayerMetric:
    """Independent units at every position: `Σ_s ν_cs ũ_s ũ_sᵀ` for channel c, zero between two.

    `ũ_s` is the patch under the kernel at position s, padding included, with 1 last.

    Args:
        x: inputs `(N, C, *positions)`.
        sensitivities: ν of every output `(N, O, *positions)`, such as `units.relu(conv(x))`.
        conv: the layer: its stride, padding, dilation, groups and bias count, its weights do not.

    Raises:
        ValueError: If the sensitivities are not of the shape of the layer's output.

    Example:
        >>> conv = nn.Conv2d(2, 4, kernel_size=3, padding=1)
        >>> metric = convolution(torch.ones(1, 2, 5, 5), torch.ones(1, 4, 5, 5), conv)
        >>> metric.units().shape
        torch.Size([4, 19, 19])
    """
    patches = _kept(ConvRule().inputs(conv, x))  # (G, N, T, I)
    weights = _kept(sensitivities).flatten(2)
    groups, num_samples, positions, _ = patches.shape
    if weights.shape != (num_samples, conv.out_channels, positions):
        raise ValueError(
            f"{conv} makes {num_samples} samples of {conv.out_channels} channels at {positions} "
            f"positions of this input, got sensitivities of shape {tuple(sensitivities.shape)}. "
            f"Give one for each output, (N, C, *positions)."
        )
    weights = weights.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    inputs = patches.flatten(1, 2)
    if conv.bias is not None:
        inputs = _with_ones(inputs)
    return LayerMetric(inputs, weights, num_samples)


def batch_norm(s: Tensor, norm: BatchNorm) -> UnitMetric:
    """Scale and shift `(γ, β)` of a batch norm, with Gaussian responses of variance 1.

    With the statistics of the batch `diag(v/(v + eps), 1)` for each channel, times the positions;
    with running ones the mean of `[[â², â], [â, 1]]`.

    Args:
        s: what the module is given, `(N, K)` or `(N, K, *positions)`.
        norm: the module. Statistics are those that it would use: the running ones after `eval()`.

    Example:
        >>> batch_norm(torch.tensor([[1.0], [3.0]]), nn.BatchNorm1d(1, eps=1.0)).matrices
        tensor([[[0.5000, 0.0000],
                 [0.0000, 1.0000]]])
    """
    if not norm.affine:
        raise ValueError(f"{norm} has no scale and shift, so there is no metric on them.")
    normalised, _ = _normalised(s, norm)  # (M, K)
    columns = torch.stack([normalised, torch.ones_like(normalised)], dim=-1)  # (M, K, 2)
    return UnitMetric(torch.einsum("mki,mkj->kij", columns, columns) / len(s))


def linear_batch_norm(
    x: Tensor, s: Tensor, norm: BatchNorm, *, bias: bool = True
) -> BatchNormMetric | LayerMetric:
    """Weights of a linear layer before a batch norm, with Gaussian responses of variance 1.

    With running statistics `γ²/(v + eps) x̃x̃ᵀ`; with those of the batch, what changes the mean or
    the scale of a pre-activation is taken out (`BatchNormMetric`).

    Args:
        x: inputs of the linear layer `(N, I)`, without a column of ones.
        s: its outputs `(N, O)`, before the norm.
        norm: the module. Statistics are those that it would use: the running ones after `eval()`.
        bias: whether the linear layer has one.

    Raises:
        ValueError: If both are not of the same samples.

    Example:
        >>> layer, norm, x = nn.Linear(3, 2), nn.BatchNorm1d(2), torch.randn(8, 3)
        >>> metric = linear_batch_norm(x, layer(x), norm)
        >>> metric.matmul(torch.tensor([0.0, 0, 0, 1]).expand(2, 4)).abs().max()  # the bias
        tensor(0.)
    """
    if x.ndim != 2:
        raise ValueError(f"linear_batch_norm takes inputs of shape (N, I), got {tuple(x.shape)}.")
    _require_same_rows(x, s, "pre-activations")
    normalised, variance = _normalised(s, norm)
    gains = variance.reciprocal()
    if norm.affine:
        gains = gains * _kept(norm.weight).square()
    rows = _rows(x, bias)
    if _of_batch(norm):
        return BatchNormMetric(rows - rows.mean(0), normalised, gains)
    return LayerMetric(rows[None], gains.expand_as(normalised)[None], len(x))


def two_layers(
    x: Tensor, slopes: Tensor, weight: Tensor, above: LayerMetric, *, bias: bool = True
) -> TwoLayerMetric:
    """A layer below another one, `h = f(W x̃)` and `c = C h̃`, with the response of the upper one.

    The hidden units are deterministic. Block of units i and j of W, for independent responses:
    `[Σ_l ν_l C_li C_lj] f'(a_i) f'(a_j) x̃x̃ᵀ`; of C: its own metric; between the two:
    `ν_l C_li f'(a_i) x̃ h̃ᵀ`.

    Args:
        x: inputs of the lower layer `(N, I)`, without a column of ones.
        slopes: f'(a) of every hidden unit `(N, H)`.
        weight: of the upper layer, C without its bias `(L, H)`.
        above: metric of the upper layer by itself, at the inputs h: from `linear`, `nonlinear` or
            `softmax`, for one position per sample.
        bias: whether the lower layer has one.

    Raises:
        ValueError: If the shapes do not belong together.

    Example:
        >>> lower, upper, x = nn.Linear(3, 4), nn.Linear(4, 2), torch.randn(8, 3)
        >>> h = lower(x).tanh()
        >>> two_layers(x, 1 - h**2, upper.weight, softmax(h, upper(h))).dense().shape
        torch.Size([26, 26])
    """
    _require_same_rows(x, slopes, "slopes")
    num_outputs, hidden = above.shape
    fits = (
        x.ndim == weight.ndim == 2
        and weight.shape == (num_outputs, slopes.shape[1])
        and hidden in (weight.shape[1], weight.shape[1] + 1)
        and (*above.inputs.shape[:2], above.num_samples) == (1, len(x), len(x))
    )
    if not fits:
        raise ValueError(
            f"two_layers takes x (N, I), slopes (N, H), weight (L, H) and the metric of that upper "
            f"layer at the same N samples, got x {tuple(x.shape)}, slopes {tuple(slopes.shape)}, "
            f"weight {tuple(weight.shape)}, and a metric of {num_outputs} units with {hidden} "
            f"parameters each at {above.inputs.shape[1]} rows in {len(above.inputs)} groups."
        )
    return TwoLayerMetric(_rows(x, bias), _kept(slopes), _kept(weight), above)


def _kept(tensor: Tensor) -> Tensor:
    """As it is kept: without its history, in float32 at least."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _rows(x: Tensor, bias: bool) -> Tensor:
    """Inputs x̃ `(M, I)` of `(N, *T, I)`."""
    rows = _kept(x).flatten(0, -2)
    return _with_ones(rows) if bias else rows


def _with_ones(inputs: Tensor) -> Tensor:
    return nn.functional.pad(inputs, (0, 1), value=1.0)


def _of_batch(norm: BatchNorm) -> bool:
    """Whether a module normalises by the statistics of the batch, as its forward pass decides."""
    return norm.training or norm.running_mean is None or norm.running_var is None


def _normalised(s: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Normalised values `(M, K)` of `(N, K, *positions)`, and `v + eps` of each channel `(K,)`."""
    if s.ndim < 2 or s.shape[1] != norm.num_features:
        raise ValueError(
            f"{norm} normalises inputs of shape (N, {norm.num_features}) or "
            f"(N, {norm.num_features}, *positions), got {tuple(s.shape)}."
        )
    rows = _kept(s).movedim(1, -1).flatten(0, -2)
    if _of_batch(norm):
        mean, variance = rows.mean(0), rows.var(0, correction=0)
    else:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance = norm.running_mean.to(rows), norm.running_var.to(rows)
    variance = variance + norm.eps
    return (rows - mean) * variance.rsqrt(), variance


def _require_same_rows(x: Tensor, other: Tensor, name: str) -> None:
    if x.ndim < 2 or x.shape[:-1] != other.shape[:-1]:
        raise ValueError(
            f"Inputs (N, *T, I) and {name} (N, *T, O) are of the same samples and positions, got "
            f"{tuple(x.shape)} and {tuple(other.shape)}."
        )
