"""Sensitivities of single units against the definition, with y enumerated or by quadrature."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuromanifold.relative import units

PRE_ACTIVATIONS = torch.linspace(-8, 8, 33, dtype=torch.float64) + 0.01
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

Sensitivity = Callable[[Tensor], Tensor]


def assert_equal(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def by_enumeration(log_prob: Callable[[Tensor, int], Tensor], support: tuple[int, int]) -> Tensor:
    """`E_y (∂ log p(y | a) / ∂a)²` for each a."""
    total = torch.zeros_like(PRE_ACTIVATIONS)
    for y in support:
        a = PRE_ACTIVATIONS.clone().requires_grad_()
        log_p = log_prob(a, y)
        (score,) = torch.autograd.grad(log_p.sum(), a)
        total += log_p.detach().exp() * score.square()
    return total


def by_quadrature(mean: Sensitivity, variance: float) -> Tensor:
    """The same for `y ~ N(mean(a), variance)`, 40 Gauss-Hermite nodes."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    total = torch.zeros_like(PRE_ACTIVATIONS)
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        a = PRE_ACTIVATIONS.clone().requires_grad_()
        y = (mean(a) + variance**0.5 * node).detach()
        log_p = -(y - mean(a)).square() / (2 * variance)
        (score,) = torch.autograd.grad(log_p.sum(), a)
        total += weight * score.square()
    return total


def smooth_relu(leak: float, width: float) -> Sensitivity:
    return lambda a: width * torch.logaddexp(leak * a / width, a / width)


def test_tanh_emits_a_sign():
    expected = by_enumeration(lambda a, y: F.logsigmoid(2 * y * a), (-1, 1))
    assert_equal(units.tanh(PRE_ACTIVATIONS), expected)


def test_sigmoid_emits_a_bit():
    expected = by_enumeration(lambda a, y: F.logsigmoid((2 * y - 1) * a), (0, 1))
    assert_equal(units.sigmoid(PRE_ACTIVATIONS), expected)


@pytest.mark.parametrize(
    ("sensitivity", "mean"),
    [
        pytest.param(units.relu, F.relu, id="relu"),
        pytest.param(units.leaky_relu, F.leaky_relu, id="leaky relu"),
        pytest.param(
            lambda a: units.leaky_relu(a, 0.3), lambda a: F.leaky_relu(a, 0.3), id="leaky relu, 0.3"
        ),
        pytest.param(units.smooth_relu, F.softplus, id="softplus"),
        pytest.param(
            lambda a: units.smooth_relu(a, leak=0.2, width=0.5),
            smooth_relu(0.2, 0.5),
            id="smooth leaky relu",
        ),
        pytest.param(units.elu, F.elu, id="elu"),
        pytest.param(lambda a: units.elu(a, 0.5), lambda a: F.elu(a, 0.5), id="elu, 0.5"),
    ],
)
def test_closed_forms_with_gaussian_noise(sensitivity: Sensitivity, mean: Sensitivity):
    assert_equal(sensitivity(PRE_ACTIVATIONS), by_quadrature(mean, 1.0))


@pytest.mark.parametrize(
    "activation", [torch.tanh, F.gelu, F.silu, nn.Mish(), nn.PReLU().double(), F.relu]
)
@pytest.mark.parametrize("variance", [1.0, 0.3])
def test_any_activation(activation: Sensitivity, variance: float):
    got = units.gaussian(activation, PRE_ACTIVATIONS, variance)
    assert_equal(got, by_quadrature(activation, variance))


def test_the_response_changes_the_metric():
    assert_equal(units.gaussian(torch.tanh, PRE_ACTIVATIONS), units.tanh(PRE_ACTIVATIONS).square())


def test_variance_for_each_unit():
    a, variance = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0.5, 1.0, 2.0])
    assert_equal(units.gaussian(torch.tanh, a, variance)[:, 0], units.tanh(a[:, 0]).square() / 0.5)


def test_saturated_units_keep_their_digits():
    a = torch.tensor([-100.0, 100.0], dtype=torch.float64)
    far = torch.exp(torch.tensor([-100.0, -100.0], dtype=torch.float64))
    torch.testing.assert_close(units.tanh(a), 4 * far**2, rtol=1e-13, atol=0)
    torch.testing.assert_close(units.sigmoid(a), far, rtol=1e-13, atol=0)
    torch.testing.assert_close(units.elu(a)[0], far[0] ** 2, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sensitivity", "below", "above"),
    [
        pytest.param(units.tanh, 0, 0, id="tanh"),
        pytest.param(units.sigmoid, 0, 0, id="sigmoid"),
        pytest.param(units.relu, 0, 1, id="relu"),
        pytest.param(lambda a: units.leaky_relu(a, 0.5), 0.25, 1, id="leaky relu"),
        pytest.param(units.smooth_relu, 0, 1, id="softplus"),
        pytest.param(
            lambda a: units.smooth_relu(a, leak=0.5, width=1e-3), 0.25, 1, id="smooth leaky relu"
        ),
        pytest.param(lambda a: units.elu(a, alpha=2.0), 0, 1, id="elu"),
        pytest.param(lambda a: units.gaussian(torch.tanh, a), 0, 0, id="tanh, Gaussian"),
        pytest.param(lambda a: units.gaussian(F.silu, a, 4.0), 0, 0.25, id="silu, Gaussian"),
    ],
)
def test_far_out_nothing_overflows(
    sensitivity: Sensitivity, below: float, above: float, dtype: torch.dtype
):
    a = torch.tensor([[-1e4, -1e3], [1e3, 1e4]], dtype=dtype)
    expected = torch.tensor([[below] * 2, [above] * 2], dtype=dtype)
    torch.testing.assert_close(sensitivity(a), expected)  # shape and dtype, too


def test_any_shape():
    for shape in ((), (0,), (2, 3, 4)):
        assert units.tanh(torch.zeros(shape)).shape == shape
        assert units.gaussian(F.relu, torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_an_activation_in_place_leaves_its_input(mode):
    with mode():
        a = torch.tensor([-1.0, 1.0])
        assert units.gaussian(nn.ReLU(inplace=True), a).tolist() == [0, 1]
        assert a.tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a: units.smooth_relu(a, leak=1.0), ValueError, r"leak must be in \[0, 1\)"),
        (lambda a: units.smooth_relu(a, width=0.0), ValueError, "leaky_relu"),
        (lambda a: units.gaussian(F.relu, a, 0.0), ValueError, "variance must be > 0"),
        (lambda a: units.gaussian(torch.sum, a), ValueError, r"made \(\) of \(2,\)"),
        (lambda a: units.tanh(a.long()), TypeError, "real numbers, got torch.int64"),
        (lambda a: units.relu(a.tolist()), TypeError, "got list"),
    ],
)
def test_refusals_say_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2))
