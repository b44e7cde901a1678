from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neuromanifold.errors import NotPositiveDefiniteError
from neuromanifold.linalg import psd


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def assert_rounding(got: Tensor, expected: Tensor, terms: int) -> None:
    eps = torch.finfo(expected.dtype).eps
    assert got.shape == expected.shape
    assert (got - expected).norm() <= 10 * terms * eps * expected.norm()


# One column, and widths on both sides of multiples of the block that is multiplied at once.
@pytest.mark.parametrize(
    "shape", [(1, 7, 1), (2, 5, 4), (1, 40, 191), (1, 40, 192), (1, 40, 193), (2, 9, 700)]
)
def test_second_moment(shape: tuple[int, int, int]) -> None:
    x = randn(*shape)
    assert_rounding(psd.second_moment(x), x.mT @ x, shape[1])


def test_second_moment_into_a_view() -> None:
    x = randn(1, 5, 200)
    full = torch.full((1, 201, 201), 9.0, dtype=x.dtype)
    psd.second_moment(x, out=full[:, :-1, :-1])
    assert_rounding(full[:, :-1, :-1], x.mT @ x, 5)
    assert (full[:, -1] == 9).all()
    assert (full[:, :, -1] == 9).all()


def test_second_moment_of_nothing() -> None:
    assert torch.equal(psd.second_moment(torch.zeros(1, 0, 3)), torch.zeros(1, 3, 3))


@pytest.mark.parametrize("n", [0, 1, 255, 256, 600])
def test_mirrored_looks_above_the_diagonal_only(n: int) -> None:
    x = randn(n, n)
    expected = x.triu() + x.triu(1).T
    given = x.clone()
    assert psd.mirrored(given) is given
    assert torch.equal(given, expected)


def test_eigenvalues_of_a_singular_matrix_are_not_negative() -> None:
    x = randn(3, 20)
    matrix = x.T @ x
    assert torch.linalg.eigvalsh(matrix).min() < 0  # rounding, which must not get through
    values, vectors = psd.eigh(matrix)
    assert values.min() == 0
    assert psd.eigenvalues(matrix).min() == 0
    assert_rounding(vectors * values @ vectors.T, matrix, 20)


def test_cholesky_of_a_batch_is_damped_and_leaves_its_input() -> None:
    x = randn(2, 8, 5)
    matrices = x.mT @ x
    before = matrices.clone()
    factor = psd.cholesky(matrices, 0.5)
    assert torch.equal(matrices, before)
    assert_rounding(factor @ factor.mT, matrices + 0.5 * torch.eye(5, dtype=x.dtype), 5)


def test_cholesky_of_a_singular_matrix_says_what_damping_would_do() -> None:
    matrix = torch.ones(3, 3)
    with pytest.raises(NotPositiveDefiniteError, match=r"damping 0 .*larger damping.*4e-07"):
        psd.cholesky(matrix, 0.0)


def test_roots() -> None:
    values = torch.tensor([-1e-20, 0.0, 4.0], dtype=torch.float64)
    assert psd.square_root(values).tolist() == [0.0, 0.0, 2.0]
    assert psd.inverse_square_root(0.25)(values)[:2].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [36, 144, 300])
def test_eigenvalues_of_sparse_singular_matrices_are_found(n: int, dtype: torch.dtype) -> None:
    """Inputs that are never active: the eigensolver alone fails on many of these in float32."""
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        x = torch.zeros(5, n, dtype=dtype)
        live = torch.randperm(n, generator=generator)[: n // 3]
        x[:, live] = torch.randn(5, len(live), generator=generator, dtype=dtype).relu()
        matrix = x.T @ x
        values, vectors = psd.eigh(matrix)
        tolerance = 10 * n * torch.finfo(dtype).eps * matrix.norm()
        assert (vectors * values @ vectors.T - matrix).norm() <= tolerance
        expected = torch.linalg.svdvals(x.double()).square()
        assert (values.flip(0)[:5] - expected).abs().max() <= tolerance
        assert (psd.eigenvalues(matrix) - values).abs().max() <= tolerance
        assert values[:-5].max() <= tolerance
