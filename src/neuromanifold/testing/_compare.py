"""How the checks compare: to rounding of a stated scale, or to standard errors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["STANDARD_ERRORS", "assert_close", "assert_mean", "rounding"]

STANDARD_ERRORS = 6.0
"""A right answer is further off once in five hundred million comparisons; a matrix makes many."""


def rounding(numel: int, dtype: torch.dtype) -> float:
    """Relative error that sums over `numel` rounded numbers may have, with a factor of ten."""
    return 10 * max(numel, 10) * torch.finfo(dtype).eps


def assert_close(name: str, got: Tensor, expected: Tensor, tolerance: float | Tensor) -> None:
    """The Frobenius norm of the difference is within an absolute tolerance; shapes are equal."""
    assert got.shape == expected.shape, (
        f"{name} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}."
    )
    error = torch.linalg.vector_norm(got.double() - expected.double())
    assert error <= tolerance, f"{name} is off by {error:.3g}; rounding allows {tolerance:.1g}."


def assert_mean(name: str, draws: Tensor, expected: Tensor, scale: Tensor) -> None:
    """The mean over axis 0 is as expected, within standard errors and the rounding of a scale."""
    stderr = draws.std(0) / len(draws) ** 0.5
    error = (draws.mean(0) - expected).abs()
    excess = (error / (stderr + rounding(len(draws), draws.dtype) * scale)).max()
    assert excess <= STANDARD_ERRORS, f"{name} is {excess:.1f} standard errors off."
