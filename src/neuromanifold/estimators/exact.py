"""The exact Fisher: every column of a square root of the output Fisher."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from neuromanifold._typing import Params
from neuromanifold.estimators._base import Estimator
from neuromanifold.estimators.moments import Moments
from neuromanifold.likelihoods import Likelihood

__all__ = ["Exact"]


class Exact(Estimator):
    """No sampling: one sweep per column of the output Fisher's square root.

    Costs C sweeps for C classes or entries, times the positions if the outputs have any.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
        >>> F = nm.fisher(model, nm.Gaussian(), x, nm.Dense(), estimator=nm.Exact())
        >>> F.shape
        (8, 8)
    """

    random = False

    def __repr__(self) -> str:
        return "Exact()"

    def cotangents(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor | None,
        *,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """The columns of the output Fisher's square root."""
        for column in likelihood.fisher_columns(outputs):
            yield likelihood.mask_cotangent(column, outputs, targets)

    def num_sweeps(self, likelihood: Likelihood, outputs: Tensor) -> int:
        """Number of columns."""
        return likelihood.num_columns(outputs)

    def noise(self, moments: Moments) -> dict[str, Params]:
        """None: nothing is drawn."""
        self.require_columns(moments)
        return {}

    def output_product(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor | None,
        v: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The output Fisher times `v`, in closed form instead of column by column."""
        product = likelihood.fisher_product(outputs, v)
        return likelihood.mask_cotangent(product, outputs, targets)
