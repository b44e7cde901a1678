"""Responses whose outputs are means, and the metric pulled back from above."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import neuromanifold as nm
from neuromanifold.errors import UnsupportedError
from neuromanifold.relative.responses import Binary, Probabilities, Through
from neuromanifold.testing import check_likelihood, reference


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    layer = nn.Linear(fan_in, fan_out, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(randn(fan_out, fan_in))
        layer.bias.copy_(randn(fan_out))
    return layer


def signs(*shape: int) -> Tensor:
    return torch.where(randn(*shape) > 0, 1.0, -1.0).double()


def above(fan_in: int, fan_out: int) -> nn.Module:
    return nn.Sequential(nn.Tanh(), linear(fan_in, fan_out))


def ignoring(targets: Tensor) -> Tensor:
    targets = targets.clone()
    targets.view(-1)[::3] = -100
    return targets


LABELS = torch.tensor([2, 0, 1])

CASES = {
    "binary": (Binary(), randn(4).sigmoid(), (signs(4) + 1) / 2),
    "binary vector": (Binary(), randn(3, 2).sigmoid(), (signs(3, 2) + 1) / 2),
    "binary signs": (Binary((-1, 1)), randn(2, 2, 2).tanh(), signs(2, 2, 2)),
    "binary other values": (Binary((2, 5)), 2 + 3 * randn(3, 2).sigmoid(), 3.5 + 1.5 * signs(3, 2)),
    "probabilities": (Probabilities(), randn(3, 3).softmax(-1), LABELS),
    "probabilities positions": (
        Probabilities(),
        randn(2, 3, 3).softmax(-1),
        torch.stack((LABELS, LABELS.flip(0))),
    ),
    "probabilities ignoring": (
        Probabilities(),
        randn(2, 3, 3).softmax(-1),
        ignoring(torch.stack((LABELS, LABELS.flip(0)))),
    ),
    "through to a label": (Through(above(2, 3), nm.Categorical()), randn(3, 2), LABELS),
    "through to labels": (
        Through(above(2, 3), nm.Categorical()),
        randn(2, 2, 2),
        torch.tensor([[0, 1], [2, 1]]),
    ),
    "through to values": (Through(above(3, 2), nm.Gaussian(0.3)), randn(3, 3), randn(3, 2)),
    "through to counts": (Through(above(3, 1), nm.Poisson()), randn(2, 3), torch.ones(2, 1)),
    "through twice": (
        Through(above(2, 3), Through(above(3, 2), nm.Bernoulli())),
        randn(3, 2),
        torch.eye(3, 2).double(),
    ),
    "through to binary": (
        Through(nn.Sequential(linear(3, 2), nn.Sigmoid()), Binary()),
        randn(3, 3),
        torch.eye(3, 2).double(),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_keeps_the_contract(case):
    check_likelihood(*CASES[case])


@pytest.mark.parametrize("case", [c for c in CASES if "ignoring" not in c])
def test_columns_equal_the_enumerated_output_fisher(case):
    likelihood, outputs, _ = CASES[case]
    columns = torch.stack(list(likelihood.fisher_columns(outputs))).reshape(
        -1, len(outputs), outputs[0].numel()
    )
    measured = torch.einsum("cni,cnj->nij", columns, columns)
    if "Through" in repr(likelihood):
        expected = pulled_back(likelihood, outputs)
    else:
        expected = enumerated(likelihood, outputs)
    assert_close(measured, expected, rtol=1e-12, atol=1e-12)


def enumerated(likelihood, outputs: Tensor) -> Tensor:
    """`E score scoreᵀ` by a sum over targets; the Hessian of `−E log p` has not this sum's size."""
    f = outputs.clone().requires_grad_()
    distribution = likelihood.distribution(f).base_dist
    values = distribution.enumerate_support().detach()
    log_p = distribution.log_prob(values).reshape(len(values), len(f), -1)  # (S, N, T)
    num = f[0].numel()
    total = f.new_zeros(len(f), num, num)
    for of_value in log_p:
        for at_position in of_value.unbind(1):
            (score,) = torch.autograd.grad(at_position.sum(), f, retain_graph=True)
            score = score.reshape(len(f), -1)
            total += at_position.exp().detach()[:, None, None] * score[:, :, None] * score[:, None]
    return total.detach()


def pulled_back(likelihood, outputs: Tensor) -> Tensor:
    values = likelihood.above(outputs).detach()
    if isinstance(likelihood.response, Through):
        inner = pulled_back(likelihood.response, values)
    elif isinstance(likelihood.response, Binary):
        inner = enumerated(likelihood.response, values)
    else:
        inner = reference.output_fisher(likelihood.response, values)
    rows = [
        torch.func.jacrev(lambda x: likelihood.above(x[None])[0])(x).reshape(
            values[0].numel(), x.numel()
        )
        for x in outputs
    ]
    j = torch.stack(rows)
    return torch.einsum("nei,nef,nfj->nij", j, inner, j)


# ---- the table of single components (papers.md §1.3) ----------------------------------------


def smooth_relu(a: Tensor, slope: float = 0.1, width: float = 0.7) -> Tensor:
    return width * torch.logaddexp(slope * a / width, a / width)


UNITS = {
    "tanh": (torch.tanh, Binary((-1, 1)), lambda a: 1 / a.cosh() ** 2),
    "tanh with a Gaussian": (torch.tanh, nm.Gaussian(), lambda a: 1 / a.cosh() ** 4),
    "sigmoid": (torch.sigmoid, Binary(), lambda a: a.sigmoid() * (-a).sigmoid()),
    "relu": (torch.relu, nm.Gaussian(), lambda a: (a > 0).double()),
    "leaky relu": (
        lambda a: nn.functional.leaky_relu(a, 0.2),
        nm.Gaussian(),
        lambda a: torch.where(a > 0, torch.ones_like(a), 0.2**2),
    ),
    "smooth relu": (
        smooth_relu,
        nm.Gaussian(),
        lambda a: (0.1 + 0.9 * (0.9 * a / 0.7).sigmoid()) ** 2,
    ),
    "elu": (
        lambda a: nn.functional.elu(a, 1.3),
        nm.Gaussian(2.0),
        lambda a: torch.where(a >= 0, 1, (1.3 * a.exp()) ** 2) / 2,
    ),
}


class Layer(nn.Module):
    def __init__(self, function, fan_in=3, fan_out=2) -> None:
        super().__init__()
        self.linear = linear(fan_in, fan_out)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


def targets_and_weights(response, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Targets `(L, N, O)` and weights: enumerated, or 40 Gauss-Hermite nodes."""
    if isinstance(response, Binary):
        low, high = response.support
        values = torch.tensor([low, high], dtype=mean.dtype)[:, None, None].expand(2, *mean.shape)
        p = (mean - low) / (high - low)
        return values, torch.stack((1 - p, p))
    matrix = torch.diag(torch.arange(1, 40, dtype=torch.float64).sqrt(), 1)
    nodes, vectors = torch.linalg.eigh(matrix + matrix.T)  # Golub and Welsch
    noise = nodes[:, None, None] * math.sqrt(response.variance)
    weights = vectors[0].square()[:, None, None]
    return mean + noise, weights.expand(40, *mean.shape)


@pytest.mark.parametrize("unit", UNITS)
def test_unit_metric_equals_table_and_enumeration(unit):
    function, response, nu = UNITS[unit]
    layer, x = Layer(function), randn(9, 3)
    F = nm.fisher(layer, response, x, nm.UnitWise(), estimator=nm.Exact())
    measured = F.blocks[0].matrices
    ones = torch.cat((x, torch.ones(9, 1)), 1)
    a = layer.linear(x).detach()
    table = torch.einsum("no,np,nq->opq", nu(a), ones, ones) / 9
    assert_close(measured, table, rtol=1e-12, atol=1e-12)

    leaf = a.clone().requires_grad_()
    mean = function(leaf)
    targets, weights = targets_and_weights(response, mean.detach())
    scores = torch.stack([response.score(mean, y) for y in targets])
    (slope,) = torch.autograd.grad(mean.sum(), leaf)
    drawn = (weights * (scores * slope).square()).sum(0)
    enumeration = torch.einsum("no,np,nq->opq", drawn, ones, ones) / 9
    assert_close(measured, enumeration, rtol=1e-12, atol=1e-12)


def test_softmax_layer_equals_table():
    layer, x = Layer(lambda a: a.softmax(-1), 3, 4), randn(9, 3)
    F = nm.fisher(layer, Probabilities(), x, nm.BlockDiagonal(), estimator=nm.Exact())
    eta = layer(x).detach()
    ones = torch.cat((x, torch.ones(9, 1)), 1)
    metric = eta.diag_embed() - eta[:, :, None] * eta[:, None]
    table = torch.einsum("nij,np,nq->ipjq", metric, ones, ones).reshape(16, 16) / 9
    assert_close(F.blocks[0].matrices[0], table, rtol=1e-12, atol=1e-12)


def test_probabilities_are_the_inverse_along_what_keeps_the_sum():
    eta, v = randn(3, 4).softmax(-1), randn(3, 4)
    v = v - v.mean(-1, keepdim=True)
    projected = Probabilities().fisher_product(eta, v)
    projected = projected - projected.mean(-1, keepdim=True)
    expected = v / eta - (v / eta).mean(-1, keepdim=True)
    assert_close(projected, expected, rtol=1e-12, atol=1e-12)


# ---- edges ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", [nm.Exact(), nm.MonteCarlo(2), nm.RandomSigns(2)], ids=repr)
@pytest.mark.parametrize(
    ("function", "response"),
    [
        pytest.param(torch.tanh, Binary((-1, 1)), id="tanh"),
        pytest.param(torch.sigmoid, Binary(), id="sigmoid"),
        pytest.param(lambda a: a.softmax(-1), Probabilities(), id="softmax"),
    ],
)
def test_a_saturated_output_has_no_information(function, response, estimator, dtype):
    layer = Layer(function).to(dtype)
    x = torch.full((4, 3), 1.0, dtype=dtype)
    with torch.no_grad():
        layer.linear.weight.fill_(1.0)
        layer.linear.bias.copy_(torch.tensor([1e4, -1e4]))
    F = nm.fisher(layer, response, x, nm.Diagonal(), estimator=estimator)
    for diagonal in F.diagonal().values():
        assert_close(diagonal, torch.zeros_like(diagonal), rtol=0, atol=0)
    moments = response.column_cumulants(layer(x).detach())
    assert torch.isfinite(moments.quartic).all()


def test_small_probabilities_keep_their_information():
    """A sigmoid at −300 has probability 1e-130, and that is its metric."""
    layer = Layer(torch.sigmoid, 1, 1)
    with torch.no_grad():
        layer.linear.weight.fill_(1.0)
        layer.linear.bias.fill_(-300.0)
    F = nm.fisher(layer, Binary(), randn(1, 1) * 0, nm.Diagonal(), estimator=nm.Exact())
    expected = torch.tensor([math.exp(-300.0)], dtype=torch.float64)
    assert_close(F.diagonal()["linear.bias"], expected, rtol=1e-12, atol=0)


def test_through_leaves_the_module_above_alone():
    top = nn.Sequential(nn.ReLU(inplace=True), linear(3, 2)).eval()
    outputs = randn(4, 3)
    before = outputs.clone()
    columns = list(Through(top, nm.Gaussian()).fisher_columns(outputs))
    assert_close(outputs, before, rtol=0, atol=0)
    assert all(p.grad is None for p in top.parameters())
    assert not any(column.requires_grad for column in columns)


def test_through_takes_outputs_of_another_dtype():
    outputs = randn(4, 3).bfloat16()
    column = next(Through(linear(3, 2), nm.Gaussian()).fisher_columns(outputs))
    assert column.dtype == torch.bfloat16


@pytest.mark.parametrize("support", [(1, 0), (0, 0), (0, math.inf), (math.nan, 1)])
def test_support_is_ordered(support):
    with pytest.raises(ValueError, match="smaller one first"):
        Binary(support)


@pytest.mark.parametrize(
    ("response", "outputs", "message"),
    [
        pytest.param(Binary(), randn(4), r"nm\.Bernoulli", id="logits for binary"),
        pytest.param(Probabilities(), randn(4, 3), r"nm\.Categorical", id="logits for classes"),
        pytest.param(Probabilities(), randn(4).sigmoid(), r"Binary\(\)", id="no class axis"),
    ],
)
def test_outputs_that_are_no_means_are_refused(response, outputs, message):
    with pytest.raises(ValueError, match=message):
        list(response.fisher_columns(outputs))


def test_binary_refuses_other_targets():
    with pytest.raises(ValueError, match="-1 or 1"):
        Binary((-1, 1)).check(torch.zeros(2), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param((torch.tanh, nm.Gaussian()), "above is", id="above"),
        pytest.param((nn.Tanh(), "gaussian"), "response is", id="response"),
    ],
)
def test_through_says_what_it_takes(arguments, message):
    with pytest.raises(TypeError, match=message):
        Through(*arguments)


@pytest.mark.parametrize(
    ("top", "error", "message"),
    [
        pytest.param(nn.BatchNorm1d(3), UnsupportedError, "eval", id="batch statistics"),
        pytest.param(nn.Flatten(0), ValueError, "axis 0", id="rows"),
    ],
)
def test_through_refuses_what_mixes_samples(top, error, message):
    with pytest.raises(error, match=message):
        list(Through(top, nm.Gaussian()).fisher_columns(torch.randn(4, 3)))


def test_through_refuses_what_does_not_depend_on_the_outputs():
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach()

    with pytest.raises(UnsupportedError, match="does not depend"):
        list(Through(Constant(), nm.Gaussian()).fisher_columns(randn(4, 3)))


def test_through_refuses_ignored_positions():
    response = Through(linear(3, 2), nm.Categorical())
    targets = torch.tensor([[0, 1], [1, -100]])
    data = (randn(2, 2, 3), targets)
    with pytest.raises(UnsupportedError, match="ignored"):
        nm.fisher(linear(3, 3), response, data, nm.Diagonal(), estimator=nm.Exact())
