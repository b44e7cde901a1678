"""Embeddings: a table of vectors, looked up by index."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from neuromanifold.layers._base import LayerRule, register
from neuromanifold.layers.parts import Indexed
from neuromanifold.layers.record import Call
from neuromanifold.linalg import Block

__all__ = ["EmbeddingRule"]


class EmbeddingRule(LayerRule):
    """`s_t = W[i_t]`: a unit is a row of the table; the one-hot vectors are never formed."""

    name = "embedding"

    def block(self, module: nn.Module, name: str, trainable: frozenset[str]) -> Block:
        """One group; `weight (rows, D)`."""
        assert isinstance(module, nn.Embedding)
        rows, width = module.num_embeddings, module.embedding_dim
        return replace(Block.of_layer(name, 1, rows, width, trainable), lookup=True)

    def part(
        self, block: Block, calls: tuple[Call, ...], num_samples: int, dtype: torch.dtype
    ) -> Indexed:
        """Lookups of every call side by side."""
        indices = [
            _without_padding(call.port.module, call.x).reshape(num_samples, -1)
            for call in calls
            if call.x is not None
        ]
        g = [call.g.reshape(len(call.g), num_samples, -1, block.fan_in) for call in calls]
        return Indexed(torch.cat(indices, dim=1), torch.cat(g, dim=2).to(dtype), block.fan_out)

    def absent(self, block: Block, groups: slice, zeros: Tensor) -> Indexed:
        """No position."""
        sweeps, num_samples = zeros.shape
        indices = torch.empty(num_samples, 0, dtype=torch.long, device=zeros.device)
        g = zeros.new_zeros(sweeps, num_samples, 0, block.fan_in)
        return Indexed(indices, g, block.fan_out)

    def numel(self, block: Block, calls: tuple[Call, ...]) -> int:
        """Of cotangents."""
        return sum(call.numel for call in calls)

    def sums_gradients(self, block: Block, calls: tuple[Call, ...]) -> bool:
        """Only those of rows that were looked up."""
        return False


def _without_padding(module: nn.Module, indices: Tensor) -> Tensor:
    """Indices, −1 at padding, whose row gets no gradient."""
    assert isinstance(module, nn.Embedding)
    if module.padding_idx is None:
        return indices.long()
    return torch.where(indices == module.padding_idx, -1, indices.long())


register(nn.Embedding, EmbeddingRule())
