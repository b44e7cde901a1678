"""Linear layers, applied at any number of positions."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from neuromanifold.layers._base import WeightRule, register
from neuromanifold.linalg import Block

__all__ = ["LinearRule"]


class LinearRule(WeightRule):
    """`s = W a + b`: fan-in is the last axis; axes between it and the samples are positions.

    Args:
        transposed: whether the weight is stored as `(I, O)`.
    """

    name = "linear"

    def __init__(self, *, transposed: bool = False) -> None:
        self._transposed = transposed

    def block(self, module: nn.Module, name: str, trainable: frozenset[str]) -> Block:
        """One group; `weight (O, I)` and `bias (O,)`."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        fan_out, fan_in = (weight.mT if self._transposed else weight).shape
        block = Block.of_layer(name, 1, fan_out, fan_in, trainable)
        if not self._transposed or "weight" not in trainable:
            return block
        slot = replace(block.slots[0], view=(1, fan_in, fan_out), order=(0, 2, 1))
        return replace(block, slots=(slot, *block.slots[1:]))

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
# The linear layer of GPT-2, which has its name from there.
register("transformers.pytorch_utils.Conv1D", LinearRule(transposed=True))
