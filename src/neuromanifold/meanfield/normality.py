"""How far what units compute is from Gaussian, which the explicit natural gradient takes it for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from neuromanifold._estimate import plain
from neuromanifold.capture import Data, Forward, buffers_kept, call_model
from neuromanifold.errors import UnsupportedError

__all__ = ["Gaussianity", "LayerGaussianity", "gaussianity"]

FAR = 1.0
"""Excess kurtosis or skewness of the median unit from which on a layer is far from Gaussian: a
uniform distribution has −1.2 and 0, an exponential one 6 and 2."""


@dataclass(frozen=True, eq=False)
class LayerGaussianity:
    """Pre-activations of a layer over the data, unit by unit; 0 is Gaussian.

    Attributes:
        name: of the module.
        skewness: `E v³` of the standardised pre-activation v, `(O,)`; NaN for one that is constant.
        excess: `E v⁴ − 3`, `(O,)`.
    """

    name: str
    skewness: Tensor
    excess: Tensor

    @property
    def median_skewness(self) -> float:
        """Of the absolute values, over units that vary; 0 if there are none."""
        return _median(self.skewness)

    @property
    def median_excess(self) -> float:
        """Of the absolute values, over units that vary; 0 if there are none."""
        return _median(self.excess)

    @property
    def is_far(self) -> bool:
        """Whether half of the units are further from Gaussian than 1, in one of the two."""
        return max(self.median_skewness, self.median_excess) > FAR


@dataclass(frozen=True, eq=False)
class Gaussianity:
    """All layers; `print` shows a table.

    Attributes:
        layers: in the order of the model.
        num_samples: N.
    """

    layers: tuple[LayerGaussianity, ...]
    num_samples: int

    @property
    def far(self) -> tuple[str, ...]:
        """Names of the layers that are far from Gaussian."""
        return tuple(layer.name for layer in self.layers if layer.is_far)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; what is NaN is None."""
        return {
            "num_samples": self.num_samples,
            "layers": [
                plain(
                    {
                        "name": layer.name,
                        "skewness": layer.skewness,
                        "excess": layer.excess,
                        "median_skewness": layer.median_skewness,
                        "median_excess": layer.median_excess,
                        "far": layer.is_far,
                    }
                )
                for layer in self.layers
            ],
        }

    def __str__(self) -> str:
        rows = [("layer", "units", "|skewness|", "|excess kurtosis|", "")]
        for layer in self.layers:
            numbers = f"{layer.median_skewness:.2f}", f"{layer.median_excess:.2f}"
            units = f"{len(layer.excess):,}"
            rows.append((layer.name or "–", units, *numbers, "far" if layer.is_far else ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        caption = f"Pre-activations over N = {self.num_samples:,} samples, median over units"
        return "\n".join([caption, "", *table])


def gaussianity(model: nn.Module, data: Any, *, forward: Forward | None = None) -> Gaussianity:
    """Look at the pre-activations of all linear and convolutional layers.

    `nm.MeanField` and `nm.optim.meanfield` take the inputs of a layer for Gaussian. Sums of many
    weakly dependent inputs nearly are; sparse ones, or single large ones, are not. Positions of a
    sample count as samples.

    Args:
        model: runs in the mode it has; nothing of it is changed.
        data: inputs, with or without targets, as for `nm.fisher`; they are read twice.
        forward: `forward(model, inputs)`, if the model is not called the usual way.

    Returns:
        Skewness and excess kurtosis of every unit, and which layers are far from Gaussian.

    Raises:
        UnsupportedError: If there are no such layers, or the data can be read only once.

    Example:
        >>> import torch, neuromanifold as nm
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(50, 20), torch.nn.Tanh(), torch.nn.Linear(20, 2)
        ... )
        >>> x = torch.randn(500, 50, generator=torch.Generator().manual_seed(0))
        >>> nm.meanfield.gaussianity(net, x).far
        ()
    """
    layers: dict[nn.Module, str] = {
        m: name for name, m in model.named_modules() if isinstance(m, (nn.Linear, _ConvNd))
    }
    if not layers:
        raise UnsupportedError(
            f"{type(model).__name__} has no nn.Linear and no convolution, whose pre-activations "
            f"could be looked at."
        )
    batches = Data(data, model)
    batches.require_repeatable("A look at pre-activations")
    forward = call_model if forward is None else forward
    first: dict[nn.Module, list[Tensor]] = {}
    with _outputs_of(layers, first, powers=(0, 1)):
        num_samples = _run(model, batches, forward)
    means = {module: _mean(sums) for module, sums in first.items()}
    second: dict[nn.Module, list[Tensor]] = {}
    with _outputs_of(layers, second, powers=(0, 2, 3, 4), means=means):
        _run(model, batches, forward)
    found = [_layer(layers[module], second[module]) for module in layers if module in second]
    return Gaussianity(tuple(found), num_samples)


def _run(model: nn.Module, batches: Data, forward: Forward) -> int:
    total = 0
    with torch.no_grad(), buffers_kept(model):
        for batch in batches:
            forward(model, batch.inputs)
            total += batch.num_samples
    return total


@contextmanager
def _outputs_of(
    layers: dict[nn.Module, str],
    sums: dict[nn.Module, list[Tensor]],
    *,
    powers: tuple[int, ...],
    means: dict[nn.Module, Tensor] | None = None,
) -> Iterator[None]:
    """Sum powers of pre-activations, less their means, over samples and positions, by unit."""

    def hook(module: nn.Module, _: Any, output: Tensor) -> None:
        axis = -1 if isinstance(module, nn.Linear) else 1
        u = output.detach().movedim(axis, -1).flatten(0, -2).double()
        if means is not None:
            u = u - means[module]
        found = [(u**power).sum(dim=0) for power in powers]
        known = sums.get(module)
        sums[module] = (
            found if known is None else [a + b for a, b in zip(known, found, strict=True)]
        )

    with ExitStack() as stack:
        for module in layers:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def _mean(sums: list[Tensor]) -> Tensor:
    count, total = sums
    return total / count


def _layer(name: str, sums: list[Tensor]) -> LayerGaussianity:
    count, *moments = sums
    variance, third, fourth = (moment / count for moment in moments)
    known = torch.where(variance > 0, variance, torch.nan)
    return LayerGaussianity(name, third / known**1.5, fourth / known.square() - 3)


def _median(values: Tensor) -> float:
    known = values[~values.isnan()].abs()
    return float(known.median()) if len(known) else 0.0
