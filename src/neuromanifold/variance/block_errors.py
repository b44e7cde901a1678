"""How far the estimated matrix of each layer is from the true one, in Frobenius norm.

A sample's block is `I = Σ_c p_c p_cᵀ`, with p_c the block's gradient along column c of the output
Fisher. All that is needed of it is the Gram matrix `K_cc' = p_c · p_c'`, `(V, V)`:

* `‖I‖_F² = ‖K‖_F²` and `tr I = tr K`;
* a score `q = Σ_c w_c p_c` has `E ‖q qᵀ − I‖_F² = (tr K)² + ‖K‖_F² + κ₄`. The last term is the
  fourth cumulant of the score summed over pairs of entries, `Σ_ij κ₄(q_i, q_i, q_j, q_j)`:
  `Σ_c a_c K_cc² + (b/3) Σ_k ((tr K_kk)² + 2 ‖K_kk‖_F²)` with the coefficients of
  `Likelihood.column_cumulants`;
* random signs have -2 times `Σ_c K_cc²` in its place.

For one parameter these are the moments of the diagonal, so estimators tell their noise from them in
the same way: with `((tr K)² + ‖K‖_F²) / 2` in place of `I²`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neuromanifold._estimate import plain
from neuromanifold._fisher import requested
from neuromanifold._typing import Params
from neuromanifold.capture import Batch, Forward, Tape
from neuromanifold.errors import UnsupportedError, listed
from neuromanifold.estimators import Estimator, Exact, Moments, MonteCarlo
from neuromanifold.layers import Factored, Indexed, Record
from neuromanifold.likelihoods import ColumnCumulants, Likelihood
from neuromanifold.structures import Progress, Reducer, Source
from neuromanifold.structures._base import RECORD_NUMEL, require_finite
from neuromanifold.structures.rows import Rows, rows_of
from neuromanifold.variance.moments import column_batches

__all__ = ["BlockErrors", "blocks"]

LARGEST_MATRIX = 2048
"""Parameters of a block up to which its matrix is formed, to know the norm of the mean."""
CHUNK_ROWS = 2048
"""Samples times columns in one part of the Gram matrix that tells the norm of a larger block."""


@dataclass(frozen=True)
class BlockErrors:
    """Expected distance, in Frobenius norm, of each layer's estimated block from the true one.

    Attributes:
        norms: `‖I‖_F` by layer, of the block at the given inputs, in nats/parameter².
        squared: expected squared distance by source and layer: "labels" or "probes" from the block
            at the given inputs; "data" of that one from the block of all inputs.
        num_samples: N, inputs.
        draws: labels or probes for each input.
    """

    norms: Mapping[str, float]
    squared: Mapping[str, Mapping[str, float]]
    num_samples: int
    draws: int

    def error(self, source: str) -> dict[str, float]:
        """Root of the expected squared distance from one source, by layer.

        Raises:
            KeyError: If there is no such source; the message lists them.
        """
        if source not in self.squared:
            raise KeyError(f"no error from {source!r}; there is {list(self.squared)}")
        return {layer: value**0.5 for layer, value in self.squared[source].items()}

    def relative(self, source: str) -> dict[str, float]:
        """The error over the block's norm; 0 where both are zero.

        Raises:
            KeyError: If there is no such source; the message lists them.
        """
        return {
            layer: error / self.norms[layer] if error else 0.0
            for layer, error in self.error(source).items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; what is not finite is None."""
        numbers: dict[str, Any] = plain(
            {
                "norm": self.norms,
                "errors": {source: self.error(source) for source in self.squared},
                "relative": {source: self.relative(source) for source in self.squared},
                "num_samples": self.num_samples,
                "draws": self.draws,
            }
        )
        return numbers

    def __str__(self) -> str:
        width = max(len("(root)"), *map(len, self.norms))
        relative = {source: self.relative(source) for source in self.squared}
        lines = [
            f"Relative error of blocks ({self.num_samples} samples, {self.draws} draws each)",
            f"{'layer':<{width}}  {'norm':>9}" + "".join(f"  {name:>9}" for name in relative),
        ]
        lines += [
            f"{layer or '(root)':<{width}}  {norm:>9.3g}"
            + "".join(f"  {errors[layer]:>9.2%}" for errors in relative.values())
            for layer, norm in self.norms.items()
        ]
        return "\n".join(lines)


def blocks(
    model: nn.Module,
    likelihood: Likelihood,
    data: Any,
    *,
    estimator: Estimator | None = None,
    params: Iterable[str] | None = None,
    forward: Forward | None = None,
    uncovered: Literal["generic", "error"] = "generic",
    reducer: Reducer | None = None,
    progress: bool | Progress = False,
) -> BlockErrors:
    """How far an estimator's matrix of each layer is off, in Frobenius norm.

    Closed forms of the expected squared distance, not estimates from draws. No matrix over all
    parameters is formed; a layer with more than 2048 parameters has no matrix at all: its norm
    costs the square of the number of samples times columns instead. As errors fall with the number
    of samples in a known way (`squared` is proportional to 1/N), some hundreds are enough.

    Args:
        model: as for `nm.fisher`, like all that follow.
        likelihood: what the outputs mean; any but an `nm.FromDistribution` of infinite support.
        data: inputs, with or without targets.
        estimator: whose error is asked for; `nm.MonteCarlo(1)` by default.
        params: names or patterns of the parameters.
        forward: how the model is called.
        uncovered: what to do about parameters without a layer rule.
        reducer: sums over processes.
        progress: True shows a progress bar.

    Returns:
        Norms and errors by layer.

    Raises:
        UnsupportedError: If the likelihood or the estimator has no closed form, or, with a reducer,
            a layer has more than 2048 parameters: its norm is no sum over samples.
        ValueError: As `nm.fisher`.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(4, 3), torch.randn(256, 4)
        >>> one, nine = (
        ...     nm.variance.blocks(model, nm.Categorical(), x, estimator=nm.MonteCarlo(s))
        ...     for s in (1, 9)
        ... )
        >>> ratio = one.error("labels")[""] / nine.error("labels")[""]
        >>> round(ratio, 3)
        3.0
    """
    estimator = MonteCarlo(1) if estimator is None else estimator
    asked = requested(
        model,
        likelihood,
        data,
        estimator=estimator,
        params=params,
        forward=forward,
        uncovered=uncovered,
        reducer=reducer,
        progress=progress,
    )
    with asked as (_, source):
        sums, squared_norms, n = _measure(source)
    means = {name: {key: v / n for key, v in part.items()} for name, part in sums.items()}
    found = Moments(
        n,
        **{
            key: {name: mean[key] for name, mean in means.items()}
            for key in ("information", "squared", "quartic", "cumulant")
        },
    )
    variances = {"data": _between(means, squared_norms, n), **estimator.noise(found)}
    return BlockErrors(
        {name: float(value) ** 0.5 for name, value in squared_norms.items()},
        {
            origin: {name: float(value) for name, value in variance.items()}
            for origin, variance in variances.items()
        },
        n,
        estimator.draws,
    )


def _between(means: dict[str, dict[str, Tensor]], squared_norms: Params, n: int) -> Params:
    """Expected squared distance of the mean over n samples from that over all, unbiased."""
    if n == 1:  # one input says nothing of others
        return {name: torch.full_like(v, torch.inf) for name, v in squared_norms.items()}
    return {
        name: (means[name]["norm"] - value).clamp(min=0) / (n - 1)
        for name, value in squared_norms.items()
    }


def _measure(source: Source) -> tuple[dict[str, dict[str, Tensor]], Params, int]:
    """Sums over samples by block, the squared norms of the mean blocks, and N."""
    sums: dict[str, dict[str, Tensor]] = {}
    means: dict[str, _Mean] = {}
    _require_sums(source)
    source = replace(source, estimator=Exact())
    # Before the tape hooks the model: this runs the model on a tape of its own.
    batches = column_batches(source)
    with Tape(source.plan, source.forward, source.likelihood.canonical) as tape:
        for done, batch in enumerate(batches, start=1):
            columns, cumulants = _columns(source, tape, batch)
            for record in tape.records(columns):
                name = record.block.name
                total = sums.setdefault(name, {})
                for key, value in _sums(record, cumulants).items():
                    total[key] = total[key] + value if key in total else value
                means.setdefault(name, _Mean()).add(record)
            if source.progress is not None:
                source.progress(done, None)
    order = [block.name for block in source.plan.blocks]
    source.reduce([value for name in order for value in sums[name].values()])
    if source.reducer is not None:
        # The samples of all processes are counted once, above.
        replace(source).reduce([means[name].moment for name in order])
    require_finite(sums)
    n = source.num_samples
    return (
        {name: sums[name] for name in order},
        {name: means[name].squared_norm() / n**2 for name in order},
        n,
    )


def _require_sums(source: Source) -> None:
    """Refuse layers whose samples would have to be compared over processes."""
    large = [block.name for block in source.plan.blocks if block.num_parameters > LARGEST_MATRIX]
    if source.reducer is not None and large:
        raise UnsupportedError(
            f"The norms of the blocks of {listed(large)} compare all samples with each other, "
            f"which are not in one process: these layers have more than {LARGEST_MATRIX} "
            f"parameters. Measure some hundred inputs in one process, without reducer=..., or "
            f"other layers by params=[...]."
        )


def _columns(source: Source, tape: Tape, batch: Batch) -> tuple[Tensor, ColumnCumulants]:
    """All columns of a batch, `(V, N, ...)`, and the fourth cumulants along them."""
    outputs, targets = source.outputs(tape, batch)
    cumulants = source.likelihood.column_cumulants(outputs)
    if cumulants is None:
        raise UnsupportedError(
            f"{source.likelihood!r} has no closed form for the fourth moment of its score, so the "
            f"error of a block has none. Estimate it from draws: compare nm.fisher(...) with "
            f"several generators."
        )
    columns = source.estimator.cotangents(source.likelihood, outputs, targets)
    return torch.stack(list(columns)), cumulants


def _sums(record: Record, cumulants: ColumnCumulants) -> dict[str, Tensor]:
    """Sums over the samples of a record, each `()`."""
    total = torch.zeros(5, dtype=record.dtype, device=record.device)
    start = 0
    for part in record.split(RECORD_NUMEL, across_sweeps=False):
        samples = slice(start, start := start + part.num_samples)
        quartic = cumulants.quartic[:, samples].to(record.dtype).T
        total += _of_grams(_grams(part), replace(cumulants, quartic=quartic))
    keys = ("information", "norm", "squared", "quartic", "cumulant")
    return dict(zip(keys, total.unbind(), strict=True))


def _of_grams(k: Tensor, cumulants: ColumnCumulants) -> Tensor:
    """Of Gram matrices `k (N, V, V)`: trace, squared norm and the moments, summed, `(5,)`."""
    own = k.diagonal(dim1=1, dim2=2)  # (N, V)
    trace, entries = own.sum(dim=1), k.square()
    norm = entries.sum(dim=(1, 2))
    cumulant = (cumulants.quartic * own.square()).sum(dim=1)
    if cumulants.squared:
        group = cumulants.group
        traces = own.new_zeros(len(own), cumulants.num_groups).index_add_(1, group, own)
        norms = (entries * (group == group[:, None])).sum(dim=(1, 2))
        cumulant += cumulants.squared / 3 * (traces.square().sum(dim=1) + 2 * norms)
    squared = (trace.square() + norm) / 2
    quartic = own.square().sum(dim=1)
    return torch.stack([trace, norm, squared, quartic, cumulant]).sum(dim=1)


def _grams(record: Record) -> Tensor:
    """Inner products of each sample's gradients along the columns, `(N, V, V)`."""
    part = record.single
    if isinstance(part, Factored) and part.num_positions == 1:
        # (g a) · (g' a) = (g · g') (a · a): only lengths of inputs are needed.
        left = right = part.g * part.augmented.norm(dim=-1, keepdim=True)  # (V, G, N, 1, O)
    elif isinstance(part, Indexed):
        same = (part.indices[:, :, None] == part.indices[:, None]).to(part.g)  # (N, T, T)
        left, right = part.g[:, None], (same @ part.g)[:, None]
    else:
        left = right = record.per_sample()
    left, right = (side.permute(2, 0, 1, 3, 4).flatten(2) for side in (left, right))
    return left @ right.mT


class _Mean:
    """What tells the norm of a block's mean over samples: its matrix, or all of its gradients."""

    def __init__(self) -> None:
        self._moment: Tensor | None = None
        self._rows: list[Rows] = []

    def add(self, record: Record) -> None:
        if record.block.num_parameters <= LARGEST_MATRIX:
            for part in record.split(RECORD_NUMEL, whole=True):
                moment = part.block_moment()
                self._moment = moment if self._moment is None else self._moment + moment
            return
        step = max(CHUNK_ROWS // record.num_sweeps, 1)
        for start in range(0, record.num_samples, step):
            stop = min(start + step, record.num_samples)
            self._rows.append(rows_of(record.samples(start, stop)))

    @property
    def moment(self) -> Tensor:
        """Sum over samples of the block's matrix."""
        assert self._moment is not None
        return self._moment

    def squared_norm(self) -> Tensor:
        """Squared Frobenius norm of the sum over samples."""
        if self._moment is not None:
            return self._moment.square().sum()
        pairs = (
            (1 if i == j else 2) * self._rows[i].gram(self._rows[j]).square().sum()
            for i in range(len(self._rows))
            for j in range(i + 1)
        )
        return torch.stack(list(pairs)).sum()
