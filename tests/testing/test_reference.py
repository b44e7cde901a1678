from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Distribution, Exponential, Independent, Normal
from torch.distributions import Poisson as TorchPoisson
from transformers import pytorch_utils

from neuromanifold.errors import UnsupportedError
from neuromanifold.likelihoods import (
    Bernoulli,
    Categorical,
    FromDistribution,
    Gaussian,
    GaussianMeanVariance,
    Likelihood,
    Poisson,
)
from neuromanifold.testing import cases, reference

N = 6


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def network(*modules: nn.Module) -> nn.Sequential:
    """The modules in a row, in float64, with reproducible parameters."""
    model = nn.Sequential(*modules).double()
    for seed, parameter in enumerate(model.parameters()):
        parameter.data.copy_(randn(*parameter.shape, seed=100 + seed) / 2)
    return model


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal to rounding, relative to the largest entry."""
    rounding = 256 * torch.finfo(torch.float64).eps * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=rounding)


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


def unit_major(fan_out: int, fan_in: int) -> Tensor:
    """Positions of `(w_1, b_1, w_2, b_2, …)` in a vector that holds the weight, then the bias."""
    weight = torch.arange(fan_out * fan_in).reshape(fan_out, fan_in)
    bias = weight[-1, -1] + 1 + torch.arange(fan_out)
    return torch.cat([weight, bias[:, None]], dim=1)


def block(matrix: Tensor, rows: Tensor) -> Tensor:
    return matrix[rows.flatten()[:, None], rows.flatten()]


# ---- the output Fisher -----------------------------------------------------------------------


def softmax_covariance(f: Tensor) -> Tensor:
    p = f.softmax(-1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def scaled_normal(f: Tensor) -> Distribution:
    return Normal(f[:, 0], f[:, 1].exp())


def squared_probability(f: Tensor) -> Distribution:
    return Independent(TorchBernoulli(probs=(f**2).clamp(max=0.9)), 1)


Sigma = Callable[[Tensor], Tensor]

LINEAR_FAMILIES: dict[str, tuple[Likelihood, Sigma]] = {
    "gaussian": (Gaussian(0.25), lambda f: torch.diag_embed(torch.full_like(f, 4.0))),
    "gaussian_per_entry": (
        Gaussian(torch.tensor([0.5, 2.0])),
        lambda f: torch.diag_embed(torch.tensor([2.0, 0.5]).to(f).expand_as(f)),
    ),
    "gaussian_per_event": (
        Gaussian(0.5, per_event=True),
        lambda f: torch.diag_embed(torch.ones_like(f)),
    ),
    "categorical": (Categorical(), softmax_covariance),
    "bernoulli": (Bernoulli(), lambda f: torch.diag_embed(f.sigmoid() * (-f).sigmoid())),
    "poisson": (Poisson(), lambda f: torch.diag_embed(f.exp())),
    "distribution_categorical": (
        FromDistribution(lambda f: TorchCategorical(logits=f)),
        softmax_covariance,
    ),
    "distribution_normal": (
        FromDistribution(scaled_normal),
        lambda f: torch.diag_embed(torch.stack([(-2 * f[:, 1]).exp(), 2 + 0 * f[:, 1]], dim=1)),
    ),
}


@pytest.fixture(params=LINEAR_FAMILIES.values(), ids=LINEAR_FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Likelihood, Sigma]:
    return request.param


def test_output_fisher_has_the_closed_form_of_its_family(family: tuple[Likelihood, Sigma]) -> None:
    likelihood, sigma = family
    f = randn(N, 2)
    assert_same(reference.output_fisher(likelihood, f), sigma(f))


@pytest.mark.parametrize(
    ("log_variance", "second"),
    [(True, lambda v: torch.full_like(v, 0.5)), (False, lambda v: 1 / (2 * v**2))],
)
@pytest.mark.parametrize("as_tuple", [False, True])
def test_output_fisher_of_a_learned_variance(
    log_variance: bool, second: Callable[[Tensor], Tensor], as_tuple: bool
) -> None:
    mean, log = randn(N, 3), randn(N, 3, seed=1)
    raw = log if log_variance else log.exp()
    outputs = (mean, raw) if as_tuple else torch.stack([mean, raw], dim=1)
    expected = torch.diag_embed(torch.cat([(-log).exp(), second(log.exp())], dim=1))
    actual = reference.output_fisher(GaussianMeanVariance(log_variance), outputs)
    assert_same(actual, expected)


def test_output_fisher_averages_over_labels_where_the_hessian_depends_on_them() -> None:
    # P(y = 1) = f², so the information is (2f)² / (f² (1 − f²)), for either label only in the mean.
    f = torch.tensor([[0.2, 0.7], [-0.4, 0.9]], dtype=torch.float64)
    expected = torch.diag_embed(4 / (1 - f**2))
    actual = reference.output_fisher(FromDistribution(squared_probability), f)
    assert_same(actual, expected)


@pytest.mark.parametrize("class_axis", [-1, 1])
def test_output_fisher_is_block_diagonal_over_positions_and_zero_where_ignored(
    class_axis: int,
) -> None:
    f = randn(2, 3, 4)  # (N, T, C)
    y = torch.tensor([[0, -100, 3], [-100, -100, 1]])
    outputs = f.movedim(-1, class_axis)
    actual = reference.output_fisher(Categorical(class_axis=class_axis), outputs, y)
    expected = torch.zeros(2, 3, 4, 3, 4, dtype=f.dtype)
    for n in range(2):
        for t in range(3):
            if y[n, t] >= 0:
                expected[n, t, :, t, :] = softmax_covariance(f[n, t][None])[0]
    if class_axis == 1:
        expected = expected.permute(0, 2, 1, 4, 3)
    assert_same(actual, expected.reshape(2, 12, 12))


@pytest.mark.parametrize(
    "distribution",
    [
        Normal(randn(3), randn(3, seed=1).exp()),
        TorchPoisson(torch.tensor([1e-3, 0.8, 40.0], dtype=torch.float64)),
        TorchBernoulli(logits=randn(3)),
    ],
    ids=lambda distribution: type(distribution).__name__,
)
def test_quadrature_has_the_moments_of_the_distribution(distribution: Distribution) -> None:
    labels, weights = reference.quadrature(distribution)
    mean = (weights * labels).sum(0)
    assert_same(weights.sum(0), torch.ones_like(mean))
    assert_same(mean, distribution.mean)
    variance = (weights * (labels - mean) ** 2).sum(0)
    assert_same(variance, distribution.variance)


def test_quadrature_of_an_unknown_family_says_how_to_add_it() -> None:
    class Waiting(Exponential):
        pass

    likelihood, f = FromDistribution(lambda f: Waiting(f.exp())), randn(N)
    with pytest.raises(UnsupportedError, match=r"no quadrature for Waiting.*quadrature\.register"):
        reference.output_fisher(likelihood, f)

    @reference.quadrature.register(Waiting)
    def mean(distribution: Waiting) -> tuple[Tensor, Tensor]:
        # log p is linear in y, so one node is enough.
        return distribution.mean[None], torch.ones_like(distribution.mean)[None]

    assert_same(reference.output_fisher(likelihood, f), torch.ones(N, 1, 1).double())


# ---- the dense Fisher ------------------------------------------------------------------------


def test_jacobian_of_a_deep_linear_network() -> None:
    model, x = network(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)), randn(N, 3)
    first, second = (layer.weight.detach() for layer in model)
    expected = [
        torch.cat([torch.kron(second, x_n[None]), torch.kron(torch.eye(2), (first @ x_n)[None])], 1)
        for x_n in x
    ]
    assert_same(reference.jacobian(model, x), torch.stack(expected))


def test_fisher_of_a_linear_model(family: tuple[Likelihood, Sigma]) -> None:
    likelihood, sigma = family
    model, x = network(nn.Linear(3, 2)), randn(N, 3, seed=1)
    outer = torch.einsum("ni,nj->nij", with_ones(x), with_ones(x))
    expected = torch.stack([torch.kron(s, a) for s, a in zip(sigma(model(x)), outer, strict=True)])
    actual = block(reference.dense_fisher(model, likelihood, x), unit_major(2, 3))
    assert_same(actual, expected.mean(0).detach())


def test_ignored_positions_count_as_little_as_absent_ones() -> None:
    model, x, likelihood = network(nn.Linear(3, 4)), randn(2, 5, 3), Categorical()
    y = torch.tensor([[0, 1, -100, -100, -100], [3, 2, -100, -100, -100]])
    ignoring = reference.dense_fisher(model, likelihood, (x, y))
    absent = reference.dense_fisher(model, likelihood, (x[:, :2], y[:, :2]))
    assert_same(ignoring, absent)
    per_position = reference.dense_fisher(model, likelihood, (x, y), per="position")
    assert_same(per_position, ignoring * 2 / 4)  # 2 samples, 4 observed positions


def test_events_and_parameters_without_axes() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x

    model, x = Scale(), randn(N)
    exact = x.square().mean().reshape(1, 1)
    assert_same(reference.dense_fisher(model, Gaussian(), x), exact)
    assert_same(reference.dense_empirical(model, Gaussian(), (x, 3 * x)), (x**4).mean()[None, None])
    assert_same(reference.project(exact, model, "UnitWise"), exact)


def test_a_module_registered_twice_is_left_as_it_was() -> None:
    layer = nn.Linear(3, 3)
    model, weight = network(layer, nn.Tanh(), layer), layer.weight
    reference.dense_fisher(model, Gaussian(), randn(N, 3))
    reference.kronecker(model, Gaussian(), randn(N, 3))
    assert layer.weight is weight
    assert not layer._forward_hooks


def test_weights_shared_by_two_modules_are_one_parameter() -> None:
    model, x = tied(), randn(N, 2)
    weight, bias, _ = (p.detach() for p in model.parameters())
    hidden = x @ weight.T + bias
    by_weight = torch.einsum("ok,ni->noki", weight, x) + torch.einsum(
        "ok,ni->noki", torch.eye(2).double(), hidden
    )
    assert_same(reference.jacobian(model, x)[:, :, :4], by_weight.reshape(N, 2, 4))


def test_only_trainable_parameters_appear() -> None:
    model, x = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), randn(N, 3)
    full = reference.dense_fisher(model, Bernoulli(), x)
    model[0].weight.requires_grad_(False)
    frozen = reference.dense_fisher(model, Bernoulli(), x)
    assert_same(frozen, full[12:, 12:])


def test_a_single_precision_model_is_measured_in_double_precision() -> None:
    model = network(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval().float()
    x, likelihood = randn(N, 3).float(), Categorical()
    actual = reference.dense_fisher(model, likelihood, x)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_same(actual, reference.dense_fisher(model.double(), likelihood, x.double()))


class Affine(nn.Module):
    """Two inputs and a tuple of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = network(nn.Linear(3, 2))

    def forward(self, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), shift * self.linear(x)


def test_inputs_are_a_tuple_or_a_mapping_and_outputs_a_tuple() -> None:
    model, x, shift, likelihood = Affine(), randn(N, 3), randn(N, 1, seed=1), GaussianMeanVariance()
    j = reference.jacobian(model.linear, x)
    j = torch.cat([j, shift[..., None] * j], dim=1)
    mean, log = model(x, shift)
    sigma = torch.diag_embed(torch.cat([(-log).exp(), torch.full_like(mean, 0.5)], dim=1))
    expected = torch.einsum("nep,nef,nfq->pq", j, sigma, j).detach() / N
    for inputs in ((x, shift), {"x": x, "shift": shift}):
        actual = reference.dense_fisher(model, likelihood, (inputs, None))
        assert_same(actual, expected)
        assert reference.kronecker(model, likelihood, (inputs, None)).shape == expected.shape


def test_empirical_fisher_is_the_second_moment_of_the_gradients() -> None:
    model, x = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), randn(N, 3)
    y = torch.arange(N) % 3
    rows = []
    for n in range(N):
        model.zero_grad()
        F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    g = torch.stack(rows)
    assert_same(reference.dense_empirical(model, Categorical(), (x, y)), g.T @ g / N)


def test_empirical_fisher_needs_labels() -> None:
    with pytest.raises(ValueError, match="needs labels"):
        reference.dense_empirical(nn.Linear(2, 2), Categorical(), torch.zeros(3, 2))


# ---- projections -----------------------------------------------------------------------------


def kept(groups: list[list[int]]) -> Tensor:
    size = sum(map(len, groups))
    mask = torch.zeros(size, size)
    for group in groups:
        rows = torch.tensor(group)
        mask[rows[:, None], rows] = 1
    return mask


def singles(*indices: int) -> list[list[int]]:
    return [[i] for i in indices]


def tied() -> nn.Module:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    return network(first, second)


@pytest.mark.parametrize(
    ("model", "structure", "groups"),
    [
        (nn.Linear(1, 2), "Dense", [[0, 1, 2, 3]]),
        (nn.Linear(1, 2), "Diagonal", singles(0, 1, 2, 3)),
        (nn.Linear(1, 2), "BlockDiagonal", [[0, 1, 2, 3]]),
        (nn.Linear(2, 2), "UnitWise", [[0, 1, 4], [2, 3, 5]]),
        (nn.Conv1d(2, 4, 2, groups=2, bias=False), "UnitWise", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (
            nn.Sequential(nn.Linear(1, 2), nn.LayerNorm(2), nn.Linear(2, 1)),
            "BlockDiagonal",
            [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]],
        ),
        (
            nn.Sequential(nn.Linear(1, 2), nn.LayerNorm(2), nn.Linear(2, 1)),
            "UnitWise",
            [[0, 2], [1, 3], [4, 6], [5, 7], [8, 9, 10]],
        ),
        (nn.LayerNorm((2, 2), bias=False), "UnitWise", singles(*range(4))),
        (nn.BatchNorm1d(2), "BlockDiagonal", [[0, 1, 2, 3]]),
        (nn.ConvTranspose1d(2, 2, 2), "UnitWise", [[0, 1, 4, 5, 8], [2, 3, 6, 7, 9]]),
        (nn.ConvTranspose1d(2, 2, 2, groups=2), "UnitWise", [[0, 1, 4], [2, 3, 5]]),
        (nn.Embedding(2, 3, padding_idx=0), "UnitWise", [[0, 1, 2], [3, 4, 5]]),
        (nn.Embedding(2, 3), "BlockDiagonal", [[*range(6)]]),
        (nn.EmbeddingBag(2, 2), "UnitWise", singles(*range(4))),
        (nn.Bilinear(1, 2, 1), "BlockDiagonal", [[0, 1], [2]]),
        (nn.PReLU(2), "UnitWise", singles(0, 1)),
        (nn.RNN(1, 2), "BlockDiagonal", [[0, 1, 6, 7], [2, 3, 4, 5, 8, 9]]),
        (nn.RNN(1, 2), "UnitWise", [[0, 6], [1, 7], [2, 3, 8], [4, 5, 9]]),
        (
            nn.LSTM(1, 2, proj_size=1, bias=False),
            "BlockDiagonal",
            [[*range(8)], [*range(8, 16)], [16, 17]],
        ),
        (nn.GRUCell(1, 1), "UnitWise", [[0, 6], [1, 7], [2, 8], [3, 9], [4, 10], [5, 11]]),
        (nn.MultiheadAttention(1, 1), "BlockDiagonal", [[*range(6)], [6, 7]]),
        (nn.MultiheadAttention(1, 1), "UnitWise", [[0, 3], [1, 4], [2, 5], [6, 7]]),
        (
            nn.MultiheadAttention(2, 1, kdim=1, vdim=1, bias=False, add_bias_kv=True),
            "BlockDiagonal",
            [[0, 1, 2, 3], [4, 5], [6, 7], [8, 9], [10, 11], [12, 13, 14, 15]],
        ),
        (
            nn.MultiheadAttention(2, 1, kdim=1, vdim=1, bias=False, add_bias_kv=True),
            "UnitWise",
            [[0, 1], [2, 3], *singles(*range(4, 12)), [12, 13], [14, 15]],
        ),
        (
            nn.MultiheadAttention(1, 1, kdim=2),
            "BlockDiagonal",
            [[0], [1, 2], [3], [4, 5, 6], [7, 8]],
        ),
        (tied(), "BlockDiagonal", [[0, 1, 2, 3], [4, 5], [6, 7]]),
        (tied(), "UnitWise", [[0, 1], [2, 3], *singles(*range(4, 8))]),
    ],
)
def test_projection_keeps_the_blocks_of_its_structure(
    model: nn.Module, structure: Any, groups: list[list[int]]
) -> None:
    size = sum(map(len, groups))
    assert torch.equal(reference.project(torch.ones(size, size), model, structure), kept(groups))


def test_hugging_face_linear_has_its_units_in_columns() -> None:
    layer = pytorch_utils.Conv1D(2, 2)
    assert torch.equal(
        reference.project(torch.ones(6, 6), layer, "UnitWise"), kept([[0, 2, 4], [1, 3, 5]])
    )
    assert torch.equal(
        reference.project(torch.ones(6, 6), layer, "BlockDiagonal"), kept([[*range(6)]])
    )


# ---- the Kronecker oracle --------------------------------------------------------------------

WEIGHT_SHARING = pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])


@WEIGHT_SHARING
@pytest.mark.parametrize("case", [c for c in cases.CASES if c.name.startswith("mlp-")], ids=str)
def test_kronecker_is_exact_for_one_sample(case: cases.Case, weight_sharing: Any) -> None:
    model, (x, _) = case.model(), case.data()
    exact = reference.dense_fisher(model, case.likelihood, x[:1])
    assert_same(
        reference.kronecker(model, case.likelihood, x[:1], weight_sharing),
        reference.project(exact, model, "BlockDiagonal"),
    )


@pytest.mark.parametrize(
    ("weight_sharing", "pool", "input_shape"),
    [
        ("expand", nn.Identity(), (3,)),
        ("reduce", nn.Identity(), (3,)),
        ("expand", nn.Identity(), (16, 3)),  # independent positions
        ("reduce", nn.AdaptiveAvgPool2d((1, 4)), (16, 3)),  # positions that are averaged
    ],
)
def test_kronecker_is_exact_for_deep_linear_networks(
    weight_sharing: Any, pool: nn.Module, input_shape: tuple[int, ...]
) -> None:
    model = network(nn.Linear(3, 4), pool, nn.Linear(4, 2))
    x, likelihood = randn(N, *input_shape), Gaussian(0.3)
    exact = reference.dense_fisher(model, likelihood, x)
    assert_same(
        reference.kronecker(model, likelihood, x, weight_sharing),
        reference.project(exact, model, "BlockDiagonal"),
    )


@WEIGHT_SHARING
@pytest.mark.parametrize(
    ("options", "padding"),
    [
        ({"stride": 2, "padding": 1, "groups": 2}, (1, 1, 1, 1)),
        ({"dilation": 2, "padding": (2, 1), "padding_mode": "circular"}, (1, 1, 2, 2)),
        ({"padding": "same", "padding_mode": "reflect", "groups": 4}, (1, 1, 1, 1)),
        ({"bias": False, "stride": (1, 2)}, (0, 0, 0, 0)),
    ],
)
def test_kronecker_of_a_convolution_agrees_with_unfold(
    options: dict[str, Any], padding: tuple[int, ...], weight_sharing: Any
) -> None:
    conv = nn.Conv2d(4, 8, 3, **options)
    x, variance = randn(N, 4, 5, 6), 0.5
    positions = conv.double()(x).shape[2:].numel()
    model = network(conv, nn.Flatten(), nn.Linear(8 * positions, 2))
    groups, fan_out, k = conv.groups, 8 // conv.groups, conv.weight[0].numel()

    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    patches = F.unfold(F.pad(x, padding, mode=mode), 3, dilation=conv.dilation, stride=conv.stride)
    a = patches.unflatten(1, (groups, k)).permute(0, 3, 1, 2)  # (N, T, G, I)
    a = a if conv.bias is None else with_ones(a)
    j = model[2].weight.detach().unflatten(1, (groups, fan_out, positions))  # (E, G, O, T)
    if weight_sharing == "reduce":
        a, j = a.mean(1, keepdim=True), j.sum(-1, keepdim=True)
    inputs = torch.einsum("ntgi,ntgj->gij", a, a) / (N * a.shape[1])
    outputs = torch.einsum("egot,egpt->gop", j, j) / variance

    where = torch.arange(8 * k).reshape(8, k) if conv.bias is None else unit_major(8, k)
    actual = reference.kronecker(model, Gaussian(variance), x, weight_sharing)
    products = [torch.kron(b, a) for a, b in zip(inputs, outputs, strict=True)]
    assert_same(block(actual, where), torch.block_diag(*products))


@WEIGHT_SHARING
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_convolutions_of_any_dimension_agree(
    kind: type[nn.Conv1d | nn.Conv3d], weight_sharing: Any
) -> None:
    extra = -1 if kind is nn.Conv1d else 1  # spatial axes more or less than two
    ones = (1,) * (1 + extra)

    def model(conv: Callable[..., nn.Module], ones: tuple[int, ...]) -> nn.Sequential:
        layer = conv(2, 4, (*ones, 3), stride=(*ones, 2), padding=(*[0] * len(ones), 1), groups=2)
        return network(layer, nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))

    x = randn(N, 2, 6)
    actual = reference.kronecker(
        model(kind, ones), Bernoulli(), x.reshape(N, 2, *ones, 6), weight_sharing
    )
    expected = reference.kronecker(
        model(nn.Conv2d, (1,)), Bernoulli(), x.reshape(N, 2, 1, 6), weight_sharing
    )
    assert_same(actual, expected)


@WEIGHT_SHARING
def test_every_call_of_a_layer_is_a_use_of_it(weight_sharing: Any) -> None:
    layer = nn.Linear(3, 3, bias=False)
    model, x = network(layer, layer), randn(N, 3)
    w = layer.weight.detach()
    a = torch.stack([x, x @ w.T], dim=1)  # (N, T, I)
    j = torch.stack([w, torch.eye(3, dtype=w.dtype)], dim=0)  # (T, E, O)
    if weight_sharing == "reduce":
        a, j = a.mean(1, keepdim=True), j.sum(0, keepdim=True)
    inputs = torch.einsum("nti,ntj->ij", a, a) / (N * a.shape[1])
    outputs = torch.einsum("teo,tep->op", j, j)
    actual = reference.kronecker(model, Gaussian(), x, weight_sharing)
    assert_same(actual, torch.kron(outputs, inputs))


def test_kronecker_leaves_frozen_parameters_out() -> None:
    model, x = network(nn.Linear(3, 2)), randn(N, 3)
    full = reference.kronecker(model, Categorical(), x)
    model[0].bias.requires_grad_(False)
    assert_same(reference.kronecker(model, Categorical(), x), full[:6, :6])


def test_parameters_without_an_input_factor_keep_their_exact_diagonal() -> None:
    shared = tied()
    bias_only = network(nn.Linear(3, 2))
    bias_only[0].weight.requires_grad_(False)
    for model in (shared, bias_only):
        x = randn(N, 2 if model is shared else 3)
        exact = reference.dense_fisher(model, Categorical(), x)
        assert_same(reference.kronecker(model, Categorical(), x), exact.diagonal().diag())


@WEIGHT_SHARING
@pytest.mark.parametrize(
    ("model", "rows"),
    [
        (network(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)), slice(16, 24)),
        (network(nn.Conv1d(3, 3, 2, groups=3), nn.Tanh(), nn.Conv1d(3, 2, 2)), slice(0, 9)),
        (network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), slice(16, 21)),
    ],
    ids=["norm", "depthwise", "single output"],
)
def test_groups_of_one_unit_are_exact(model: nn.Module, rows: slice, weight_sharing: Any) -> None:
    x = randn(N, 3, 3)
    exact = reference.dense_fisher(model, Gaussian(), x)
    actual = reference.kronecker(model, Gaussian(), x, weight_sharing)
    assert_same(actual[rows], reference.project(exact, model, "UnitWise")[rows])


@WEIGHT_SHARING
def test_a_transposed_convolution_is_a_linear_layer_where_it_spreads_nothing(
    weight_sharing: Any,
) -> None:
    transposed = network(nn.ConvTranspose1d(4, 6, 1, groups=2), nn.Tanh(), nn.Conv1d(6, 2, 3))
    conv = network(nn.Conv1d(4, 6, 1, groups=2), nn.Tanh(), nn.Conv1d(6, 2, 3))
    conv[0].weight.data = transposed[0].weight.data.reshape(2, 2, 3).mT.reshape(6, 2, 1)
    for index in (0, 2):
        conv[index].bias = transposed[index].bias
    conv[2].weight = transposed[2].weight
    x = randn(N, 4, 3)
    # (groups, in, out) of one weight to (groups, out, in) of the other
    order = torch.cat([torch.arange(12).reshape(2, 2, 3).mT.flatten(), torch.arange(12, 56)])
    actual = reference.kronecker(transposed, Categorical(class_axis=1), x, weight_sharing)
    expected = reference.kronecker(conv, Categorical(class_axis=1), x, weight_sharing)
    assert_same(block(actual, order), expected)


@WEIGHT_SHARING
def test_hugging_face_linear_is_a_linear_layer(weight_sharing: Any) -> None:
    linear = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    layer = pytorch_utils.Conv1D(4, 3)
    layer.weight.data, layer.bias = linear[0].weight.data.T.clone(), linear[0].bias
    model = nn.Sequential(layer, *linear[1:])
    x = randn(N, 5, 3)
    order = torch.cat([torch.arange(12).reshape(3, 4).T.flatten(), torch.arange(12, 26)])
    actual = reference.kronecker(model, Categorical(), x, weight_sharing)
    expected = reference.kronecker(linear, Categorical(), x, weight_sharing)
    assert_same(block(actual, order), expected)


class Partial(nn.Module):
    """A layer that is called, one that is not used, and one whose weight is read directly."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)
        self.bypassed = nn.Linear(3, 2)
        self.called = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(F.linear(x, self.bypassed.weight, self.bypassed.bias))


def test_a_layer_that_is_never_called_keeps_its_exact_diagonal() -> None:
    model, x = Partial().double(), randn(N, 3)
    exact = reference.dense_fisher(model, Categorical(), x)
    actual = reference.kronecker(model, Categorical(), x)
    assert_same(actual[:14], exact.diagonal().diag()[:14])
    assert exact[:6].count_nonzero() == 0
    assert exact[6:14].count_nonzero() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: reference.kronecker(m, Categorical(), x, "sum"), "'expand' or 'reduce'"),  # type: ignore[arg-type]
        (lambda m, x: reference.dense_fisher(m, Categorical(), x, per="batch"), "'sample' or"),  # type: ignore[arg-type]
        (lambda m, _: reference.project(torch.eye(8), m, "Block"), "got 'Block'"),  # type: ignore[arg-type]
    ],
)
def test_unknown_choices_are_refused(
    call: Callable[[nn.Module, Tensor], Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(nn.Linear(3, 2), torch.zeros(4, 3))
