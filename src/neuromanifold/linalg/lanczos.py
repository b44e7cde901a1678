"""Lanczos' iteration for symmetric matrices known by their products, and what it says of them.

Vectors are rows, as everywhere inside the library, and all of them go through one product.

Sources: Golub and Meurant, Matrices, Moments and Quadrature, 2010; Wu and Simon, SIAM Journal on
Matrix Analysis and Applications 22 (2000), for the thick restart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from neuromanifold.linalg import memory

__all__ = ["Pairs", "Products", "Tridiagonal", "largest", "require_fits", "tridiagonal"]

Products = Callable[[Tensor], Tensor]
"""Rows `(R, P)` to rows `(R, P)`, each times the matrix."""


@dataclass(frozen=True)
class Tridiagonal:
    """The matrix in the Krylov spaces of S vectors, `(S, m, m)`, by its diagonals.

    Attributes:
        diagonal: `(S, m)`.
        coupling: `(S, m)`, of each step with the next; the last with the step that was not taken.
    """

    diagonal: Tensor
    coupling: Tensor

    def gauss(self) -> tuple[Tensor, Tensor]:
        """Nodes `(S, m)`, ascending and not negative, and weights `(S, m)` that sum to one.

        `Σ w p(node)` is `xᵀ p(A) x / xᵀ x` for every polynomial p of degree up to 2 m − 1.
        """
        values, vectors = torch.linalg.eigh(_dense(self.diagonal, self.coupling[:, :-1]))
        return values.clamp(min=0), vectors[:, 0].square()

    def radau(self, end: float = 0.0) -> tuple[Tensor, Tensor]:
        """The same with m + 1 nodes, one of them prescribed: below the spectrum, `end` <= 0.

        For a function whose even derivatives are negative and whose odd ones are positive, such as
        `log(λ + damping)`, these nodes give a lower bound where `gauss` gives an upper one.
        """
        values, vectors = torch.linalg.eigh(_dense(self.diagonal, self.coupling[:, :-1]))
        # What rounding puts below zero must not reach the node.
        below = torch.finfo(values.dtype).eps * len(values.T) * values[:, -1:].abs()
        distance = values.clamp(min=0) - end + below.clamp(min=torch.finfo(values.dtype).tiny)
        last = self.coupling[:, -1]
        moved = end + last.square() * (vectors[:, -1].square() / distance).sum(dim=1)
        diagonal = torch.cat([self.diagonal, moved[:, None]], dim=1)
        values, vectors = torch.linalg.eigh(_dense(diagonal, self.coupling))
        return values.clamp(min=end), vectors[:, 0].square()


def _dense(diagonal: Tensor, beside: Tensor) -> Tensor:
    upper = torch.diag_embed(beside, offset=1)
    return torch.diag_embed(diagonal) + upper + upper.mT


def tridiagonal(product: Products, starts: Tensor, steps: int) -> Tridiagonal:
    """Lanczos' iteration from several vectors at once, with full reorthogonalisation.

    Where a Krylov space is exhausted before, the steps that are left add nodes of weight zero;
    nothing is copied from the device to find out.

    Args:
        product: with a symmetric matrix.
        starts: rows `(S, P)`, not zero.
        steps: m, products with each vector.

    Returns:
        In float64.

    Raises:
        TooLargeError: If the S · m vectors that are kept would not fit.

    Example:
        >>> values = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
        >>> nodes, weights = tridiagonal(lambda x: x * values, torch.ones(1, 3).double(), 3).gauss()
        >>> nodes.round(decimals=6), weights.round(decimals=6)  # doctest: +NORMALIZE_WHITESPACE
        (tensor([[1., 2., 4.]], dtype=torch.float64),
         tensor([[0.3333, 0.3333, 0.3333]], dtype=torch.float64))
    """
    num, size = starts.shape
    require_fits(num, steps, size, starts)
    basis = starts.new_empty(num, steps, size)
    diagonal = starts.new_empty(num, steps, dtype=torch.float64)
    coupling = torch.empty_like(diagonal)
    vectors = starts / torch.linalg.vector_norm(starts, dim=1, keepdim=True)
    largest = torch.zeros_like(diagonal[:, 0])
    rounding = torch.finfo(starts.dtype).eps * math.sqrt(size)
    for step in range(steps):
        basis[:, step] = vectors
        images = product(vectors)
        diagonal[:, step] = (vectors * images).sum(dim=1)
        known = basis[:, : step + 1]
        for _ in range(2):
            along = known @ images[..., None]
            images = images - (along.mT @ known).squeeze(1)
        lengths = torch.linalg.vector_norm(images, dim=1)
        largest = torch.maximum(largest, diagonal[:, step].abs() + lengths)
        alive = lengths > rounding * largest
        coupling[:, step] = torch.where(alive, lengths, 0)
        vectors = torch.where(alive[:, None], images / lengths[:, None], 0)
    return Tridiagonal(diagonal, coupling)


def require_fits(num: int, steps: int, size: int, like: Tensor) -> None:
    """Ask before vectors are drawn whether those that `tridiagonal` keeps will fit.

    Raises:
        TooLargeError: If not.
    """
    memory.require(
        num * steps * size * like.dtype.itemsize,
        like.device,
        what=f"Lanczos' iteration with {num} vectors of {size} numbers for {steps} steps",
        instead="Use fewer probes or steps.",
    )


@dataclass(frozen=True)
class Pairs:
    """Approximate eigenpairs, the largest first.

    Attributes:
        values: `(k + 1,)`, each at most the eigenvalue of its rank; one more than was asked for.
        vectors: orthonormal rows `(k, P)`.
        residuals: `(k + 1,)`, the norms of `A v − value v`, as the iteration has them.
        converged: whether all residuals but the last are as small as was asked for.
        products: how many vectors were multiplied.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: bool
    products: int


def largest(
    product: Products, start: Tensor, k: int, *, tol: float, capacity: int, most: int
) -> Pairs:
    """The largest eigenvalues of a positive semi-definite matrix, by block Lanczos.

    With a block of more than `k` random vectors, eigenvalues that are repeated or close together
    are found as often as they occur. When the basis is full, it is cut to the best directions
    (thick restart).

    Args:
        product: with the matrix.
        start: random rows `(B, P)`.
        k: how many eigenvalues.
        tol: residuals end below this, relative to the largest eigenvalue.
        capacity: vectors kept, at least `k + 1 + 2 B` and at most `P − B`.
        most: products after which to stop in any case.

    Raises:
        TooLargeError: If the basis would not fit.

    Example:
        >>> values = torch.linspace(0, 1, 101, dtype=torch.float64) ** 4
        >>> start = torch.randn(4, 101, dtype=torch.float64)
        >>> found = largest(lambda x: x * values, start, 2, tol=1e-6, capacity=20, most=2000)
        >>> torch.allclose(found.values[:2], values[-2:].flip(0))
        True
    """
    width, size = start.shape
    assert k + 1 + 2 * width <= capacity <= size - width
    memory.require(
        (capacity + 4 * width) * size * start.dtype.itemsize,
        start.device,
        what=f"A basis of {capacity} vectors of {size} numbers",
        instead="Ask for fewer eigenvalues.",
    )
    basis = start.new_empty(capacity, size)
    small = start.new_zeros(capacity, capacity, dtype=torch.float64)
    block = torch.linalg.qr(start.T)[0].T
    filled = products = 0
    while True:
        images = product(block)
        products += width
        basis[filled : filled + width] = block
        filled += width
        known, last = basis[:filled], slice(filled - width, filled)
        along = known @ images.T
        images = torch.addmm(images, along.T, known, alpha=-1)
        again = known @ images.T
        images.addmm_(again.T, known, alpha=-1)
        along = (along + again).double()
        small[:filled, last] = along
        small[last, :filled] = along.T
        small[last, last] = (along[last] + along[last].T) / 2
        block, coupling = _next(images, known, small[:filled, :filled].abs().amax())
        values, vectors = (x.flip(-1) for x in torch.linalg.eigh(small[:filled, :filled]))
        residuals = torch.linalg.vector_norm(coupling @ vectors[last], dim=0)
        enough = filled > k
        converged = enough and bool((residuals[:k] <= tol * values[0]).all())
        if converged or (enough and products >= most):
            break
        if filled + width > capacity:
            kept = max(k + 1, capacity - 2 * width)
            basis[:kept] = vectors[:, :kept].T.to(known.dtype) @ known
            small.zero_()
            small.diagonal()[:kept] = values[:kept]
            filled = kept
    rows = vectors[:, :k].T.to(known.dtype) @ known
    return Pairs(values[: k + 1], rows, residuals[: k + 1], converged, products)


def _next(rest: Tensor, known: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows that are orthogonal to a basis, and what of each of them `rest` has."""
    block, triangle = (x.T for x in torch.linalg.qr(rest.T))
    rounding = torch.finfo(rest.dtype).eps * math.sqrt(rest.shape[1]) * scale
    lost = triangle.diagonal().abs() <= rounding
    if bool(lost.any()):
        # An exhausted direction of the Krylov space is replaced; which by is all the same.
        generator = torch.Generator().manual_seed(len(known))
        noise = torch.randn(rest.shape, generator=generator, dtype=torch.float64).to(rest)
        block = torch.where(lost[:, None], noise, block)
    for _ in range(2):
        block = torch.addmm(block, block @ known.T, known, alpha=-1)
        block = torch.linalg.qr(block.T)[0].T
    return block, (block @ rest.T).double()
