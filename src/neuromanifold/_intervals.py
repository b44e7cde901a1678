"""Intervals in words and numbers; knows no tensor."""

from __future__ import annotations

import math
from statistics import NormalDist

__all__ = ["plus_minus", "quantile"]


def quantile(confidence: float) -> float:
    """How many standard errors to each side hold this share of a normal distribution.

    Raises:
        ValueError: If the confidence is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is between 0 and 1, such as 0.95; got {confidence}.")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def plus_minus(value: float, stderr: float) -> str:
    """A value to two digits of its error.

    Example:
        >>> plus_minus(1234.5678, 0.0321), plus_minus(1234.5678, 321.0), plus_minus(2.0, 0.0)
        ('1234.568 ± 0.032', '1230 ± 320', '2 ± 0')
    """
    if stderr == 0 or not math.isfinite(stderr):
        return f"{value:g} ± {stderr:g}"
    digits = 1 - math.floor(math.log10(stderr))
    if digits >= 0:
        return f"{value:.{digits}f} ± {stderr:.{digits}f}"
    return f"{round(value, digits):.0f} ± {round(stderr, digits):.0f}"
