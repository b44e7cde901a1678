"""What is trained: data that needs no download, a model, a loss, and the number that is judged."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pydoc_data.topics import topics
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import neuromanifold as nm
from benchmarks.workloads import GPT
from neuromanifold.likelihoods import Likelihood

__all__ = ["PROBLEMS", "Bar", "Data", "Problem"]

DATA_SEED = 0
"""Data is the same for every seed of a contest; what changes is the start and the batches."""

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Data:
    """Inputs and targets, to train on and to test on.

    Attributes:
        train: inputs and targets, `(N, ...)` each.
        test: the same, of other samples.
        origin: where it comes from, and what pins it.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    origin: str


@dataclass(frozen=True)
class Bar:
    """What curvature is to save, at the value that AdamW ends with.

    Attributes:
        steps: at most this share of AdamW's steps.
        seconds: at most this share of AdamW's seconds.
    """

    steps: float
    seconds: float


@dataclass(frozen=True)
class Problem:
    """A model to be trained.

    Attributes:
        title: the sizes, for a reader.
        likelihood: what outputs mean.
        loss: of outputs and targets, in nats per sample, or per position of a text.
        model: made from torch's default generator.
        data: cached, so that every run has the same.
        batch_size: samples in a step.
        steps: of optimizers that do not measure curvature.
        share: of those steps, what the others have, their whole learning-rate schedule included.
        judged: name of the number that decides: "train", "test" or "accuracy".
        bar: for `nm.optim.kfac`.
        evaluated: samples, at most, of each part that an evaluation takes.
        without: contestants that cannot take part, with the reason.
        options: of the optimizers that measure curvature, where they are not the defaults.
    """

    title: str
    likelihood: Likelihood
    loss: Loss
    model: Callable[[], nn.Module]
    data: Callable[[], Data]
    batch_size: int
    steps: int
    share: float
    judged: str
    bar: Bar
    evaluated: int = 2000
    without: tuple[tuple[str, str], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Whole batches of shuffled epochs, without end."""
        inputs, targets = self.data().train
        while True:
            order = torch.randperm(len(inputs), generator=generator)
            for rows in order.split(self.batch_size):
                if len(rows) == self.batch_size:
                    yield inputs[rows], targets[rows]

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Losses on a part of both sets, and for classes of whole samples the accuracy."""
        data, found = self.data(), {}
        model.eval()
        for name, (inputs, targets) in (("train", data.train), ("test", data.test)):
            outputs, targets = model(inputs[: self.evaluated]), targets[: self.evaluated]
            found[name] = float(self.loss(outputs, targets))
            if name == "test" and self.judged == "accuracy":
                right = (outputs.argmax(1) == targets).double().mean()
                # The largest of many NaN is the first, and some samples are of that class.
                found["accuracy"] = float(right) if math.isfinite(found["test"]) else math.nan
        model.train()
        return found

    def cost(self, value: float) -> float:
        """A judged number as one where less is better; infinite if it is NaN."""
        if math.isnan(value):
            return math.inf
        return -value if self.judged == "accuracy" else value


# ---- data ----------------------------------------------------------------------------------


@cache
def digits() -> Data:
    """8×8 images of digits, scaled to [0, 1], of which a fifth is for testing."""
    source = load_digits()
    order = torch.randperm(len(source.data), generator=_seeded())
    inputs = torch.tensor(source.data, dtype=torch.float32)[order] / 16
    targets = torch.tensor(source.target)[order]
    cut = len(inputs) // 5
    return Data((inputs[cut:], targets[cut:]), (inputs[:cut], targets[:cut]), "scikit-learn digits")


CURVES_SIZE, CURVES_SIDE, CURVES_TESTED = 10_000, 28, 1_000


@cache
def curves() -> Data:
    """Images of quadratic Bézier curves through random control points, drawn by a Gaussian pen."""
    total, side = CURVES_SIZE + CURVES_TESTED, CURVES_SIDE
    points = torch.rand(total, 3, 2, generator=_seeded()) * (side - 8) + 4
    t = torch.linspace(0, 1, 40)
    weights = torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2])
    pixels = torch.arange(side, dtype=torch.float32)
    images = []
    for part in points.split(500):
        x, y = (torch.einsum("pt,npc->cnt", weights, part)[..., None] - pixels).square()
        nearest = (x[..., :, None] + y[..., None, :]).amin(dim=1)
        images.append(torch.exp(-nearest / (2 * 0.8**2)).flatten(1))
    found = torch.cat(images)
    train, test = found[:CURVES_SIZE], found[CURVES_SIZE:]
    return Data((train, train), (test, test), f"drawn from seed {DATA_SEED}")


LENGTH = 64


@cache
def text() -> Data:
    """Characters of Python's own help, in windows; the last tenth of the text is for testing."""
    whole = "".join(topics[name] for name in sorted(topics))
    characters = sorted(set(whole))
    index = {character: i for i, character in enumerate(characters)}
    tokens = torch.tensor([index[character] for character in whole])
    cut = len(tokens) * 9 // 10
    windows = tokens[:cut].unfold(0, LENGTH + 1, LENGTH // 2)
    held_out = tokens[cut:].unfold(0, LENGTH + 1, LENGTH)
    digest = hashlib.sha256(whole.encode()).hexdigest()[:16]
    return Data(
        (windows[:, :-1], windows[:, 1:]),
        (held_out[:, :-1], held_out[:, 1:]),
        f"pydoc_data.topics, {len(whole)} characters of {len(characters)} kinds, sha256 {digest}",
    )


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(DATA_SEED)


# ---- models --------------------------------------------------------------------------------


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


WIDTHS = (784, 400, 200, 100, 50, 25, 6)
CONNECTIONS = 15


def autoencoder() -> nn.Module:
    """Sigmoid units, a linear code, and at first a few connections to each unit (Martens 2010)."""
    widths = (*WIDTHS, *WIDTHS[-2::-1])
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(widths), start=1):
        layer = nn.Linear(fan_in, fan_out)
        _sparse(layer)
        layers.append(layer)
        if fan_out != WIDTHS[-1] and i < len(widths) - 1:
            layers.append(nn.Sigmoid())
    return nn.Sequential(*layers)


@torch.no_grad()
def _sparse(layer: nn.Linear) -> None:
    connected = min(CONNECTIONS, layer.in_features)
    chosen = torch.rand_like(layer.weight).argsort(dim=1)[:, :connected]
    layer.weight.zero_().scatter_(1, chosen, torch.randn(layer.out_features, connected))
    layer.bias.zero_()


def language_model() -> nn.Module:
    vocabulary = 1 + int(max(part.max() for part in (*text().train, *text().test)))
    return GPT(vocabulary, length=LENGTH, width=64, heads=4, depth=2)


def per_character(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ---- the four ------------------------------------------------------------------------------

PROBLEMS = {
    "digits-mlp": Problem(
        "digits, MLP 64-64-32-10, N=64",
        nm.Categorical(),
        functional.cross_entropy,
        perceptron,
        digits,
        batch_size=64,
        steps=22 * 20,  # 20 epochs
        share=0.18,
        judged="accuracy",
        bar=Bar(steps=0.5, seconds=1.0),
    ),
    "digits-conv": Problem(
        "digits, conv net 16-32-32, N=64",
        nm.Categorical(),
        functional.cross_entropy,
        convnet,
        digits,
        batch_size=64,
        steps=22 * 20,
        share=0.25,
        judged="accuracy",
        bar=Bar(steps=0.5, seconds=1.0),
        without=(("Muon", "torch.optim.Muon takes matrices, and there are none between layers"),),
    ),
    "curves": Problem(
        "CURVES autoencoder 784-400-200-100-50-25-6, N=250",
        nm.Bernoulli(),
        nm.Bernoulli().loss,
        autoencoder,
        curves,
        batch_size=250,
        steps=1000,
        share=0.08,
        judged="train",
        bar=Bar(steps=0.2, seconds=0.5),
        evaluated=CURVES_TESTED,
        without=(("unitwise", "the blocks of its wide units take 1.7 GB"),),
        options=(("line", True), ("kl_max", None), ("damping", 1e-4)),
    ),
    "gpt": Problem(
        "character GPT, 2 layers of width 64, T=64, N=16",
        nm.Categorical(),
        per_character,
        language_model,
        text,
        batch_size=16,
        steps=600,
        share=1.0,
        judged="test",
        bar=Bar(steps=0.75, seconds=1.0),
        evaluated=128,
        without=(("unitwise", "its blocks hold 112 numbers for each weight, too many to invert"),),
    ),
}
"""By name. The bars for steps of the language model say what "clearly ahead" means."""
