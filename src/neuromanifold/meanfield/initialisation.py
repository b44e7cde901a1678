"""Weight and bias variances of the usual initialisations, and of a given model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from neuromanifold.errors import UnsupportedError

__all__ = ["Variances", "measured", "variances"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Variances:
    """Of the layers of a network, in the convention of mean-field theory.

    Attributes:
        weight: σ_w², the variance of a layer's weights times its fan-in, one per layer.
        bias: σ_b², one per layer; 0 without biases.
        widths: of the input and of all layers; channels, for convolutions.
        names: of the modules; empty if no model was read.
    """

    weight: tuple[float, ...]
    bias: tuple[float, ...]
    widths: tuple[int, ...]
    names: tuple[str, ...] = ()


def variances(
    rule: str, widths: Sequence[int], *, activation: str = "relu", kernel_entries: int = 1
) -> Variances:
    """Variances of a named initialisation.

    Rules are "pytorch" (what `nn.Linear` and convolutions begin with: uniform, σ_w² = 1/3 and
    σ_b² = 1 / (3 fan-in)), "xavier" (2 / (fan-in + fan-out) per weight), "kaiming" (gain² / fan-in,
    2 for relu) and "lecun" (1 / fan-in); the last three are without biases.

    Args:
        rule: one of the above.
        widths: of the input and of each layer; channels, for convolutions.
        activation: whose gain "kaiming" takes, as for `torch.nn.init.calculate_gain`.
        kernel_entries: of a convolution, 9 for 3 × 3; 1 for a fully connected layer.

    Raises:
        ValueError: If the rule or the activation is unknown, or there is no layer.

    Example:
        >>> variances("kaiming", [784, 100, 10]).weight
        (2.0, 2.0)
        >>> variances("pytorch", [300, 100]).bias  # 1 / 900
        (0.0011111111111111111,)
    """
    sizes = tuple(widths)
    if len(sizes) < 2 or min(*sizes, kernel_entries) < 1:
        raise ValueError(
            f"Give the widths of the input and of at least one layer, all ≥ 1, got {sizes} and "
            f"{kernel_entries} kernel entries."
        )
    layers = len(sizes) - 1
    bias = (0.0,) * layers
    if rule == "pytorch":
        weight = (1 / 3,) * layers
        bias = tuple(1 / (3 * size * kernel_entries) for size in sizes[:-1])
    elif rule == "xavier":
        # Kernel entries count in both fans, and cancel.
        weight = tuple(2 * i / (i + o) for i, o in pairwise(sizes))
    elif rule == "kaiming":
        # The gain of relu is a root that its square does not quite undo.
        weight = (round(nn.init.calculate_gain(activation) ** 2, 15),) * layers  # type: ignore[arg-type]
    elif rule == "lecun":
        weight = (1.0,) * layers
    else:
        raise ValueError(
            f"No initialisation is called {rule!r}: take 'pytorch', 'xavier', 'kaiming', 'lecun', "
            f"or numbers of your own."
        )
    return Variances(weight, bias, sizes)


def measured(model: nn.Module) -> Variances:
    """Variances of a model's weights and biases as they are, layer by layer.

    Layers are its linear and convolutional ones, in the order of `named_modules`; each must take
    what the one before gives, in number of channels, as in `nn.Sequential`.

    The moments are those about 0, which is the mean that theory assumes.

    Args:
        model: whose linear and convolutional layers stand one behind another.

    Raises:
        UnsupportedError: If there are none, or they do not follow one another.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(300, 100), nn.Tanh(), nn.Linear(100, 10))
        >>> found = measured(model)
        >>> round(found.weight[0], 2), found.widths  # PyTorch's own: 1/3
        (0.33, (300, 100, 10))
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, _LAYERS)]
    if not layers:
        raise UnsupportedError(
            f"{type(model).__name__} has no linear or convolutional layer to read variances from."
        )
    weight: list[float] = []
    bias: list[float] = []
    widths: list[int] = []
    for name, layer in layers:
        outs, ins = layer.weight.shape[0], layer.weight.shape[1] * getattr(layer, "groups", 1)
        # Flattened positions multiply channels.
        if widths and ins % widths[-1]:
            raise UnsupportedError(
                f"{name!r} takes {ins} inputs, which is no multiple of the {widths[-1]} outputs of "
                f"the layer before: theory is for layers in a row. Give their variances by hand."
            )
        widths += [outs] if widths else [ins, outs]
        with torch.no_grad():
            fan_in = math.prod(layer.weight.shape[1:])
            weight.append(fan_in * float(layer.weight.double().square().mean()))
            bias.append(0.0 if layer.bias is None else float(layer.bias.double().square().mean()))
    return Variances(tuple(weight), tuple(bias), tuple(widths), tuple(name for name, _ in layers))
