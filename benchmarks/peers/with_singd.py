"""singd: Kronecker factors kept as roots of inverses, without inversions, on its defaults."""

from __future__ import annotations

import warnings
from functools import partial

from torch import nn
from torch.optim import AdamW, Optimizer

from benchmarks.peers._peer import Peer, factored, on
from benchmarks.peers._steps import LR, stepping

__all__ = ["SINGD"]


def optimizers(model: nn.Module, *, kfac: bool = False) -> list[Optimizer]:
    """On the layers that it supports, AdamW on the rest; `kfac` chooses its variant IKFAC."""
    from singd.optim.optimizer import SINGD

    chosen = [p for layer in factored(model).values() for p in layer.parameters()]
    rest = [p for p in model.parameters() if all(p is not q for q in chosen)]
    positions = any(isinstance(m, nn.Embedding) for m in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the parameters that AdamW trains
        own = SINGD(
            model,
            params=chosen,
            lr=LR,
            loss_average="batch+sequence" if positions else "batch",
            kfac_like=kfac,
        )
    return [own, AdamW(rest, LR, fused=True)] if rest else [own]


SINGD = Peer(
    "singd",
    "singd",
    on(
        "W1 W2 W3",
        {
            "step, SINGD": stepping(optimizers),
            "step, IKFAC": stepping(partial(optimizers, kfac=True)),
        },
    ),
)
