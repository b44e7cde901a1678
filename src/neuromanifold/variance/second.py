"""The estimator made of second derivatives, for the diagonal (papers.md §3.2, type 2).

`Î2_ii = I_ii − z·η_i`, with z the score of a sampled label at the outputs h and
`η_i = ∂²h/∂θ_i²`, one number per output. What it adds to the exact diagonal averages to zero, and
has the variance `η_iᵀ Σ η_i`.

A second derivative along a direction comes from forward mode over forward mode, for all outputs at
once. In a linear layer that each sample uses once, the outputs depend on the weights of a unit
through its pre-activation s alone: `∂²h/∂W_oi² = a_i² ∂²h/∂s_o²`, so that O directions are enough.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.overrides import TorchFunctionMode

from neuromanifold._estimate import Estimate
from neuromanifold._fisher import requested
from neuromanifold._typing import Params
from neuromanifold.capture import (
    Batch,
    Forward,
    Tape,
    differentiable_twice,
    functional_model,
    require_function,
)
from neuromanifold.errors import UnsupportedError, listed
from neuromanifold.estimators import Exact, MonteCarlo
from neuromanifold.layers import Factored, LinearRule, Record
from neuromanifold.likelihoods import Likelihood
from neuromanifold.linalg import Block
from neuromanifold.structures import Progress, Reducer, Source
from neuromanifold.structures._base import RECORD_NUMEL, require_finite
from neuromanifold.variance.moments import column_batches

__all__ = ["second_derivative"]

MOST_DIRECTIONS = 2**16
"""Parameters of a block whose second derivatives are taken one by one."""


def second_derivative(
    model: nn.Module,
    likelihood: Likelihood,
    data: Any,
    *,
    samples: int = 1,
    draw: bool = False,
    generator: torch.Generator | None = None,
    params: Iterable[str] | None = None,
    forward: Forward | None = None,
    uncovered: Literal["generic", "error"] = "generic",
    reducer: Reducer | None = None,
    progress: bool | Progress = False,
) -> Estimate:
    """The diagonal from second derivatives of sampled log-probabilities, and how far it is off.

    The estimate is `I_ii − z·η_i`, averaged over N inputs and their sampled labels: `I` the exact
    information, z the score of a label at the outputs, `η_i = ∂²outputs/∂θ_i²`. For outputs that
    are natural parameters (`nm.Categorical`, `nm.Bernoulli`, `nm.Poisson`, `nm.Gaussian`) this is
    the mean of `−∂² log p/∂θ_i²`; for other families it is that with the second derivative in the
    outputs replaced by its mean. Labels add the variance `mean(η_iᵀ Σ η_i) / (N samples)`, a closed
    form for every family. It is zero, and the estimate exact for the inputs, where the outputs are
    linear in the parameters of a layer: in the last layer, and in piecewise-linear networks.

    The cost: the exact diagonal; one pass for each block of parameters, which tells whether its
    second derivatives vanish; where they do not, for each unit of a linear layer that is used once
    per sample one pass, for each parameter of any other layer one pass. A pass is a forward pass
    with second-order tangents, about four times a forward pass, whatever the number of outputs.

    Args:
        model: as for `nm.fisher`, like all that follow.
        likelihood: what the outputs mean.
        data: inputs, with or without targets.
        samples: labels for each input, whose error is asked for.
        draw: draw those labels, and give the estimate made of them; by default, its mean, which is
            the exact diagonal. One that is drawn may be negative.
        generator: source of the labels.
        params: names or patterns of the parameters.
        forward: how the model is called.
        uncovered: what to do about parameters without a layer rule.
        reducer: sums over processes.
        progress: True shows a progress bar.

    Returns:
        Value and variances by parameter, in nats/parameter²: "data", because the inputs are a
        sample of all inputs, and "labels".

    Raises:
        UnsupportedError: If the model cannot be differentiated twice in forward mode, or is random,
            or a curved block other than a linear layer used once has more than 65,536 parameters.
        ValueError: As `nm.fisher`.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
        ... )
        >>> found = nm.variance.second_derivative(model, nm.Categorical(), torch.randn(32, 4))
        >>> bool((found.error("labels")["0.weight"] > 0).all())
        True
        >>> bool((found.error("labels")["2.weight"] == 0).all())
        True
    """
    asked = requested(
        model,
        likelihood,
        data,
        estimator=MonteCarlo(samples),
        params=params,
        forward=forward,
        uncovered=uncovered,
        reducer=reducer,
        generator=generator,
        progress=progress,
    )
    with asked as (_, source):
        source = replace(source, estimator=Exact())
        information, squared, of_label, drawn = _means(source, samples if draw else 0)
        n, layout = source.num_samples, source.plan.layout
        between = (squared - information.square()).clamp(min=0) / max(n - 1, 1)
        if n == 1:  # one input says nothing of others
            between = torch.full_like(between, torch.inf)
        return Estimate(
            layout.unflatten(information - drawn),
            {
                "data": layout.unflatten(between),
                "labels": layout.unflatten(of_label / (n * samples)),
            },
            num_samples=n,
            draws=samples,
        )


def _means(source: Source, samples: int) -> Tensor:
    """Means over inputs of `I`, `I²`, `ηᵀ Σ η` and `z·η`, `(4, P)`; z is zero without samples."""
    layout = source.plan.layout
    total = torch.zeros(4, layout.num_parameters, dtype=source.dtype, device=source.device)
    batches = column_batches(source)
    with Tape(source.plan, source.forward, source.likelihood.canonical) as tape:
        for done, batch in enumerate(batches, start=1):
            total += _of_batch(source, tape, batch, samples, first=done == 1)
            if source.progress is not None:
                source.progress(done, None)
    source.reduce([total])
    require_finite({name: {"": total[:, s]} for name, s in layout.slices.items()})
    return total / source.num_samples


def _of_batch(source: Source, tape: Tape, batch: Batch, samples: int, *, first: bool) -> Tensor:
    """Sums over the samples of a batch, `(4, P)`."""
    plan, likelihood, layout = source.plan, source.likelihood, source.plan.layout
    outputs, targets = source.outputs(tape, batch)
    if first:
        require_function(
            plan,
            source.forward,
            likelihood.canonical,
            batch,
            outputs,
            instead="nm.variance.diagonal(...) is about an estimator made of first derivatives, "
            "and needs no second pass.",
        )
    columns = torch.stack(list(source.estimator.cotangents(likelihood, outputs, targets)))
    score = torch.zeros_like(outputs)
    if samples:
        for labels in likelihood.sample(outputs, samples, generator=source.generator):
            score += likelihood.score(outputs, labels) / samples
        score = likelihood.mask_cotangent(score, outputs, targets)
    contract = partial(
        _contract,
        columns.reshape(*columns.shape[:2], -1).to(source.dtype),
        score.reshape(len(score), -1).to(source.dtype),
    )
    model = functional_model(plan, source.forward, likelihood.canonical)
    numel = 3 * tape.sweep_numel + outputs.numel() * (len(columns) + 3)
    sums = torch.zeros(4, layout.num_parameters, dtype=source.dtype, device=source.device)
    for record in tape.records(columns):
        block = record.block
        block.write(_information(record), sums[:2], layout)
        parameters = {name: plan.parameters[name].detach() for name in block.parameters}
        of_params = partial(_swapped, model, batch.inputs)
        with torch.no_grad(), differentiable_twice(), _PlainFunctions(), _explained(block):
            if not _curved(of_params, parameters, tape.eps):
                continue
            layer = _used_once(source, record)
            if layer is not None:
                module, inputs = layer
                shifted = partial(_shifted, model, batch.inputs, module)
                at = inputs.new_zeros(block.fan_out)
                etas = _second(shifted, at, source.sweeps_together(numel))
                powers = inputs.square()
                of_label, drawn = _gathered(contract, etas)
                value = torch.stack([of_label @ powers.square(), drawn @ powers])
                block.write(value[:, None], sums[2:], layout)
                continue
            _require_few(block)
            for name, at in parameters.items():
                one = partial(_swapped_one, of_params, name)
                etas = _second(one, at, source.sweeps_together(numel + 3 * at.numel()))
                sums[2:, layout.slices[name]] = _gathered(contract, etas).sum(dim=2)
    return sums


def _information(record: Record) -> Tensor:
    """Sums over samples of `I` and `I²`, `(2, G, O, I)`."""
    part = record.single
    if isinstance(part, Factored) and part.num_positions == 1:
        inputs = part.augmented.squeeze(2).square()  # (G, N, I)
        units = part.g.squeeze(3).square().sum(dim=0)  # (G, N, O)
        return torch.stack([units.mT @ inputs, units.square().mT @ inputs.square()])
    total = torch.zeros((2, *record.block.shape), dtype=record.dtype, device=record.device)
    for some in record.split(RECORD_NUMEL, across_sweeps=False):
        information = some.per_sample().square().sum(dim=0)  # (G, N, O, I)
        total[0] += information.sum(dim=1)
        total[1] += information.square().sum(dim=1)
    return total


def _used_once(source: Source, record: Record) -> tuple[nn.Module, Tensor] | None:
    """The module of a linear layer that every sample uses once, and its inputs `ã (N, I)`."""
    part, ports = record.single, record.ports
    if (
        not isinstance(part, Factored)
        or part.num_positions != 1
        or len(record.calls) != 1
        or not isinstance(ports[0].rule, LinearRule)
        # A composite rule has its linear maps inside, where no hook shifts them.
        or ("" not in {port for _, port in source.plan.sites[record.block.name].ports})
    ):
        return None
    return ports[0].module, part.augmented[0, :, 0]


def _require_few(block: Block) -> None:
    if block.num_parameters > MOST_DIRECTIONS:
        raise UnsupportedError(
            f"The outputs are curved in {listed(block.parameters)}, which is no linear layer used "
            f"once per sample: its {block.num_parameters:,} second derivatives would take a pass "
            f"each, and there may be {MOST_DIRECTIONS:,}. Measure with params=... without it, or "
            f"use nm.variance.diagonal(...) for an estimator made of first derivatives."
        )


# ---- second derivatives ----------------------------------------------------------------------


def _second(function: Callable[[Any], Tensor], at: Tensor, together: int) -> Iterator[Tensor]:
    """`∂²outputs/∂at_k²` for the entries k, in groups `(R, N, *K)`."""
    for start in range(0, at.numel(), together):
        entries = torch.arange(start, min(start + together, at.numel()), device=at.device)
        directions = at.new_zeros(len(entries), at.numel())
        directions[torch.arange(len(entries), device=at.device), entries] = 1
        yield vmap(partial(_along, function, at))(directions.reshape(-1, *at.shape))


def _along(function: Callable[[Any], Tensor], at: Any, direction: Any) -> Tensor:
    """Second derivative of a function along a direction."""

    def slope(here: Any) -> Tensor:
        found: Tensor = jvp(function, (here,), (direction,))[1]
        return found

    curvature: Tensor = jvp(slope, (at,), (direction,))[1]
    return curvature


def _curved(of_params: Callable[[Params], Tensor], parameters: Params, eps: float) -> bool:
    """Whether the outputs have a second derivative in these parameters.

    Along one direction without regularities, `dᵀ H d` is zero only if H is. The look at its value
    saves a pass for every unit of the layer.

    Raises:
        UnsupportedError: If forward mode over forward mode is wrong for one of the operators, by
            comparison with forward mode over reverse mode.
    """
    directions = {name: _irregular(p) for name, p in parameters.items()}
    outputs, slope = jvp(of_params, (parameters,), (directions,))[:2]
    curvature = _along(of_params, parameters, directions)
    u = _irregular(outputs)

    def contracted(params: Params) -> Tensor:
        return (of_params(params) * u).sum()

    turned = jvp(grad(contracted), (parameters,), (directions,))[1]
    expected = torch.stack([(turned[name] * d).sum() for name, d in directions.items()]).sum()
    rounding = eps**0.5 * (u.abs() * (curvature.abs() + eps**0.5 * slope.abs())).sum()
    if bool(((u * curvature).sum() - expected).abs() > rounding):
        raise UnsupportedError(
            f"Two ways to differentiate the outputs twice in {listed(parameters)} disagree: an "
            f"operator behind has a wrong derivative (an autograd.Function?). Measure with "
            f"params=... without them, or use nm.variance.diagonal(...) for an estimator made of "
            f"first derivatives."
        )
    return bool((curvature != 0).any())


def _irregular(like: Tensor) -> Tensor:
    """Numbers between -1 and 1 without a pattern, the same each time."""
    count = torch.arange(1, like.numel() + 1, device=like.device, dtype=torch.float64)
    return count.square().sin().reshape(like.shape).to(like.dtype)


def _gathered(contract: Callable[[Tensor], Tensor], etas: Iterable[Tensor]) -> Tensor:
    """Contractions of second derivatives that come in groups, `(2, entries, N)`."""
    return torch.cat([contract(eta) for eta in etas], dim=1)


def _contract(columns: Tensor, score: Tensor, eta: Tensor) -> Tensor:
    """`ηᵀ Σ η` and `z·η`, `(2, R, N)`, for columns `(V, N, E)` of Σ and scores z `(N, E)`."""
    rows = eta.reshape(*eta.shape[:2], -1).transpose(0, 1).to(score.dtype)  # (N, R, E)
    along = rows @ columns.permute(1, 2, 0)  # (N, R, V)
    return torch.stack([along.square().sum(dim=2).T, (rows @ score[..., None])[..., 0].T])


# ---- the model as a function -----------------------------------------------------------------

_Model = Callable[[Params, Any], Tensor]


def _swapped(model: _Model, inputs: Any, params: Params) -> Tensor:
    return model(params, inputs)


def _swapped_one(of_params: Callable[[Params], Tensor], name: str, value: Tensor) -> Tensor:
    return of_params({name: value})


def _shifted(model: _Model, inputs: Any, module: nn.Module, shift: Tensor) -> Tensor:
    """The outputs if what a module returns were shifted by `shift (O,)`."""

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output + shift.to(output.dtype)

    handle = module.register_forward_hook(hook, prepend=True)
    try:
        return model({}, inputs)
    finally:
        handle.remove()


class _PlainFunctions(TorchFunctionMode):
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


@contextlib.contextmanager
def _explained(block: Block) -> Iterator[None]:
    """Say what to do about what torch.func cannot transform."""
    try:
        yield
    except RuntimeError as error:
        known = ("forward AD", "saved tensor hooks", "data pointer", "jvp", "randomness")
        if not any(word in str(error) for word in known):
            raise
        raise UnsupportedError(
            f"The outputs cannot be differentiated twice in {listed(block.parameters)}, by forward "
            f"mode ({str(error).splitlines()[0]}). Measure with params=... without them, or use "
            f"nm.variance.diagonal(...) for an estimator made of first derivatives."
        ) from error
