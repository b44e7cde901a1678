from __future__ import annotations

import pytest
import torch

import neuromanifold as nm

SIZE = 600
SPECTRA = {
    "repeated": torch.cat(
        [torch.full((3,), 2.0), torch.full((2,), 1.5), torch.linspace(0, 1, 595)]
    ),
    "clustered": torch.cat([1 + 1e-5 * torch.arange(5), torch.linspace(0, 0.9, 595)]),
    "harmonic": 1 / torch.arange(1, SIZE + 1),
    "low rank": torch.cat([torch.linspace(1, 2, 4), torch.zeros(596)]),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_values_lie_within_their_bounds(pair, name):
    values = SPECTRA[name].double().sort(descending=True).values
    F, exact = pair(values)
    matrix = exact.to_dense()
    inside = sharp = 0
    for seed in range(200):
        random = torch.Generator().manual_seed(seed)
        found = nm.spectral.extremes(F, 5, tol=1e-2, generator=random)
        assert found.converged
        assert (found.residuals <= 1.1e-2 * values[0]).all()
        errors = values[:5] - found.values
        assert (errors >= -1e-12).all()
        inside += bool((errors <= found.bounds).all())
        sharp += bool((found.bounds[:5] < found.residuals / 2).any())
    assert inside >= 190
    if name == "harmonic":
        assert sharp == 200
    residuals = (matrix @ found.vectors - found.vectors * found.values).norm(dim=0)
    assert torch.allclose(residuals, found.residuals, rtol=1e-6, atol=1e-14)
    gram = found.vectors.T @ found.vectors
    assert torch.allclose(gram, torch.eye(5).double(), rtol=0, atol=1e-12)
    assert found.method == "block Lanczos, 7 vectors"


def test_products_are_counted_and_limited(pair):
    F, _ = pair(SPECTRA["clustered"])
    found = nm.spectral.extremes(F, 2, tol=1e-12, max_products=30)
    assert found.products == F.products
    assert 30 <= found.products <= 36
    assert not found.converged
    assert found.residuals.max() > 1e-12
    assert found.to_dict()["converged"] is False


def test_a_narrow_block_takes_less_memory_and_more_calls(pair):
    F, exact = pair(SPECTRA["harmonic"])
    found = nm.spectral.extremes(F, 5, tol=1e-8, block=1)
    assert torch.allclose(found.values, exact.eigenvalues(5), rtol=1e-12)
    assert found.method == "block Lanczos, 1 vectors"


@pytest.mark.parametrize(
    ("rows", "method"),
    [
        (10, "Gram matrix of 30 rows, all eigenvalues"),
        (180, "Gram matrix of 540 rows, block Lanczos, 6 vectors"),
        (700, "block Lanczos, 6 vectors"),  # fewer multiplications by 1,203 parameters
    ],
)
def test_gram_searches_where_it_is_less_work(float64, rows, method):
    model, x = torch.nn.Linear(400, 3), torch.randn(rows, 400)
    F = nm.fisher(model, nm.Gaussian(), x, nm.Gram(), estimator=nm.Exact())
    found = nm.spectral.extremes(F, 4, tol=1e-9)
    exact = torch.linalg.eigvalsh(F.to_dense()).flip(0)[:4]
    assert ((found.values - exact).abs() <= found.bounds).all()
    assert torch.allclose(found.values, exact, rtol=1e-10)
    assert (found.residuals <= 2e-9 * exact[0]).all()
    assert found.method == method


def test_more_than_the_rank_of_gram_are_zeros(float64):
    model, x = torch.nn.Linear(40, 1), torch.randn(2, 40)
    F = nm.fisher(model, nm.Gaussian(), x, nm.Gram(), estimator=nm.Exact())
    found = nm.spectral.extremes(F, 4)
    assert (found.values[2:] == 0).all()
    assert found.vectors.shape == (41, 4)
    assert torch.allclose(found.vectors.T @ found.vectors, torch.eye(4))
    assert (found.residuals < 1e-12 * found.values[0]).all()
