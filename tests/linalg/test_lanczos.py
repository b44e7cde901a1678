from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neuromanifold.errors import TooLargeError
from neuromanifold.linalg.lanczos import largest, tridiagonal


def rotated(values: Tensor, seed: int = 0) -> Tensor:
    """A matrix with prescribed eigenvalues, in float64."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(noise)[0]
    return basis * values.double() @ basis.T


def randn(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


SPECTRA = {
    "decaying": 1 / torch.arange(1, 401).double().square(),
    "repeated": torch.cat([torch.full((4,), 3.0), torch.full((3,), 2.0), torch.full((393,), 1.0)]),
    "clustered": torch.cat([1 + 1e-6 * torch.arange(8), torch.linspace(0, 0.9, 392)]),
    "low rank": torch.cat([torch.linspace(1, 2, 6), torch.zeros(394)]),
    "zero": torch.zeros(400),
}


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_polynomials_are_integrated_exactly(steps: int) -> None:
    a, x = rotated(torch.linspace(0, 2, 60)), randn(5, 60)
    nodes, weights = tridiagonal(lambda rows: rows @ a, x, steps).gauss()
    assert torch.allclose(weights.sum(1), torch.ones(5).double(), rtol=0, atol=1e-13)
    power = x
    for degree in range(2 * steps):  # to 2 steps − 1
        exact = (x * power).sum(1) / x.square().sum(1)
        found = (weights * nodes**degree).sum(1)
        assert torch.allclose(found, exact, rtol=1e-12, atol=1e-13)
        power = power @ a
    assert not torch.allclose(  # and no further
        (weights * nodes ** (2 * steps)).sum(1), (x * power).sum(1) / x.square().sum(1), rtol=1e-12
    )


@pytest.mark.parametrize("damping", [1e-3, 0.1])
def test_two_rules_are_bounds(damping: float) -> None:
    values = torch.linspace(0, 1, 200).double() ** 6
    a, x = rotated(values), randn(4, 200)
    eigenvalues, vectors = torch.linalg.eigh(a)
    shares = (x @ vectors).square() / x.square().sum(1, keepdim=True)
    exact = (shares * (eigenvalues + damping).log()).sum(1)
    last = torch.full((4,), torch.inf)
    for steps in (2, 5, 10, 20):
        found = tridiagonal(lambda rows: rows @ a, x, steps)
        sums = [
            (weights * (nodes + damping).log()).sum(1)
            for nodes, weights in (found.radau(), found.gauss())
        ]
        assert (sums[0] <= exact + 1e-12).all()
        assert (exact <= sums[1] + 1e-12).all()
        assert (sums[1] - sums[0] < last).all()
        last = sums[1] - sums[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_exhausted_space_adds_nothing(dtype: torch.dtype) -> None:
    values = torch.tensor([3.0] * 10 + [1.0] * 10 + [0.0] * 80, dtype=dtype)
    x = randn(3, 100).to(dtype)
    nodes, weights = tridiagonal(lambda rows: rows * values, x, 12).gauss()
    exact = x.double().square() @ torch.stack([values == 0, values == 1, values == 3]).double().T
    exact /= x.double().square().sum(1, keepdim=True)
    found = torch.stack([(weights * ((nodes - v).abs() < 1e-3)).sum(1) for v in (0, 1, 3)], dim=1)
    assert torch.allclose(found, exact, atol=1e3 * torch.finfo(dtype).eps)


def test_too_many_vectors_are_refused() -> None:
    with pytest.raises(TooLargeError, match="Use fewer probes or steps"):
        tridiagonal(lambda rows: rows, torch.ones(1, 10).expand(10**9, 10), 10**6)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("width", [3, 12])
def test_the_largest_are_found_as_often_as_they_occur(name: str, width: int) -> None:
    values = SPECTRA[name].double().sort(descending=True).values
    a = rotated(values)
    found = largest(
        lambda rows: rows @ a, randn(width, 400), 10, tol=1e-7, capacity=11 + 4 * width, most=5000
    )
    assert found.converged
    error = values[:10] - found.values[:10]
    assert (error >= -1e-12).all()
    if width == 12 or name not in ("repeated", "zero"):
        assert (error <= 1e-12 + found.residuals[:10]).all()
    vectors = found.vectors
    assert torch.allclose(vectors @ vectors.T, torch.eye(10).double(), rtol=0, atol=1e-12)
    residuals = (vectors @ a - found.values[:10, None] * vectors).norm(dim=1)
    assert torch.allclose(residuals, found.residuals[:10], rtol=1e-4, atol=1e-12)


def test_what_does_not_converge_says_so() -> None:
    a = rotated(torch.linspace(0, 1, 400))
    found = largest(lambda rows: rows @ a, randn(3, 400), 2, tol=1e-14, capacity=15, most=40)
    assert not found.converged
    assert found.products >= 40
    assert found.residuals[:2].max() > 1e-14
