"""The diagonal and, for each unit, the row of its bias.

Source: Ollivier, arXiv 1303.0818; Marceau-Caron and Ollivier, arXiv 1602.08007.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from neuromanifold.layers import Factored, Record
from neuromanifold.layers.parts import TEMPORARY_NUMEL
from neuromanifold.linalg import Block, memory, psd
from neuromanifold.operators import BlockMatrix
from neuromanifold.structures._base import AdditiveStructure, Statistics
from neuromanifold.structures.diagonal import DiagonalMatrix

__all__ = ["QuasiDiagonal", "QuasiDiagonalMatrix"]

_ROUNDINGS = 30
"""Of the largest gradient of a unit: what is left of one that cancels is up to thirteen of them in
attention and normalised layers."""


class QuasiDiagonal(AdditiveStructure):
    """The diagonal, and the entries between each weight and the bias of its unit; 2 G·O·I numbers.

    From the moments `M_ij = E[p_i p_j]` of a unit's gradient p, bias at index 0, the matrix has

        M_ii on the diagonal,   M_0i in the bias row,   M_0i M_0j / M_00 between two weights,

    as if weights were uncorrelated once the mean of each input, weighted by the squared cotangent,
    is taken off. Diagonal and bias row are exact, everything is as cheap as for a diagonal, and a
    step `solve(gradient)` changes the function in the same way whatever the offset and scale of
    each input (at damping 0; a diagonal step depends on both).

    The five metrics of the source are this structure with different estimators: `nm.Exact()` and
    `nm.MonteCarlo()` are the natural ones (QDNat, QDMCNat), `nm.Empirical()` is that of outer
    products (QDOP). Units without a bias, and biases without weights, are kept by their diagonal.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3) + 5
        >>> F = nm.fisher(model, nm.Gaussian(), x, nm.QuasiDiagonal(), estimator=nm.Exact())
        >>> F.solve(torch.ones(8), damping=1e-3).shape
        torch.Size([8])
    """

    def statistics(self, record: Record) -> Statistics:
        """Squares of the per-sample gradients, and products with the one of the bias."""
        if not _has_bias_row(record.block):
            return {"squares": record.squared()}
        part = record.single
        if isinstance(part, Factored) and part.a is not None and part.num_positions == 1:
            # One position: p_0 p_i = g² a_i, so the sum over N is a matrix product.
            weights = part.g.squeeze(3).square().sum(dim=0)  # (G, N, O)
            return {"squares": record.squared(), "cross": weights.mT @ part.a.squeeze(2)}
        p = record.per_sample()  # (V, G, N, O, I)
        if isinstance(part, Factored):
            p[..., -1] = part.g.sum(dim=3)  # with the rounding that it has in a diagonal
        cross = torch.einsum("vgno,vgnoi->goi", p[..., -1], p[..., :-1])
        return {"squares": p.square().sum(dim=(0, 2)), "cross": cross}

    def assemble(self, block: Block, statistics: Statistics, normaliser: float) -> BlockMatrix:
        """Means, and what the bias leaves of the diagonal."""
        squares = statistics["squares"].div_(normaliser)
        if "cross" not in statistics:
            return DiagonalMatrix(block, squares)
        bias = squares[..., -1:]
        # A bias whose gradients cancel over positions, as those of attention keys do, has rounding
        # for a row, which may be as large as the weights' entries. It is left out: zero, not 0/0.
        rounding = (_ROUNDINGS * torch.finfo(squares.dtype).eps) ** 2
        seen = bias > rounding * squares.amax(dim=-1, keepdim=True)
        row = torch.cat([statistics["cross"].div_(normaliser), bias], dim=-1)
        row = torch.where(seen, row * torch.where(seen, bias, 1).rsqrt(), 0)
        rest = (squares - row.square()).clamp(min=0)
        rest[..., -1:] = torch.where(seen, 0, bias)
        return QuasiDiagonalMatrix(block, rest, row)

    def numel(self, block: Block) -> int:
        """A diagonal and a row."""
        return block.num_parameters * (2 if _has_bias_row(block) else 1)

    def represent(self, block: Block) -> tuple[str, bool, str]:
        """Where there is no row, the diagonal is all."""
        if _has_bias_row(block):
            exact = block.fan_in == 2  # nothing is left out between one weight and the bias
            note = "" if exact else "weights of a unit interact through its bias only"
            return "QuasiDiagonal", exact, note
        return "Diagonal", True, ""


def _has_bias_row(block: Block) -> bool:
    return block.biased and block.fan_in > 1


class QuasiDiagonalMatrix(BlockMatrix):
    """`diag(d) + r rᵀ` for each unit: `rest d (G, O, I)` and `row r (G, O, I)`.

    With the bias in the last column, `r = (M_0i, M_00) / √M_00` and `d = (M_ii − r_i², 0)`.
    """

    kind = "quasidiagonal"

    def __init__(self, block: Block, rest: Tensor, row: Tensor) -> None:
        super().__init__(block)
        self.rest = rest
        self.row = row

    def matmul(self, x: Tensor) -> Tensor:
        """O(I) per unit."""
        return self.rest * x + self.row * (self.row * x).sum(dim=-1, keepdim=True)

    def solve(self, x: Tensor, damping: float | Tensor) -> Tensor:
        """O(I) per unit: the inverse of a diagonal plus a rank-one matrix.

        The entry with the least of the diagonal is eliminated first, by hand, since its part may be
        zero: that of a bias is, at damping 0. Then this is the update rule of the source.
        """
        d = self.rest + damping
        first = torch.zeros_like(d).scatter_(-1, d.argmin(dim=-1, keepdim=True), 1) > 0

        def entry(v: Tensor) -> Tensor:
            return torch.where(first, v, 0).sum(dim=-1, keepdim=True)

        weights = self.row / torch.where(first, torch.inf, d)  # r / d but for the first entry
        one = 1 + (self.row * weights).sum(dim=-1, keepdim=True)
        seen = (weights * x).sum(dim=-1, keepdim=True)
        first_d, first_r, first_x = entry(d), entry(self.row), entry(x)
        determinant = first_d * one + first_r.square()
        inner = (first_d * seen + first_r * first_x) / determinant  # rᵀ of the solution
        eliminated = (one * first_x - first_r * seen) / determinant
        return torch.where(first, eliminated, (x - self.row * inner) / d)

    def function(self, function: psd.Function, x: Tensor) -> Tensor:
        """By an eigendecomposition for each unit, I³, computed once."""
        values, vectors = self._eigh
        columns = x.flatten(1, 2)[..., None]  # (R, G·O, I, 1)
        moved = function(values)[..., None] * (vectors.mT @ columns)
        return (vectors @ moved).reshape(x.shape)

    def eigenvalues(self) -> Tensor:
        """Of each unit, some units at a time."""
        units = list(zip(*self._units(), strict=True))
        return torch.cat([psd.eigenvalues(_dense(d, r)).flatten() for d, r in units])

    def diagonal(self) -> Tensor:
        """The exact diagonal."""
        return self.rest + self.row.square()

    def norm(self) -> Tensor:
        """`‖d‖² + 2 Σ d r² + ‖r‖⁴`, summed over units."""
        squares = self.row.square()
        per_unit = (self.rest * (self.rest + 2 * squares)).sum(dim=-1) + squares.sum(-1).square()
        return per_unit.sum().sqrt()

    def tensors(self) -> dict[str, Tensor]:
        """What the bias leaves of the diagonal, and the row."""
        return {"rest": self.rest, "row": self.row}

    def scaled(self, factor: float) -> QuasiDiagonalMatrix:
        """The row is a square root."""
        return QuasiDiagonalMatrix(self.block, self.rest * factor, self.row * factor**0.5)

    def restrict(self, block: Block, columns: list[int]) -> QuasiDiagonalMatrix:
        """Some entries of both: weights alone still share the row."""
        return QuasiDiagonalMatrix(block, self.rest[..., columns], self.row[..., columns])

    def _units(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Both tensors in parts of some units, `(units, I)`."""
        step = max(TEMPORARY_NUMEL // self.block.fan_in**2, 1)
        return self.rest.flatten(0, 1).split(step), self.row.flatten(0, 1).split(step)

    @cached_property
    def _eigh(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues `(G·O, I)` and eigenvectors `(G·O, I, I)`."""
        memory.require(
            self.block.num_parameters * self.block.fan_in * self.rest.dtype.itemsize,
            self.rest.device,
            what=f"The eigenvectors of QuasiDiagonal() for the units of {self.block.name!r}",
            instead="Products, F.solve, F.trace, F.diagonal and F.eigenvalues do without them; "
            "nm.Diagonal() has cheap square roots and samples.",
        )
        return psd.eigh(_dense(self.rest.flatten(0, 1), self.row.flatten(0, 1)))


def _dense(rest: Tensor, row: Tensor) -> Tensor:
    """`(units, I)` to `(units, I, I)`."""
    return torch.diag_embed(rest) + row[:, :, None] * row[:, None, :]
