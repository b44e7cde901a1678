"""Random signs on the columns of the output Fisher.

Source: Martens, Sutskever and Swersky, arXiv 1206.6464 (curvature propagation).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neuromanifold._typing import Params
from neuromanifold.estimators._base import Estimator
from neuromanifold.estimators.moments import Moments
from neuromanifold.likelihoods import Likelihood

__all__ = ["RandomSigns"]


@dataclass(frozen=True)
class RandomSigns(Estimator):
    """Unbiased: each sweep sends back all columns of the output Fisher at once, with random signs.

    Costs what sampled labels cost. Once a classifier is trained it varies far less; before, it may
    vary more (see `nm.variance.compare`).

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(3, 4), torch.randn(8, 3)
        >>> F = nm.fisher(model, nm.Categorical(), x, nm.Diagonal(), estimator=nm.RandomSigns())
        >>> sorted(F.diagonal())
        ['bias', 'weight']
    """

    probes: int = 1
    random = True

    @property
    def draws(self) -> int:
        """Probes for each input."""
        return self.probes

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise ValueError(f"RandomSigns needs at least 1 probe, got {self.probes}.")

    def cotangents(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor | None,
        *,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Signed sums of columns, over the square root of their number."""
        for u in likelihood.random_signs(outputs, self.probes, generator=generator):
            yield likelihood.mask_cotangent(u, outputs, targets) / self.probes**0.5

    def num_sweeps(self, likelihood: Likelihood, outputs: Tensor) -> int:
        """Number of probes."""
        return self.probes

    def noise(self, moments: Moments) -> dict[str, Params]:
        """Of random signs: `2 I² − 2 Σ_c γ_c⁴`."""
        self.require_columns(moments)
        draws = moments.num_samples * self.probes
        return {"probes": {name: v / draws for name, v in moments.of_signs.items()}}
