"""Fixed points against long iterations, and the edges of chaos that are known."""

from __future__ import annotations

import json
import math

import pytest
import torch

from neuromanifold.errors import UnsupportedError
from neuromanifold.meanfield.kernels import kernel
from neuromanifold.meanfield.phases import edge_of_chaos, fixed_point, phase_diagram
from neuromanifold.meanfield.recursions import propagate

POINTS = [
    ("tanh", 0.8, 0.1), ("tanh", 2.5, 0.05), ("erf", 3.0, 0.02), ("gelu", 1.0, 0.1),
    ("sigmoid", 200.0, 0.1), ("sin", 3.0, 0.1), ("softplus", 1.0, 0.1), ("relu", 1.2, 0.3),
]  # fmt: skip


@pytest.mark.parametrize(("name", "weight", "bias"), POINTS)
def test_signals_end_at_the_fixed_point(name, weight, bias):
    found = fixed_point(name, weight, bias)
    net = propagate(name, weight_variance=weight, bias_variance=bias, depth=200, overlap=0.3)
    correlation = net.covariance / net.variance
    torch.testing.assert_close(net.variance[-1], found.variance, rtol=1e-11, atol=0)
    torch.testing.assert_close(correlation[-1], found.correlation, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(net.gain[-1], found.gain, rtol=1e-11, atol=0)
    assert found.phase == ("ordered" if found.gain < 1 else "chaotic")
    assert (found.correlation == 1) == (found.gain < 1)


@pytest.mark.parametrize(("name", "weight", "bias"), [("tanh", 1.4, 0.1), ("tanh", 2.5, 0.05)])
def test_depth_scales_are_those_of_the_iteration(name, weight, bias):
    found = fixed_point(name, weight, bias)
    net = propagate(name, weight_variance=weight, bias_variance=bias, depth=60, overlap=0.3)
    gap = (net.variance - found.variance).abs()
    rate = float((gap[9] / gap[6]).log() / -3)
    assert rate == pytest.approx(1 / float(found.variance_depth), rel=0.02)
    gap = (net.covariance / net.variance - found.correlation).abs()
    rate = float((gap[59] / gap[49]).log() / -10)
    assert rate == pytest.approx(1 / float(found.correlation_depth), rel=0.05)


@pytest.mark.parametrize(
    ("name", "weight"),
    [("tanh", 1.0), ("sin", 1.0), ("erf", math.pi / 4), ("relu", 2.0), ("leaky_relu", 2 / 1.0001)],
)
def test_edges_without_biases_are_one_over_the_squared_slope_at_zero(name, weight):
    edge = edge_of_chaos(name)
    assert float(edge) == pytest.approx(weight, abs=1e-12)
    assert fixed_point(name, edge).phase == "edge of chaos"


@pytest.mark.parametrize("name", ["tanh", "erf", "selu", "elu", "sigmoid"])
@pytest.mark.parametrize("bias", [0.01, 0.3])
def test_at_the_edge_the_gain_is_one(name, bias):
    edge = edge_of_chaos(name, bias)
    gains = fixed_point(name, torch.stack([0.9 * edge, edge, 1.1 * edge]), bias).gain
    assert float(gains[1]) == pytest.approx(1, abs=1e-9)
    assert gains[0] < 1 < gains[2]


def test_a_known_point_of_the_edge():
    # By hand: E tanh'² at q gives the weight variance, the fixed point the bias variance.
    q = torch.tensor(0.8, dtype=torch.float64)
    weight = 1 / kernel("tanh").slope.square(q).value
    bias = q - weight * kernel("tanh").value.square(q).value
    assert float(edge_of_chaos("tanh", bias)) == pytest.approx(float(weight), rel=1e-12)


def test_relu_has_no_scale():
    settled = fixed_point("relu", 1.0, 0.3)
    assert float(settled.variance) == pytest.approx(0.6)
    assert float(settled.correlation) == 1
    kept = fixed_point("relu", 2.0, start=0.7)
    assert (float(kept.variance), kept.phase) == (0.7, "edge of chaos")
    slow = fixed_point("relu", 2.0, 0.1)
    assert (float(slow.variance), float(slow.gain)) == (math.inf, 1.0)
    assert fixed_point("relu", 2.5).phase == "unbounded"
    dead = fixed_point("relu", 1.0)
    assert (float(dead.variance), float(dead.gain), dead.phase) == (0.0, 0.5, "ordered")


def test_what_grows_without_end_has_no_correlation():
    found = fixed_point("gelu", 2.5)
    assert float(found.variance) == math.inf
    assert found.correlation.isnan()
    assert found.phase == "unbounded"
    # It also has an unstable fixed point with gain 1, which is no edge.
    with pytest.raises(UnsupportedError, match="gelu has no edge of chaos"):
        edge_of_chaos("gelu")


def test_a_selu_network_keeps_variance_one():
    # What it was made for.
    found = fixed_point("selu", 1.0, start=3.0)
    assert float(found.variance) == pytest.approx(1, abs=1e-12)


def test_the_diagram_is_its_points():
    weights, biases = [0.0, 0.5, 1.5, 3.0], [0.0, 0.05, 0.5]
    found = phase_diagram("tanh", weights, biases)
    assert found.points.gain.shape == (3, 4)
    for row, bias in enumerate(biases):
        assert float(found.edge[row]) == pytest.approx(float(edge_of_chaos("tanh", bias)))
        one = fixed_point("tanh", 1.5, bias)
        torch.testing.assert_close(found.points.correlation[row, 2], one.correlation)
        torch.testing.assert_close(found.points.variance[row, 2], one.variance)
    assert ((found.points.gain > 1) == (found.weight_variances > found.edge[:, None])).all()
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["weight_variance"] == weights
    assert "edge at" in str(found)
    assert "(3, 4)" in str(found.points)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="weight_variance must be"):
        fixed_point("tanh", -1.0)
    with pytest.raises(ValueError, match="start must be"):
        fixed_point("tanh", 1.0, start=0.0)
    with pytest.raises(ValueError, match="use fixed_point"):
        phase_diagram("tanh", 1.0, [0.1])
    with pytest.raises(ValueError, match="2 points"):
        _ = fixed_point("tanh", [1.0, 2.0]).phase
