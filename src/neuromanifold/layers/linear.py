"""Linear layers, applied at any number of positions."""

from __future__ import annotations

from torch import Tensor, nn

from neuromanifold.layers._base import LayerRule, register
from neuromanifold.linalg import Block

__all__ = ["LinearRule"]


class LinearRule(LayerRule):
    """`s = W a + b`: fan-in is the last axis; axes between it and the samples are positions."""

    name = "linear"

    def block(self, module: nn.Module, name: str, trainable: frozenset[str]) -> Block:
        """One group; `weight (O, I)` and `bias (O,)`."""
        assert isinstance(module, nn.Linear)
        return Block.of_layer(name, 1, module.out_features, module.in_features, trainable)

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """`(rows, *T, I)` to `(1, rows, T, I)`."""
        return _positions(x, 1)[None]

    def cotangents(self, module: nn.Module, g: Tensor) -> Tensor:
        """`(V, rows, *T, O)` to `(V, 1, rows, T, O)`."""
        return _positions(g, 2)[:, None]


def _positions(x: Tensor, lead: int) -> Tensor:
    """Merge the axes between the `lead` first ones and the last into one (length 1 if none)."""
    return x.unsqueeze(lead) if x.ndim == lead + 1 else x.flatten(lead, -2)


register(nn.Linear, LinearRule())
