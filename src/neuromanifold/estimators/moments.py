"""What the variance of an estimated Fisher diagonal is made of (papers.md §3.2, §3.6)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuromanifold._typing import Params

__all__ = ["Moments"]


@dataclass(frozen=True)
class Moments:
    """Means over N samples, per parameter.

    Attributes:
        num_samples: N.
        information: of `I`.
        squared: of `I²`.
        quartic: of `Σ_c γ_c⁴`.
        cumulant: of `κ₄`, the fourth cumulant of a sampled score.
        cumulant_bound: of an upper bound on it; None if it was not asked for.
    """

    num_samples: int
    information: Params
    squared: Params
    quartic: Params
    cumulant: Params
    cumulant_bound: Params | None = None

    @property
    def between_samples(self) -> Params:
        """Variance of `I` between samples, unbiased."""
        n = self.num_samples
        scale = n / (n - 1) if n > 1 else torch.nan
        return {
            name: scale * (self.squared[name] - value.square()).clamp(min=0)
            for name, value in self.information.items()
        }

    @property
    def of_label(self) -> Params:
        """Mean over samples of the variance of a squared score: `E (j·z)⁴ − I²`."""
        return {
            name: _above_rounding(self.cumulant[name] + 2 * value, value)
            for name, value in self.squared.items()
        }

    @property
    def of_label_at_most(self) -> Params:
        """Upper bound on `of_label`."""
        assert self.cumulant_bound is not None
        return {
            name: (self.cumulant_bound[name] + 2 * value).clamp(min=0)
            for name, value in self.squared.items()
        }

    @property
    def of_signs(self) -> Params:
        """Mean over samples of the variance of one sweep with random signs."""
        return {
            name: _above_rounding(2 * (value - self.quartic[name]), value)
            for name, value in self.squared.items()
        }


def _above_rounding(variance: Tensor, squared: Tensor) -> Tensor:
    """A difference of sums as large as `squared`; zero where rounding could be all there is."""
    return torch.where(variance > 16 * torch.finfo(squared.dtype).eps * squared, variance, 0)
