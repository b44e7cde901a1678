"""Symmetric matrices known by their products alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Product", "conjugate_gradients"]

Product = Callable[[Tensor], Tensor]
"""`v ↦ A v` for vectors `(P,)`."""


def conjugate_gradients(
    product: Product, v: Tensor, *, steps: int, precondition: Product | None = None
) -> Tensor:
    """About `A⁻¹ v` for a positive definite A: a fixed number of steps of conjugate gradients.

    Each step decreases `½ xᵀ A x − xᵀ v`, from zero at `x = 0`; P of them suffice but for rounding.
    Nothing is copied from the device to decide when to stop: once the residual is zero, the steps
    that are left change nothing. NaN or infinity in `v` or in a product gives NaN.

    Args:
        product: with A.
        v: right-hand side `(P,)`.
        steps: number of products.
        precondition: product with a positive definite matrix near `A⁻¹`.

    Returns:
        `(P,)`.

    Source: Hestenes and Stiefel, Journal of Research of the National Bureau of Standards 49 (1952).

    Example:
        >>> a, v = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([3.0, 4.0])
        >>> solution = conjugate_gradients(lambda x: a @ x, v, steps=2)
        >>> torch.allclose(solution, torch.ones(2))
        True
    """
    solution, residual = torch.zeros_like(v), v
    direction = torch.zeros_like(v)
    size = torch.zeros_like(v[:1].sum())
    for _ in range(steps):
        steepest = residual if precondition is None else precondition(residual)
        size, last_size = residual @ steepest, size
        direction = steepest + _ratio(size, last_size) * direction
        image = product(direction)
        length = _ratio(size, direction @ image)
        solution = solution + length * direction
        residual = residual - length * image
    return solution


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Zero where the denominator is; NaN stays NaN."""
    return torch.where(denominator == 0, 0, numerator / denominator)
