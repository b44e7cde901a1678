"""Optimizers by name, each with a learning rate to begin with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from neuromanifold import optim
from neuromanifold.likelihoods import Likelihood

__all__ = ["OPTIMIZERS", "Entry", "parse_entry"]

Preset = Callable[..., torch.optim.Optimizer]

NATURAL: dict[str, Preset] = {
    "kfac": optim.kfac,
    "projected": optim.projected_kfac,
    "ekfac": optim.ekfac,
    "unitwise": optim.unitwise,
    "quasidiagonal": optim.quasidiagonal,
    "diagonal": optim.diagonal,
    "relative": optim.relative,
    "meanfield": optim.meanfield,
    "gram": optim.gram,
    "implicit": optim.implicit,
}
"""Presets of `nm.optim`, with their own learning rates."""

OTHERS: dict[str, float] = {"adamw": 1e-3, "sgd": 0.01}
"""Optimizers of torch, and their learning rates if none is given."""

OPTIMIZERS = (*NATURAL, *OTHERS)
"""Every name that there is."""

SGD_MOMENTUM = 0.9


@dataclass(frozen=True)
class Entry:
    """An optimizer that takes part.

    Attributes:
        name: one of `OPTIMIZERS`.
        lr: None for its default.
    """

    name: str
    lr: float | None = None

    @property
    def label(self) -> str:
        """The name, with the learning rate if that was given."""
        return self.name if self.lr is None else f"{self.name}:{self.lr:g}"

    def build(
        self, model: nn.Module, likelihood: Likelihood, *, seed: int, damping: float | None
    ) -> torch.optim.Optimizer:
        """The optimizer of a model.

        There is no weight decay, so that all minimise the same loss.

        Args:
            model: that is trained.
            likelihood: what its outputs mean.
            seed: of the labels that natural gradients draw.
            damping: of natural gradients, in nats/parameter²; None for the default.
        """
        if self.name in NATURAL:
            generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
            options: dict[str, Any] = {"generator": generator}
            if self.name not in ("gram", "implicit"):  # which have none
                options["weight_decay"] = 0.0
            if self.lr is not None:
                options["lr"] = self.lr
            if damping is not None:
                options["damping"] = damping
            return NATURAL[self.name](model, likelihood, **options)
        lr = OTHERS[self.name] if self.lr is None else self.lr
        if self.name == "sgd":
            return torch.optim.SGD(model.parameters(), lr=lr, momentum=SGD_MOMENTUM)
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


def parse_entry(text: str, lr: float | None = None) -> Entry:
    """`NAME` or `NAME:LR`.

    Args:
        text: as on the command line.
        lr: where the text has none.

    Raises:
        ValueError: If there is no such optimizer, or the learning rate is not a positive number.

    Example:
        >>> parse_entry("kfac"), parse_entry("adamw:0.003").label
        (Entry(name='kfac', lr=None), 'adamw:0.003')
    """
    name, colon, rate = text.partition(":")
    if name not in OPTIMIZERS:
        raise ValueError(f"There is no optimizer {name!r}. There are: {', '.join(OPTIMIZERS)}.")
    try:
        lr = float(rate) if colon else lr
    except ValueError:
        lr = float("nan")
    if lr is not None and not 0 < lr < float("inf"):
        raise ValueError(
            f"A learning rate is a positive number, as in {name}:0.1; got {rate or lr!r}."
        )
    return Entry(name, lr)
