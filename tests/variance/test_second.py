"""The estimator made of second derivatives, against Hessians and enumerated labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

import neuromanifold as nm
from neuromanifold.testing import layer_cases, reference
from neuromanifold.testing.cases import CASES, Case

RTOL = 1e-10
NETWORKS = ("mlp", "conv2d", "sequence_positions", "reused")
LAYERS = (
    *("layer_norm_positions", "instance_norm1d", "instance_norm2d_running", "batch_norm2d"),
    *("attention_self", "lstm", "gru_cell", "embedding_padding_idx"),
    *("hugging_face_conv1d", "raw_parameters", "low_rank_adapter", "tied_head", "shared_weight"),
)
SMALL = [case for case in CASES if str(case).partition("-")[0] in NETWORKS]
LAYERED = [case for case in layer_cases.LAYERS if str(case) in LAYERS]
NATURAL = [
    case
    for case in CASES
    if str(case) in ("mlp-categorical", "mlp-bernoulli", "mlp-gaussian", "mlp-poisson")
]


def flat(params: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in params.values()])


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).norm() <= RTOL * expected.norm()


def of_vector(
    model: nn.Module, result: Callable[[Tensor], Tensor], x: Any
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A result of the outputs as a function of all trainable parameters, and where they are."""
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def function(vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in params.values()])
        given = {
            name: part.reshape(p.shape)
            for (name, p), part in zip(params.items(), parts, strict=True)
        }
        with sdpa_kernel(SDPBackend.MATH):
            return result(functional_call(model, given, (x,)))

    return function, flat(params)


def second_derivatives(
    model: nn.Module, x: Any, result: Callable[[Tensor], Tensor] = lambda outputs: outputs
) -> Tensor:
    """`∂²result/∂θ_i²`, `(*result.shape, P)`, by reverse mode over reverse mode."""
    function, at = of_vector(model, result, x)
    return jacrev(jacrev(function))(at).diagonal(dim1=-2, dim2=-1)


def variance_of_labels(
    model: nn.Module, likelihood: nm.Likelihood, x: Any, y: Tensor | None = None
) -> Tensor:
    """`mean(η_iᵀ Σ η_i) / N`, `(P,)`."""
    with torch.no_grad():
        outputs = model(x)
    columns = [likelihood.mask_cotangent(c, outputs, y) for c in likelihood.fisher_columns(outputs)]
    eta = second_derivatives(model, x).flatten(1, -2)  # (N, E, P)
    along = torch.einsum("vne,nep->vnp", torch.stack(columns).flatten(2), eta)
    return along.square().sum(0).mean(0) / len(outputs)


@pytest.mark.parametrize("case", [*SMALL, *LAYERED], ids=str)
def test_variance_of_labels(case: Case) -> None:
    model, (x, y), likelihood = case.model(), case.data(), case.likelihood
    x, y = x[:2], y[:2]  # the oracle differentiates every output for every parameter, twice
    expected = variance_of_labels(model, likelihood, x, y)
    exact = nm.fisher(model, likelihood, (x, y), nm.Diagonal(), estimator=nm.Exact())
    for samples in (1, 4):
        got = nm.variance.second_derivative(model, likelihood, (x, y), samples=samples)
        assert (got.num_samples, got.draws) == (len(x), samples)
        assert_same(flat(got.value), flat(exact.diagonal()))
        assert_same(flat(got.variances["labels"]), expected / samples)


@pytest.mark.parametrize(
    "unit",
    [
        *(nn.Sigmoid(), nn.Softplus(), nn.ELU(), nn.SELU(), nn.GELU(), nn.GELU("tanh")),
        *(nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.GLU(), nn.LogSigmoid()),
        *(nn.Softsign(), nn.Softmax(-1), nn.LogSoftmax(-1), nn.LayerNorm(6), nn.RMSNorm(6)),
    ],
    ids=str,
)
def test_functions_between_layers(unit: nn.Module) -> None:
    width = 3 if isinstance(unit, nn.GLU) else 6
    model = nn.Sequential(nn.Linear(3, 6), unit, nn.Linear(width, 3)).double()
    x = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = nm.variance.second_derivative(model, nm.Categorical(), x)
    expected = variance_of_labels(model, nm.Categorical(), x)
    assert_same(flat(got.variances["labels"]), expected)
    assert not flat(got.variances["labels"])[-(width + 1) * 3 :].any()  # of the last layer


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_variance_between_inputs(case: Case) -> None:
    model, (x, y) = case.model(), case.data()
    exact = [
        nm.fisher(model, case.likelihood, (x[i], y[i]), nm.Diagonal(), estimator=nm.Exact())
        for i in torch.arange(len(x)).split(1)
    ]
    expected = torch.stack([flat(F.diagonal()) for F in exact]).var(dim=0) / len(x)
    whole = nm.variance.second_derivative(model, case.likelihood, (x, y))
    parts = nm.variance.second_derivative(model, case.likelihood, [(x[:3], y[:3]), (x[3:], y[3:])])
    for got in (whole, parts):
        assert_same(flat(got.variances["data"]), expected)
        assert_same(flat(got.value), flat(whole.value))
        assert_same(flat(got.variances["labels"]), flat(whole.variances["labels"]))


@pytest.mark.parametrize("case", NATURAL, ids=str)
def test_all_labels_of_an_input(case: Case) -> None:
    """The estimate is `−∂² log p/∂θ_i²`: its mean and variance over the labels, by quadrature."""
    model, x = case.model(), case.data()[0][:1]

    def entries(outputs: Tensor) -> Distribution:
        distribution = case.likelihood.distribution(outputs)
        return getattr(distribution, "base_dist", distribution)

    with torch.no_grad():
        labels, weights = reference.quadrature(entries(model(x)))
    curvature = -second_derivatives(model, x, lambda f: entries(f).log_prob(labels))
    weights = weights[..., None]
    by_entry = (weights * curvature).sum(0)  # the labels of different entries are independent
    mean = by_entry.flatten(0, -2).sum(0)
    variance = (weights * (curvature - by_entry).square()).flatten(0, -2).sum(0)
    got = nm.variance.second_derivative(model, case.likelihood, x)
    assert_same(flat(got.value), mean)
    assert_same(flat(got.variances["labels"]), variance)
    assert flat(got.variances["data"]).isinf().all()  # one input says nothing of others


@pytest.mark.parametrize("case", NATURAL, ids=str)
def test_drawn_labels(case: Case) -> None:
    model, (x, _) = case.model(), case.data()
    with torch.no_grad():
        labels = case.likelihood.sample(model(x), 3, generator=torch.Generator().manual_seed(5))
    drawn = [
        second_derivatives(model, x, lambda f, y=y: case.likelihood.loss(f, y)) for y in labels
    ]
    got = nm.variance.second_derivative(
        model,
        case.likelihood,
        x,
        samples=3,
        draw=True,
        generator=torch.Generator().manual_seed(5),
    )
    assert_same(flat(got.value), torch.stack(drawn).mean(0))
    mean = nm.variance.second_derivative(model, case.likelihood, x, samples=3)
    assert not torch.equal(flat(got.value), flat(mean.value))
    assert_same(flat(got.variances["labels"]), flat(mean.variances["labels"]))


def test_padded_positions_are_not_drawn() -> None:
    case = next(case for case in CASES if str(case) == "sequence_positions-categorical")
    model, (x, y) = case.model(), case.data()
    with torch.no_grad():
        outputs = model(x)
        labels = case.likelihood.sample(outputs, 1, generator=torch.Generator().manual_seed(5))[0]
    labels[y == case.likelihood.ignore_index] = case.likelihood.ignore_index
    drawn = second_derivatives(model, x, lambda f: case.likelihood.loss(f, labels))
    rng = torch.Generator().manual_seed(5)
    got = nm.variance.second_derivative(model, case.likelihood, (x, y), draw=True, generator=rng)
    assert_same(flat(got.value), drawn)


@pytest.mark.parametrize("likelihood", [nm.Categorical(), nm.Bernoulli(), nm.Gaussian()], ids=str)
@pytest.mark.parametrize("unit", [nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.Softplus()], ids=str)
def test_the_last_layer_has_no_error(likelihood: nm.Likelihood, unit: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 4), unit, nn.Linear(4, 3)).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    got = nm.variance.second_derivative(model, likelihood, x)
    labels = got.variances["labels"]
    assert not labels["2.weight"].any()
    assert not labels["2.bias"].any()
    assert (labels["0.weight"] > 0).all()


@pytest.mark.parametrize("likelihood", [nm.Categorical(), nm.Bernoulli(), nm.Gaussian()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_piecewise_linear_networks_have_no_error(
    likelihood: nm.Likelihood, dtype: torch.dtype
) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 2),
        nn.LeakyReLU(),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.Hardtanh(),
        nn.Linear(8, 8),
        nn.Hardsigmoid(),
        nn.Linear(8, 3),
    ).to(dtype)
    x = torch.randn(5, 1, 8, 8, dtype=dtype)
    rng = torch.Generator().manual_seed(0)
    got = nm.variance.second_derivative(model, likelihood, x, draw=True, generator=rng)
    assert not flat(got.variances["labels"]).any()
    exact = nm.fisher(model, likelihood, x, nm.Diagonal(), estimator=nm.Exact()).diagonal()
    torch.testing.assert_close(flat(got.value), flat(exact))


def test_single_precision() -> None:
    case = next(case for case in CASES if str(case) == "mlp-categorical")
    model, (x, _) = case.model(), case.data()
    double = nm.variance.second_derivative(model, case.likelihood, x)
    single = nm.variance.second_derivative(model.float(), case.likelihood, x.float())
    got, expected = flat(single.variances["labels"]), flat(double.variances["labels"])
    assert got.dtype == torch.float32
    assert (got.double() - expected).norm() < 1e-5 * expected.norm()


def test_one_output_without_an_axis() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    got = nm.variance.second_derivative(model, nm.Bernoulli(), x, draw=True)
    v = torch.sigmoid(model(x).detach()).mul(torch.sigmoid(-model(x).detach()))
    expected = (v[:, None] * second_derivatives(model, x).square()).mean(0) / len(x)
    assert_same(flat(got.variances["labels"]), expected)


def test_some_parameters() -> None:
    case = next(case for case in CASES if str(case) == "mlp-categorical")
    model, (x, _) = case.model(), case.data()
    whole = nm.variance.second_derivative(model, case.likelihood, x)
    for params in (["body.0.bias"], ["body.0.weight"], ["*.weight"]):
        some = nm.variance.second_derivative(model, case.likelihood, x, params=params)
        for name, value in some.variances["labels"].items():
            assert_same(value, whole.variances["labels"][name])


def test_two_processes_with_the_same_data() -> None:
    def reducer(tensors: list[Tensor]) -> None:
        for tensor in tensors:
            tensor *= 2

    case = next(case for case in CASES if str(case) == "mlp-categorical")
    model, (x, _) = case.model(), case.data()
    one = nm.variance.second_derivative(model, case.likelihood, torch.cat([x, x]))
    two = nm.variance.second_derivative(model, case.likelihood, x, reducer=reducer)
    assert one.num_samples == two.num_samples
    for source in ("data", "labels"):
        assert_same(flat(two.variances[source]), flat(one.variances[source]))


def test_the_model_is_left_alone() -> None:
    case = next(case for case in layer_cases.LAYERS if str(case) == "lstm")
    model, data = case.model(), case.data()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    nm.variance.second_derivative(model, case.likelihood, data)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


class WrongTwice(torch.autograd.Function):
    """A sine whose forward derivative is right once: it is a constant to the next one."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin(), x.cos()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, None]:
        return tangent * ctx.saved_tensors[0], None


class OnlyReverse(torch.autograd.Function):
    """A sine without a forward derivative."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], _: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        pytest.param(
            nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 2)),
            (3,),
            r"dropout",
            id="random",
        ),
        pytest.param(
            nn.Sequential(nn.Conv1d(256, 256, 1), nn.Tanh(), nn.Flatten(), nn.Linear(512, 2)),
            (256, 2),
            r"'0.weight', '0.bias'.*65,792 second derivatives.*nm\.variance\.diagonal",
            id="too many",
        ),
        pytest.param(
            Applied(lambda s: WrongTwice.apply(s)[0]),
            (3,),
            r"'linear.weight'.*disagree",
            id="wrong derivative",
        ),
        pytest.param(
            Applied(OnlyReverse.apply), (3,), r"linear.weight.*forward mode", id="no forward mode"
        ),
    ],
)
def test_refusals(model: nn.Module, shape: tuple[int, ...], message: str) -> None:
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(nm.errors.UnsupportedError, match=message):
        nm.variance.second_derivative(model, nm.Gaussian(), x)


def test_arguments() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with pytest.raises(ValueError, match="at least 1 label"):
        nm.variance.second_derivative(model, nm.Gaussian(), x, samples=0)
