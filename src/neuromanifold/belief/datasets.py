"""Binary data sets: two that are enumerated with their probabilities, and real digits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuromanifold._extras import require_extra

__all__ = ["BinaryDigits", "Patterns", "bars_and_stripes", "binarised_digits", "lines"]


@dataclass(frozen=True)
class Patterns:
    """A distribution over a list of binary patterns.

    Attributes:
        states: distinct patterns in coded values, `(S, n)`.
        probabilities: `(S,)`, which sum to 1.

    Example:
        >>> data = lines()
        >>> len(data.states), round(18 * float(data.probabilities.max()))
        (12, 2)
        >>> data.draw(32, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([32, 9])
    """

    states: Tensor
    probabilities: Tensor

    def draw(self, num: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Independent patterns, `(num, n)`."""
        return self.states[
            torch.multinomial(self.probabilities, num, replacement=True, generator=generator)
        ]

    @property
    def entropy(self) -> Tensor:
        """In nats: the mean log-likelihood that no model exceeds, times −1."""
        return -torch.special.xlogy(self.probabilities, self.probabilities).sum()

    def kl(self, log_likelihood: Tensor) -> Tensor:
        """KL divergence of a model from this distribution, in nats.

        Args:
            log_likelihood: of `states` under the model, `(S,)`.
        """
        return -self.entropy - (self.probabilities * log_likelihood).sum()


@dataclass(frozen=True)
class BinaryDigits:
    """Images of digits, in coded values.

    Attributes:
        train: `(N, 64)`.
        test: `(M, 64)`.
    """

    train: Tensor
    test: Tensor


def bars_and_stripes(
    side: int, *, coding: tuple[float, float] = (0, 1), dtype: torch.dtype | None = None
) -> Patterns:
    """All images of `side` × `side` pixels whose rows are all constant, or whose columns are.

    First an orientation is drawn, then each line with probability one half. So the empty and the
    full image are twice as probable as the others.

    Args:
        side: pixels of a side.
        coding: value of a pixel that is off, and of one that is on.
        dtype: of the patterns; torch's default if not given.

    Returns:
        2^(side+1) − 2 patterns, or 2 of a single pixel.

    Raises:
        ValueError: If the side is less than 1.

    Example:
        >>> len(bars_and_stripes(2).states)
        6
    """
    if side < 1:
        raise ValueError(f"side is a number of pixels, at least 1, got {side}.")
    on, counts = torch.cat(_oriented(side)).unique(dim=0, return_counts=True)
    return _patterns(on, counts, coding, dtype)


def lines(*, coding: tuple[float, float] = (0, 1), dtype: torch.dtype | None = None) -> Patterns:
    """The twelve images of 3 × 3 pixels with one or two full lines, all of one orientation.

    The six with columns have probability 2/18 each, the six with rows 1/18 (papers.md §5.3).

    Args:
        coding: value of a pixel that is off, and of one that is on.
        dtype: of the patterns; torch's default if not given.

    Example:
        >>> lines().states[0].view(3, 3)
        tensor([[1., 0., 0.],
                [1., 0., 0.],
                [1., 0., 0.]])
    """
    columns, rows = _oriented(3)
    some = (columns.sum(1) % 9 > 0).nonzero()[:, 0]  # neither none nor all of the lines
    weights = torch.tensor([2.0, 1.0]).repeat_interleave(len(some))
    return _patterns(torch.cat([columns[some], rows[some]]), weights, coding, dtype)


def binarised_digits(
    *,
    coding: tuple[float, float] = (0, 1),
    test_share: float = 0.2,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> BinaryDigits:
    """scikit-learn's 1,797 handwritten digits, 8 × 8 pixels, on where at least half full.

    Args:
        coding: value of a pixel that is off, and of one that is on.
        test_share: of the images, held out.
        generator: of the split into training and test images.
        dtype: of the images; torch's default if not given.

    Raises:
        UnsupportedError: If scikit-learn is not installed.
        ValueError: If the share is not between 0 and 1.

    Example:
        >>> digits = binarised_digits(generator=torch.Generator().manual_seed(0))
        >>> digits.train.shape, digits.test.shape
        (torch.Size([1438, 64]), torch.Size([359, 64]))
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share is a share of the images, in (0, 1), got {test_share}.")
    require_extra("demo", "sklearn")
    from sklearn.datasets import load_digits

    images = _coded(torch.from_numpy(load_digits().data >= 8), coding, dtype)
    order = torch.randperm(len(images), generator=generator)
    held_out = round(test_share * len(images))
    return BinaryDigits(train=images[order[held_out:]], test=images[order[:held_out]])


def _oriented(side: int) -> tuple[Tensor, Tensor]:
    """All images of full columns and all of full rows, `(2^side, side²)`, in the same order."""
    on = (torch.arange(2**side)[:, None] >> torch.arange(side)) & 1  # (2^side, side)
    columns = on[:, None, :].expand(-1, side, -1).flatten(1)
    rows = on[:, :, None].expand(-1, -1, side).flatten(1)
    return columns, rows


def _patterns(
    on: Tensor, weights: Tensor, coding: tuple[float, float], dtype: torch.dtype | None
) -> Patterns:
    states = _coded(on.bool(), coding, dtype)
    weights = weights.to(states.dtype)
    return Patterns(states, weights / weights.sum())


def _coded(on: Tensor, coding: tuple[float, float], dtype: torch.dtype | None) -> Tensor:
    low, high = coding
    return low + (high - low) * on.to(dtype or torch.get_default_dtype())
