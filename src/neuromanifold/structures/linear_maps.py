# ruff: noqa: A002 -- arguments are called as torch calls them
"""Functions whose derivative is kept as a linear map, for products that repeat.

Reverse mode gives a map's transpose, and the derivative of that in the cotangent is the map itself.
Torch finds the latter by a general second derivative: of convolutions it also computes what nobody
asked for, and of the others more than the few passes that the map takes. In forward mode it
multiplies inputs by zero that have no tangent, in the first layer of a model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neuromanifold.capture import attention_weights
from neuromanifold.capture.plain import Functions
from neuromanifold.errors import CaptureError

__all__ = ["ALL", "LAYERS"]

aten = torch.ops.aten
Tangent = Tensor | None
"""None is zero, or not wanted."""


class _Map(ABC):
    """The derivative of a function at a point.

    Args:
        kept: tensors that the derivative depends on.
    """

    def __init__(self, *kept: Tensor | None) -> None:
        self._kept = [(tensor, tensor._version) for tensor in kept if tensor is not None]

    @abstractmethod
    def push(self, *tangents: Tangent) -> Tensor:
        """Along tangents of the arguments; at least one of them is given."""

    @abstractmethod
    def pull(self, g: Tensor, wanted: Sequence[bool]) -> tuple[Tangent, ...]:
        """The transpose at a cotangent, for the arguments that are wanted."""

    def require_unchanged(self) -> None:
        """Refuse what has been overwritten since, as torch's own functions do."""
        if any(tensor._version != version for tensor, version in self._kept):
            raise CaptureError(
                "An input of a layer was changed in place after the layer had used it, so its "
                "gradient cannot be formed (a backward pass fails too). Make that operation "
                "out-of-place."
            )


class _Value(torch.autograd.Function):
    """A value, whose derivative is a map."""

    @staticmethod
    def forward(
        ctx: Any, value: Callable[[], Tensor], linear: _Map, *arguments: Tensor | None
    ) -> Tensor:
        ctx.linear = linear
        ctx.dtypes = [x if x is None else x.dtype for x in arguments]
        ctx.set_materialize_grads(False)
        return value()

    @staticmethod
    def backward(ctx: Any, g: Tangent) -> tuple[Tangent, ...]:
        ctx.linear.require_unchanged()
        wanted = ctx.needs_input_grad[2:]
        return None, None, *_Pull.apply(ctx.linear, wanted, g)  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tangent) -> Tensor:
        own = zip(tangents[2:], ctx.dtypes, strict=True)
        # Under autocast, some of torch's functions give tangents in another precision.
        with torch.no_grad():
            found: Tensor = ctx.linear.push(*(t if t is None else t.to(dtype) for t, dtype in own))
        return found


class _Pull(torch.autograd.Function):
    """The transpose of a map, whose own transpose is the map."""

    @staticmethod
    def forward(ctx: Any, linear: _Map, wanted: Sequence[bool], g: Tensor) -> tuple[Tangent, ...]:
        ctx.linear = linear
        ctx.set_materialize_grads(False)
        return linear.pull(g, wanted)

    @staticmethod
    def backward(ctx: Any, *tangents: Tangent) -> tuple[Tangent, ...]:
        if all(tangent is None for tangent in tangents):
            return None, None, None
        return None, None, ctx.linear.push(*tangents)


def _mapped(value: Callable[[], Tensor], linear: _Map, *arguments: Tensor | None) -> Tensor:
    """A value of some arguments, with its derivative."""
    found: Tensor = _Value.apply(value, linear, *arguments)  # type: ignore[no-untyped-call]
    return found


def _sum(terms: Iterable[Tensor]) -> Tensor:
    first, *others = terms
    for other in others:
        first += other
    return first


def _plain(x: Tensor) -> bool:
    """Whether derivatives are wanted, and x is computed with as it is, unlike under autocast."""
    autocast = torch.is_autocast_enabled(x.device.type)
    return torch.is_grad_enabled() and x.is_floating_point() and not autocast


# --- linear layers -----------------------------------------------------------------------------


class _Affine(_Map):
    """Of `x Wᵀ + b`, `x (*, I)`."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        super().__init__(x, weight)
        self._x, self._weight = x.detach(), weight.detach()

    def push(self, *tangents: Tangent) -> Tensor:
        x, weight, bias = tangents
        if weight is None and x is not None:
            return _affine(x, self._weight, bias)
        y = _affine(self._x, torch.zeros_like(self._weight) if weight is None else weight, bias)
        if x is not None:
            y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), self._weight.T)
        return y

    def pull(self, g: Tensor, wanted: Sequence[bool]) -> tuple[Tangent, ...]:
        rows = g.reshape(-1, g.shape[-1])
        return (
            g @ self._weight if wanted[0] else None,
            rows.T @ self._x.reshape(-1, self._x.shape[-1]) if wanted[1] else None,
            rows.sum(dim=0) if wanted[2] else None,
        )


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x Wᵀ + b` as a tensor of its own: of views, autograd refuses changes in place."""
    y = x.new_empty(*x.shape[:-1], len(weight))
    rows, out = x.reshape(-1, x.shape[-1]), y.view(-1, len(weight))
    if bias is None:
        torch.mm(rows, weight.T, out=out)
    else:
        torch.addmm(bias, rows, weight.T, out=out)
    return y


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if not _plain(input):
        return None
    linear = _Affine(input, weight)
    return _mapped(lambda: _affine(input, weight, bias), linear, input, weight, bias)


class _Convolution(_Map):
    """Of a convolution, transposed or not."""

    def __init__(self, x: Tensor, weight: Tensor, options: Sequence[Any]) -> None:
        super().__init__(x, weight)
        self._x, self._weight, self._options = x.detach(), weight.detach(), options

    def push(self, *tangents: Tangent) -> Tensor:
        x, weight, bias = tangents
        if weight is None and x is not None:
            return self._at(x, self._weight, bias)
        weight = torch.zeros_like(self._weight) if weight is None else weight
        y = self._at(self._x, weight, bias)
        if x is not None:
            y += self._at(x, self._weight, None)
        return y

    def _at(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found: Tensor = aten.convolution(x, weight, bias, *self._options)
        return found

    def pull(self, g: Tensor, wanted: Sequence[bool]) -> tuple[Tangent, ...]:
        transposed, groups = self._options[3], self._options[5]
        units = self._weight.shape[1] * groups if transposed else len(self._weight)
        found = aten.convolution_backward(
            g, self._x, self._weight, [units], *self._options, list(wanted)
        )
        return tuple(found)


def _convolution(num_axes: int, transposed: bool) -> Callable[..., Tensor | None]:
    def convolve(
        x: Tensor, weight: Tensor, bias: Tensor | None, options: Sequence[Any]
    ) -> Tensor | None:
        if not _plain(x) or x.ndim != num_axes + 2:
            return None
        listed = [_each(option, num_axes) for option in options[:4]]
        if any(option is None for option in listed):
            return None
        stride, padding, dilation, output_padding = listed
        arguments = (stride, padding, dilation, transposed, output_padding, options[4])
        return _mapped(
            lambda: aten.convolution(x, weight, bias, *arguments),
            _Convolution(x, weight, arguments),
            x,
            weight,
            bias,
        )

    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        return convolve(input, weight, bias, (stride, padding, dilation, 0, groups))

    def backward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor | None:
        return convolve(input, weight, bias, (stride, padding, dilation, output_padding, groups))

    return backward if transposed else forward


def _each(option: Any, num_axes: int) -> list[int] | None:
    """An option for each axis; None if it is given by a word."""
    if isinstance(option, str):
        return None
    return [option] * num_axes if isinstance(option, int) else list(option)


# --- attention ---------------------------------------------------------------------------------


class _Attention(_Map):
    """Of `p v`, `p = softmax(q kᵀ)`; the derivative of a softmax is symmetric."""

    def __init__(self, p: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        super().__init__(q, k, v)
        self._p, self._k, self._v = p, k.detach(), v.detach()
        self._q, self._scale = q.detach() * scale, scale

    def push(self, *tangents: Tangent) -> Tensor:
        q, k, v = tangents
        scores = [
            *([] if q is None else [(q * self._scale) @ self._k.mT]),
            *([] if k is None else [self._q @ k.mT]),
        ]
        parts = [] if v is None else [self._p @ v]
        if scores:
            parts.append(self._of_softmax(_sum(scores)) @ self._v)
        return _sum(parts)

    def pull(self, g: Tensor, wanted: Sequence[bool]) -> tuple[Tangent, ...]:
        scores = self._of_softmax(g @ self._v.mT)
        return (
            (scores @ self._k).mul_(self._scale) if wanted[0] else None,
            scores.mT @ self._q if wanted[1] else None,
            self._p.mT @ g if wanted[2] else None,
        )

    def _of_softmax(self, v: Tensor) -> Tensor:
        found: Tensor = aten._softmax_backward_data(v, self._p, -1, v.dtype)
        return found


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
    batches = {x.shape[:-2] for x in (query, key, value)}
    if attn_mask is not None or dropout_p or enable_gqa or len(batches) > 1 or not _plain(query):
        return None
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    p = attention_weights(query.detach(), key.detach(), is_causal, scale)
    linear = _Attention(p, query, key, value, scale)
    return _mapped(lambda: p @ value, linear, query, key, value)


# --- norms and activations ---------------------------------------------------------------------


class _Norm(_Map):
    """Of `w x̂ + b`, where the derivative of x̂ in x is symmetric."""

    def __init__(
        self,
        standardised: Tensor,
        weight: Tensor | None,
        axes: list[int],
        symmetric: Callable[[Tensor], Tensor],
        *kept: Tensor | None,
    ) -> None:
        super().__init__(weight, *kept)
        self._standardised, self._axes, self._symmetric = standardised, axes, symmetric
        self._shape = [1 if axis in axes else size for axis, size in enumerate(standardised.shape)]
        self._weight = None if weight is None else weight.detach().view(self._shape)

    def push(self, *tangents: Tangent) -> Tensor:
        x, weight, bias = tangents
        y = torch.zeros_like(self._standardised) if x is None else self._symmetric(x)
        if self._weight is not None:
            y *= self._weight
        if weight is not None:
            y.addcmul_(weight.view(self._shape), self._standardised)
        if bias is not None:
            y += bias.view(self._shape)
        return y

    def pull(self, g: Tensor, wanted: Sequence[bool]) -> tuple[Tangent, ...]:
        scaled = g if self._weight is None else g * self._weight
        return (
            self._symmetric(scaled) if wanted[0] else None,
            (g * self._standardised).sum(self._axes) if wanted[1] else None,
            g.sum(self._axes) if wanted[2] else None,
        )


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    if not _plain(input) or (weight is not None and weight.dtype != input.dtype):
        return None
    shape, x = list(normalized_shape), input.detach()
    affine = (None if w is None else w.detach() for w in (weight, bias))
    value, mean, rstd = aten.native_layer_norm(x, shape, *affine, eps)

    def symmetric(v: Tensor) -> Tensor:
        found: Tensor = aten.native_layer_norm_backward(
            v.contiguous(), x, shape, mean, rstd, None, None, [True, False, False]
        )[0]
        return found

    axes = list(range(x.ndim - len(shape)))
    linear = _Norm((x - mean) * rstd, weight, axes, symmetric, x)
    return _mapped(lambda: value, linear, input, weight, bias)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,  # noqa: ARG001 -- running statistics are used, not updated
    eps: float = 1e-5,
) -> Tensor | None:
    if training or not _plain(input) or running_mean is None or running_var is None:
        return None
    axes = [axis for axis in range(input.ndim) if axis != 1]
    shape = [1 if axis in axes else size for axis, size in enumerate(input.shape)]
    with torch.no_grad():
        rstd = (running_var + eps).rsqrt().view(shape)
        standardised = (input.detach() - running_mean.view(shape)) * rstd

    def value() -> Tensor:
        return F.batch_norm(input, running_mean, running_var, weight, bias, eps=eps)

    linear = _Norm(standardised, weight, axes, lambda v: v * rstd)
    return _mapped(value, linear, input, weight, bias)


class _Scaling(_Map):
    """Of a function of each entry, by its slope."""

    def __init__(self, slope: Tensor) -> None:
        super().__init__()
        self._slope = slope

    def push(self, *tangents: Tangent) -> Tensor:
        (x,) = tangents
        assert x is not None
        return x * self._slope

    def pull(self, g: Tensor, _: Sequence[bool]) -> tuple[Tangent, ...]:
        return (g * self._slope,)


def _gelu(input: Tensor, *, approximate: str = "none") -> Tensor | None:
    if not _plain(input):
        return None
    one = torch.ones_like(input)
    linear = _Scaling(aten.gelu_backward(one, input.detach(), approximate=approximate))
    return _mapped(lambda: F.gelu(input, approximate=approximate), linear, input)


def _silu(input: Tensor, inplace: bool = False) -> Tensor | None:
    if inplace or not _plain(input):
        return None
    linear = _Scaling(aten.silu_backward(torch.ones_like(input), input.detach()))
    return _mapped(lambda: F.silu(input), linear, input)


def _cast(layer: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """The same layer as autocast runs it, where that is on: in lower precision."""

    def run(*args: Any, **kwargs: Any) -> Tensor | None:
        kind = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).device.type
        if not torch.is_autocast_enabled(kind):
            return layer(*args, **kwargs)
        dtype = torch.get_autocast_dtype(kind)

        def lower(x: Any) -> Any:
            floating = isinstance(x, Tensor) and x.is_floating_point()
            return x.to(dtype) if floating and x.dtype != torch.float64 else x

        lowered = {name: lower(x) for name, x in kwargs.items()}
        with torch.autocast(kind, enabled=False):
            return layer(*map(lower, args), **lowered)

    return run


LAYERS: Functions = {
    F.linear: _cast(_linear),
    F.conv1d: _cast(_convolution(1, transposed=False)),
    F.conv2d: _cast(_convolution(2, transposed=False)),
    F.conv3d: _cast(_convolution(3, transposed=False)),
    F.conv_transpose1d: _cast(_convolution(1, transposed=True)),
    F.conv_transpose2d: _cast(_convolution(2, transposed=True)),
    F.conv_transpose3d: _cast(_convolution(3, transposed=True)),
    F.scaled_dot_product_attention: _cast(_attention),
}

ALL: Functions = {
    **LAYERS,
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.gelu: _gelu,
    F.silu: _silu,
}
"""The others compute beforehand what a map needs, which pays where it is used again."""
