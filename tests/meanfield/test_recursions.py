"""The recursions against wide random networks, and against hand-computed layers."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from neuromanifold.meanfield.kernels import kernel
from neuromanifold.meanfield.recursions import propagate

WIDTH, SEEDS = 2000, 24
"""Of the random networks, in float32: far more exact than their scatter."""


def random_network(name: str, weight: float, bias: float, seed: int) -> dict[str, Tensor]:
    """Activities, overlaps and errors of one network of three layers, two inputs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    phi = kernel(name).function
    x = normal(2, WIDTH)
    # Activities 1 and 0.5, overlap 0.4, exactly.
    x = torch.linalg.qr(x.T)[0].T * WIDTH**0.5
    x = torch.stack([x[0], 0.4 * x[0] + (0.5 - 0.16) ** 0.5 * x[1]])
    found: dict[str, list[Tensor]] = {"activity": [], "overlap": []}
    pre = []
    for _ in range(2):
        layer = normal(WIDTH, WIDTH) * (weight / WIDTH) ** 0.5
        u = (x @ layer.T + bias**0.5 * normal(WIDTH)).requires_grad_()
        pre.append(u)
        x = phi(u)
        found["activity"].append(x.detach().square().mean(-1))
        found["overlap"].append((x[0] * x[1]).detach().mean())
    outputs = x @ (normal(50, WIDTH) * (weight / WIDTH) ** 0.5).T
    # Mean over 50 outputs of the squared derivatives.
    signs = torch.eye(50)[:, None].expand(-1, 2, -1)
    grads = torch.autograd.grad(outputs, pre, signs, is_grads_batched=True)
    return {
        **{key: torch.stack(value) for key, value in found.items()},
        "error": torch.stack([g.square().sum(-1).mean(0) for g in grads]),
        "error_overlap": torch.stack([(g[:, 0] * g[:, 1]).sum(-1).mean(0) for g in grads]),
    }


@pytest.mark.parametrize(
    ("name", "weight", "bias"), [("tanh", 1.5, 0.1), ("relu", 2.0, 0.05), ("erf", 1.2, 0.0)]
)
def test_wide_random_networks_agree(name, weight, bias):
    runs = [random_network(name, weight, bias, seed) for seed in range(SEEDS)]
    overlap = torch.tensor([[1.0, 0.4], [0.4, 0.5]], dtype=torch.float64)
    theory = propagate(
        name,
        weight_variance=weight,
        bias_variance=[bias, bias, 0.0],
        depth=3,
        activity=overlap.diagonal(),
        overlap=overlap,
    )
    expected = {
        "activity": theory.activity[1:3],
        "overlap": theory.overlap[1:3, 0, 1],
        "error": theory.error[:2],
        "error_overlap": theory.error_overlap[:2, 0, 1],
    }
    for key, value in expected.items():
        samples = torch.stack([run[key] for run in runs]).double()
        # Student's t with 23 degrees of freedom, beyond 6 once in 200,000; corrections are
        # O(1 / width).
        margin = 6 * samples.std(0) / SEEDS**0.5 + 4 * value.abs() / WIDTH
        assert ((samples.mean(0) - value).abs() < margin).all(), key
        assert (margin < 0.1 * value.abs()).all(), key  # or the test would see nothing


def test_relu_at_its_critical_variance_keeps_everything():
    net = propagate("relu", weight_variance=2.0, depth=5, activity=0.7, overlap=0.7)
    torch.testing.assert_close(net.variance, torch.full((5,), 1.4).double())
    torch.testing.assert_close(net.gain, torch.ones(4).double())
    torch.testing.assert_close(net.error, torch.ones(5).double())
    assert torch.equal(net.overlap, net.activity)
    assert torch.equal(net.error, net.error_overlap)
    assert net.quadrature_error == 0


def test_a_linear_network_is_a_geometric_series():
    net = propagate("linear", weight_variance=[0.5, 3.0, 2.0], bias_variance=0.25, depth=3)
    torch.testing.assert_close(net.activity, torch.tensor([1.0, 0.75, 2.5, 5.25]).double())
    torch.testing.assert_close(net.overlap, torch.tensor([0.0, 0.25, 1.0, 2.25]).double())
    torch.testing.assert_close(net.gain, torch.tensor([3.0, 2.0]).double())
    torch.testing.assert_close(net.error, torch.tensor([6.0, 2.0, 1.0]).double())


def test_identical_inputs_stay_identical_for_ever():
    activity = torch.tensor([1.0, 0.3, 0.3], dtype=torch.float64)
    overlap = torch.tensor([[1.0, 0.1, 0.1], [0.1, 0.3, 0.3], [0.1, 0.3, 0.3]]).double()
    overlap[0, 0], overlap[1:, 1:] = activity[0], activity[1]
    for name in ("relu", "tanh"):
        net = propagate(
            name, weight_variance=1.7, bias_variance=0.1, depth=30, activity=activity,
            overlap=overlap,
        )  # fmt: skip
        assert torch.equal(net.overlap[:, 1, 2], net.activity[:, 1])
        assert torch.equal(net.error_overlap.diagonal(dim1=1, dim2=2), net.error)
        assert net.correlation[-1, 0, 1] > net.correlation[0, 0, 1]


def test_an_activation_for_each_layer_and_one_behind_the_outputs():
    net = propagate(["relu", "tanh"], weight_variance=2.0, widths=[30, 20, 10])
    assert net.names == ("relu", "tanh")
    assert net.widths == (30, 20, 10)
    slope = kernel("tanh").slope.square(net.variance[1]).value
    torch.testing.assert_close(net.error, torch.stack([slope, slope]))


def test_results_print_and_become_json():
    net = propagate("tanh", weight_variance=1.0, depth=2, activity=torch.ones(3), overlap=0.1)
    assert net.activity.dtype == torch.float32
    assert net.overlap.shape == (3, 3, 3)
    assert "means over inputs and pairs" in str(net)
    assert json.loads(json.dumps(net.to_dict(), allow_nan=False))["names"] == ["tanh", "linear"]
    one = propagate(nn.ReLU(), weight_variance=1.0, depth=1)
    assert one.gain.shape == (0,)
    assert "linear" in str(one)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"depth": None}, "either depth or widths"),
        ({"widths": [3, 4]}, "either depth or widths"),
        ({"depth": 0}, "at least one layer"),
        ({"weight_variance": [1.0, 2.0]}, "one per layer: 3"),
        ({"bias_variance": -0.1}, "bias_variance must be"),
        ({"weight_variance": float("nan")}, "weight_variance must be"),
        ({"overlap": 1.1}, "at most the root"),
        ({"activity": -1.0}, "mean square"),
        ({"activity": torch.ones(2), "overlap": torch.ones(3, 3)}, "a number or"),
        ({"activation": ["tanh", "relu"]}, "2 activations for 3 layers"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    given = {"activation": "tanh", "weight_variance": 1.0, "depth": 3, **changed}
    with pytest.raises(ValueError, match=message):
        propagate(given.pop("activation"), **given)
