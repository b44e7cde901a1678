"""Multi-head attention, whose projections are parameters of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from neuromanifold.layers._base import CompositeRule, Piece, Reporter, Use, register
from neuromanifold.layers.linear import LinearRule
from neuromanifold.linalg import Block, Slot

__all__ = ["AttentionRule"]

_LINEAR = LinearRule()
_PROJECTIONS = ("q", "k", "v")
"""Of queries, keys and values: ports, in the order in which a packed weight stores them."""
_BIASES = frozenset({"in_proj_bias", "bias_k", "bias_v"})


class AttentionRule(CompositeRule):
    """`nn.MultiheadAttention`: linear layers of queries, keys and values, and of the output.

    The first three are the groups of one block, named after the module, if their weights are one
    parameter. If not, each weight is a block named after itself, and so is the bias of all three.
    `bias_k` and `bias_v` are the key and value of one more position: biases without a weight. The
    output's layer is a module with a rule of its own.
    """

    name = "attention"

    def pieces(self, module: nn.Module, name: str, trainable: frozenset[str]) -> list[Piece]:
        """`(3, E, I)`, or `(1, E, I)` each; an added key or value is `(1, E, 1)`."""
        assert isinstance(module, nn.MultiheadAttention)
        width, prefix = module.embed_dim, f"{name}." if name else ""

        def piece(block: str, columns: dict[str, int], ports: tuple[str, ...]) -> Piece:
            slots = tuple(
                Slot.plain(prefix + local, len(ports), width, number)
                for local, number in columns.items()
                if local in trainable
            )
            biased = bool(trainable & _BIASES & columns.keys())
            uses = tuple(Use(port, _LINEAR, slice(i, i + 1)) for i, port in enumerate(ports))
            return Piece(Block(block, len(ports), width, slots, biased), uses)

        if module.in_proj_weight is not None:
            packed = {"in_proj_weight": width, "in_proj_bias": 1}
            found = [piece(name, packed, _PROJECTIONS)]
        else:
            separate = zip(_PROJECTIONS, (width, module.kdim, module.vdim), strict=True)
            found = [
                piece(f"{prefix}{port}_proj_weight", {f"{port}_proj_weight": fan_in}, (port,))
                for port, fan_in in separate
            ]
            found.append(piece(f"{prefix}in_proj_bias", {"in_proj_bias": 1}, _PROJECTIONS))
        found += [piece(prefix + local, {local: 1}, (local,)) for local in ("bias_k", "bias_v")]
        return [one for one in found if one.block.slots]

    def forward(
        self,
        module: nn.Module,
        use: Reporter,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs `(N, L, E)` or `(L, N, E)`; attention weights `(N, L, S)` or `(N, H, L, S)`.

        Ports are "q", "k", "v", "bias_k" and "bias_v". Inputs without a sample axis, and what the
        module refuses, are left to the module.
        """
        assert isinstance(module, nn.MultiheadAttention)
        if not _is_plain(module, query, key, value, key_padding_mask, attn_mask, is_causal):
            outputs: tuple[Tensor, Tensor | None] = type(module).forward(
                module,
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
            return outputs
        q, k, v = (
            use(port, x, _projected(module, x, i))
            for i, (port, x) in enumerate(zip(_PROJECTIONS, (query, key, value), strict=True))
        )
        k = _extended(module, k, "bias_k", use)
        v = _extended(module, v, "bias_v", use)
        q, k, v = (_heads(module, x) for x in (q, k, v))  # (N, H, L or S, E/H)
        # As a hint, `is_causal` stands for the mask that comes with it where that is the only one.
        hinted = is_causal and key_padding_mask is None and not need_weights
        mask = None if hinted else _mask(attn_mask, key_padding_mask, k, q.dtype)
        dropout = module.dropout if module.training else 0.0
        weights = None
        if need_weights:
            scores = q * q.shape[-1] ** -0.5 @ k.mT
            weights = (scores if mask is None else scores + mask).softmax(dim=-1)
            weights = functional.dropout(weights, dropout)
            mixed = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            mixed = functional.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=hinted
            )
        mixed = mixed.transpose(1, 2).flatten(2)
        return module.out_proj(mixed if module.batch_first else mixed.transpose(0, 1)), weights


def _is_plain(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> bool:
    """Whether inputs and masks are those of a batch of samples."""
    inputs = (query, key, value)
    if any(x.ndim != 3 or x.is_nested for x in inputs) or (is_causal and attn_mask is None):
        return False
    samples, positions = (0, 1) if module.batch_first else (1, 0)
    num_samples, length, span = query.shape[samples], query.shape[positions], key.shape[positions]
    shapes = [(num_samples, span), (length, span), (num_samples * module.num_heads, length, span)]
    return (
        key.shape[:2] == value.shape[:2]
        and key.shape[samples] == num_samples
        and (key_padding_mask is None or tuple(key_padding_mask.shape) == shapes[0])
        and (attn_mask is None or tuple(attn_mask.shape) in shapes[1:])
        and all(
            mask is None or mask.dtype == torch.bool or mask.is_floating_point()
            for mask in (key_padding_mask, attn_mask)
        )
    )


def _projected(module: nn.MultiheadAttention, x: Tensor, i: int) -> Tensor:
    """Queries, keys or values (i = 0, 1, 2), each with its own entry into the weight and bias."""
    third = slice(i * module.embed_dim, (i + 1) * module.embed_dim)
    if module.in_proj_weight is None:
        weight = getattr(module, f"{_PROJECTIONS[i]}_proj_weight")
    else:
        weight = module.in_proj_weight[third]
    bias = None if module.in_proj_bias is None else module.in_proj_bias[third]
    return functional.linear(x, weight, bias)


def _extended(module: nn.MultiheadAttention, x: Tensor, port: str, use: Reporter) -> Tensor:
    """Keys or values, with the learned one and a zero behind them if the module has such."""
    positions = 1 if module.batch_first else 0
    row = x.narrow(positions, 0, 1)
    parts = [x]
    added = getattr(module, port)
    if added is not None:
        # A copy for each sample, not a view: it has to have a gradient of its own.
        parts.append(use(port, None, added.repeat(*row.shape[:2], 1)))
    if module.add_zero_attn:
        parts.append(torch.zeros_like(row))
    return torch.cat(parts, dim=positions) if len(parts) > 1 else x


def _heads(module: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """`(N, T, E)`, or `(T, N, E)` where the module has it so, to `(N, H, T, E/H)`."""
    x = x if module.batch_first else x.transpose(0, 1)
    return x.unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2)


def _mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, keys: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """What is added to the scores `(N, H, L, S)`: of pairs of positions and of keys, together.

    Keys `(N, H, S, E/H)` that were added at the end are masked by neither.
    """
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, keys.shape[:2]))
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None])
    if not masks:
        return None
    total = sum(_additive(mask, dtype) for mask in masks)
    assert isinstance(total, Tensor)
    return functional.pad(total, (0, keys.shape[2] - total.shape[-1]))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """`−∞` where a boolean mask is true; another mask as it is."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)


register(nn.MultiheadAttention, AttentionRule())
