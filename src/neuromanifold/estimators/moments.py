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
        cumulant: of `κ₄`, the fourth cumulant of a sampled score.
        quartic: of `Σ_c γ_c⁴`; None if the output Fisher has no columns.
        cumulant_bound: of an upper bound on it; None if it was not asked for, or there is none.
        label_variance: of the variance that a sample's `κ₄ + 2 I²` has because it is measured from
            sampled labels; None if it is exact.
        information_variance: of the variance of `I` for the same reason; None if it is exact.
    """

    num_samples: int
    information: Params
    squared: Params
    cumulant: Params
    quartic: Params | None = None
    cumulant_bound: Params | None = None
    label_variance: Params | None = None
    information_variance: Params | None = None

    @property
    def between_samples(self) -> Params:
        """Variance of `I` between samples, unbiased."""
        n = self.num_samples
        scale = n / (n - 1) if n > 1 else torch.nan
        squares = {name: value.square() for name, value in self.information.items()}
        if self.information_variance is not None:  # the square of a measured mean is too large
            squares = {
                name: square - self.information_variance[name] / n
                for name, square in squares.items()
            }
        return {
            name: scale * (self.squared[name] - value).clamp(min=0)
            for name, value in squares.items()
        }

    @property
    def of_label(self) -> Params:
        """Mean over samples of the variance of a squared score: `E (j·z)⁴ − I²`."""
        return {
            name: _above_rounding(self.cumulant[name] + 2 * value, value)
            for name, value in self.squared.items()
        }

    @property
    def label_error(self) -> Params | None:
        """Standard error of `of_label`; None if it is exact."""
        if self.label_variance is None:
            return None
        return {name: (v / self.num_samples).sqrt() for name, v in self.label_variance.items()}

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
        assert self.quartic is not None
        return {
            name: _above_rounding(2 * (value - self.quartic[name]), value)
            for name, value in self.squared.items()
        }


def _above_rounding(variance: Tensor, squared: Tensor) -> Tensor:
    """A difference of sums as large as `squared`; zero where rounding could be all there is."""
    return torch.where(variance > 16 * torch.finfo(squared.dtype).eps * squared, variance, 0)
