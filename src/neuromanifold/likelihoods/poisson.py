"""Counts from log rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent
from torch.distributions import Poisson as TorchPoisson

from neuromanifold._typing import Outputs
from neuromanifold.likelihoods._base import at_least_float32, random_device
from neuromanifold.likelihoods._diagonal import DiagonalLikelihood

__all__ = ["Poisson"]


@dataclass(frozen=True, eq=False)
class Poisson(DiagonalLikelihood):
    """Independent counts: log rates `(N, *K)`, targets 0, 1, 2, … of the same shape.

    The output Fisher is the rate, per entry.

    Example:
        >>> import torch
        >>> Poisson().score(torch.zeros(1, 2), torch.tensor([[0.0, 3.0]]))
        tensor([[-1.,  2.]])
    """

    target_values: ClassVar[str] = "counts 0, 1, 2, …"

    def distribution(self, outputs: Outputs) -> Distribution:
        """Independent Poisson counts."""
        rate = at_least_float32(self.canonical(outputs)).exp()
        return Independent(TorchPoisson(rate, validate_args=False), rate.ndim - 1)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`y − rate`."""
        rate = at_least_float32(self.canonical(outputs).detach()).exp()
        return (targets - rate).to(outputs.dtype)

    def sample(
        self, outputs: Outputs, num: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Counts as floating-point numbers, `(num, N, *K)`."""
        rate = at_least_float32(self.canonical(outputs).detach()).exp()
        drawn_from = rate.to(random_device(generator, rate)).expand(num, *rate.shape)
        return torch.poisson(drawn_from, generator=generator).to(rate.device)

    def _information(self, outputs: Tensor) -> Tensor:
        return at_least_float32(outputs).exp()

    def _fourth_cumulants(self, outputs: Tensor, j: Tensor) -> Tensor:
        # Every cumulant of a Poisson variable is its rate.
        return j**4 * self._information(outputs)
