"""Functions that torch cannot differentiate twice in forward mode, by plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["PlainFunctions"]


class PlainFunctions(TorchFunctionMode):
    """Norms and activations by plain arithmetic, where torch has no second forward derivative.

    That of its norms takes the statistics of their inputs for constants, and is wrong without a
    word; that of some activations is missing.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """A call of one of them, or of another function."""
        return PLAIN.get(function, function)(*args, **(kwargs or {}))


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


PLAIN: dict[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    F.instance_norm: _instance_norm,
    F.silu: _silu,
    F.mish: _mish,
    F.hardsigmoid: _hardsigmoid,
    F.glu: _glu,
}
