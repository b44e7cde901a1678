"""AdamW for the parameters that do not follow the curvature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

__all__ = ["adamw_step"]


def adamw_step(
    params: list[Tensor],
    gradients: list[Tensor],
    states: list[dict[str, Any]],
    *,
    lr: float,
    weight_decay: float,
    fine: Tensor,
) -> None:
    """One step in place, if `fine` is true on the device; begins the state where there is none.

    Source: Loshchilov and Hutter, arXiv 1711.05101, by the fused kernel of torch.
    """
    for p, state in zip(params, states, strict=True):
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
    adamw(
        params,
        gradients,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        found_inf=(~fine).float(),
        amsgrad=False,
        beta1=0.9,
        beta2=0.999,
        lr=lr,
        weight_decay=weight_decay,
        eps=1e-8,
        maximize=False,
    )
