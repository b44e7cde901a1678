"""What optimizers share that solve for all their parameters at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["OneGroup"]

OWN = "exact"
"""Key of a state dict."""


class OneGroup(torch.optim.Optimizer, ABC):
    """One group of parameters, the last step of each, and steps that were skipped.

    Attributes:
        skipped: steps that were left out because something was NaN or infinite.
    """

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        maximize: bool,
        differentiable: bool,
    ) -> None:
        if maximize:
            raise ValueError(
                "maximize=True is not supported: the Fisher information is curvature of a loss "
                "that falls. Minimise the negative of what you maximise."
            )
        if differentiable:
            raise ValueError(
                "differentiable=True is not supported: the curvature is measured apart from the "
                "graph of the loss. Leave it out."
            )
        if not defaults["lr"] >= 0:
            raise ValueError(f"lr must be at least 0, got {defaults['lr']!r}.")
        if not 0 <= defaults["momentum"] < 1:
            raise ValueError(f"momentum must be in [0, 1), got {defaults['momentum']!r}.")
        self.skipped = 0
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The first group; a second one is refused."""
        if self.param_groups:
            raise ValueError(
                f"{type(self).__name__} takes one group of parameters: a single linear system "
                f"gives the step of all of them. Leave parameters out by requires_grad_(False), or "
                f"use nm.optim.kfac, which takes groups."
            )
        super().add_param_group(param_group)

    def _last_step(self, p: Tensor) -> Tensor:
        """The last step, for each unit of lr; zero before the first."""
        return self.state[p].get("last", torch.zeros_like(p))

    @abstractmethod
    def _own_state(self) -> dict[str, Any]:
        """Tensors and numbers beside those of the parameters."""

    @abstractmethod
    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        """The inverse."""

    def state_dict(self) -> dict[str, Any]:
        """That of any optimizer, and clocks and damping; plain tensors and numbers."""
        return {**super().state_dict(), OWN: {"skipped": self.skipped, **self._own_state()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`: training goes on as if it had not stopped."""
        super().load_state_dict({k: v for k, v in state_dict.items() if k != OWN})
        own = state_dict.get(OWN)
        if own is not None:  # some checkpointing tools leave it out
            self.skipped = own["skipped"]
            self._load_own_state(own)
