"""A training step of another library's optimizer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from benchmarks.peers._peer import Prepare, copied
from benchmarks.workloads import Batch

__all__ = ["LR", "stepping"]

LR = 1e-5
"""So small that weights stay where they are, however long one measures."""


def stepping(build: Callable[[nn.Module], list[Optimizer]]) -> Prepare:
    """Forward, backward and a step with the optimizers that `build` makes; gives the model."""

    def prepare(batch: Batch, _: Tensor) -> Callable[[], nn.Module]:
        own = copied(batch)
        model, targets = own.model.train(), own.targets.flatten()
        optimizers = build(model)

        def call() -> nn.Module:
            for optimizer in optimizers:
                optimizer.zero_grad()
            functional.cross_entropy(model(own.inputs).flatten(0, -2), targets).backward()
            for optimizer in optimizers:
                optimizer.step()
            return model

        return call

    return prepare
