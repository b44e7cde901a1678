"""Who takes part: each is its usual self, with one learning rate to search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer

import neuromanifold as nm
from benchmarks.training.soap import SOAP
from neuromanifold.likelihoods import Likelihood

__all__ = ["CONTESTANTS", "GRID", "REFERENCE", "Contestant"]

GRID = (1.0, 10**0.5, 10**-0.5, 10.0)
"""Learning rates to search, each times the contestant's own; those that matter most come first."""

REFERENCE = "AdamW"
"""Whose final value the others are to reach."""

Build = Callable[..., list[Optimizer]]
"""`build(model, likelihood, lr, **options of the problem)`."""


@dataclass(frozen=True)
class Contestant:
    """An optimizer, or several for different parameters of one model.

    Attributes:
        lr: the middle of its learning rates.
        build: makes it.
        curvature: whether it measures the Fisher matrix; it then gets `share` of the steps.
    """

    lr: float
    build: Build
    curvature: bool = False


def adamw(model: nn.Module, _: Likelihood, lr: float) -> list[Optimizer]:
    return [AdamW(model.parameters(), lr, fused=True)]


def adam(model: nn.Module, _: Likelihood, lr: float) -> list[Optimizer]:
    return [Adam(model.parameters(), lr, fused=True)]


def sgd(model: nn.Module, _: Likelihood, lr: float) -> list[Optimizer]:
    return [SGD(model.parameters(), lr, momentum=0.9, nesterov=True, fused=True)]


def muon(model: nn.Module, _: Likelihood, lr: float) -> list[Optimizer]:
    """On the weights of linear layers but the last; all other parameters follow AdamW."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    matrices = [layer.weight for layer in layers[:-1]]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        AdamW(rest, lr, fused=True),
    ]


def soap(model: nn.Module, _: Likelihood, lr: float) -> list[Optimizer]:
    return [SOAP(model.parameters(), lr)]


def ours(
    preset: Callable[..., Optimizer],
    model: nn.Module,
    likelihood: Likelihood,
    lr: float,
    **options: Any,
) -> list[Optimizer]:
    """A preset with its defaults, but for what the problem asks for."""
    return [preset(model, likelihood, lr=lr, **options)]


CONTESTANTS = {
    "AdamW": Contestant(6e-3, adamw),
    "Adam": Contestant(6e-3, adam),
    "SGD": Contestant(0.03, sgd),
    "Muon": Contestant(6e-3, muon),
    "SOAP": Contestant(6e-3, soap),
    "kfac": Contestant(0.15, partial(ours, nm.optim.kfac), curvature=True),
    "ekfac": Contestant(0.15, partial(ours, nm.optim.ekfac), curvature=True),
    "unitwise": Contestant(0.15, partial(ours, nm.optim.unitwise), curvature=True),
    "quasidiagonal": Contestant(0.15, partial(ours, nm.optim.quasidiagonal), curvature=True),
    "relative": Contestant(0.05, partial(ours, nm.optim.relative), curvature=True),
    "meanfield": Contestant(0.15, partial(ours, nm.optim.meanfield), curvature=True),
    "projected": Contestant(0.15, partial(ours, nm.optim.projected_kfac), curvature=True),
    "diagonal": Contestant(0.15, partial(ours, nm.optim.diagonal), curvature=True),
}
