"""SOAP, a reference implementation: Adam in the eigenbasis of Shampoo's preconditioner.

Vyas et al., arXiv 2409.11321, algorithms 3 and 4. A tensor of more than two axes is taken as the
matrix of its first axis by all others; one of fewer follows Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["SOAP"]

State = dict[str, Any]
SIDES = ("rows", "columns")


class SOAP(torch.optim.Optimizer):
    """Adam on rotated gradients.

    Args:
        params: to train.
        lr: as for Adam.
        betas: decay of the mean gradient, and of second moments and factors.
        eps: added to the root of second moments.
        period: steps between two refreshes of the bases, each one step of orthogonal iteration.
        widest: a side of a matrix that is wider keeps its own axes.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        period: int = 10,
        widest: int = 10_000,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "period": period, "widest": widest}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; the first only measures, as in the paper's own runs."""
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    _step(p, self.state[p], group)


def _step(p: Tensor, state: State, group: dict[str, Any]) -> None:
    gradient = p.grad
    assert gradient is not None
    gradient = gradient.flatten(1) if p.ndim > 1 else gradient
    beta1, beta2 = group["betas"]
    if not state:
        state["step"], state["mean"] = 0, torch.zeros_like(gradient)
        state["squares"] = torch.zeros_like(gradient)
        if gradient.ndim == 2:
            for side, width in zip(SIDES, gradient.shape, strict=True):
                if width <= group["widest"]:
                    state[side] = gradient.new_zeros(width, width)
            _absorb(state, gradient, beta2)
            for side in SIDES:
                if side in state:
                    state[f"{side} basis"] = torch.linalg.eigh(state[side])[1].flip(1)
            return
    state["step"] += 1
    state["mean"].lerp_(gradient, 1 - beta1)
    rotated = _rotate(state, gradient)
    state["squares"].lerp_(rotated.square(), 1 - beta2)
    bias1, bias2 = (1 - beta ** state["step"] for beta in (beta1, beta2))
    root = (state["squares"] / bias2).sqrt_().add_(group["eps"])
    direction = _rotate_back(state, _rotate(state, state["mean"]) / bias1 / root)
    p.add_(direction.view_as(p), alpha=-group["lr"])
    if gradient.ndim == 2:
        _absorb(state, gradient, beta2)
        if state["step"] % group["period"] == 0:
            _refresh(state)


def _absorb(state: State, gradient: Tensor, beta2: float) -> None:
    if "rows" in state:
        state["rows"].lerp_(gradient @ gradient.T, 1 - beta2)
    if "columns" in state:
        state["columns"].lerp_(gradient.T @ gradient, 1 - beta2)


def _rotate(state: State, x: Tensor) -> Tensor:
    if "rows basis" in state:
        x = state["rows basis"].T @ x
    return x @ state["columns basis"] if "columns basis" in state else x


def _rotate_back(state: State, x: Tensor) -> Tensor:
    if "rows basis" in state:
        x = state["rows basis"] @ x
    return x @ state["columns basis"].T if "columns basis" in state else x


def _refresh(state: State) -> None:
    """One step of orthogonal iteration; columns stay sorted, and second moments follow them."""
    for axis, side in enumerate(SIDES):
        if side not in state:
            continue
        product = state[side] @ state[f"{side} basis"]
        values = (state[f"{side} basis"] * product).sum(dim=0)
        order = values.argsort(descending=True)
        state["squares"] = state["squares"].index_select(axis, order)
        state[f"{side} basis"] = torch.linalg.qr(product[:, order])[0]
