"""The Monte-Carlo Fisher: scores of labels drawn from the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neuromanifold._typing import Params
from neuromanifold.estimators._base import Estimator
from neuromanifold.estimators.moments import Moments
from neuromanifold.likelihoods import Likelihood

__all__ = ["MonteCarlo"]


@dataclass(frozen=True)
class MonteCarlo(Estimator):
    """Unbiased: `samples` labels per input are drawn from the model, one sweep each.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(3, 4), torch.randn(8, 3)
        >>> rng = torch.Generator().manual_seed(0)
        >>> F = nm.fisher(model, nm.Categorical(), x, estimator=nm.MonteCarlo(2), generator=rng)
        >>> F.num_samples
        8
    """

    samples: int = 1
    random = True

    @property
    def draws(self) -> int:
        """Labels for each input."""
        return self.samples

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"MonteCarlo draws at least 1 label per input, got {self.samples}.")

    def cotangents(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor | None,
        *,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Scores of sampled labels, over the square root of their number."""
        for labels in likelihood.sample(outputs, self.samples, generator=generator):
            score = likelihood.score(outputs, labels)
            yield likelihood.mask_cotangent(score, outputs, targets) / self.samples**0.5

    def num_sweeps(self, likelihood: Likelihood, outputs: Tensor) -> int:
        """Number of labels per input."""
        return self.samples

    def noise(self, moments: Moments) -> dict[str, Params]:
        """Of sampled labels: `E (j·z)⁴ − I²`."""
        draws = moments.num_samples * self.samples
        return {"labels": {name: v / draws for name, v in moments.of_label.items()}}

    def noise_bounds(self, moments: Moments) -> dict[str, Params]:
        """Of sampled labels."""
        draws = moments.num_samples * self.samples
        return {"labels": {name: v / draws for name, v in moments.of_label_at_most.items()}}
