"""The demonstration: two small networks trained on handwritten digits, then measured.

The digits are the 1,797 real images of 8×8 pixels that come with scikit-learn. The networks are
small enough (under 4,000 parameters) for the exact Fisher matrix, which shows what each
approximation of it loses.
"""

from __future__ import annotations

import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuromanifold._extras import require_extra
from neuromanifold._progress import reporting
from neuromanifold.cli.output import note
from neuromanifold.likelihoods import Categorical
from neuromanifold.report import collect

__all__ = ["MODELS", "Split", "analyze_digits", "conv_net", "load_split", "mlp", "train"]

LEARNING_RATE = 3e-3
BATCH_SIZE = 64
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Split:
    """Images `(N, 1, 8, 8)` with grey values in [0, 1], and labels `(N,)`."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_split(generator: torch.Generator) -> Split:
    """scikit-learn's digits, split at random into training and test images."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=generator)
    held_out = round(TEST_SHARE * len(order))
    test, train = order[:held_out], order[held_out:]
    return Split((images[train], labels[train]), (images[test], labels[test]))


def mlp() -> nn.Sequential:
    """64 pixels, two hidden layers of 32 units, 10 classes: 3,466 parameters."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            hidden1=nn.Linear(64, 32),
            relu1=nn.ReLU(),
            hidden2=nn.Linear(32, 32),
            relu2=nn.ReLU(),
            head=nn.Linear(32, 10),
        )
    )


def conv_net() -> nn.Sequential:
    """Two convolutions, the second with stride 2, and a linear head: 3,818 parameters."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 8, 3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(8, 16, 3, stride=2, padding=1),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            head=nn.Linear(16 * 4 * 4, 10),
        )
    )


MODELS: dict[str, Callable[[], nn.Sequential]] = {"conv net": conv_net, "MLP": mlp}
"""Name of each network to the function that builds it."""


def train(
    model: nn.Module,
    split: Split,
    *,
    epochs: int,
    generator: torch.Generator,
    progress: bool = False,
) -> dict[str, Any]:
    """Train with Adam on minibatches; what happened goes into the report.

    Args:
        model: images `(N, 1, 8, 8)` to logits `(N, 10)`; trained in place.
        split: where the images come from.
        epochs: passes over the training images.
        generator: draws the minibatches.
        progress: show a bar on stderr.

    Returns:
        Optimizer, epochs, mean loss per epoch in nats, accuracies in [0, 1], and seconds.
    """
    images, labels = split.train
    likelihood = Categorical()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    losses, began = [], time.perf_counter()
    with reporting(progress, "epochs") as report:
        for epoch in range(1, epochs + 1):
            total = 0.0
            for rows in torch.randperm(len(labels), generator=generator).split(BATCH_SIZE):
                loss = likelihood.loss(model(images[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += len(rows) * loss.item()
            losses.append(total / len(labels))
            if report is not None:
                report(epoch, epochs)
    return {
        "optimizer": f"Adam(lr={LEARNING_RATE})",
        "epochs": epochs,
        "train_accuracy": accuracy(model, *split.train),
        "test_accuracy": accuracy(model, *split.test),
        "loss": losses,
        "seconds": time.perf_counter() - began,
    }


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose most probable class is the right one."""
    return (model(images).argmax(dim=1) == labels).float().mean().item()


def analyze_digits(*, seed: int, epochs: int, samples: int) -> list[dict[str, Any]]:
    """Train each of `MODELS` and measure its Fisher information on training images.

    Args:
        seed: of the split, the initial weights and the minibatches.
        epochs: passes over the training images.
        samples: how many training images to measure on.

    Returns:
        One analysis per model, as `neuromanifold.report.collect` makes them.

    Raises:
        UnsupportedError: If scikit-learn is not installed.
    """
    require_extra("demo", "sklearn")
    generator = torch.Generator().manual_seed(seed)
    split = load_split(generator)
    images, labels = split.train
    progress, analyses = sys.stderr.isatty(), []
    for name, build in MODELS.items():
        with torch.random.fork_rng():  # modules draw their initial weights from the global state
            torch.manual_seed(seed)
            model = build()
        note(f"Training the {name} on {len(labels):,} images")
        training = train(model, split, epochs=epochs, generator=generator, progress=progress)
        note(f"Measuring the Fisher information of the {name}")
        # In float64, so that small eigenvalues are told from rounding.
        analysis = collect(
            model.double().eval(),
            Categorical(),
            (images[:samples].double(), labels[:samples]),
            name=name,
            generator=generator,
            progress=progress,
        )
        analyses.append({**analysis, "training": training})
    return analyses
