"""The quadratic model of the loss along a few directions, with the exact Fisher matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from neuromanifold._typing import Params
from neuromanifold.capture import Plan, differentiable_twice, functional_model
from neuromanifold.structures import Source

__all__ = ["Quadratic", "fisher_products"]


@dataclass(frozen=True)
class Quadratic:
    """`M(c) = bᵀc + ½ cᵀ A c` for steps `Σ_i c_i d_i`.

    Attributes:
        slopes: `b (R,)`, the gradient along each direction.
        curvatures: `A (R, R)`, `d_iᵀ (F + damping) d_j`.
    """

    slopes: Tensor
    curvatures: Tensor

    def minimum(self, most: float | None = None) -> Tensor:
        """Coefficients `(R,)`; of directions that are parallel or zero, the shortest.

        Args:
            most: nats; where `½ cᵀ A c` is over it, the step is shortened to that.
        """
        c = -torch.linalg.pinv(self.curvatures, hermitian=True) @ self.slopes
        if most is None:
            return c
        kl = 0.5 * c @ self.curvatures @ c
        return c * (most / kl.clamp(min=torch.finfo(kl.dtype).tiny)).sqrt().clamp(max=1)

    def __call__(self, coefficients: Tensor) -> Tensor:
        """By how much the loss changes, in nats."""
        linear = self.slopes @ coefficients
        return linear + 0.5 * coefficients @ self.curvatures @ coefficients


def fisher_products(source: Source, plan: Plan, directions: Sequence[Params]) -> Tensor:
    """`(R, R)` inner products `d_iᵀ F d_j` on a batch: one forward-mode pass for each direction.

    A parameter that a direction lacks stays where it is.
    """
    function = functional_model(plan, source.forward, source.likelihood.canonical)
    names = list(directions[0])
    params = {name: plan.parameters[name].detach() for name in names}
    tangents = {
        name: torch.stack([direction[name] for direction in directions]).to(params[name].dtype)
        for name in names
    }
    total = torch.zeros(len(directions), len(directions), dtype=source.dtype, device=source.device)
    for batch in source.data:
        of_params = partial(_with_inputs, function, batch.inputs)
        with torch.no_grad(), differentiable_twice(plan.model):
            outputs = of_params(params)
            pushed = vmap(partial(_pushed, of_params, params))(tangents)
        targets = source.targets(outputs, batch)
        source.count(outputs, targets)
        product = source.likelihood.fisher_product(outputs, pushed)
        product = source.likelihood.mask_cotangent(product, outputs, targets)
        total += pushed.flatten(1).to(total.dtype) @ product.flatten(1).to(total.dtype).T
    return total / source.normaliser


def _pushed(function: Callable[[Params], Tensor], params: Params, tangent: Params) -> Tensor:
    pushed: Tensor = jvp(function, (params,), (tangent,))[1]
    return pushed


def _with_inputs(
    function: Callable[[Params, Any], Tensor], inputs: Any, params: Mapping[str, Tensor]
) -> Tensor:
    return function(dict(params), inputs)
