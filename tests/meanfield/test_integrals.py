"""Integrals of one unit against independent numerical integration, and where they are delicate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neuromanifold.meanfield.integrals import gaussian_integrals, quadrature_error

pytestmark = pytest.mark.usefixtures("float64")

MEANS = torch.tensor([-2.0, -0.4, 0.0, 0.0, 0.7, 3.0, 1.0], dtype=torch.float64)
SCALES = torch.tensor([1.0, 0.3, 1.0, 2.0, 1.5, 0.8, 1e-3], dtype=torch.float64)


def assert_integrals(activation, expected: Tensor, tolerance: float, means=MEANS, scales=SCALES):
    got = torch.stack(gaussian_integrals(activation, means, scales).raw())
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def by_halves(below, above=None) -> Tensor:
    """`∫ v^k ψ(μ + σv) Dv`, `(3, U)`: 200 Gauss-Legendre nodes to either side of u = 0."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(200))
    zero = (-MEANS / SCALES).clamp(-12, 12)[:, None]
    total = torch.zeros(3, len(MEANS))
    for start, stop, psi in ((-12.0, zero, below), (zero, 12.0, above or below)):
        v = start + (stop - start) * (nodes + 1) / 2
        measure = torch.exp(-(v**2) / 2) * weights * (stop - start) / math.sqrt(8 * math.pi)
        measure = measure * psi(MEANS[:, None] + SCALES[:, None] * v)
        total += torch.stack([(measure * v**k).sum(-1) for k in range(3)])
    return total


def test_erf_equals_quadrature():
    assert_integrals("erf", by_halves(lambda u: 4 / math.pi * torch.exp(-2 * u**2)), 1e-12)


def test_normal_distribution_function_equals_quadrature():
    expected = by_halves(lambda u: torch.exp(-(u**2)) / (2 * math.pi))
    assert_integrals("normal_cdf", expected, 1e-12)
    assert_integrals(torch.special.ndtr, expected, 1e-12)


@pytest.mark.parametrize(
    ("activation", "slope"),
    [
        ("relu", 0.0),
        (nn.ReLU(inplace=True), 0.0),
        ("leaky_relu", 0.01),
        (nn.LeakyReLU(0.3), 0.3),
        (nn.LeakyReLU(-1.0), -1.0),
        (nn.LeakyReLU(-2.0), -2.0),
        ("linear", 1.0),
    ],
    ids=str,
)
def test_half_lines_equal_integration_split_at_the_kink(activation, slope):
    expected = by_halves(lambda u: torch.full_like(u, slope**2), torch.ones_like)
    assert_integrals(activation, expected, 1e-12)


@pytest.mark.parametrize(
    ("activation", "information"),
    [
        ("tanh", lambda u: (1 - u.tanh() ** 2) ** 2),
        (torch.sin, lambda u: u.cos() ** 2),
        (nn.Sigmoid(), lambda u: (u.sigmoid() * (1 - u.sigmoid())) ** 2),
        ("bernoulli", lambda u: u.sigmoid() * (1 - u.sigmoid())),
        ("softplus", lambda u: u.sigmoid() ** 2),
    ],
    ids=["tanh", "sin", "sigmoid", "bernoulli", "softplus"],
)
def test_smooth_activations_equal_a_rule_with_more_nodes(activation, information):
    assert_integrals(activation, by_halves(information), 1e-10)
    assert quadrature_error(activation, MEANS, SCALES).max() < 1e-10


def test_a_kink_at_zero_does_not_spoil_quadrature():
    elu = by_halves(lambda u: torch.exp(2 * u), torch.ones_like)
    assert_integrals("elu", elu, 1e-10)
    assert quadrature_error("elu", MEANS, SCALES).max() < 1e-10


@pytest.mark.parametrize("scale", [5.0, 20.0])
def test_saturated_units(scale):
    """tanh changes over a length of 1/σ: compared with a fine trapezoid rule."""
    v = torch.linspace(-12, 12, 400_001)
    means, scales = torch.tensor([0.0, 0.8 * scale]), torch.full((2,), scale)
    psi = (means[:, None] + scales[:, None] * v).tanh().square().neg().add(1).square()
    measure = psi * torch.exp(-(v**2) / 2) / math.sqrt(2 * math.pi) * (v[1] - v[0])
    expected = torch.stack([(measure * v**k).sum(-1) for k in range(3)])
    assert_integrals("tanh", expected, 1e-10, means, scales)
    assert quadrature_error("tanh", means, scales).max() < 1e-7


def test_error_is_reported_where_quadrature_is_poor():
    """hardtanh has kinks at −1 and 1, where no panel ends."""
    mean, scale = torch.tensor([0.0]), torch.tensor([1.0])
    truth = 2 * torch.special.ndtr(torch.tensor([1.0])) - 1
    error = (gaussian_integrals("hardtanh", mean, scale).mass - truth).abs()
    reported = quadrature_error("hardtanh", mean, scale)
    assert error > 1e-6
    assert 0.1 * error < reported < 100 * error


def test_closed_forms_have_no_quadrature_error():
    for activation in ("relu", "erf", "linear", "normal_cdf"):
        assert quadrature_error(activation, MEANS, SCALES).eq(0).all()


@pytest.mark.parametrize("depth", [3.1, 6.0, 10.0, 30.0])
def test_rarely_active_relu_keeps_its_variance(depth):
    """Where a₂/a₀ − (a₁/a₀)² has no digit left: the exceedance x, of density ∝ exp(−tx − x²/2)."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    x = (nodes + 1) / 2 * 40 / depth
    density = np.exp(-depth * x - x**2 / 2) * weights
    density /= density.sum()
    mean = (density * x).sum()
    variance = (density * (x - mean) ** 2).sum()
    tilted = gaussian_integrals("relu", torch.tensor(-depth), torch.tensor(1.0))
    torch.testing.assert_close(tilted.variance, torch.tensor(variance), rtol=1e-12, atol=0)
    torch.testing.assert_close(tilted.mean, torch.tensor(depth + mean), rtol=1e-13, atol=0)
    mass = torch.tensor(0.5 * math.erfc(depth / math.sqrt(2)))
    torch.testing.assert_close(tilted.mass, mass, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "activation", ["relu", "leaky_relu", "linear", "erf", "normal_cdf", "tanh", "bernoulli", "elu"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_units_are_finite(activation, dtype):
    means = torch.tensor([0.0, 5.0, -5.0, 0.0, 1e6, -1e6, 1e-30, 1e4], dtype=dtype)
    scales = torch.tensor([0.0, 0.0, 0.0, 1e-30, 1.0, 1.0, 1e6, 1e4], dtype=dtype)
    tilted = gaussian_integrals(activation, means, scales)
    for moment in (tilted.mass, tilted.mean, tilted.variance):
        assert moment.dtype == dtype
        assert moment.isfinite().all()
    assert (tilted.mass >= 0).all()
    assert (tilted.variance >= 0).all()


def test_unknown_name_says_what_is_known():
    with pytest.raises(ValueError, match="relu"):
        gaussian_integrals("reelu", MEANS, SCALES)
