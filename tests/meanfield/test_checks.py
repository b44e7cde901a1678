"""What is measured of a model against autograd, what is found in it, and what is said about it."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from statistics import mean

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import neuromanifold as nm
from neuromanifold.errors import UnsupportedError
from neuromanifold.meanfield.checks import check


def network(activation, weight_variance, *, width=100, hidden=6, bias_variance=0.0, seed=0):
    """Random, with linear outputs."""
    generator = torch.Generator().manual_seed(seed)
    modules = []
    for fan_in, fan_out in [(width, width)] * hidden + [(width, 3)]:
        layer = nn.Linear(fan_in, fan_out)
        with torch.no_grad():
            layer.weight.normal_(std=(weight_variance / fan_in) ** 0.5, generator=generator)
            layer.bias.normal_(std=bias_variance**0.5, generator=generator)
        modules += [layer, activation()]
    return nn.Sequential(*modules[:-1]).double()


def inputs(num, *shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, *shape, dtype=torch.float64, generator=generator)


class Functional(nn.Module):
    """Activations as functions: with arguments, in place, and a skip connection."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.d = nn.Linear(8, 2)

    def forward(self, x):
        h = F.leaky_relu(self.a(x), 0.2)
        h = torch.relu_(self.b(h))
        h = h + F.elu(self.c(h), alpha=0.5)
        return self.d(h)


def default(activation, width=100):
    torch.manual_seed(0)
    hidden = [m for _ in range(6) for m in (nn.Linear(width, width), activation())]
    return nn.Sequential(*hidden, nn.Linear(width, 3)).double()


# ---- what is measured ------------------------------------------------------------------------


def test_measured_numbers_are_those_of_autograd():
    model, x = network(nn.Tanh, 1.2, width=9, hidden=2, bias_variance=0.1), 3 * inputs(5, 9) + 1
    found = check(model, x)
    layers = [m for m in model if isinstance(m, nn.Linear)]
    a, signals, outputs = x, [], []
    for i, layer in enumerate(layers):
        u = layer(a)
        signals.append((layer, a, u))
        a = u.tanh() if i < 2 else u
    outputs = a
    for (layer, a, u), row in zip(signals, found.layers, strict=True):
        total = sum(
            torch.autograd.grad(outputs[:, k].sum(), u, retain_graph=True)[0].square().sum()
            for k in range(3)
        )
        assert row.error.measured == pytest.approx(float(total) / 3 / 5, rel=1e-10)
        assert row.activity.measured == pytest.approx(float(a.detach().square().mean()), rel=1e-10)
        unit = F.normalize(a.detach(), dim=1)
        pairs = ((unit @ unit.T).sum() - 5) / 20
        assert row.correlation.measured == pytest.approx(float(pairs), rel=1e-10)
        assert row.weight_variance == pytest.approx(
            float(layer.weight.detach().square().mean()) * layer.in_features, rel=1e-10
        )
        if layer is not layers[-1]:
            above = found.layers[found.layers.index(row) + 1].weight_variance
            slope = (1 - u.detach().tanh() ** 2).square().mean()
            assert row.gain.measured == pytest.approx(above * float(slope), rel=1e-10)
    values = nm.fisher(model, nm.Gaussian(), x, nm.Dense(), estimator=nm.Exact()).eigenvalues()
    assert found.measured.largest == pytest.approx(float(values[0]), rel=1e-9)
    assert found.measured.mean == pytest.approx(float(values.mean()), rel=1e-9)
    assert found.measured.second_moment == pytest.approx(float(values.square().mean()), rel=1e-9)


@pytest.mark.parametrize(
    ("activation", "weight_variance", "data"),
    [
        (nn.Tanh, 1.0, "standardised"),
        (nn.Tanh, 1.0, "raw"),
        (nn.ReLU, 2.0, "raw"),
        (nn.GELU, 2.0, "standardised"),
    ],
)
def test_predictions_hold_in_a_wide_network(activation, weight_variance, data):
    """Width 1,000, mean of five networks, within four standard errors.

    The mean square of n activations of one input varies by `5/n` of its square for relu, less for
    bounded activations, in each layer; where inputs are alike, more of them do not help.
    """
    width, hidden, seeds = 1000, 2, 5
    x = inputs(8, width)
    if data == "raw":
        x = x.abs() * torch.arange(1.0, 9.0)[:, None]
    found = [
        check(network(activation, weight_variance, width=width, hidden=hidden, seed=seed), x)
        for seed in range(seeds)
    ]
    spread = 4 * math.sqrt(5 * hidden / (width * seeds))
    for i in range(hidden + 1):
        rows = [one.layers[i] for one in found]
        assert mean(row.activity.ratio for row in rows) == pytest.approx(1, abs=spread)
        assert mean(row.error.ratio for row in rows) == pytest.approx(1, abs=spread)
        apart = mean(row.correlation.predicted - row.correlation.measured for row in rows)
        assert abs(apart) < spread / 2
    assert mean(one.predicted.mean / one.measured.mean for one in found) == pytest.approx(
        1, abs=spread
    )
    assert mean(one.predicted.largest / one.measured.largest for one in found) == pytest.approx(
        1, abs=spread
    )


def test_convolutions_are_predicted_per_channel():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 36, 4),
    )
    found = check(model, inputs(6, 3, 6, 6).float())
    assert [layer.fan_in for layer in found.layers] == [27, 576, 64 * 36]
    assert not found.left_out
    for row in found.layers:
        assert row.activity.ratio == pytest.approx(1, abs=0.2)
        assert row.error.ratio == pytest.approx(1, abs=0.2)
    assert found.predicted.mean / found.measured.mean == pytest.approx(1, abs=0.2)


def test_other_likelihoods_scale_errors_by_their_output_fisher():
    model, x = default(nn.ReLU), inputs(8, 100)
    found = check(model, x, nm.Categorical())
    assert found.layers[-1].error.predicted == pytest.approx(found.layers[-1].error.measured)
    assert found.layers[-1].error.measured == pytest.approx(2 / 9, rel=0.01)
    measured = nm.fisher(model, nm.Categorical(), x, nm.Gram(), estimator=nm.Exact())
    assert found.measured.largest == pytest.approx(float(measured.eigenvalues(1)[0]))
    assert found.predicted.largest / found.measured.largest == pytest.approx(1, abs=0.2)


# ---- what is found ---------------------------------------------------------------------------


def test_activations_called_as_functions_are_found():
    found = check(Functional(), torch.randn(5, 6))
    assert [layer.name for layer in found.layers] == ["a", "b", "c", "d"]
    assert [layer.activation for layer in found.layers] == ["leaky_relu", "relu", "elu", "linear"]
    assert found.left_out == ("add, before d",)
    assert "1 part of the model left out" in found.verdict


def test_modules_and_functions_are_the_same():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Linear(8, 2)]
    x = torch.randn(5, 6)

    class AsFunction(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x):
            return layers[1](F.leaky_relu(layers[0](x), negative_slope=0.3, inplace=True))

    by_module = check(nn.Sequential(layers[0], nn.LeakyReLU(0.3), layers[1]), x)
    by_function = check(AsFunction(), x)
    assert by_module.predicted == by_function.predicted
    assert by_module.verdict == by_function.verdict


def test_what_is_left_out_is_said():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(),
        nn.Flatten(), nn.Linear(16, 3),
    ).eval()  # fmt: skip
    found = check(model, torch.randn(4, 2, 6, 6))
    assert [layer.activation for layer in found.layers] == ["relu", "linear"]
    assert found.left_out == (
        "1 (BatchNorm2d), before 6",
        "3 (MaxPool2d), before 6",
        "parameter 1.weight",
        "parameter 1.bias",
    )
    assert "Left out: 1 (BatchNorm2d)" in str(found)


def test_frozen_and_repeated_layers_are_said():
    shared, last = nn.Linear(5, 5), nn.Linear(5, 2)
    found = check(nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), last), torch.randn(4, 5))
    assert "0, used again" in found.left_out
    frozen = nn.Linear(5, 5).requires_grad_(False)
    found = check(nn.Sequential(frozen, nn.Tanh(), last), torch.randn(4, 5))
    assert found.left_out == ("layer 0, frozen or not read as a layer",)
    assert [layer.name for layer in found.layers] == ["2"]


def test_the_model_is_left_as_it_was():
    model, x = (
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)),
        torch.ones(5, 3),
    )
    before = deepcopy(model.state_dict())
    check(model, (x, torch.zeros(5, 2)))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(x, torch.ones(5, 3))


def test_samples_are_limited_to_the_first_ones():
    model, x = default(nn.Tanh, width=8), inputs(20, 8)
    some = check(model, [(x, torch.zeros(20, 3))], samples=5)
    assert some.samples == 5
    assert some.to_dict() == check(model, x[:5]).to_dict()


# ---- what is said ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "phase", "beginning", "end"),
    [
        pytest.param(
            lambda: default(nn.ReLU),
            "ordered",
            "ordered phase: signals fade to a tenth within 2 layers; raise weight variance from "
            "0.33 to 2.00, learning rate below",
            "",
            id="relu as PyTorch begins",
        ),
        pytest.param(
            lambda: network(nn.Tanh, 0.8, bias_variance=0.3),
            "ordered",
            "ordered phase: signals of two inputs become alike within 5 layers; raise weight "
            "variance from 0.81 to 2.47, learning rate below",
            "",
            id="tanh with large biases",
        ),
        pytest.param(
            lambda: network(nn.ReLU, 2.0),
            "edge of chaos",
            "at the edge of chaos: fine for 6 hidden layers; learning rate below",
            "",
            id="relu after He",
        ),
        pytest.param(
            lambda: network(nn.Tanh, 4.0, bias_variance=0.05),
            "chaotic",
            "chaotic phase: inputs that are alike are torn apart",
            "lower weight variance from 4",
            id="tanh",
        ),
        pytest.param(
            lambda: nn.Linear(100, 3).double(),
            "no hidden layer",
            "no hidden layer: nothing to check but the step, learning rate below",
            "",
            id="one layer",
        ),
    ],
)
def test_verdicts(model, phase, beginning, end):
    found = check(model(), inputs(10, 100))
    assert found.phase == phase
    assert found.verdict.startswith(beginning)
    assert end in found.verdict
    assert "\n" not in found.verdict
    assert str(found).endswith(found.verdict)
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_recommendation_is_at_the_edge_of_chaos():
    """A network made as recommended is fine, and its bound is about the one that was predicted."""
    advice = check(
        network(nn.Tanh, 0.3, width=400, bias_variance=0.01), inputs(10, 400)
    ).recommended
    made = network(nn.Tanh, advice.weight_variance, width=400, bias_variance=advice.bias_variance)
    with torch.no_grad():
        made[-1].weight *= (0.3 / advice.weight_variance) ** 0.5
    found = check(made, inputs(10, 400))
    assert found.phase == "edge of chaos"
    bound = found.measured.learning_rate_bound
    assert bound == pytest.approx(advice.learning_rate_bound, rel=0.3)


def test_inputs_may_be_there_twice_or_zero():
    x = inputs(3, 100)
    found = check(default(nn.ReLU), torch.cat([x, x, -x, torch.zeros_like(x)]))
    assert found.predicted.largest / found.measured.largest == pytest.approx(1, abs=0.2)


def test_one_sample_has_no_correlation():
    found = check(default(nn.Tanh), inputs(1, 100))
    assert math.isnan(found.layers[0].correlation.measured)
    assert found.alike_after is None
    assert found.to_dict()["layers"][0]["correlation"]["measured"] is None


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (nn.LayerNorm(4), {}, "no nn.Linear"),
        (nn.Linear(4, 2).requires_grad_(False), {}, "requires_grad_"),
        (nn.Linear(4, 2), {"samples": 0}, "at least 1"),
    ],
)
def test_errors_say_what_to_do(model, arguments, message):
    with pytest.raises((ValueError, UnsupportedError), match=message):
        check(model, torch.randn(3, 4), **arguments)
