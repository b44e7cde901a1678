"""Functions whose derivatives torch lacks, or takes long for, by plain arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Functions", "PlainAttention", "PlainFunctions", "Replacing", "attention_weights"]

Functions = Mapping[Callable[..., Any], Callable[..., Any]]
"""What stands in for a function; it gives None for arguments that it leaves to torch."""


class Replacing(TorchFunctionMode):
    """Within it, calls of some functions of torch go to others.

    Args:
        functions: what stands in for which.
    """

    def __init__(self, functions: Functions) -> None:
        super().__init__()
        self._functions = functions

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """A call of one of them, or of another function."""
        kwargs = kwargs or {}
        other = self._functions.get(function)
        found = None if other is None else other(*args, **kwargs)
        return function(*args, **kwargs) if found is None else found


class PlainFunctions(Replacing):
    """Norms and activations by plain arithmetic, where torch has no second forward derivative.

    That of its norms takes the statistics of their inputs for constants, and is wrong without a
    word; that of some activations is missing.
    """

    def __init__(self) -> None:
        super().__init__(TWICE)


class PlainAttention(Replacing):
    """Attention by plain arithmetic.

    The softmax of torch's own mathematics kernel looks for rows without any key, which in forward
    mode takes as long as the products with keys and values do.
    """

    def __init__(self) -> None:
        super().__init__({F.scaled_dot_product_attention: _attention})


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    if attn_mask is not None or dropout_p or enable_gqa:
        return None
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return attention_weights(query, key, is_causal, scale) @ value


def attention_weights(query: Tensor, key: Tensor, is_causal: bool, scale: float) -> Tensor:
    """How much each query `(*, L, E)` takes of each value, `(*, L, S)`, by keys `(*, S, E)`."""
    scores = (query * scale) @ key.mT
    if is_causal:  # every query has a key: its own position, or the first
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores.softmax(-1)


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    axes = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    y = _standardised(x, axes, eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,  # noqa: ARG001 -- running statistics are used, not updated
    eps: float = 1e-5,
) -> Tensor:
    units = (-1,) + (1,) * (x.ndim - 2)
    if use_input_stats:
        y = _standardised(x, tuple(range(2, x.ndim)), eps)
    else:
        assert running_mean is not None
        assert running_var is not None
        y = (x - running_mean.view(units)) * (running_var.view(units) + eps).rsqrt()
    y = y if weight is None else y * weight.view(units)
    return y if bias is None else y + bias.view(units)


def _standardised(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()


def _silu(x: Tensor, inplace: bool = False) -> Tensor:
    return F.silu(x, inplace=True) if inplace else x * x.sigmoid()


def _mish(x: Tensor, inplace: bool = False) -> Tensor:
    return F.mish(x, inplace=True) if inplace else x * F.softplus(x).tanh()


def _hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    return F.hardsigmoid(x, inplace=True) if inplace else F.relu6(x + 3) / 6


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    values, gates = x.chunk(2, dim)
    return values * gates.sigmoid()


TWICE: Functions = {
    F.layer_norm: _layer_norm,
    F.instance_norm: _instance_norm,
    F.silu: _silu,
    F.mish: _mish,
    F.hardsigmoid: _hardsigmoid,
    F.glu: _glu,
}
