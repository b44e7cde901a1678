"""Yes-or-no labels from logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Distribution, Independent

from neuromanifold._typing import Outputs
from neuromanifold.likelihoods._base import (
    at_least_float32,
    evenly,
    rademacher,
    random_device,
)
from neuromanifold.likelihoods._diagonal import DiagonalLikelihood

__all__ = ["Bernoulli"]


@dataclass(frozen=True, eq=False)
class Bernoulli(DiagonalLikelihood):
    """Independent yes-or-no labels: logits `(N, *K)`, targets 0 or 1 of the same shape.

    With `p = sigmoid(logit)` the output Fisher is `p (1 − p)` per entry.

    Example:
        >>> import torch
        >>> Bernoulli().score(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
        tensor([[ 0.5000, -0.5000]])
    """

    target_values: ClassVar[str] = "0 or 1 (round label probabilities, or draw labels from them)"

    def distribution(self, outputs: Outputs) -> Distribution:
        """Independent Bernoulli labels."""
        logits = at_least_float32(self.canonical(outputs))
        return Independent(TorchBernoulli(logits=logits, validate_args=False), logits.ndim - 1)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`y − p`."""
        p = at_least_float32(self.canonical(outputs).detach()).sigmoid()
        return (targets.to(p.dtype) - p).to(outputs.dtype)

    def sample(
        self, outputs: Outputs, num: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Labels 0 and 1 as floating-point numbers, `(num, N, *K)`."""
        p = at_least_float32(self.canonical(outputs).detach()).sigmoid()
        drawn_from = p.to(random_device(generator, p)).expand(num, *p.shape)
        return torch.bernoulli(drawn_from, generator=generator).to(p.device)

    def _even_targets(
        self, outputs: Tensor, num: int, generator: torch.Generator | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        p = at_least_float32(outputs).sigmoid()
        for labels in evenly(torch.stack((1 - p, p), dim=-1), num, generator):
            yield labels.to(p.dtype), rademacher(p.shape, p, generator)

    def _information(self, outputs: Tensor) -> Tensor:
        logits = at_least_float32(outputs)
        # Not p (1 − p): 1 − p would lose all its digits for a large logit.
        return logits.sigmoid() * (-logits).sigmoid()

    def _fourth_cumulants(self, outputs: Tensor, j: Tensor) -> Tensor:
        variance = self._information(outputs)
        return j**4 * variance * (1 - 6 * variance)
