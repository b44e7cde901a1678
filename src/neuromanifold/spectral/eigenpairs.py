"""The largest eigenvalues and their eigenvectors, with bounds of their errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from neuromanifold.linalg import lanczos, memory, psd
from neuromanifold.operators import FisherOperator
from neuromanifold.spectral.exact import SMALL, checked, dense
from neuromanifold.structures.gram import GramOperator

__all__ = ["Extremes", "extremes"]

WIDEST = 32
"""Vectors in a block at most."""
USUAL = 100
"""Products that ten eigenvalues take."""
BLOCKS = 4
"""That the basis holds, besides what a restart keeps."""


@dataclass(frozen=True)
class Extremes:
    """The largest eigenvalues of a Fisher matrix.

    Attributes:
        values: `(k,)` in descending order, in nats/parameter². None is above the eigenvalue of the
            same rank, but for rounding.
        vectors: orthonormal columns `(P, k)`; `F.layout.unflatten(vectors[:, 0])` gives a dict.
        residuals: `‖F v − value v‖`, `(k,)`, from a product with each vector or, in sample space,
            with the Gram matrix.
        bounds: `(k,)`, how far the eigenvalue of the same rank is from the value at most, if no
            eigenvalue was missed: the residual, or its square over the gap where that is less.
        method: what was done.
        products: how many vectors F was multiplied with.
        converged: whether residuals are as small as was asked for.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    bounds: Tensor
    method: str
    products: int
    converged: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON, without the vectors."""
        lists = {name: getattr(self, name).tolist() for name in ("values", "residuals", "bounds")}
        return {
            **lists,
            "method": self.method,
            "products": self.products,
            "converged": self.converged,
        }


def extremes(
    F: FisherOperator,
    k: int = 1,
    *,
    tol: float = 1e-4,
    generator: torch.Generator | None = None,
    block: int | None = None,
    max_products: int = 10_000,
) -> Extremes:
    """The `k` largest eigenvalues and eigenvectors of F.

    Of few parameters, or few rows of `nm.Gram()`, all are computed. Else block Lanczos with thick
    restart iterates, for `Gram` in sample space where that is less work. That an eigenvalue is
    found as often as it is repeated takes a block as wide, of random vectors.

    Args:
        F: any Fisher matrix.
        k: how many.
        tol: residuals end below this times the largest eigenvalue. The error of a value is at most
            as large, and of the order of `tol²` for one that stands alone.
        generator: source of the random vectors to start with.
        block: vectors in each product; `k + 2` by default, at most 32.
        max_products: after which to stop; `converged` then is False, and residuals are what they
            are.

    Returns:
        Values, vectors, residuals, bounds, and what was done.

    Raises:
        ValueError: If k is not between 1 and P, or the tolerance is not positive.
        TooLargeError: If the basis would not fit.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(40, 20), torch.randn(64, 40)
        >>> F = nm.fisher(model, nm.Gaussian(), x, nm.Implicit(), estimator=nm.Exact())
        >>> found = nm.spectral.extremes(F, 3)
        >>> found.converged, found.vectors.shape
        (True, torch.Size([820, 3]))
    """
    checked("k", k, 1)
    p = F.num_parameters
    if k > p:
        raise ValueError(f"There are {p} eigenvalues, one per parameter; got k={k}.")
    if not tol > 0:
        raise ValueError(f"tol is a number > 0, got {tol!r}.")
    width = min(k + 2, WIDEST) if block is None else checked("block", block, 1)
    search = partial(_search, k=k, tol=tol, width=width, most=max_products, generator=generator)
    if isinstance(F, GramOperator) and _in_sample_space(F):
        found, how = search(F.gram, lambda rows: rows @ F.gram)
        return _of_gram(F, found, k, f"Gram matrix of {F.num_rows} rows, {how}")
    matrix = torch.empty(0, p, dtype=F.dtype, device=F.device)
    if _all_at_once(p, k, width):
        matrix = dense(F) if p <= SMALL else F.to_dense()
    found, how = search(matrix, F._matmat)
    if not found.products:
        found = replace(found, products=p)
    return _of_vectors(F, found, found.vectors, how)


def _in_sample_space(F: GramOperator) -> bool:
    """Whether its Gram matrix is there, small, or cheaper than the products it would replace."""
    if F.num_rows <= SMALL or "gram" in F.__dict__:
        return True
    kept = sum(tensor.numel() for tensor in F._state()[1].values())
    return kept <= 2 * USUAL * F.num_parameters


def _all_at_once(size: int, k: int, width: int) -> bool:
    """Whether the basis of an iteration would fill the space, or nearly."""
    return size <= max(SMALL, _capacity(k, width) + width)


def _capacity(k: int, width: int) -> int:
    return k + 1 + (BLOCKS + 1) * width


def _search(
    matrix: Tensor,
    product: lanczos.Products,
    *,
    k: int,
    tol: float,
    width: int,
    most: int,
    generator: torch.Generator | None,
) -> tuple[lanczos.Pairs, str]:
    """Of a symmetric matrix with that many columns, which need not be there for a large one."""
    size = matrix.shape[1]
    if _all_at_once(size, k, width):
        values, vectors = psd.eigh(matrix)
        values = values.flip(0)[: k + 1].double()
        pairs = lanczos.Pairs(values, vectors.T.flip(0)[:k], values.new_zeros(len(values)), True, 0)
        return pairs, "all eigenvalues"
    device = matrix.device if generator is None else generator.device
    start = torch.randn(width, size, generator=generator, dtype=matrix.dtype, device=device)
    found = lanczos.largest(
        product,
        start.to(matrix.device),
        k,
        tol=tol,
        capacity=_capacity(k, width),
        most=most,
    )
    return found, f"block Lanczos, {width} vectors"


def _of_gram(F: GramOperator, found: lanczos.Pairs, k: int, method: str) -> Extremes:
    """From eigenvectors of the Gram matrix: `Û q / √κ` are those of F."""
    cutoff = F._cutoff * found.values[0]
    rank = int((found.values[:k] > cutoff).sum())
    values = found.values[:rank].to(F.dtype)
    vectors = found.vectors[:rank]
    rows = F._combine(vectors.T) / values.sqrt()[:, None]
    if rank == k:
        # F Û q − κ Û q = Û (K q − κ q): products with K are cheaper than with F.
        errors = vectors @ F.gram - values[:, None] * vectors
        squares = (errors @ F.gram * errors).sum(dim=1) / values
        return _extremes(F, replace(found, products=0), rows, psd.square_root(squares), method)
    # F has no more eigenvalues but zero: any directions that are left will do.
    memory.require(
        2 * k * F.num_parameters * F.dtype.itemsize,
        F.device,
        what=f"{k} vectors of {F.num_parameters} parameters",
        instead="Ask for fewer eigenvalues.",
    )
    more = torch.eye(k - rank, F.num_parameters, dtype=F.dtype, device=F.device)
    rows = torch.linalg.qr(torch.cat([rows, more]).T)[0].T
    all_values = found.values.new_zeros(k + 1)
    all_values[:rank] = found.values[:rank]
    residuals = torch.zeros_like(all_values)
    residuals[:rank] = found.residuals[:rank]
    found = replace(found, values=all_values, residuals=residuals, products=0)
    return _of_vectors(F, found, rows, method)


def _of_vectors(F: FisherOperator, found: lanczos.Pairs, rows: Tensor, method: str) -> Extremes:
    """With the residuals that F itself gives."""
    values = found.values[: len(rows), None].to(rows.dtype)
    residuals = torch.linalg.vector_norm(F._matmat(rows) - values * rows, dim=1)
    found = replace(found, products=found.products + len(rows))
    return _extremes(F, found, rows, residuals, method)


def _extremes(
    F: FisherOperator, found: lanczos.Pairs, rows: Tensor, residuals: Tensor, method: str
) -> Extremes:
    """With bounds that follow from the residuals."""
    k = len(rows)
    all_residuals = torch.cat([residuals.double(), found.residuals[k:]])
    bounds = _bounds(found.values, all_residuals)[:k]
    rounding = 4 * math.sqrt(F.num_parameters) * torch.finfo(F.dtype).eps * found.values[0]
    return Extremes(
        found.values[:k].to(F.dtype),
        rows.T,
        residuals,
        torch.maximum(bounds, rounding).to(F.dtype),
        method,
        found.products,
        found.converged,
    )


def _bounds(values: Tensor, residuals: Tensor) -> Tensor:
    """The residual, or its square over the gap to the other eigenvalues, whichever is less.

    Eigenvalue j is between its value and its value plus its residual.
    """
    # Larger ones are at least at their values, smaller ones at most at theirs plus residuals.
    above = values[None] - values[:, None]
    below = values[:, None] - (values + residuals)[None]
    num = len(values)
    larger = torch.ones(num, num, dtype=torch.bool, device=values.device).tril(-1)  # j < i
    gaps = torch.where(larger, above, below)
    gaps.fill_diagonal_(math.inf)
    gap = gaps.amin(dim=1)
    return torch.where(gap > residuals, residuals.square() / gap, residuals)
