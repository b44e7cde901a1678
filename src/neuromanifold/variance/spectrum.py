"""Error bars of what a Gram matrix says: trace, eigenvalues, effective dimension.

Every one of them is a function of the mean `F = (1/N) Σ_n F_n` of one matrix per sample. To first
order it moves by the mean of the samples' influences, so its variance is that of the influences
between samples over N. Samples draw their labels independently, so that the variance holds what
comes from the data and, for an estimator that draws, what comes from labels or probes.

Source: Hampel, The influence curve and its role in robust estimation, 1974.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuromanifold._estimate import Estimate
from neuromanifold.structures.gram import GramOperator

__all__ = ["effective_dimension", "eigenvalues", "trace"]


def trace(F: GramOperator) -> Estimate:
    """The trace with its standard error.

    Args:
        F: from `nm.fisher(..., nm.Gram())`.

    Returns:
        In nats/parameter²; the variance is from "samples".

    Raises:
        UnsupportedError: If F is a sum of measurements.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(4, 3), torch.randn(64, 4)
        >>> F = nm.fisher(model, nm.Categorical(), x, nm.Gram(), estimator=nm.Exact())
        >>> bool(nm.variance.trace(F).stderr > 0)
        True
    """
    return _estimate(F, F.trace(), F.gram.diagonal())


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
        UnsupportedError: If F is a sum of measurements.
    """
    if not 1 <= k <= F.num_rows:
        raise ValueError(f"k is from 1 to {F.num_rows}, the number of rows; got {k}.")
    values, vectors = F._eigh
    values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
    # Row r has √k Q along the eigenvector, F's eigenvectors being Û Q k^(−1/2).
    return _estimate(F, values, values * vectors.square())


def effective_dimension(F: GramOperator, *, damping: float) -> Estimate:
    """Directions that the data determine more strongly than the damping, `tr F (F + damping)⁻¹`.

    Args:
        F: from `nm.fisher(..., nm.Gram())`.
        damping: in nats/parameter².

    Returns:
        A number of directions; the variance is from "samples".

    Raises:
        ValueError: If the damping is not positive.
        UnsupportedError: If F is a sum of measurements.
    """
    if not damping > 0:
        raise ValueError(f"damping must be > 0 nats/parameter², got {damping}.")
    values, vectors = F._eigh
    # The derivative of k / (k + damping), times k for the rows' share of each direction.
    influence = values * damping / (values + damping).square()
    return _estimate(F, (values / (values + damping)).sum(), vectors.square() @ influence)


def _estimate(F: GramOperator, value: Tensor, rows: Tensor) -> Estimate:
    """From what each row contributes to the influence, `(R,)` or `(R, k)`."""
    n = F.num_samples
    influence = rows.new_zeros(n, *rows.shape[1:]).index_add_(0, F.sample_of_row, rows) * n
    variance = influence.var(dim=0) / n if n > 1 else torch.full_like(value, torch.inf)
    return Estimate(value, {"samples": variance}, num_samples=n)
