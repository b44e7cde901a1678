"""Named variances against what torch draws."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from neuromanifold.errors import UnsupportedError
from neuromanifold.meanfield.initialisation import measured, variances
from neuromanifold.meanfield.recursions import propagate

WIDTHS = (400, 300, 200)


def drawn(initialise) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 200))
    for layer in (model[0], model[2]):
        if initialise is not None:
            initialise(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


@pytest.mark.parametrize(
    ("rule", "initialise"),
    [
        ("pytorch", None),
        ("xavier", nn.init.xavier_normal_),
        ("kaiming", lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu")),
        ("lecun", lambda w: nn.init.normal_(w, std=w.shape[1] ** -0.5)),
    ],
)
def test_rules_are_what_torch_draws(rule, initialise):
    torch.manual_seed(0)
    found, expected = measured(drawn(initialise)), variances(rule, WIDTHS)
    assert found.widths == expected.widths == WIDTHS
    assert found.names == ("0", "2")
    # Relative standard error of a variance: √(2/count) for normal numbers, less for uniform ones.
    for got, want, count in zip(found.weight, expected.weight, (120_000, 60_000), strict=True):
        assert got == pytest.approx(want, rel=5 * (2 / count) ** 0.5)
    for got, want, count in zip(found.bias, expected.bias, (300, 200), strict=True):
        assert got == pytest.approx(want, rel=5 * (2 / count) ** 0.5)


def test_gains_of_other_activations():
    assert variances("kaiming", (3, 2), activation="tanh").weight[0] == pytest.approx(25 / 9)


def test_convolutions_count_kernel_entries():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(32, 64, 3), nn.Tanh(), nn.Conv2d(64, 16, 3, groups=4), nn.Flatten(),
        nn.Linear(16 * 4, 10, bias=False),
    )  # fmt: skip
    found = measured(model)
    rule = variances("pytorch", (32, 64), kernel_entries=9)
    assert found.widths == (32, 64, 16, 10)
    assert found.weight[0] == pytest.approx(rule.weight[0], rel=0.05)
    assert found.bias[0] == pytest.approx(1 / (3 * 288), rel=5 * (2 / 64) ** 0.5)
    # A group sees a quarter of the channels: that is its fan-in.
    assert found.weight[1] == pytest.approx(1 / 3, rel=0.1)
    assert found.bias[2] == 0


def test_a_model_can_be_followed_by_its_own_variances():
    torch.manual_seed(0)
    found = measured(drawn(None))
    net = propagate(
        "relu", weight_variance=found.weight, bias_variance=found.bias, widths=found.widths
    )
    assert net.gain[0] == pytest.approx(1 / 6, rel=0.05)


def test_channels_of_a_convolutional_network_follow_the_recursion():
    torch.manual_seed(0)
    model = nn.Sequential()
    for _ in range(2):
        layer = nn.Conv1d(600, 600, 3, padding=1, padding_mode="circular")
        nn.init.normal_(layer.weight, std=(1.5 / 1800) ** 0.5)
        nn.init.normal_(layer.bias, std=0.1**0.5)
        model.extend([layer, nn.Tanh()])
    with torch.no_grad():
        activity = model(torch.randn(1, 600, 5)).square().mean()
    net = propagate("tanh", weight_variance=1.5, bias_variance=0.1, depth=3)
    # 600 channels: tanh² varies by less than 0.3 about its mean; positions share their biases.
    assert float(activity) == pytest.approx(float(net.activity[2]), abs=5 * 0.3 / 600**0.5)


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="'glorot'"):
        variances("glorot", (3, 2))
    with pytest.raises(ValueError, match="at least one layer"):
        variances("xavier", (3,))
    with pytest.raises(UnsupportedError, match="no linear"):
        measured(nn.ReLU())
    with pytest.raises(UnsupportedError, match="layers in a row"):
        measured(nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 2)))
