"""The empirical Fisher: scores at the labels of the data. It is not the Fisher."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from neuromanifold.estimators._base import Estimator
from neuromanifold.likelihoods import Likelihood

__all__ = ["Empirical"]


class Empirical(Estimator):
    """Biased: the labels of the data stand in for labels of the model.

    Equals the Fisher on average only where the model's conditional distribution is the true one.

    Example:
        >>> import torch, neuromanifold as nm
        >>> data = torch.randn(8, 3), torch.randint(4, (8,))
        >>> F = nm.fisher(
        ...     torch.nn.Linear(3, 4), nm.Categorical(), data, estimator=nm.Empirical()
        ... )
        >>> F.num_parameters
        16
    """

    random = False
    needs_targets = True

    def __repr__(self) -> str:
        return "Empirical()"

    def cotangents(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor | None,
        *,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """The score at the data's labels."""
        if targets is None:
            raise ValueError(
                "The empirical Fisher needs the labels of the data: pass (inputs, targets) instead "
                "of inputs alone, or use MonteCarlo(), which draws labels from the model."
            )
        score = likelihood.score(outputs, targets)
        yield likelihood.mask_cotangent(score, outputs, targets)

    def num_sweeps(self, likelihood: Likelihood, outputs: Tensor) -> int:
        """One."""
        return 1
