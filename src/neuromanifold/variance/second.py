"""How sure the estimator made of second derivatives is (papers.md §3.2, type 2).

`Î2_ii = I_ii − z·η_i`, with z the score of a sampled label at the outputs h and
`η_i = ∂²h/∂θ_i²`, one number per output. What it adds to the exact diagonal averages to zero, and
has the variance `η_iᵀ Σ η_i`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neuromanifold._estimate import Estimate
from neuromanifold._fisher import requested
from neuromanifold._typing import Params
from neuromanifold.capture import (
    Batch,
    Forward,
    Tape,
    functional_model,
    require_function,
)
from neuromanifold.capture.curvature import (
    along_entries,
    curved,
    require_few,
    shifted,
    swapped_one,
    twice,
    used_once,
)
from neuromanifold.estimators import Exact, MonteCarlo
from neuromanifold.layers import Factored, Record
from neuromanifold.likelihoods import Likelihood
from neuromanifold.structures import Progress, Reducer, Source
from neuromanifold.structures._base import RECORD_NUMEL, require_finite
from neuromanifold.variance.moments import column_batches

__all__ = ["second_derivative"]

INSTEAD = "use nm.variance.diagonal(...) for an estimator made of first derivatives"


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
        with twice(plan.model, block.parameters, INSTEAD):
            if not curved(of_params, parameters, tape.eps, INSTEAD):
                continue
            layer = used_once(plan, record)
            if layer is not None:
                module, inputs = layer
                unit = partial(shifted, of_params, module)
                at = inputs.new_zeros(block.fan_out)
                derivatives = along_entries(unit, at, source.sweeps_together(numel))
                powers = inputs.square()
                of_label, drawn = _gathered(contract, derivatives)
                value = torch.stack([of_label @ powers.square(), drawn @ powers])
                block.write(value[:, None], sums[2:], layout)
                continue
            require_few(block, INSTEAD)
            for name, at in parameters.items():
                one = partial(swapped_one, of_params, name)
                together = source.sweeps_together(numel + 3 * at.numel())
                derivatives = along_entries(one, at, together)
                sums[2:, layout.slices[name]] = _gathered(contract, derivatives).sum(dim=2)
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


def _swapped(model: Callable[[Params, Any], Tensor], inputs: Any, params: Params) -> Tensor:
    """The outputs with other values of some parameters."""
    return model(params, inputs)


def _gathered(
    contract: Callable[[Tensor], Tensor], derivatives: Iterable[tuple[Tensor, Tensor]]
) -> Tensor:
    """Contractions of second derivatives that come in groups, `(2, entries, N)`."""
    return torch.cat([contract(second) for _, second in derivatives], dim=1)


def _contract(columns: Tensor, score: Tensor, eta: Tensor) -> Tensor:
    """`ηᵀ Σ η` and `z·η`, `(2, R, N)`, for columns `(V, N, E)` of Σ and scores z `(N, E)`."""
    rows = eta.reshape(*eta.shape[:2], -1).transpose(0, 1).to(score.dtype)  # (N, R, E)
    along = rows @ columns.permute(1, 2, 0)  # (N, R, V)
    return torch.stack([along.square().sum(dim=2).T, (rows @ score[..., None])[..., 0].T])
