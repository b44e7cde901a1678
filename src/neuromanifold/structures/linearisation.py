"""Products with the Jacobian of a model's outputs and its transpose, one vector at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from neuromanifold._typing import Params
from neuromanifold.capture.curvature import OfParams
from neuromanifold.capture.plain import Replacing
from neuromanifold.structures.linear_maps import ALL, LAYERS

__all__ = ["Linearisation", "pushed_once"]


class Linearisation:
    """`J v` and `Jᵀ u` from graphs that are kept, without running the model again.

    `J v` is the derivative of `u ↦ Jᵀ u`, by reverse mode: it takes no forward mode, and the
    products of a forward pass are not done again.

    Attributes:
        outputs: `(N, *K)`, detached.
    """

    def __init__(self, of_params: OfParams, params: Params) -> None:
        self._leaves = _leaves(params)
        with torch.enable_grad(), Replacing(ALL):
            self._outputs = of_params(self._leaves)
            self._cotangent = torch.zeros_like(self._outputs, requires_grad=True)
            pulled = _pull(self._outputs, self._leaves, self._cotangent, create_graph=True)
        self.outputs = self._outputs.detach()
        self._pulled = {name: value for name, value in pulled.items() if value.requires_grad}

    def push(self, v: Params) -> Tensor:
        """`J v`, like the outputs."""
        values, directions = list(self._pulled.values()), [v[name] for name in self._pulled]
        with Replacing(ALL):  # for layers that run again, where the model keeps checkpoints
            return torch.autograd.grad(values, self._cotangent, directions, retain_graph=True)[0]

    def pull(self, u: Tensor) -> Params:
        """`Jᵀ u`, by name."""
        with Replacing(ALL):
            return _pull(self._outputs, self._leaves, u, retain_graph=True)


def pushed_once(
    of_params: OfParams, params: Params, v: Params
) -> tuple[Tensor, Tensor, Callable[[Tensor], Params]]:
    """The outputs, `J v`, and a function that gives `Jᵀ u` once, from one pass of dual numbers.

    Raises:
        NotImplementedError: If an operator has no forward mode.
    """
    leaves = _leaves(params)
    with torch.enable_grad(), forward_ad.dual_level(), Replacing(LAYERS):
        duals = {name: forward_ad.make_dual(leaf, v[name]) for name, leaf in leaves.items()}
        outputs, pushed = forward_ad.unpack_dual(of_params(duals))
    if pushed is None:
        pushed = torch.zeros_like(outputs)
    return outputs.detach(), pushed.detach(), lambda u: _pull(outputs, leaves, u)


def _leaves(params: Params) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_() for name, value in params.items()}


def _pull(outputs: Tensor, leaves: Params, u: Tensor, **options: bool) -> Params:
    found = torch.autograd.grad(
        outputs, list(leaves.values()), u, materialize_grads=True, **options
    )
    return dict(zip(leaves, found, strict=True))
