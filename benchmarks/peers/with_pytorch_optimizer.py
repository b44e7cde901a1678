"""pytorch-optimizer: a collection of optimizers, on their defaults."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.optim import Optimizer

from benchmarks.peers._peer import Peer, on
from benchmarks.peers._steps import LR, stepping

__all__ = ["PYTORCH_OPTIMIZER"]


def optimizers(model: nn.Module, *, name: str) -> list[Optimizer]:
    """One for all parameters."""
    import pytorch_optimizer

    return [getattr(pytorch_optimizer, name)(model.parameters(), lr=LR)]


NAMES = {"SOAP": "SOAP", "Shampoo": "ScalableShampoo", "PSGD Kron": "Kron"}

PYTORCH_OPTIMIZER = Peer(
    "pytorch-optimizer",
    "pytorch-optimizer",
    on(
        "W1 W2 W3",
        {
            f"step, {title}": stepping(partial(optimizers, name=name))
            for title, name in NAMES.items()
        },
    ),
)
"""Shampoo refreshes its roots every 1,000 steps, so a short measurement of it leaves them out."""
