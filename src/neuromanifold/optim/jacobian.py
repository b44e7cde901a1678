"""The Jacobian of a vector of residuals, row by row, at the cost of a few backward passes.

Every product with a weight, in the forward pass and in derivatives with respect to inputs alike, is
`y = x Wᵀ` for rows x. In the backward pass from the sum of the residuals, the gradient of W is a
sum of outer products of rows of x with rows of the cotangent of y, and a row that enters only one
residual is part of that residual's gradient. Which one that is, is read off a second cotangent with
a factor for each residual: gradients are linear in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from neuromanifold._typing import Params
from neuromanifold.errors import NonFiniteError
from neuromanifold.linalg import Layout, memory

__all__ = ["Closure", "Jacobian", "MixedRowsError", "jacobian_by_passes", "jacobian_by_rows"]

Closure = Callable[[], Tensor]

MOST_COLUMNS = 64
"""Up to so many numbers outside of linear layers, their columns are differentiated one by one."""
_CHUNK_NUMEL = 2**22
"""Rows of the Jacobian that are made together hold about this many numbers."""


class MixedRowsError(Exception):
    """The rows of a layer's input do not each belong to one residual."""


@dataclass(frozen=True)
class Jacobian:
    """Residuals and their derivatives.

    Attributes:
        residuals: `(N,)`, detached.
        matrix: `(N, P)`, parameters in the order of the layout.
    """

    residuals: Tensor
    matrix: Tensor


def jacobian_by_rows(closure: Closure, params: Params, layout: Layout) -> Jacobian:
    """Call the closure once, and send two or three cotangents back.

    Args:
        closure: returns residuals `(N,)`, attached to the graph.
        params: those that the residuals depend on.
        layout: of the columns.

    Raises:
        MixedRowsError: If rows of a layer feed several residuals, or parameters with more than
            `MOST_COLUMNS` numbers are used by other functions than `torch.nn.functional.linear`.
        NonFiniteError: If a residual or a derivative is NaN or infinite.
    """
    tape = _Tape(params)
    with torch.enable_grad(), _Recording(tape):
        residuals = checked(closure())
    with torch.no_grad():
        return Jacobian(residuals.detach(), _by_rows(tape, residuals, params, layout))


def _by_rows(tape: _Tape, residuals: Tensor, params: Params, layout: Layout) -> Tensor:
    n, names = len(residuals), list(params)
    first, outside = tape.sweep(residuals, torch.ones_like(residuals))
    columns = [name for name, g in zip(names, outside, strict=True) if g is not None]
    if sum(params[name].numel() for name in columns) > MOST_COLUMNS:
        raise MixedRowsError(
            f"{columns} are used by other functions than torch.nn.functional.linear"
        )
    owners = _owners(tape, residuals, first)
    matrix = _empty(residuals, layout)
    by_name: dict[str, list[tuple[Tensor, Tensor, Tensor | None]]] = {}
    for key, record in first.items():
        for name, g, a in record.factors():
            by_name.setdefault(name, []).append((owners[key], g, a))
    for name, factors in by_name.items():
        _add_outer_products(matrix[:, layout.slices[name]].view(n, -1), factors)
    if columns:
        found = _columns(tape, residuals, {name: params[name] for name in columns})
        for name, column in found.items():
            matrix[:, layout.slices[name]] += column
    return _finite(matrix)


def jacobian_by_passes(closure: Closure, params: Params, layout: Layout) -> Jacobian:
    """Call the closure once, and go back once for each residual, many at a time.

    Raises:
        NonFiniteError: If a residual or a derivative is NaN or infinite.
    """
    with torch.enable_grad():
        residuals = checked(closure())
    n, leaves = len(residuals), list(params.values())
    matrix = _empty(residuals, layout)
    step = max(_CHUNK_NUMEL // layout.num_parameters, 1)
    for start in range(0, n, step):
        stop = min(start + step, n)
        units = torch.zeros(stop - start, n, dtype=residuals.dtype, device=residuals.device)
        units[:, start:stop].fill_diagonal_(1)
        found = torch.autograd.grad(
            residuals,
            leaves,
            units,
            is_grads_batched=True,
            retain_graph=True,
            allow_unused=True,
        )
        for columns, g in zip(layout.slices.values(), found, strict=True):
            if g is not None:
                matrix[start:stop, columns] = g.reshape(stop - start, -1)
    return Jacobian(residuals.detach(), _finite(matrix))


def checked(residuals: Any) -> Tensor:
    """What a closure returned, if it is a vector of finite residuals that can be differentiated.

    Raises:
        TypeError: If it is no floating tensor.
        ValueError: If it has another shape, or no graph.
        NonFiniteError: If a residual is NaN or infinite.
    """
    if not isinstance(residuals, Tensor) or not residuals.is_floating_point():
        given = residuals.dtype if isinstance(residuals, Tensor) else type(residuals).__name__
        raise TypeError(f"The closure returns a tensor of real residuals (N,), got {given}.")
    if residuals.ndim != 1 or len(residuals) == 0:
        raise ValueError(
            f"The closure returns residuals (N,), one number for each equation, got shape "
            f"{tuple(residuals.shape)}. Do not average or square them; flatten and concatenate "
            f"several kinds by torch.cat([interior.flatten(), weight * boundary.flatten()])."
        )
    if not residuals.requires_grad:
        raise ValueError(
            "The residuals do not depend on a trainable parameter: they have no graph. Compute "
            "them without torch.no_grad() and without .detach()."
        )
    if not bool(torch.isfinite(residuals.detach().sum())):
        bad = int((~torch.isfinite(residuals)).sum())
        if bad:
            raise NonFiniteError(f"{bad} of {len(residuals)} residuals are NaN or infinite.")
    return residuals


def _finite(matrix: Tensor) -> Tensor:
    if not bool(torch.isfinite(matrix.sum())):
        raise _not_finite()
    return matrix


def _not_finite() -> NonFiniteError:
    return NonFiniteError("A derivative of the residuals is NaN or infinite.")


def _empty(residuals: Tensor, layout: Layout) -> Tensor:
    shape = len(residuals), layout.num_parameters
    memory.require(
        shape[0] * shape[1] * residuals.element_size(),
        residuals.device,
        what=f"The Jacobian of {shape[0]} residuals by {shape[1]} parameters",
        instead="Use fewer residuals in a step, drawn anew for each.",
    )
    return residuals.new_zeros(shape)


# ---- products with weights ---------------------------------------------------------------


@dataclass(frozen=True)
class _Record:
    """One product in a backward pass: rows `(B, O)` and `(B, I)` whose outer products make W's.

    Attributes:
        weight: name of W, None if it is frozen.
        bias: name of what was added to the outputs, None if nothing trainable was.
        cotangent: the rows that are linear in the cotangent of the residuals.
        constant: the other ones.
        forward: whether the cotangent is that of the outputs.
    """

    weight: str | None
    bias: str | None
    cotangent: Tensor
    constant: Tensor
    forward: bool

    def factors(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """By parameter, `(B, O)` and `(B, I)`; None stands for ones."""
        g, a = self.cotangent, self.constant
        if not self.forward:
            g, a = a, g
        if self.weight is not None:
            yield self.weight, g, a
        if self.bias is not None:
            yield self.bias, g, None


@dataclass(eq=False)
class _Tape:
    """What products with weights leave in a backward pass.

    Attributes:
        params: trainable ones, by name.
        sweeping: whether products leave records, instead of gradients of weights.
        weights: whether a backward pass of the closure's own asks for gradients of weights.
        records: of the present sweep, by number of the product.
        products: how many there were.
    """

    params: Params
    sweeping: bool = False
    weights: bool = True
    records: dict[int, _Record] = field(default_factory=dict)
    products: int = 0

    def __post_init__(self) -> None:
        self.names = {id(p): name for name, p in self.params.items()}

    def name(self, tensor: Tensor | None) -> str | None:
        return None if tensor is None else self.names.get(id(tensor))

    def number(self) -> int:
        self.products += 1
        return self.products

    def sweep(
        self, residuals: Tensor, cotangent: Tensor
    ) -> tuple[dict[int, _Record], tuple[Tensor | None, ...]]:
        """Records of all products that are reached, and gradients of uses that are no products."""
        self.records, self.sweeping = {}, True
        try:
            outside = torch.autograd.grad(
                residuals,
                list(self.params.values()),
                cotangent,
                retain_graph=True,
                allow_unused=True,
            )
        finally:
            self.sweeping = False
        found = {key: record for key, record in self.records.items() if len(record.cotangent)}
        self.records = {}
        return found, outside

    @contextmanager
    def without_weights(self) -> Iterator[None]:
        before, self.weights = self.weights, False
        try:
            yield
        finally:
            self.weights = before


class _Recording(TorchFunctionMode):
    """Sends products with trainable weights over the tape."""

    def __init__(self, tape: _Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is linear:
            return self._linear(*args, **kwargs)
        if func is torch.autograd.grad:
            inputs = kwargs["inputs"] if "inputs" in kwargs else args[1]
            asked = [inputs] if isinstance(inputs, Tensor) else inputs
            if not any(self._tape.name(one) for one in asked if isinstance(one, Tensor)):
                with self._tape.without_weights():
                    return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
        tape = self._tape
        names = tape.name(weight), tape.name(bias)
        plain = names == (None, None) or (names[0] is None and weight.requires_grad)
        if plain or _transformed():
            return linear(input, weight, bias)
        if bias is not None and names[1] is None:
            return _product(input, weight, None, tape, names) + bias
        return _product(input, weight, bias, tape, names)


def _transformed() -> bool:
    """Whether a transform of torch.func runs, in which tensors have hidden axes."""
    return torch._C._functorch.peek_interpreter_stack() is not None


Names = tuple[str | None, str | None]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, tape: _Tape, names: Names) -> Tensor:
    return _Product.apply(x, weight, bias, tape, names)  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    """`x Wᵀ + b`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tape: _Tape, names: Names
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tape, ctx.names, ctx.number = tape, names, tape.number()
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        tape: _Tape = ctx.tape
        if tape.sweeping:
            tape.records[ctx.number] = _Record(
                ctx.names[0], ctx.names[1], _rows(g), _rows(x), forward=True
            )
            return (g @ weight if ctx.needs_input_grad[0] else None), None, None, None, None
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = _Transposed.apply(g, weight, tape, (ctx.names[0], None))  # type: ignore[no-untyped-call]
        if tape.weights:
            if ctx.needs_input_grad[1]:
                of_weight = _rows(g).mT @ _rows(x)
            if ctx.needs_input_grad[2]:
                of_bias = _rows(g).sum(dim=0)
        return of_x, of_weight, of_bias, None, None


class _Transposed(torch.autograd.Function):
    """`g W`, as in the backward pass of a product."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, weight: Tensor, tape: _Tape, names: Names) -> Tensor:
        ctx.save_for_backward(g, weight)
        ctx.tape, ctx.names, ctx.number = tape, names, tape.number()
        return g @ weight

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
        g, weight = ctx.saved_tensors
        tape: _Tape = ctx.tape
        if tape.sweeping:
            tape.records[ctx.number] = _Record(
                ctx.names[0], ctx.names[1], _rows(h), _rows(g), forward=False
            )
            return (linear(h, weight) if ctx.needs_input_grad[0] else None), None, None, None
        of_g = of_weight = None
        if ctx.needs_input_grad[0]:
            of_g = _product(h, weight, None, tape, ctx.names)
        if tape.weights and ctx.needs_input_grad[1]:
            of_weight = _rows(g).mT @ _rows(h)
        return of_g, of_weight, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


# ---- whose row it is ---------------------------------------------------------------------


def _owners(tape: _Tape, residuals: Tensor, first: dict[int, _Record]) -> dict[int, Tensor]:
    """By product, the residual that each of its rows belongs to, `(B,)` integers.

    Raises:
        MixedRowsError: If a row belongs to several.
    """
    n, eps = len(residuals), torch.finfo(residuals.dtype).eps
    generator = torch.Generator().manual_seed(0)
    owners: dict[int, Tensor] = {}
    # A row that enters two residuals alike has a factor between theirs, which may by chance be
    # that of a third one. In float32 this is likely enough to look twice.
    for sweep in range(1 if eps < 1e-12 else 2):
        jitter = torch.rand(n, generator=generator, dtype=torch.float64) / 2
        factors = 1 + (torch.arange(n) + jitter) / n  # (N,) ascending
        order = torch.randperm(n, generator=generator)
        of_residual = torch.empty_like(factors).scatter_(0, order, factors).to(residuals)
        second, _ = tape.sweep(residuals, of_residual)
        shared = torch.zeros((), dtype=torch.bool, device=residuals.device)
        for key, record in first.items():
            one, other = record.cotangent, second[key].cotangent
            if sweep == 0:
                owners[key] = _nearest(one, other, factors.to(residuals), order.to(one.device))
            size = one.abs().amax(dim=1)
            if not bool(torch.isfinite(size.max())):
                raise _not_finite()
            error = (other - of_residual[owners[key], None] * one).abs().amax(dim=1)
            shared |= ~(error <= eps**0.6 * size + 100 * eps * size.max()).all()
        if bool(shared):
            raise MixedRowsError("rows of a layer's input enter several residuals")
    return owners


def _nearest(one: Tensor, other: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Which factor, of some in ascending order, leads from one to other rows `(B, O)`."""
    units = one / one.norm(dim=1, keepdim=True).clamp(min=torch.finfo(one.dtype).tiny)
    ratios = (units * other).sum(dim=1) / (units * one).sum(dim=1)
    middles = (factors[1:] + factors[:-1]) / 2
    return order[torch.bucketize(ratios, middles)]


# ---- the matrix --------------------------------------------------------------------------


def _add_outer_products(
    matrix: Tensor, factors: list[tuple[Tensor, Tensor, Tensor | None]]
) -> None:
    """Add to the columns of one parameter, `(N, O·I)`, its part of each row."""
    by_owner: dict[tuple[int, bool], list[tuple[Tensor, Tensor, Tensor | None]]] = {}
    for owner, g, a in factors:
        # Products of the same call of the model have the same rows: they are summed at once.
        key = next(
            (k for k, kept in by_owner.items() if _same(kept[0][0], owner) and k[1] == (a is None)),
            (len(by_owner), a is None),
        )
        by_owner.setdefault(key, []).append((owner, g, a))
    for parts in by_owner.values():
        owner, inputs = parts[0][0], [a for _, _, a in parts if a is not None]
        if not inputs:
            total = torch.stack([g for _, g, _ in parts]).sum(dim=0)
        else:
            outputs = torch.stack([g for _, g, _ in parts], dim=2)  # (B, O, T)
            total = (outputs @ torch.stack(inputs, dim=1)).flatten(1)  # (B, O·I)
        matrix.index_add_(0, owner, total)


def _same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and bool((left == right).all())


def _columns(tape: _Tape, residuals: Tensor, params: Params) -> Params:
    """Derivatives `(N, numel)` by uses that are no products: the transpose of a backward pass."""
    cotangent = torch.zeros_like(residuals, requires_grad=True)
    with torch.enable_grad(), tape.without_weights():
        pulled = torch.autograd.grad(
            residuals, list(params.values()), cotangent, create_graph=True, allow_unused=True
        )
        found = {}
        for name, g in zip(params, pulled, strict=True):
            assert g is not None
            columns = [
                torch.autograd.grad(entry, cotangent, retain_graph=True)[0]
                for entry in g.flatten().unbind()
            ]
            found[name] = torch.stack(columns, dim=1)
    return found
