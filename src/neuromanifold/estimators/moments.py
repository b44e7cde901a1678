"""What the variance of an estimated Fisher diagonal is made of (papers.md §3.2, §3.6)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
    """

    num_samples: int
    information: Params
    squared: Params
    quartic: Params
    cumulant: Params

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
            name: (self.cumulant[name] + 2 * value).clamp(min=0)
            for name, value in self.squared.items()
        }

    @property
    def of_signs(self) -> Params:
        """Mean over samples of the variance of one sweep with random signs."""
        return {
            name: 2 * (value - self.quartic[name]).clamp(min=0)
            for name, value in self.squared.items()
        }
