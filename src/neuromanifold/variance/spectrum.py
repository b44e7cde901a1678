"""Error bars of what a Gram matrix says: trace, norm, eigenvalues, effective dimension.

Each of them is a function of the mean `F = (1/N) Σ_n F_n` of one matrix per sample. To first
order it moves by the mean of the samples' influences, so its variance is that of the influences
between samples over N. Samples draw their labels independently, so that the variance holds what
comes from the data and, for an estimator that draws, what comes from labels or probes.

Source: Hampel, The influence curve and its role in robust estimation, 1974.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuromanifold._estimate import Estimate
from neuromanifold.errors import UnsupportedError
from neuromanifold.linalg import psd
from neuromanifold.operators import FisherOperator
from neuromanifold.structures.gram import GramOperator

__all__ = [
    "effective_dimension",
    "eigenvalues",
    "from_rows",
    "largest_eigenvalue",
    "leading",
    "norm",
    "of_samples",
    "share",
    "stable_rank",
    "trace",
]

TOGETHER = 2**20
"""Entries of eigenvectors that are multiplied at once."""

STEPS = 4
"""Of inverse iteration. Each divides the error by the gap over the shift, of half the digits."""


def trace(F: GramOperator) -> Estimate:
    """The trace with its standard error.

    Args:
        F: from `nm.fisher(..., nm.Gram())`.

    Returns:
        In nats/parameter²; the variance is from "samples".

    Raises:
        UnsupportedError: If F is a sum of measurements, or not by `nm.Gram`.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(4, 3), torch.randn(64, 4)
        >>> F = nm.fisher(model, nm.Categorical(), x, nm.Gram(), estimator=nm.Exact())
        >>> bool(nm.variance.trace(F).stderr > 0)
        True
    """
    _require_gram(F)
    return from_rows(F, F.trace(), F.gram.diagonal())


def share(part: GramOperator, F: GramOperator) -> Estimate:
    """The share of some parameters in the trace, with its standard error.

    Args:
        part: F restricted to them.
        F: from `nm.fisher(..., nm.Gram())`.

    Returns:
        In [0, 1], 0 if there is no information at all; the variance is from "samples".

    Raises:
        UnsupportedError: If F is a sum of measurements.
    """
    rows, of_part = F.gram.diagonal(), part.gram.diagonal()
    whole = rows.sum()
    value = torch.where(whole > 0, of_part.sum() / whole, 0)
    return from_rows(F, value, torch.where(whole > 0, (of_part - value * rows) / whole, 0))


def norm(F: GramOperator) -> Estimate:
    """The Frobenius norm with its standard error.

    Args:
        F: from `nm.fisher(..., nm.Gram())`.

    Returns:
        In nats/parameter²; the variance is from "samples".

    Raises:
        UnsupportedError: If F is a sum of measurements.
    """
    value = F.norm()
    # d‖F‖ = ⟨F, dF⟩ / ‖F‖, and a row has ûᵀ F û = ‖K_r‖² of the inner product.
    rows = F.gram.square().sum(dim=1)
    return from_rows(F, value, torch.where(value > 0, rows / value, 0))


def stable_rank(F: GramOperator) -> Estimate:
    """Trace over the largest eigenvalue, with its standard error: directions as long as the first.

    Args:
        F: from `nm.fisher(..., nm.Gram())`; not zero.

    Returns:
        A number of directions; the variance is from "samples".

    Raises:
        UnsupportedError: If F is a sum of measurements.
    """
    top, vector = _leading(F)
    value = F.trace() / top
    return from_rows(F, value, F.gram.diagonal() / top - value * vector.square())


def largest_eigenvalue(F: GramOperator, dense: Tensor | None = None) -> Estimate:
    """The largest eigenvalue with its standard error, without the other eigenvectors.

    Args:
        F: from `nm.fisher(..., nm.Gram())`.
        dense: F itself, `(P, P)`, where that is smaller than its Gram matrix.

    Returns:
        In nats/parameter²; the variance is from "samples", to first order as in `eigenvalues`.

    Raises:
        UnsupportedError: If F is a sum of measurements.
    """
    if dense is None:
        value, vector = _leading(F)
        return from_rows(F, value, value * vector.square())
    value, vector = leading(dense)
    return from_rows(F, value, F._project(vector[None]).squeeze(1).square())


def eigenvalues(F: GramOperator, k: int = 1) -> Estimate:
    """The k largest eigenvalues, each with its standard error to first order.

    The influence of a sample on an eigenvalue is what its own matrix has along the eigenvector. The
    largest ones are biased upwards when samples are few; that is not part of the error.

    Args:
        F: from `nm.fisher(..., nm.Gram())`.
        k: how many, at most R.

    Returns:
        `(k,)` in nats/parameter², in descending order; the variance is from "samples".

    Raises:
        ValueError: If there are not k of them.
        UnsupportedError: If F is a sum of measurements, or not by `nm.Gram`.
    """
    _require_gram(F)
    if not 1 <= k <= F.num_rows:
        raise ValueError(f"k is from 1 to {F.num_rows}, the number of rows; got {k}.")
    values, vectors = F._eigh
    values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
    # Row r has √k Q along the eigenvector, F's eigenvectors being Û Q k^(−1/2).
    return from_rows(F, values, values * vectors.square())


def effective_dimension(F: GramOperator, *, damping: float | Tensor) -> Estimate:
    """Directions that the data determine more strongly than the damping, `tr F (F + damping)⁻¹`.

    Where single samples determine directions of their own, influences are not enough: the error is
    that of leaving each sample out in turn (the jackknife), in closed form.

    Args:
        F: from `nm.fisher(..., nm.Gram())`.
        damping: in nats/parameter²; one, or several `(D,)`.

    Returns:
        A number of directions, for each damping; the variance is from "samples".

    Raises:
        ValueError: If a damping is not positive.
        UnsupportedError: If F is a sum of measurements, or not by `nm.Gram`.
    """
    _require_gram(F)
    dampings = torch.as_tensor(damping, dtype=torch.float64, device=F.device)
    if not bool((dampings > 0).all()):
        raise ValueError(f"damping must be > 0 nats/parameter², got {damping}.")
    values, n = _seen(F).double(), F.num_samples
    # Relative to the largest eigenvalue, whose square may be too small or too large for a number.
    scale = torch.where(values[-1] > 0, values[-1], 1)
    values, relative = values / scale, dampings.flatten() / scale
    kept = (values / (values + relative[:, None])).sum(dim=1)
    if n == 1:
        variance = torch.full_like(kept, torch.inf)
    else:
        left_out = _dimensions_left(F, values, relative * (n - 1) / n)
        variance = left_out.var(dim=1, correction=0) * (n - 1)
    kept, variance = (x.to(F.dtype).reshape(dampings.shape) for x in (kept, variance))
    return Estimate(kept, {"samples": variance}, num_samples=n)


def _require_gram(F: FisherOperator) -> None:
    if not isinstance(F, GramOperator):
        raise UnsupportedError(
            f"Error bars come from the samples that a Fisher matrix keeps, and {F!r} keeps none: "
            f"measure it by nm.fisher(..., nm.Gram())."
        )


def _seen(F: GramOperator) -> Tensor:
    """The eigenvalues of the Gram matrix, ascending, with zero for what is rounding."""
    values, _ = F._eigh
    return torch.where(values > F._cutoff * values[-1], values, 0)


def _dimensions_left(F: GramOperator, values: Tensor, dampings: Tensor) -> Tensor:
    """The effective dimension at each damping without each sample in turn, `(D, N)`.

    The eigenvalues `(R,)` and the dampings `(D,)` may be in any unit that is the same for both.

    F without the rows U of a sample, times N / (N − 1), has at N / (N − 1) times a damping the
    dimension `tr K (K + damping)⁻¹ − tr B⁻¹ C`, with the sample's blocks B of `(K + damping)⁻¹` and
    C of `K (K + damping)⁻² = (K + damping)⁻¹ − damping (K + damping)⁻²` (Woodbury).
    """
    _, vectors = F._eigh
    inverses = 1 / (values + dampings[:, None])  # (D, R)
    rows = F.sample_of_row.argsort(stable=True)
    counts = F.sample_of_row.bincount(minlength=F.num_samples)
    starts = counts.cumsum(dim=0) - counts
    lost = values.new_zeros(len(dampings), F.num_samples)
    for count in counts.unique().tolist():  # all the same but for batches of different lengths
        samples = (counts == count).nonzero().squeeze(1)
        for some in samples.split(max(TOGETHER // (count * len(rows)), 1)):
            own = starts[some, None] + torch.arange(count, device=rows.device)
            parts = vectors[rows[own]].double()  # (n, count, R)
            for i, damping in enumerate(dampings):
                scaled = parts * inverses[i]
                b = scaled @ parts.mT
                c = b - damping * (scaled @ scaled.mT)
                lost[i, some] = torch.linalg.solve(b, c).diagonal(dim1=1, dim2=2).sum(dim=1)
    return (values * inverses).sum(dim=1, keepdim=True) - lost


def leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The largest eigenvalue of a positive semi-definite `(n, n)`, and its eigenvector `(n,)`.

    By inverse iteration: all eigenvectors would take several times as long.
    """
    top = psd.eigenvalues(matrix)[-1]
    # Positive definite above the rounding of the largest eigenvalue, and singular but for that.
    eps = torch.finfo(matrix.dtype).eps
    shifted = -matrix
    shifted.diagonal().add_(top * (1 + max(eps**0.5, 4 * len(matrix) * eps)))
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if bool(failed):  # it is zero, or was rounded off
        values, vectors = psd.eigh(matrix)
        return values[-1], vectors[:, -1]
    # Any vector will do that is not orthogonal to the one wanted.
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(matrix), 1, generator=generator, dtype=torch.float64)
    vector = start.to(matrix)
    for _ in range(STEPS):
        vector = torch.cholesky_solve(vector, factor)
        vector /= vector.norm()
    return top, vector[:, 0]


def _leading(F: GramOperator) -> tuple[Tensor, Tensor]:
    if "_eigh" in F.__dict__:  # known already
        values, vectors = F._eigh
        return values[-1], vectors[:, -1]
    return leading(F.gram)


def from_rows(F: GramOperator, value: Tensor, rows: Tensor) -> Estimate:
    """A value with the error that follows from the influence of each row on it.

    Args:
        F: whose rows these are.
        value: what they influence, `(...)`.
        rows: what each adds to the influence of its sample, `(R, ...)`, but for a constant.

    Returns:
        The variance is from "samples", infinite if there is only one.

    Raises:
        UnsupportedError: If F is a sum of measurements.
    """
    n = F.num_samples
    influence = of_samples(F, rows).double()  # their squares may be small
    variance = influence.var(dim=0) / n if n > 1 else torch.full_like(value, torch.inf)
    return Estimate(value, {"samples": variance}, num_samples=n)


def of_samples(F: GramOperator, rows: Tensor) -> Tensor:
    """Sums `(N, ...)` over the rows `(R, ...)` of each sample, times N: its own, not its share."""
    total = rows.new_zeros(F.num_samples, *rows.shape[1:])
    return total.index_add_(0, F.sample_of_row, rows) * F.num_samples
