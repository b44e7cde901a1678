"""Closed forms of layers against the Fisher matrix by automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jacrev

import neuromanifold as nm
from neuromanifold.relative import forms, layers, units

pytestmark = pytest.mark.usefixtures("float64")

N, I, O = 9, 4, 3  # noqa: E741


def assert_equal(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def assert_is(metric: forms.ComponentMetric, expected: Tensor) -> None:
    """Everything that the metric can do, against its matrix."""
    fan_out, fan_in = metric.shape
    assert_equal(metric.dense(), expected)
    assert_equal(metric.trace(), expected.trace())
    assert_equal(metric.diagonal(), expected.diagonal().view(fan_out, fan_in))
    blocks = expected.view(fan_out, fan_in, fan_out, fan_in)
    assert_equal(metric.units(), torch.stack([blocks[o, :, o] for o in range(fan_out)]))
    v = torch.randn(5, fan_out, fan_in)
    assert_equal(metric.matmul(v).flatten(1), v.flatten(1) @ expected)
    assert_equal(metric.matmul(v[0]), metric.matmul(v)[0])


def pulled_back(
    function: Callable[[Tensor], Tensor], at: Tensor, information: Tensor | None = None
) -> Tensor:
    """`(1/N) Σ_n J_nᵀ Σ_n J_n` for outputs (N, *K) and parameters that are one tensor."""
    outputs = function(at)
    jacobian = jacrev(function)(at).reshape(*outputs.flatten(1).shape, -1)
    if information is None:
        information = torch.eye(jacobian.shape[1]).expand(len(outputs), -1, -1)
    return torch.einsum("nkp,nkl,nlq->pq", jacobian, information, jacobian) / len(outputs)


def enumerated(log_probs: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """`(1/N) Σ_n Σ_y p(y) g gᵀ` for log-probabilities of every outcome (N, Y)."""
    scores = jacrev(log_probs)(at).flatten(2)
    p = log_probs(at).exp()
    assert_equal(p.sum(1), torch.ones(len(p)))
    return torch.einsum("ny,nyp,nyq->pq", p, scores, scores) / len(p)


def parameters(layer: nn.Module) -> Tensor:
    """W̃ (O, I), unit-major with the bias last."""
    return torch.cat([layer.weight.flatten(1), layer.bias[:, None]], dim=1).detach()


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


def storages(value: object) -> Iterator[tuple[int, int]]:
    """Address and size of each tensor that an object keeps."""
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            yield storage.data_ptr(), storage.nbytes() // item.element_size()
        elif hasattr(item, "__dataclass_fields__"):
            yield from storages(item)


def numbers_kept(value: object) -> int:
    return sum(dict(storages(value)).values())


@pytest.mark.parametrize("variance", [0.3, torch.tensor([0.5, 1.0, 2.0])], ids=["one", "each"])
def test_linear(variance: float | Tensor):
    x, layer = torch.randn(N, I), nn.Linear(I, O)
    information = torch.diag(torch.ones(O) / variance).expand(N, O, O)
    expected = pulled_back(lambda w: with_ones(x) @ w.T, parameters(layer), information)
    assert_is(layers.linear(x, O, variance), expected)


@pytest.mark.parametrize(
    ("activation", "sensitivity", "information"),
    [
        pytest.param(torch.tanh, units.tanh, lambda m: 1 / (1 - m**2), id="signs"),
        pytest.param(torch.sigmoid, units.sigmoid, lambda m: 1 / (m - m**2), id="bits"),
        pytest.param(F.elu, units.elu, torch.ones_like, id="Gaussian"),
    ],
)
def test_independent_units(activation, sensitivity, information):
    x, layer = torch.randn(N, I), nn.Linear(I, O)
    known = torch.diag_embed(information(activation(layer(x)).detach()))
    expected = pulled_back(lambda w: activation(with_ones(x) @ w.T), parameters(layer), known)
    assert_is(layers.nonlinear(x, sensitivity(layer(x))), expected)


def test_softmax():
    x, layer = torch.randn(N, I), nn.Linear(I, O)
    expected = enumerated(lambda w: (with_ones(x) @ w.T).log_softmax(1), parameters(layer))
    assert_is(layers.softmax(x, layer(x)), expected)


def test_without_a_bias_and_over_positions():
    x, layer = torch.randn(N, 5, I), nn.Linear(I, O, bias=False)
    expected = pulled_back(lambda w: (x @ w.T).tanh(), layer.weight.detach())
    metric = layers.nonlinear(x, units.gaussian(torch.tanh, layer(x)), bias=False)
    assert_is(metric, expected)
    assert_is(
        layers.linear(x, O, bias=False), pulled_back(lambda w: x @ w.T, layer.weight.detach())
    )
    p = layer(x).softmax(2).detach()
    information = torch.stack([torch.block_diag(*(1 / row).diag_embed()) for row in p])
    expected = pulled_back(lambda w: (x @ w.T).softmax(2), layer.weight.detach(), information)
    assert_is(layers.softmax(x, layer(x), bias=False), expected)


def test_softmax_is_the_exact_block_of_the_last_layer():
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, I), nn.Tanh(), nn.Linear(I, O))
    x = torch.randn(N, 5)
    exact = nm.fisher(model, nm.Categorical(), x, nm.BlockDiagonal(), estimator=nm.Exact())
    metric = layers.softmax(model[:4](x), model(x))
    weights = torch.arange(O * I).view(O, I)
    order = torch.cat([weights, O * I + torch.arange(O)[:, None]], dim=1).flatten()
    block = exact.block("4").to_dense()[order][:, order]
    assert (metric.dense() - block).abs().max() < 1e-12
    assert block.abs().max() > 0.01


@pytest.mark.parametrize(
    "conv",
    [
        pytest.param(lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), id="stride and padding"),
        pytest.param(lambda: nn.Conv2d(2, 3, (2, 3), dilation=(2, 1)), id="dilation"),
        pytest.param(lambda: nn.Conv2d(2, 4, 3, groups=2, padding="same"), id="groups"),
        pytest.param(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), id="reflect"),
        pytest.param(lambda: nn.Conv1d(4, 4, 2, groups=4), id="one axis, depthwise"),
        pytest.param(lambda: nn.Conv3d(1, 2, 2, stride=2), id="three axes"),
        pytest.param(lambda: nn.Conv2d(2, 3, 3, bias=False), id="no bias"),
    ],
)
def test_convolution(conv: Callable[[], layers.Conv]):
    layer = conv()
    x = torch.randn(3, layer.in_channels, *[5] * len(layer.kernel_size))
    biased = layer.bias is not None
    flat = parameters(layer) if biased else layer.weight.detach().flatten(1)

    def outputs(flat: Tensor) -> Tensor:
        weight = flat[:, :-1] if biased else flat
        params = {"weight": weight.view_as(layer.weight)} | (
            {"bias": flat[:, -1]} if biased else {}
        )
        return torch.func.functional_call(layer, params, x).tanh()

    metric = layers.convolution(x, units.gaussian(torch.tanh, layer(x)), layer)
    assert_is(metric, pulled_back(outputs, flat))


def test_convolution_equals_the_sum_over_unfolded_patches():
    conv, x = nn.Conv2d(2, 3, 3, stride=2, padding=1), torch.randn(4, 2, 5, 5)
    nu = units.relu(conv(x))
    patches = with_ones(F.unfold(x, 3, stride=2, padding=1).mT)  # (N, S, I)
    expected = torch.einsum("ncs,nsi,nsj->cij", nu.flatten(2), patches, patches) / 4
    assert_equal(layers.convolution(x, nu, conv).units(), expected)


def batch_norm(training: bool, num_features: int = O) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(num_features, eps=0.1).train(training)
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        tensor.copy_(torch.randn(num_features))
    norm.running_var.copy_(torch.rand(num_features) + 0.5)
    return norm


def normalise(s: Tensor, norm: nn.Module, scale: Tensor, shift: Tensor) -> Tensor:
    means, variances = norm.running_mean.clone(), norm.running_var.clone()
    return F.batch_norm(s, means, variances, scale, shift, norm.training, eps=norm.eps)


@pytest.mark.parametrize("training", [True, False], ids=["batch", "frozen"])
@pytest.mark.parametrize("positions", [(), (5,)])
def test_scale_and_shift_of_a_batch_norm(training: bool, positions: tuple[int, ...]):
    s, norm = torch.randn(N, O, *positions) * 2 + 1, batch_norm(training)
    at = torch.stack([norm.weight, norm.bias], dim=1).detach()
    before = norm.running_mean.clone()
    metric = layers.batch_norm(s, norm)
    assert_is(metric, pulled_back(lambda at: normalise(s, norm, at[:, 0], at[:, 1]), at))
    assert torch.equal(norm.running_mean, before)
    if training and not positions:
        variance = s.var(0, correction=0)
        assert_equal(
            metric.diagonal(), torch.stack([variance / (variance + norm.eps), torch.ones(O)], dim=1)
        )


@pytest.mark.parametrize("training", [True, False], ids=["batch", "frozen"])
def test_weights_before_a_batch_norm(training: bool):
    x, layer, norm = torch.randn(N, I), nn.Linear(I, O), batch_norm(training)
    scale, shift = norm.weight.detach(), norm.bias.detach()
    expected = pulled_back(
        lambda w: normalise(with_ones(x) @ w.T, norm, scale, shift), parameters(layer)
    )
    assert_is(layers.linear_batch_norm(x, layer(x), norm), expected)


def test_statistics_of_the_batch_where_none_are_kept():
    x, layer = torch.randn(N, I), nn.Linear(I, O)
    plain = nn.BatchNorm1d(O, affine=False, track_running_stats=False).eval()
    expected = pulled_back(
        lambda w: F.batch_norm(with_ones(x) @ w.T, None, None, training=True), parameters(layer)
    )
    assert_is(layers.linear_batch_norm(x, layer(x), plain), expected)


def test_batch_statistics_hide_the_bias_and_the_scale():
    x, layer, norm = torch.randn(N, I), nn.Linear(I, O), nn.BatchNorm1d(O, eps=1e-12)
    metric = layers.linear_batch_norm(x, layer(x), norm)
    bias = torch.tensor([0.0] * I + [1.0]).expand(O, -1)
    for hidden in (bias, parameters(layer)):
        assert metric.matmul(hidden).abs().max() < 1e-10
    assert metric.units()[0].diagonal()[0] > 0.01


def two_layer_case(num_outputs: int) -> tuple[Tensor, nn.Linear, nn.Linear, Tensor, Tensor]:
    x, lower, upper = torch.randn(N, I), nn.Linear(I, 5), nn.Linear(5, num_outputs)
    at = torch.cat([parameters(lower).flatten(), parameters(upper).flatten()])
    return x, lower, upper, lower(x).tanh().detach(), at


def outputs_of_two(x: Tensor, num_outputs: int) -> Callable[[Tensor], Tensor]:
    def outputs(at: Tensor) -> Tensor:
        lower, upper = at.split([5 * (I + 1), num_outputs * 6])
        hidden = (with_ones(x) @ lower.view(5, -1).T).tanh()
        return with_ones(hidden) @ upper.view(num_outputs, -1).T

    return outputs


def assert_is_pair(metric: forms.TwoLayerMetric, expected: Tensor) -> None:
    (rows, columns), above = metric.shapes
    split = rows * columns
    dense = metric.dense()
    for first, second in product((slice(None, split), slice(split, None)), repeat=2):
        assert_equal(dense[first, second], expected[first, second])
    assert_equal(metric.trace(), expected.trace())
    for part, at, shape in zip(
        zip(metric.units(), metric.diagonal(), strict=True),
        (slice(None, split), slice(split, None)),
        metric.shapes,
        strict=True,
    ):
        block = expected[at, at].view(*shape, *shape)
        assert_equal(part[0], torch.stack([block[o, :, o] for o in range(shape[0])]))
        assert_equal(part[1], expected[at, at].diagonal().view(shape))
    lower, upper = torch.randn(3, rows, columns), torch.randn(3, *above)
    moved = torch.cat([lower.flatten(1), upper.flatten(1)], dim=1) @ expected
    got = metric.matmul(lower, upper)
    assert_equal(torch.cat([part.flatten(1) for part in got], dim=1), moved)
    for one, many in zip(metric.matmul(lower[0], upper[0]), got, strict=True):
        assert_equal(one, many[0])


def test_two_layers_by_enumeration_of_four_outputs():
    x, _, upper, hidden, at = two_layer_case(2)
    outcomes = torch.tensor(list(product((-1.0, 1.0), repeat=2)))
    outputs = outputs_of_two(x, 2)

    def log_probs(at: Tensor) -> Tensor:
        return F.logsigmoid(outputs(at)[:, None] * outcomes).sum(2)

    nu = units.sigmoid(upper(hidden))
    metric = layers.two_layers(x, 1 - hidden**2, upper.weight, layers.nonlinear(hidden, nu))
    assert_is_pair(metric, enumerated(log_probs, at))


def test_two_layers_below_a_softmax_and_below_gaussian_noise():
    x, _, upper, hidden, at = two_layer_case(O)
    outputs, slopes = outputs_of_two(x, O), 1 - hidden**2
    metric = layers.two_layers(x, slopes, upper.weight, layers.softmax(hidden, upper(hidden)))
    assert_is_pair(metric, enumerated(lambda at: outputs(at).log_softmax(1), at))
    metric = layers.two_layers(x, slopes, upper.weight, layers.linear(hidden, O))
    assert_is_pair(metric, pulled_back(outputs, at))


def test_two_layers_without_biases():
    x, lower, upper = torch.randn(N, I), nn.Linear(I, 5, bias=False), nn.Linear(5, 2, bias=False)
    hidden = lower(x).sigmoid()
    above = layers.linear(hidden, 2, bias=False)
    metric = layers.two_layers(x, hidden * (1 - hidden), upper.weight, above, bias=False)

    def outputs(at: Tensor) -> Tensor:
        first, second = at.split([5 * I, 2 * 5])
        return (x @ first.view(5, I).T).sigmoid() @ second.view(2, 5).T

    at = torch.cat([lower.weight.flatten(), upper.weight.flatten()]).detach()
    assert_is_pair(metric, pulled_back(outputs, at))


def test_stochastic_hidden_units_are_seen_by_themselves():
    """papers.md 1.2: the joint Fisher is block diagonal, with the relative metric as a block."""
    x, lower, _, _, at = two_layer_case(2)
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=7)))
    hidden, observed = signs[:, :5], signs[:, 5:]

    def log_probs(at: Tensor) -> Tensor:
        first, second = at.split([5 * (I + 1), 2 * 6])
        below = F.logsigmoid(2 * hidden * (with_ones(x) @ first.view(5, -1).T)[:, None]).sum(2)
        above = F.logsigmoid(observed * (with_ones(hidden) @ second.view(2, -1).T)).sum(1)
        return below + above

    joint, split = enumerated(log_probs, at), 5 * (I + 1)
    assert joint[:split, split:].abs().max() < 1e-14
    assert_equal(layers.nonlinear(x, units.tanh(lower(x))).dense(), joint[:split, :split])


def test_storage_is_linear_in_the_units_of_each_sample():
    num_samples, fan_in, fan_out = 50, 20, 10
    x, layer = torch.randn(num_samples, fan_in), nn.Linear(fan_in, fan_out)
    s, size = layer(x), num_samples * (fan_out + fan_in + 1)
    inputs = num_samples * (fan_in + 1)
    norm = nn.BatchNorm1d(fan_out)
    assert numbers_kept(layers.nonlinear(x, units.tanh(s))) == size
    assert numbers_kept(layers.softmax(x, s)) == size
    assert numbers_kept(layers.softmax(x, s, bias=False)) <= num_samples * (fan_out + fan_in)
    assert numbers_kept(layers.linear(x, fan_out)) == inputs + 1
    assert numbers_kept(layers.linear_batch_norm(x, s, norm)) == size + fan_out
    assert numbers_kept(layers.linear_batch_norm(x, s, norm.eval())) == inputs + fan_out
    assert numbers_kept(layers.batch_norm(s, norm)) == 4 * fan_out
    weight = torch.randn(3, fan_out)
    pair = layers.two_layers(x, s, weight, layers.softmax(s, s @ weight.T))
    above = num_samples * (fan_out + 1 + 3)
    assert numbers_kept(pair) == size + above + weight.numel()
    for tensor in (pair.inputs, pair.slopes, pair.weight, pair.above.weights):
        assert not tensor.requires_grad


def test_many_units_and_rows():
    """More than are weighted at once."""
    x, nu = torch.randn(3000, 40), torch.rand(3000, 100)
    got = layers.nonlinear(x, nu, bias=False).units()
    for unit in (0, 50, 99):
        assert_equal(got[unit], (x * nu[:, unit, None]).T @ x / 3000)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_numbers_are_summed_in_float32(dtype: torch.dtype):
    x, logits = torch.randn(N, I).to(dtype), (1e4 * torch.randn(N, O)).to(dtype)
    norm = nn.BatchNorm1d(O, dtype=torch.float32)
    above = layers.linear(logits, 2)
    weight = torch.randn(2, O).to(dtype)
    for metric in (
        layers.linear(x, O),
        layers.nonlinear(x, units.tanh(logits)),
        layers.softmax(x, logits),
        layers.batch_norm(logits, norm),
        layers.linear_batch_norm(x, logits, norm),
        layers.two_layers(x, units.tanh(logits), weight, above),
    ):
        dense = metric.dense()
        assert dense.dtype == torch.float32
        assert dense.isfinite().all()


def call_convolution(x: Tensor) -> object:
    return layers.convolution(x[:, None], torch.ones(2, 4, 3), nn.Conv1d(1, 4, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: layers.nonlinear(x, torch.ones(3, 2)), r"\(2, 3\) and \(3, 2\)"),
        (lambda x: layers.softmax(x[0], torch.ones(2)), r"Inputs \(N, \*T, I\) and logits"),
        (lambda x: layers.linear(x, 2, 0.0), "variance must be > 0"),
        (lambda x: layers.linear(x, 2).matmul(torch.ones(2, 3)), r"\(2, 4\) or \(R, 2, 4\)"),
        (call_convolution, "4 channels at 2 positions"),
        (lambda x: layers.batch_norm(x, nn.BatchNorm1d(2)), r"\(N, 2\) or .* got \(2, 3\)"),
        (lambda x: layers.batch_norm(x, nn.BatchNorm1d(3, affine=False)), "no scale and shift"),
        (
            lambda x: layers.linear_batch_norm(x[None], x[None], nn.BatchNorm1d(3)),
            r"inputs of shape \(N, I\)",
        ),
        (
            lambda x: layers.two_layers(x, x, torch.ones(2, 5), layers.linear(x, 2)),
            r"weight \(2, 5\)",
        ),
        (
            lambda x: layers.two_layers(x, x, torch.ones(2, 3), layers.linear(x, 2)).matmul(
                torch.ones(3, 4), torch.ones(2, 3)
            ),
            r"\(3, 4\) for the lower",
        ),
    ],
)
def test_refusals_say_what_to_do(call: Callable[[Tensor], object], message: str):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 3))


def test_a_matrix_that_cannot_fit_is_refused():
    metric = layers.linear(torch.ones(2, 3000), 3000)
    assert metric.diagonal().shape == (3000, 3001)
    with pytest.raises(nm.errors.TooLargeError, match=r"matmul\(v\), or units\(\)"):
        metric.dense()
