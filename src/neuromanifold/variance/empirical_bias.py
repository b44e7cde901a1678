"""How far the empirical Fisher is from the true one: its bias, with an error bar.

With the residual `z` of the data's label, the empirical Fisher averages `Jᵀ z zᵀ J`, the true one
`Jᵀ Σ J`. If labels come from a distribution q of their own, with covariance `Σ_q` and mean off by
d, their difference is `Jᵀ (d dᵀ + Σ_q − Σ) J` on average: a misfit term plus a covariance gap
(papers.md §3.5).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neuromanifold._estimate import Estimate
from neuromanifold._fisher import requested
from neuromanifold._intervals import plus_minus
from neuromanifold._typing import Params
from neuromanifold.capture import Forward, Tape
from neuromanifold.estimators import Empirical, Exact
from neuromanifold.layers import Factored, Record
from neuromanifold.likelihoods import Likelihood
from neuromanifold.linalg import psd
from neuromanifold.structures import Progress, Reducer, Source
from neuromanifold.structures._base import RECORD_NUMEL, require_finite
from neuromanifold.variance.moments import column_batches

__all__ = ["Bias", "empirical"]


@dataclass(frozen=True)
class Bias:
    """The diagonal of the empirical Fisher beside that of the true one, on the same inputs.

    Errors are paired: both are measured on the same samples, so what varies between inputs and is
    common to both cancels. They tell how far the numbers are from those of all inputs and labels,
    of which the data are a sample.

    Attributes:
        empirical: diagonal of the empirical Fisher, in nats/parameter².
        true: diagonal of the Fisher.
        difference: empirical less true, with its error.
        traces: by layer, the trace of the empirical Fisher, and that of the Fisher.
        ratios: by layer, the first over the second, with its error; 1 where there is no bias, NaN
            for a layer without information.
        ratio: of the whole model's traces.
        num_samples: N.
    """

    empirical: Params
    true: Params
    difference: Estimate
    traces: Mapping[str, tuple[float, float]]
    ratios: Mapping[str, Estimate]
    ratio: Estimate
    num_samples: int

    @property
    def decomposition(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Between which ends the two terms of the bias lie, as traces by layer.

        The residual of one label per input shows `d dᵀ + Σ_q`, and only that sum: noise of the
        labels and misfit of the model look the same. What is certain is that neither is negative.

        Returns:
            "misfit": of `Jᵀ d dᵀ J`, from 0 (the model's means are right) to the empirical trace
            (labels have no noise). "covariance": of `Jᵀ (Σ_q − Σ) J`, from minus the true trace
            (no noise) to the whole difference (means are right). Their sum is the difference, so
            one end of the one belongs to the other end of the other. All are estimates from a
            sample, with errors like that of the difference.
        """
        return {
            "misfit": {layer: (0.0, e) for layer, (e, _) in self.traces.items()},
            "covariance": {layer: (-t, e - t) for layer, (e, t) in self.traces.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "ratio": self.ratio.to_dict(),
            "layers": {
                layer: {"empirical": e, "true": t, "ratio": self.ratios[layer].to_dict()}
                for layer, (e, t) in self.traces.items()
            },
            "decomposition": {
                term: {layer: list(ends) for layer, ends in by_layer.items()}
                for term, by_layer in self.decomposition.items()
            },
            "difference": self.difference.to_dict(),
            "num_samples": self.num_samples,
        }

    def __str__(self) -> str:
        width = max(len("(root)"), *map(len, self.ratios))
        lines = [
            f"The empirical trace is {_number(self.ratio)} times the true one "
            f"({self.num_samples} samples). By layer:"
        ]
        lines += [
            f"{layer or '(root)':<{width}}  {_number(ratio)}"
            for layer, ratio in self.ratios.items()
        ]
        return "\n".join(lines)


def _number(ratio: Estimate) -> str:
    value, stderr = ratio.value, ratio.stderr
    assert isinstance(value, Tensor)
    assert isinstance(stderr, Tensor)
    return plus_minus(float(value), float(stderr))


def empirical(
    model: nn.Module,
    likelihood: Likelihood,
    data: Any,
    *,
    params: Iterable[str] | None = None,
    forward: Forward | None = None,
    uncovered: Literal["generic", "error"] = "generic",
    reducer: Reducer | None = None,
    progress: bool | Progress = False,
) -> Bias:
    """How far the empirical Fisher is from the Fisher: look at this before using `nm.Empirical()`.

    A ratio of 1 does not say that the model is right: noise that is too small and a misfit can
    make up for each other. A ratio far from 1 says that the empirical Fisher is another matrix:
    near 0 where the model fits its labels exactly, large where it is sure and wrong.

    With one label per input, misfit and noise of the labels cannot be told apart, except within the
    ends of `Bias.decomposition`; that takes two labels for the same input, or knowing that labels
    have no noise.

    The cost is that of `nm.Exact()` and one sweep.

    Args:
        model: as for `nm.fisher`, like all that follow.
        likelihood: what the outputs mean.
        data: inputs with targets.
        params: names or patterns of the parameters.
        forward: how the model is called.
        uncovered: what to do about parameters without a layer rule.
        reducer: sums over processes.
        progress: True shows a progress bar.

    Returns:
        Both diagonals, their difference, and the ratio of traces by layer.

    Raises:
        ValueError: As `nm.fisher`, and if there are no targets.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(4, 2), torch.randn(512, 4)
        >>> y = model(x).detach() + 3 * torch.randn(512, 2)  # noise of variance 9 instead of 1
        >>> bias = nm.variance.empirical(model, nm.Gaussian(), (x, y))
        >>> bool((bias.ratio.value - 9).abs() < 5 * bias.ratio.stderr)
        True
    """
    asked = requested(
        model,
        likelihood,
        data,
        estimator=Empirical(),
        params=params,
        forward=forward,
        uncovered=uncovered,
        reducer=reducer,
        progress=progress,
    )
    with asked as (_, source):
        means, traces, whole = _measure(source)
        n = source.num_samples
    difference = means["difference"]
    variance = {
        name: _of_mean(square - difference[name].square(), n)
        for name, square in means["squared"].items()
    }
    return Bias(
        {name: value + difference[name] for name, value in means["information"].items()},
        means["information"],
        Estimate(difference, {"data": variance}, num_samples=n),
        {layer: _pair(moments[:, 0]) for layer, moments in traces.items()},
        {layer: _ratio(moments, n) for layer, moments in traces.items()},
        _ratio(whole, n),
        n,
    )


def _pair(pair: Tensor) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])


def _of_mean(mean_square: Tensor, n: int) -> Tensor:
    """Variance of a mean of n, from their mean square about it."""
    if n == 1:  # one sample says nothing of others
        return torch.full_like(mean_square, math.inf)
    return mean_square.clamp(min=0) / (n - 1)


def _ratio(moments: Tensor, n: int) -> Estimate:
    """Of two means, from first and second moments `(2, 3)`, `[mean | mean of the outer product]`.

    The error is that of `Σ (e − r t) / Σ t` to first order.
    """
    above, below = moments[:, 0].unbind()
    ratio = above / below
    weights = torch.stack([torch.ones_like(ratio), -ratio]) / below
    rest = weights @ moments[:, 1:] @ weights
    return Estimate(ratio, {"data": _of_mean(rest, n)}, num_samples=n)


def _measure(source: Source) -> tuple[dict[str, Params], dict[str, Tensor], Tensor]:
    """Means over samples by parameter; moments of the two traces by layer, and of their sums."""
    layout = source.plan.layout
    sums: dict[str, dict[str, Tensor]] = {}
    names = [block.name for block in source.plan.blocks]
    traces = torch.zeros(len(names) + 1, 2, 3, dtype=torch.float64, device=source.device)
    exact = Exact()
    batches = column_batches(replace(source, estimator=exact))
    with Tape(source.plan, source.forward, source.likelihood.canonical) as tape:
        for done, batch in enumerate(batches, start=1):
            outputs, targets = source.outputs(tape, batch)
            given = (source.likelihood, outputs, targets)
            # The score at the data's labels first, then the columns of the output Fisher.
            cotangents = [*source.estimator.cotangents(*given), *exact.cotangents(*given)]
            pairs: dict[str, Tensor] = {}
            for record in tape.records(torch.stack(cotangents)):
                name, parts = record.block.name, []
                for part, of_samples in _sums(record):
                    parts.append(of_samples)
                    total = sums.setdefault(name, part)
                    if total is not part:
                        for key, value in part.items():
                            total[key] += value
                pairs[name] = torch.cat(parts, dim=1)
            of_layers = torch.stack([pairs[name] for name in names]).double()
            traces += _moments(torch.cat([of_layers, of_layers.sum(dim=0, keepdim=True)]))
            if source.progress is not None:
                source.progress(done, None)
    source.reduce([traces, *(value for name in names for value in sums[name].values())])
    require_finite(sums)
    means = {}
    for key in ("information", "difference", "squared"):
        row = torch.empty(1, layout.num_parameters, dtype=source.dtype, device=source.device)
        for block in source.plan.blocks:
            block.write(sums[block.name][key][None], row, layout)
        means[key] = layout.unflatten(row[0] / source.num_samples)
    *by_layer, whole = (traces / source.num_samples).unbind()
    return means, dict(zip(names, by_layer, strict=True)), whole


def _moments(pairs: Tensor) -> Tensor:
    """Sums over samples of pairs `(..., 2, N)` and of their outer products, `(..., 2, 3)`."""
    return torch.cat([pairs.sum(dim=-1, keepdim=True), pairs @ pairs.mT], dim=-1)


def _sums(record: Record) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Parts of the samples: sums over them, each `(G, O, I)`, and their traces `(2, n)`."""
    for some in record.split(RECORD_NUMEL, across_sweeps=False):
        part = some.single
        if isinstance(part, Factored) and part.num_positions == 1:
            # Squares of g a are products of squares, so sums over samples are matrix products.
            squares = part.g.squeeze(3).square()  # (1 + V, G, n, O)
            weights = part.augmented.squeeze(2).square()  # (G, n, I)
        else:
            squares, weights = some.per_sample().square(), None
        information = squares[1:].sum(dim=0)  # (G, n, ...)
        difference = squares[0] - information
        yield (
            {
                "information": _summed(information, weights),
                "difference": _summed(difference, weights),
                "squared": _summed(
                    difference.square(), None if weights is None else weights.square()
                ),
            },
            torch.stack([_traces(squares[0], weights), _traces(information, weights)]),
        )


def _summed(values: Tensor, weights: Tensor | None) -> Tensor:
    """Over samples: `(G, n, O, I)`, or `(G, n, O)` times weights `(G, n, I)`."""
    if weights is None:
        return values.sum(dim=1)
    out = psd.aligned_empty(values, len(values), values.shape[2], weights.shape[2])
    return psd.product(values.mT, weights, out)


def _traces(values: Tensor, weights: Tensor | None) -> Tensor:
    """Of each sample, `(n,)`."""
    if weights is None:
        return values.sum(dim=(0, 2, 3))
    return (values.sum(dim=2) * weights.sum(dim=2)).sum(dim=0)
