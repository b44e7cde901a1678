"""Second derivatives of what a model gives for a batch.

Along a direction they come from forward mode over forward mode, for all outputs at once. In a
linear layer that each sample uses once, the outputs depend on the weights of a unit through its
pre-activation s alone: `∂²/∂W_oi ∂W_pj = a_i a_j ∂²/∂s_o ∂s_p`, so that O directions are enough.
Products with all second derivatives of a number come from forward mode over reverse mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap

from neuromanifold._typing import Params
from neuromanifold.capture.kernels import differentiable_twice
from neuromanifold.capture.layout import Plan
from neuromanifold.capture.plain import PlainFunctions
from neuromanifold.errors import UnsupportedError, listed
from neuromanifold.layers import Factored, LinearRule, Record
from neuromanifold.linalg import Block, Layout

__all__ = [
    "OfParams",
    "along_entries",
    "curvature_matrix",
    "curved",
    "irregular",
    "products",
    "require_few",
    "shifted",
    "swapped_one",
    "twice",
    "unit_matrices",
    "used_once",
]

MOST_DIRECTIONS = 2**16
"""Parameters of a block whose second derivatives are taken one by one."""

OfParams = Callable[[Params], Tensor]
"""The outputs `(N, *K)` as a function of some parameters by name."""


@contextlib.contextmanager
def twice(model: nn.Module, parameters: Iterable[str], instead: str) -> Iterator[None]:
    """Set torch up to differentiate twice; say what to do about what it cannot transform."""
    try:
        with torch.no_grad(), differentiable_twice(model), PlainFunctions():
            yield
    except RuntimeError as error:
        known = ("forward AD", "saved tensor hooks", "data pointer", "jvp", "randomness")
        if not any(word in str(error) for word in known):
            raise
        raise UnsupportedError(
            f"The outputs cannot be differentiated twice in {listed(parameters)} "
            f"({str(error).splitlines()[0]}). Measure with params=... without them, or {instead}."
        ) from error


# ---- along directions ------------------------------------------------------------------------


def along_entries(
    function: Callable[[Any], Tensor], at: Tensor, together: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """`∂function/∂at_k` and `∂²function/∂at_k²` for the entries k, in groups `(R, N, *K)`."""
    for start in range(0, at.numel(), together):
        units = _units(start, min(start + together, at.numel()), at)
        yield vmap(partial(_along, function, at))(units.reshape(-1, *at.shape))


def _units(start: int, stop: int, like: Tensor) -> Tensor:
    """Unit vectors `(stop - start, numel)` along some entries."""
    entries = torch.arange(start, stop, device=like.device)
    units = like.new_zeros(len(entries), like.numel())
    units[entries - start, entries] = 1
    return units


def _along(function: Callable[[Any], Tensor], at: Any, direction: Any) -> tuple[Tensor, Tensor]:
    """First and second derivative of a function along a direction."""

    def slope(here: Any) -> Tensor:
        found: Tensor = jvp(function, (here,), (direction,))[1]
        return found

    first, second = jvp(slope, (at,), (direction,))[:2]
    return first, second


def curved(of_params: OfParams, parameters: Params, eps: float, instead: str) -> bool:
    """Whether the outputs have a second derivative in these parameters.

    Along one direction without regularities, `dᵀ H d` is zero only if H is. The look at its value
    saves a pass for every unit of the layer.

    Raises:
        UnsupportedError: If forward mode over forward mode is wrong for one of the operators, by
            comparison with forward mode over reverse mode.
    """
    directions = {name: irregular(p) for name, p in parameters.items()}
    outputs = of_params(parameters)
    slope, curvature = _along(of_params, parameters, directions)
    u = irregular(outputs)

    def contracted(params: Params) -> Tensor:
        return (of_params(params) * u).sum()

    turned = jvp(grad(contracted), (parameters,), (directions,))[1]
    expected = torch.stack([(turned[name] * d).sum() for name, d in directions.items()]).sum()
    rounding = eps**0.5 * (u.abs() * (curvature.abs() + eps**0.5 * slope.abs())).sum()
    if bool(((u * curvature).sum() - expected).abs() > rounding):
        raise UnsupportedError(
            f"Two ways to differentiate the outputs twice in {listed(parameters)} disagree: an "
            f"operator behind has a wrong derivative (an autograd.Function?). Measure with "
            f"params=... without them, or {instead}."
        )
    return bool((curvature != 0).any())


def irregular(like: Tensor) -> Tensor:
    """Numbers between -1 and 1 without a pattern, the same each time."""
    count = torch.arange(1, like.numel() + 1, device=like.device, dtype=torch.float64)
    return count.square().sin().reshape(like.shape).to(like.dtype)


# ---- products --------------------------------------------------------------------------------


def products(number: Callable[[Params], Tensor], at: Params, tangents: Params) -> Params:
    """`∂²number/∂θ² v` for R vectors, each entry `(R, ...)`."""
    slope = grad(number)
    try:
        found: Params = vmap(lambda v: jvp(slope, (at,), (v,))[1])(tangents)
    except NotImplementedError:  # an operator without forward mode; the matrix is symmetric
        pull = vjp(slope, at)[1]
        found = vmap(lambda v: pull(v)[0])(tangents)
    return found


def curvature_matrix(
    number: Callable[[Params], Tensor], at: Params, block: Block, layout: Layout, together: int
) -> Tensor:
    """`∂²number/∂θ²` in the parameters of a block, `(p, p)`, by products with unit vectors."""
    own = layout.restrict(block.parameters)
    p = own.num_parameters
    first = next(iter(at.values()))
    matrix = first.new_empty(p, p)
    for start in range(0, p, together):
        some = slice(start, min(start + together, p))
        units = _units(some.start, some.stop, first.new_empty(p))
        rows = torch.empty_like(units)
        block.write(units.unflatten(1, block.shape), rows, own)
        tangents = {
            name: rows[:, s].reshape(-1, *own.shapes[name]) for name, s in own.slices.items()
        }
        found = products(number, at, tangents)
        rows = torch.cat([found[name].reshape(len(units), -1) for name in own.names], dim=1)
        matrix[some] = block.read(rows, own).flatten(1)
    return (matrix + matrix.T).div_(2)


def unit_matrices(
    number: Callable[[Tensor], Tensor], at: Tensor, together: int
) -> Iterator[tuple[slice, Tensor]]:
    """`∂²number_n/∂s_no ∂s_np` for groups of units o, `(R, N, O)`, at `s (N, O)`.

    The number is a sum over samples, each of which depends on its own row of s.
    """
    for start in range(0, at.shape[1], together):
        some = slice(start, min(start + together, at.shape[1]))
        units = _units(some.start, some.stop, at[0])
        tangents = {"s": units[:, None].expand(-1, *at.shape)}
        yield some, products(lambda params: number(params["s"]), {"s": at}, tangents)["s"]


# ---- one layer, one parameter -----------------------------------------------------------------


def used_once(plan: Plan, record: Record) -> tuple[nn.Module, Tensor] | None:
    """The module of a linear layer that every sample uses once, and its inputs `ã (N, I)`."""
    part, ports = record.single, record.ports
    if (
        not isinstance(part, Factored)
        or part.num_positions != 1
        or len(record.calls) != 1
        or not isinstance(ports[0].rule, LinearRule)
        # A composite rule has its linear maps inside, where no hook shifts them.
        or ("" not in {port for _, port in plan.sites[record.block.name].ports})
    ):
        return None
    return ports[0].module, part.augmented[0, :, 0]


def shifted(of_params: OfParams, module: nn.Module, shift: Tensor) -> Tensor:
    """The outputs if what a module returns were shifted by `shift`, `(O,)` or `(N, O)`."""

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output + shift.to(output.dtype)

    handle = module.register_forward_hook(hook, prepend=True)
    try:
        return of_params({})
    finally:
        handle.remove()


def swapped_one(of_params: OfParams, name: str, value: Tensor) -> Tensor:
    """The outputs with another value of one parameter."""
    return of_params({name: value})


def require_few(block: Block, instead: str) -> None:
    """Refuse a block whose second derivatives would take too many passes."""
    if block.num_parameters > MOST_DIRECTIONS:
        raise UnsupportedError(
            f"The outputs are curved in {listed(block.parameters)}, which is no linear layer used "
            f"once per sample: its {block.num_parameters:,} second derivatives would take a pass "
            f"each, and there may be {MOST_DIRECTIONS:,}. Measure with params=... without it, or "
            f"{instead}."
        )
