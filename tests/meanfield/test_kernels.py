"""Gaussian kernels against two-dimensional quadrature of another kind, and against each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuromanifold.meanfield.kernels import derivative, kernel, leaky_relu

PAIRS = [(1.0, 1.0, 0.5), (0.3, 1.2, -0.4), (2.0, 2.0, 1.9), (0.7, 0.2, 0.0)]
"""Variances and covariances."""

SMOOTH = ["tanh", "sigmoid", "gelu", "silu", "softplus", "mish", "sin"]

Function = Callable[[Tensor], Tensor]


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def trapezoid(f: Function, q: float, r: float, p: float) -> float:
    """`E f(a) f(b)` on a square grid: for smooth f the error falls as exp(-width / spacing)."""
    v = torch.arange(-9, 9.0001, 0.05, dtype=torch.float64)
    density = 0.05 * torch.exp(-(v**2) / 2) / math.sqrt(2 * math.pi)
    a = math.sqrt(q) * v[:, None].expand(-1, len(v))
    b = p / math.sqrt(q) * v[:, None] + math.sqrt(r - p * p / q) * v
    return float(density @ (f(a) * f(b)) @ density)


def wedges(f: Function, q: float, r: float, p: float) -> float:
    """The same for f with a kink at 0: rays between the kinks of a and of b, and along them."""
    # (a, b) = radius · (√q cos t, √r cos(t − ω)) with cos ω the correlation.
    angle = math.acos(p / math.sqrt(q * r))
    kinks = sorted(
        t % (2 * math.pi) for t in (0.5, 1.5) for t in (t * math.pi, t * math.pi + angle)
    )
    kinks.append(kinks[0] + 2 * math.pi)
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(60))
    radius, radial = (nodes + 1) * 6, weights * 6
    total = 0.0
    for low, high in pairwise(kinks):
        t = (low + high) / 2 + (high - low) / 2 * nodes
        a = math.sqrt(q) * radius[:, None] * torch.cos(t)
        b = math.sqrt(r) * radius[:, None] * torch.cos(t - angle)
        along = radial * radius * torch.exp(-(radius**2) / 2) / (2 * math.pi)
        total += float(along @ (f(a) * f(b)) @ (weights * (high - low) / 2))
    return total


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", ["erf", "linear", *SMOOTH])
def test_smooth_kernels_are_the_double_integral(name, pair):
    k = kernel(name)
    tolerance = 1e-12 if name in ("erf", "linear") else 1e-10
    for form, f in ((k.value, k.function), (k.slope, derivative(k.function))):
        value, error = form.product(*map(number, pair))
        assert abs(float(value) - trapezoid(f, *pair)) < tolerance
        assert float(error) < 1e-11


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("slope", [0.0, 0.01, 0.5, -1.0])
def test_leaky_relu_is_the_double_integral(slope, pair):
    k = leaky_relu(slope)
    for form, f in ((k.value, k.function), (k.slope, derivative(k.function))):
        value, error = form.product(*map(number, pair))
        assert abs(float(value) - wedges(f, *pair)) < 1e-12
        assert float(error) == 0


@pytest.mark.parametrize("pair", PAIRS[:3])
@pytest.mark.parametrize("name", ["elu", "selu"])
def test_a_kink_at_zero_does_no_harm(name, pair):
    k = kernel(name)
    value, error = k.value.product(*map(number, pair))
    assert abs(float(value) - wedges(k.function, *pair)) < 1e-10 + float(error)
    square = k.value.square(number(pair[0]))
    assert float(square.error) < 1e-12


@pytest.mark.parametrize("variance", [0.01, 1.0, 30.0])
def test_the_series_knows_its_error_where_a_closed_form_is_known(variance):
    closed, series = kernel("erf"), kernel(lambda u: torch.erf(u))
    correlation = torch.linspace(-1, 1, 41, dtype=torch.float64)
    q = torch.full_like(correlation, variance)
    for exact, found in ((closed.value, series.value), (closed.slope, series.slope)):
        value, error = found.product(q, q, correlation * variance)
        off = (value - exact.product(q, q, correlation * variance).value).abs()
        assert (off <= error + 1e-13).all()
    # A kink that no panel meets is nowhere near as good, and is said.
    assert float(kernel("hardtanh").slope.square(number(400.0)).error) > 1e-6


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "erf", "linear", "tanh", "gelu", "selu"])
def test_one_input_seen_twice(name):
    q = torch.tensor([1e-6, 0.3, 1.0, 7.0], dtype=torch.float64)
    k = kernel(name)
    for form in (k.value, k.slope):
        square = form.square(q)
        torch.testing.assert_close(form.product(q, q, q).value, square.value, rtol=1e-14, atol=0)


def test_dead_signals():
    zero = number(0.0)
    assert float(kernel("relu").value.product(zero, zero, zero).value) == 0
    assert float(kernel("relu").slope.product(zero, zero, zero).value) == 0.5
    assert float(kernel("sigmoid").value.product(zero, number(1.0), zero).value) == pytest.approx(
        0.25, abs=1e-13
    )


def test_pairs_of_several_inputs_broadcast():
    q = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    p = 0.3 * (q[:, None] * q).sqrt()
    got = kernel("tanh").value.product(q[:, None], q[None, :], p).value
    assert got.shape == (3, 3)
    one = kernel("tanh").value.product(q[0], q[2], p[0, 2]).value
    torch.testing.assert_close(got[0, 2], one, rtol=1e-13, atol=0)


def test_dtype_is_kept():
    q = torch.ones(2)
    for name in ("relu", "erf", "tanh"):
        assert kernel(name).value.square(q).value.dtype == torch.float32
        assert kernel(name).slope.product(q, q, q / 2).value.dtype == torch.float32


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (torch.relu, "relu"),
        (F.relu, "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (torch.erf, "erf"),
        (nn.Identity(), "linear"),
        (nn.LeakyReLU(0.2), "leaky_relu(0.2)"),
        (nn.PReLU(init=0.25), "leaky_relu(0.25)"),
        (torch.tanh, "tanh"),
        (nn.Tanh(), "tanh"),
        ("Tanh", "tanh"),
    ],
)
def test_an_activation_can_be_given_in_many_ways(given, name):
    found = kernel(given)
    assert found.name == name
    assert kernel(found) is found


def test_modules_that_work_in_place():
    expected = kernel("elu").value.square(number(1.0)).value
    assert kernel(nn.ELU(inplace=True)).value.square(number(1.0)).value == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tanhh", "No activation is called 'tanhh'"),
        (nn.Softmax(dim=-1), "each entry by itself"),
        (torch.add, "could not be called"),
        (lambda u: u.sum(), "each entry by itself"),
    ],
)
def test_what_is_no_activation_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        kernel(given)
    with pytest.raises(TypeError, match="got int"):
        kernel(3)
