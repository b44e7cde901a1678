"""Squared signals that go back unit by unit.

Source: Ollivier, arXiv 1303.0818, the back-propagated metric.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neuromanifold.estimators._base import Estimator
from neuromanifold.likelihoods import Likelihood
from neuromanifold.likelihoods._base import rademacher

__all__ = ["BackPropagated"]


@dataclass(frozen=True)
class BackPropagated(Estimator):
    """The back-propagated metric, for structures without products of different units.

    As if the outputs of a layer were independent, given their inputs: the squared signals of its
    units are `D² = φ'² ∘ (W²)ᵀ D²` of the layer above, with the diagonal of the output Fisher at
    the top. Random signs at every output of every layer have this mean. The diagonal is that of
    the Fisher matrix in the last layer, and an approximation below: it is no estimator of F.

    Costs what sampled labels cost, with one probe.

    Example:
        >>> import torch, neuromanifold as nm
        >>> from torch.nn import Linear, Sequential, Tanh
        >>> model, x = Sequential(Linear(3, 4), Tanh(), Linear(4, 2)), torch.randn(8, 3)
        >>> estimator = nm.estimators.BackPropagated()
        >>> F = nm.fisher(model, nm.Categorical(), x, nm.QuasiDiagonal(), estimator=estimator)
    """

    probes: int = 1
    random = True
    independent_units = True

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise ValueError(f"BackPropagated needs at least 1 probe, got {self.probes}.")

    @property
    def draws(self) -> int:
        """Probes for each input."""
        return self.probes

    def cotangents(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor | None,
        *,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Roots of the output Fisher's diagonal, with random signs."""
        root = likelihood.fisher_diagonal(outputs).sqrt() / self.probes**0.5
        for _ in range(self.probes):
            signs = rademacher(root.shape, root, generator)
            yield likelihood.mask_cotangent(root * signs, outputs, targets)

    def num_sweeps(self, likelihood: Likelihood, outputs: Tensor) -> int:
        """Number of probes."""
        return self.probes
