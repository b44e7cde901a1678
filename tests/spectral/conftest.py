"""Operators with prescribed spectra, known by their products alone or exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from neuromanifold.linalg import Block, Layout
from neuromanifold.operators import (
    BlockOperator,
    Coverage,
    CoverageEntry,
    FisherOperator,
    Matrices,
    Origin,
)

SHAPES = {"layer.weight": (20, 29), "layer.bias": (20,)}
SIZE = 600


class Products(FisherOperator):
    """A matrix that has nothing but products, and counts them."""

    def __init__(self, matrix: Tensor, layout: Layout, coverage: Coverage, origin: Origin) -> None:
        super().__init__(layout, coverage, origin, dtype=matrix.dtype, device=matrix.device)
        self.matrix = matrix
        self.products = 0
        self.calls = 0

    def _matmat(self, rows: Tensor) -> Tensor:
        self.products += len(rows)
        self.calls += 1
        return rows @ self.matrix


def rotated(values: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(noise)[0]
    matrix = basis * values.double() @ basis.T
    return (matrix + matrix.T) / 2


Pair = tuple[Products, BlockOperator]


@pytest.fixture
def pair() -> Callable[[Tensor], Pair]:
    """The same matrix twice, from 600 eigenvalues: as products, and exactly."""

    def build(values: Tensor) -> Pair:
        matrix = rotated(values)
        layout = Layout(SHAPES)
        coverage = Coverage(
            tuple(CoverageEntry(name, "layer", "test", "test", True) for name in SHAPES)
        )
        origin = Origin(1, "Products", "Exact()", "test")
        exact = BlockOperator(
            layout, [Matrices(Block.whole(layout), matrix[None])], coverage, origin
        )
        return Products(matrix, layout, coverage, origin), exact

    return build
