"""The networks and batches that every benchmark shares, as data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["DAMPING", "WORKLOADS", "Batch", "Workload", "direction", "forward_backward"]

DAMPING = 1e-2
"""Of every damped solve, in nats/parameter²."""


@dataclass(frozen=True)
class Batch:
    """A model with one batch of random data.

    Attributes:
        model: maps `inputs` to logits (N, *T, C).
        inputs: (N, ...).
        targets: class indices (N, *T).
        shared: whether several libraries use it, so that none may wrap, hook or write to it.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    shared: bool = True

    def double(self) -> Batch:
        """A copy in float64, for checks."""
        inputs = self.inputs.double() if self.inputs.is_floating_point() else self.inputs
        return Batch(copy.deepcopy(self.model).double(), inputs, self.targets)

    def to(self, device: str | torch.device) -> Batch:
        """The same on a device; the model itself moves."""
        return replace(
            self,
            model=self.model.to(device),
            inputs=self.inputs.to(device),
            targets=self.targets.to(device),
        )

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.inputs.device


@dataclass(frozen=True)
class Workload:
    """A named way to build a `Batch`.

    Attributes:
        title: the sizes, for a reader.
        build: makes the model and the data; draws from torch's default generator.
    """

    title: str
    build: Callable[[], Batch]


def mlp() -> Batch:
    model = nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )
    return Batch(model, torch.randn(512, 784), torch.randint(10, (512,)))


def convnet() -> Batch:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    return Batch(model, torch.randn(128, 3, 32, 32), torch.randint(10, (128,)))


class SelfAttention(nn.Module):
    """Causal multi-head attention with separate projections, through the fused kernel."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, T, width) to (N, T, width)."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Pre-norm attention and a GELU perceptron of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.perceptron_norm = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, T, width) to (N, T, width)."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.perceptron(self.perceptron_norm(x))


class GPT(nn.Module):
    """A decoder-only transformer with learned positions and an untied head."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token indices (N, T) to logits (N, T, vocabulary)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(positions)
        return self.head(self.norm(self.blocks(x)))


def gpt() -> Batch:
    model = GPT(vocabulary=256, length=64, width=128, heads=4, depth=4)
    text = torch.randint(256, (16, 65))
    return Batch(model, text[:, :-1], text[:, 1:])


class Residual(nn.Module):
    """Two 3×3 convolutions with batch norm, added to the input; a 1×1 one where shapes differ."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to (N, out, H / stride, W / stride)."""
        return functional.relu(self.body(x) + self.shortcut(x))


def resnet18() -> Batch:
    """ResNet-18 as for CIFAR: no pooling, and no stride in the first layer (arXiv 1512.03385)."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
    ]
    channels = 64
    for out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Residual(channels, out, stride), Residual(out, out, 1)]
        channels = out
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    return Batch(model.eval(), torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))


WORKLOADS = {
    "W1": Workload("MLP 784-512-512-10, N=512", mlp),
    "W2": Workload("conv net 3×32×32 → 32-64-128, N=128", convnet),
    "W3": Workload("GPT 4 layers, width 128, T=64, N=16", gpt),
    "W4": Workload("ResNet-18 for 32×32, N=32, batch norm as in evaluation", resnet18),
}


def direction(batch: Batch) -> Tensor:
    """A vector to multiply or solve for, flat (P,), the same for everyone."""
    num_parameters = sum(p.numel() for p in batch.model.parameters())
    v = torch.randn(num_parameters, generator=torch.Generator().manual_seed(1))
    return v.to(batch.device)


def forward_backward(batch: Batch) -> None:
    """The unit of every ratio: forward, mean cross-entropy, backward into `.grad`."""
    logits = batch.model(batch.inputs)
    functional.cross_entropy(logits.flatten(0, -2), batch.targets.flatten()).backward()
    batch.model.zero_grad(set_to_none=True)
