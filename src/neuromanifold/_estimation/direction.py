"""The direction in which the Fisher information is largest, from products with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from neuromanifold.estimators import Exact
from neuromanifold.linalg import memory
from neuromanifold.structures import Gram, Implicit, Reducer, Source, Structure
from neuromanifold.structures._base import SWEEP_BYTES
from neuromanifold.structures.cost import load

__all__ = ["top_direction"]

MOST_ROWS = 2048
"""Samples times columns up to which all records are kept, whose products need no model."""
MOST_VECTORS = 16
"""Kept by the iteration, beside as many products."""
KEPT = 4
"""Of them, when it starts anew."""
MOST_PRODUCTS = 500


def top_direction(source: Source) -> tuple[Tensor, Tensor]:
    """A unit vector along which the Fisher matrix of these inputs is largest, and its shortfall.

    It is that of the exact output Fisher, so that labels that are drawn later are independent of
    it: along it their mean has no bias. An estimator that draws nothing has a matrix of its own.

    Returns:
        The vector `(P,)`, and by how much the value along it is too small, at most, in
        nats/parameter², both in the source's precision.
    """
    exact = replace(
        source,
        estimator=Exact() if source.estimator.random else source.estimator,
        generator=None,
        reducer=None,
        progress=None,
    )
    try:
        product = _products(exact, source.reducer)
    except ValueError as error:
        error.add_note(
            'quantity="eigenvalue" looks for the eigenvector by products with the exact matrix of '
            "these inputs, whatever the estimator is."
        )
        raise
    start = torch.randn(
        1,
        source.plan.layout.num_parameters,
        generator=torch.Generator(source.device).manual_seed(0),  # the same in all processes
        dtype=source.dtype,
        device=source.device,
    )
    return _largest(product, start)


def _structure(source: Source) -> Structure:
    """Records of all samples where they are few; the model itself where they are many."""
    batch, _ = source.data.peek()
    loaded = load(source, batch, memory.available(source.device))
    rows = (source.data.num_batches or math.inf) * batch.num_samples * loaded.sweeps
    small = rows <= MOST_ROWS and 4 * rows * loaded.sweep_numel <= SWEEP_BYTES
    return Gram() if small else Implicit()


def _products(exact: Source, reducer: Reducer | None) -> Callable[[Tensor], Tensor]:
    """Products with rows `(R, P)` of the matrix of the data of all processes."""
    F = _structure(exact).build(exact)

    def product(rows: Tensor) -> Tensor:
        total = F._matmat(rows) * F.num_samples
        counted = replace(exact, reducer=reducer, num_samples=F.num_samples)
        counted.reduce([total])
        return total / counted.num_samples

    return product


def _largest(product: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvector of the largest eigenvalue, and a bound on what its own value falls short.

    Each step takes the residual of the best vector into the basis, which spans what a Lanczos
    iteration does. As it is kept orthogonal and its images are kept too, it may start anew from its
    best vectors (Davidson, J. Comput. Phys. 17, 1975; Parlett, The symmetric eigenvalue problem).
    """
    basis = start / start.norm()
    images = product(basis)
    tolerance = torch.finfo(start.dtype).eps ** 0.5
    for _ in range(MOST_PRODUCTS):
        projected = basis @ images.T
        values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
        best, image = vectors[:, -1] @ basis, vectors[:, -1] @ images
        residual = image - values[-1] * best
        if bool(residual.norm() <= tolerance * values[-1]) or len(basis) == start.shape[1]:
            break
        if len(basis) == MOST_VECTORS:
            kept = vectors[:, -KEPT:].T
            basis, images = kept @ basis, kept @ images
        for _ in range(2):  # once leaves what rounding makes of it
            residual = residual - (basis @ residual) @ basis
        step = (residual / residual.norm())[None]
        basis, images = torch.cat([basis, step]), torch.cat([images, product(step)])
    length, second = residual.norm(), values[-2] if len(values) > 1 else values.new_zeros(())
    if length == 0:
        return best, length
    # Parlett §4.5 and §11.7: no eigenvalue is farther than ‖r‖, nor than ‖r‖² over the gap.
    return best, torch.minimum(length, length.square() / (values[-1] - second))
