from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neuromanifold.linalg import lowrank


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype)


def dense(values: Tensor, vectors: Tensor) -> Tensor:
    return (vectors.T * values) @ vectors


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (4, 4), (1, 1)])
def test_factorise(shape: tuple[int, int]) -> None:
    rows = randn(*shape)
    values, vectors = lowrank.factorise(rows)
    torch.testing.assert_close(dense(values, vectors), rows.T @ rows)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(min(shape)).double())
    assert (values.diff() <= 0).all()


def test_factorise_small_values_keep_orthonormal_vectors() -> None:
    rows = randn(4, 9) * torch.logspace(0, -12, 4).double()[:, None]
    _, vectors = lowrank.factorise(rows)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(4).double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("true_rank", [0, 1, 5])
def test_nystrom_of_a_matrix_of_low_rank(true_rank: int, dtype: torch.dtype) -> None:
    factor = randn(true_rank, 40, dtype=dtype)
    matrix = factor.T @ factor
    test = torch.linalg.qr(randn(40, 8, dtype=dtype))[0].T
    values, vectors = lowrank.nystrom(test, test @ matrix, 6)
    assert values.shape == (6,)
    error = torch.linalg.matrix_norm(dense(values, vectors) - matrix)
    assert error <= 1e3 * torch.finfo(dtype).eps * torch.linalg.matrix_norm(matrix)


def test_nystrom_is_the_formula_and_below_the_matrix() -> None:
    factor = randn(30, 20)
    matrix = factor.T @ factor
    test = torch.linalg.qr(randn(20, 7))[0].T
    image = test @ matrix
    expected = image.T @ torch.linalg.solve(image @ test.T, image)
    values, vectors = lowrank.nystrom(test, image, 7)
    torch.testing.assert_close(dense(values, vectors), expected)
    assert torch.linalg.eigvalsh(matrix - expected)[0] >= -1e-12 * values[0]
