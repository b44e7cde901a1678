"""Predicted spectra against the formulas of papers.md §2.5, and against measured networks."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import neuromanifold as nm
from neuromanifold.meanfield.recursions import propagate
from neuromanifold.meanfield.statistics import spectrum_statistics

M, T, C = 1000, 10, 2
NETWORKS = {"tanh": (torch.tanh, 1.0), "relu": (torch.relu, 2.0), "erf": (torch.erf, 1.0)}
BIAS_VARIANCE = 0.01


class Network(nn.Module):
    """Random weights and biases, an activation behind all layers but the last."""

    def __init__(self, widths, function, weight_variance, seed):
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in pairwise(widths))
        with torch.no_grad():
            for layer in self.layers:
                std = (weight_variance / layer.in_features) ** 0.5
                layer.weight.normal_(std=std, generator=generator)
                layer.bias.normal_(std=BIAS_VARIANCE**0.5, generator=generator)

    def forward(self, x):
        *hidden, last = self.layers
        for layer in hidden:
            x = self.function(layer(x))
        return last(x)


def inputs(seed, num=T, width=M):
    return torch.randn(num, width, generator=torch.Generator().manual_seed(100 + seed))


def overlaps(x):
    overlap = x.double() @ x.double().T / x.shape[1]
    return {"activity": overlap.diagonal(), "overlap": overlap}


@pytest.fixture(scope="module", params=NETWORKS)
def five(request):
    """Mean and largest eigenvalue of five networks: measured, by κ1 and κ2, by actual overlaps."""
    function, weight_variance = NETWORKS[request.param]
    widths = [M, M, M, C]
    setting = {
        "weight_variance": weight_variance,
        "bias_variance": BIAS_VARIANCE,
        "widths": widths,
    }
    alike = spectrum_statistics(propagate(request.param, **setting), T)
    rows = []
    for seed in range(5):
        x = inputs(seed)
        F = nm.fisher(
            Network(widths, function, weight_variance, seed),
            nm.Gaussian(),
            x,
            nm.Gram(),
            estimator=nm.Exact(),
        )
        actual = spectrum_statistics(propagate(request.param, **setting, **overlaps(x)))
        rows.append(
            [
                [float(F.trace()) / F.num_parameters, float(F.eigenvalues(1)[0])],
                [alike.mean, alike.largest],
                [actual.mean, actual.largest],
            ]
        )
    return torch.tensor(rows).mean(dim=0)


@pytest.mark.parametrize("version", [1, 2], ids=["kappa", "actual overlaps"])
@pytest.mark.parametrize("quantity", [0, 1], ids=["mean", "largest"])
def test_prediction_is_within_ten_percent_of_five_networks(five, version, quantity):
    measured, predicted = five[0, quantity], five[version, quantity]
    assert abs(predicted / measured - 1) < 0.1


def test_formulas_of_the_dossier():
    """papers.md §2.5 word for word, without biases, by a quadrature of its own."""
    # The trapezoidal rule converges exponentially for functions that are analytic near the axis.
    nodes = torch.linspace(-12, 12, 601, dtype=torch.float64)
    weights = 0.04 * (-(nodes**2) / 2).exp() / math.sqrt(2 * math.pi)
    width, sigma, overlap = 50, 1.3, 0.4
    net = propagate("tanh", weight_variance=sigma, widths=[width] * 4 + [3], overlap=overlap)
    a, r, activities, pairs, slopes, slope_pairs = 1.0, overlap, [1.0], [overlap], [], []
    for _ in range(3):
        tau, rho = torch.tensor([sigma * a, sigma * r], dtype=torch.float64)
        u = tau.sqrt() * nodes
        v = rho / tau.sqrt() * nodes[:, None] + (tau - rho**2 / tau).sqrt() * nodes
        both = weights[:, None] * weights

        def slope(x):
            return 1 - x.tanh() ** 2

        a = float((weights * u.tanh() ** 2).sum())
        r = float((both * u.tanh()[:, None] * v.tanh()).sum())
        activities.append(a)
        pairs.append(r)
        slopes.append(float((weights * slope(u) ** 2).sum()))
        slope_pairs.append(float((both * slope(u)[:, None] * slope(v)).sum()))
    q, q_pair = [1.0], [1.0]
    for own, pair in zip(slopes[::-1], slope_pairs[::-1], strict=True):
        q.insert(0, q[0] * sigma * own)
        q_pair.insert(0, q_pair[0] * sigma * pair)
    num_parameters = 3 * width**2 + 3 * width
    alpha = num_parameters / width**2
    kappa_1 = sum(x * y for x, y in zip(q, activities, strict=True)) / alpha
    kappa_2 = sum(x * y for x, y in zip(q_pair, pairs, strict=True)) / alpha
    found = spectrum_statistics(net, samples=7, biased=False)
    assert found.num_parameters == num_parameters
    assert found.kappa == pytest.approx((kappa_1, kappa_2), rel=1e-10)
    assert found.mean == pytest.approx(kappa_1 * 3 / width, rel=1e-10)
    expected = alpha * (6 / 7 * kappa_2**2 + kappa_1**2 / 7) * 3
    assert found.second_moment == pytest.approx(expected, rel=1e-10)
    expected = alpha * (6 / 7 * kappa_2 + kappa_1 / 7) * width
    assert found.largest == pytest.approx(expected, rel=1e-10)
    assert found.learning_rate_bound == pytest.approx(2 / expected, rel=1e-10)


def test_samples_that_are_alike_are_a_data_set():
    """κ1 and κ2 give what a data set with just these overlaps does."""
    setting = {"weight_variance": 1.5, "bias_variance": 0.2, "widths": [30, 40, 20, 5]}
    for overlap in (0.3, 0.0, -0.2):
        one = spectrum_statistics(propagate("relu", **setting, overlap=overlap), 6)
        matrix = torch.full((6, 6), overlap, dtype=torch.float64).fill_diagonal_(1.0)
        net = propagate("relu", **setting, activity=matrix.diagonal(), overlap=matrix)
        many = spectrum_statistics(net)
        assert many.kappa == pytest.approx(one.kappa, rel=1e-12)
        for name in ("mean", "second_moment", "largest", "num_parameters", "samples", "outputs"):
            assert getattr(many, name) == pytest.approx(getattr(one, name), rel=1e-12)
        assert many.count_bound(many.largest / 3) == pytest.approx(
            one.count_bound(one.largest / 3), rel=1e-12
        )


def test_a_linear_layer_is_exact():
    """Nothing is random about the Fisher matrix of one layer: every statistic is exact."""
    model, x = nn.Linear(5, 3).double(), inputs(0, 8, 5).double()
    net = propagate("linear", weight_variance=1.0, widths=[5, 3], **overlaps(x))
    found = spectrum_statistics(net)
    F = nm.fisher(model, nm.Gaussian(), x, nm.Dense(), estimator=nm.Exact())
    values = F.eigenvalues()
    assert found.mean == pytest.approx(float(values.mean()), rel=1e-12)
    assert found.second_moment == pytest.approx(float(values.square().mean()), rel=1e-12)
    assert found.largest == pytest.approx(float(values[0]), rel=1e-12)
    for threshold in (0.01, 0.3, 1.0, 3.0):
        assert int((values >= threshold).sum()) <= found.count_bound(threshold)


def test_other_likelihoods_enter_by_their_output_fisher():
    """Outputs near zero have the same Fisher matrix in every sample, so that it is exact again."""
    model, x = nn.Linear(5, 3).double(), inputs(0, 8, 5).double()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    net = propagate("linear", weight_variance=1.0, widths=[5, 3], **overlaps(x))
    sigma = torch.full((3, 3), -1 / 9, dtype=torch.float64).fill_diagonal_(2 / 9)
    found = spectrum_statistics(net, output_fisher=sigma)
    values = nm.fisher(model, nm.Categorical(), x, nm.Dense(), estimator=nm.Exact()).eigenvalues()
    assert found.mean == pytest.approx(float(values.mean()), rel=1e-12)
    assert found.largest == pytest.approx(float(values[0]), rel=1e-12)
    assert found.second_moment == pytest.approx(float(values.square().mean()), rel=1e-12)


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_learning_rate_bound_of_the_linearised_model(factor):
    """Gradient descent on the linearised loss shrinks below the measured bound, and grows above."""
    x = inputs(0, 6, 8).double()
    model = Network([8, 8, C], torch.tanh, 1.0, 0).double()
    F = nm.fisher(model, nm.Gaussian(), x, nm.Gram(), estimator=nm.Exact())
    rate = factor * 2 / float(F.eigenvalues(1)[0])
    params = dict(model.named_parameters())
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, x))(params)
    J = torch.cat([part.detach().flatten(2).flatten(0, 1) for part in jacobian.values()], dim=1)
    residual = start = model(x).detach().flatten() - 1
    for _ in range(400):
        residual = residual - rate * J @ (J.T @ residual) / len(x)
    assert (float(residual.norm() / start.norm()) < 1) == (factor < 1)


def test_text_and_plain_data():
    found = spectrum_statistics(propagate("tanh", weight_variance=1, widths=[9, 9, 2]), 5)
    assert "gradient descent is stable below" in str(found)
    assert found.to_dict()["learning_rate_bound"] == 2 / found.largest


@pytest.mark.parametrize(
    ("setting", "arguments", "message"),
    [
        ({"depth": 2}, {"samples": 5}, "widths"),
        ({"widths": [3, 3, 2]}, {}, "samples=T"),
        ({"widths": [3, 3, 2]}, {"samples": 0}, "samples=0"),
        ({"widths": [3, 3, 2]}, {"samples": 5, "fan_in": [3]}, "fan_in is one per layer"),
        ({"widths": [3, 3, 2]}, {"samples": 5, "biased": [True]}, "biased is one per layer"),
        (
            {"widths": [3, 3, 2], "activity": torch.ones(4)},
            {"samples": 5},
            "activities of 4 samples",
        ),
    ],
)
def test_errors_say_what_to_do(setting, arguments, message):
    net = propagate("tanh", weight_variance=1.0, **setting)
    with pytest.raises(ValueError, match=message):
        spectrum_statistics(net, **arguments)


def test_a_threshold_is_positive():
    found = spectrum_statistics(propagate("tanh", weight_variance=1, widths=[9, 9, 2]), 5)
    with pytest.raises(ValueError, match="> 0"):
        found.count_bound(0)
