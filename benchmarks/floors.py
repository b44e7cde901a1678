"""Floors: the fewest operations in matrix products that a quantity takes, whoever computes it.

Four numbers of a model and batch make them up: operations of the forward pass, of gradients with
respect to inputs of layers, of gradients with respect to weights, and of each layer's factors. They
leave out what is not a matrix product, fused attention on CPUs, and every access to memory; so real
programs stay above.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.workloads import Batch, forward_backward

__all__ = [
    "Counts",
    "Floor",
    "counts",
    "diagonal",
    "error_bars",
    "exact_diagonal",
    "first_product",
    "gram",
    "kept_product",
    "kronecker",
    "operations",
    "product",
    "quasidiagonal",
]


@dataclass(frozen=True)
class Layer:
    """A Linear or Conv2d layer at work.

    Attributes:
        samples: N.
        positions: T, that its weight is used at in a sample.
        fan_in: I, without a bias.
        fan_out: O.
    """

    samples: int
    positions: int
    fan_in: int
    fan_out: int

    @property
    def gradients(self) -> int:
        """Operations of an inner product with the gradient of every sample."""
        return 2 * self.samples * self.fan_in * self.fan_out

    @property
    def forward(self) -> int:
        """Operations; as many as of the gradient with respect to the weight."""
        return 2 * self.samples * self.positions * self.fan_in * self.fan_out


@dataclass(frozen=True)
class Counts:
    """Operations, two for a multiplication with an addition.

    Attributes:
        forward: of the forward pass.
        inputs: of the gradients with respect to inputs of layers.
        weights: of the gradients with respect to weights.
        layers: every Linear and Conv2d.
        classes: C.
    """

    forward: int
    inputs: int
    weights: int
    layers: tuple[Layer, ...]
    classes: int

    @property
    def unit(self) -> int:
        """Forward and backward."""
        return self.forward + self.inputs + self.weights


Floor = Callable[[Counts], int]
"""From the counts of a model and batch to the operations of a quantity."""


def operations(task: Callable[[], object]) -> int:
    """Of all matrix products and convolutions in a call."""
    with FlopCounterMode(display=False) as counter:
        task()
    return int(counter.get_total_flops())


def counts(batch: Batch) -> Counts:
    """Count on a batch."""
    layers: list[Layer] = []
    handles = [
        module.register_forward_hook(partial(_note, layers))
        for module in batch.model.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    with torch.no_grad():
        outputs = batch.model(batch.inputs)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        forward = operations(lambda: batch.model(batch.inputs))
    weights = sum(layer.forward for layer in layers)
    inputs = operations(lambda: forward_backward(batch)) - forward - weights
    return Counts(forward, inputs, weights, tuple(layers), outputs.shape[-1])


def _note(layers: list[Layer], layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    fan_out = len(weight)
    samples = len(output)
    positions = output.numel() // (samples * fan_out)
    layers.append(Layer(samples, positions, weight[0].numel(), fan_out))


# --- quantities --------------------------------------------------------------------------------


def diagonal(c: Counts) -> int:
    """Forward, back, and products of squares, or per-sample gradients: as much as a gradient."""
    return c.forward + c.inputs + c.weights


def quasidiagonal(c: Counts) -> int:
    """A product more where T = 1; elsewhere it is a sum of per-sample gradients."""
    return diagonal(c) + sum(x.forward for x in c.layers if x.positions == 1)


def exact_diagonal(c: Counts) -> int:
    """C − 1 columns go back; where T = 1 their squares are added before the product."""
    columns = c.classes - 1
    weights = sum(x.forward * (1 if x.positions == 1 else columns) for x in c.layers)
    return c.forward + columns * c.inputs + weights


def error_bars(c: Counts) -> int:
    """Where T = 1, fourth powers of inputs take a product as well; else both share gradients."""
    fourth = sum(x.forward for x in c.layers if x.positions == 1)
    return exact_diagonal(c) + fourth


def first_product(c: Counts) -> int:
    """Forward, and a product."""
    return c.forward + product(c)


def product(c: Counts) -> int:
    """Forward mode takes a product of every weight's tangent, and one of every input's."""
    return 2 * (c.weights + c.inputs)


def kept_product(c: Counts) -> int:
    """Inner products with the kept gradients, and their sum, by factors or whole gradients."""
    return 2 * sum(min(x.forward, x.gradients) for x in c.layers)


def kronecker(c: Counts) -> int:
    """Forward, back, and one triangle of both factors of each layer."""
    factors = sum(
        x.samples * x.positions * (n * (n + 1)) for x in c.layers for n in (x.fan_in + 1, x.fan_out)
    )
    return c.forward + c.inputs + factors


def gram(c: Counts) -> int:
    """Forward, back, and one triangle of `A Aᵀ ∘ G Gᵀ` of each layer."""
    triangles = sum(
        (x.samples * x.positions) * (x.samples * x.positions + 1) * (x.fan_in + x.fan_out)
        for x in c.layers
    )
    return c.forward + c.inputs + triangles
