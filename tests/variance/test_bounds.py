"""Bounds on the variance of sampled labels: never below it, and equal where they should be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.testing import layer_cases
from neuromanifold.testing.cases import CASES, Case

EPS = 1e-12
CLOSED = [
    case
    for case in CASES
    if str(case).partition("-")[2]
    in ("categorical", "bernoulli", "gaussian", "gaussian_mean_variance", "poisson")
]
ATTENTION = [case for case in layer_cases.LAYERS if str(case) in ("attention_self", "tied_head")]


def variances(model: nn.Module, likelihood: nm.Likelihood, data: object) -> tuple[Tensor, Tensor]:
    """Bound on and variance of one label, all parameters in a row."""
    most = nm.variance.bound(model, likelihood, data)
    got = nm.variance.diagonal(model, likelihood, data)
    return flat(most), flat(dict(got.variances["labels"]))


def flat(params: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in params.values()])


def random_logits(num_classes: int, num: int, seed: int) -> Tensor:
    """Logits and directions `(num, 2, C)`, from flat to very sure."""
    rng = torch.Generator().manual_seed(seed)
    scale = torch.rand(num, 1, generator=rng).double() * 8
    logits = torch.randn(num, num_classes, generator=rng).double() * scale
    return torch.stack((logits, torch.randn(num, num_classes, generator=rng).double()), dim=1)


class Each(nn.Module):
    """Outputs `f + θ_n d` with a parameter θ_n = 0 for every sample: the gradients are the d."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.theta = nn.Embedding(num, 1).double()
        nn.init.zeros_(self.theta.weight)

    def forward(self, x: Tensor) -> Tensor:
        outputs, direction = x.unbind(1)
        # One sample may travel alone, so it says itself which parameter is its own.
        own = self.theta(outputs[:, -1].long())
        return outputs[:, :-1] + own * direction[:, :-1]


class Tokens(nn.Module):
    """Logits of two classes at three positions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).unflatten(1, (3, 2))


@pytest.mark.parametrize("num_classes", [2, 3, 5, 10])
@pytest.mark.parametrize("seed", range(10))
def test_no_violation_in_random_categorical_cases(num_classes: int, seed: int) -> None:
    """500 distributions and directions each, one for each parameter."""
    num = 500
    x = random_logits(num_classes, num, seed=10 * seed + num_classes)
    index = torch.arange(num).double()[:, None, None].expand(-1, 2, 1)
    data = torch.cat((x, index), dim=2)
    most, true = variances(Each(num), nm.Categorical(), data)
    p, d = x[:, 0].softmax(-1), x[:, 1]
    centred = d - (p * d).sum(-1, keepdim=True)
    information = (p * centred.square()).sum(-1)
    enumerated = (p * centred**4).sum(-1) - information.square()
    scale = (p * centred**4).sum(-1)
    # One sample of `num` has a gradient along each parameter; one label each: over N².
    assert ((true * num**2 - enumerated).abs() <= EPS * scale).all()
    assert (most * num**2 >= enumerated - EPS * scale).all()
    by_range = information * ((d.amax(-1) - d.amin(-1)).square() - 4 * information)
    assert (most * num**2 <= by_range + EPS * by_range.clamp(min=scale)).all()
    if num_classes == 2:
        assert ((most * num**2 - enumerated).abs() <= EPS * scale).all()
    else:
        assert (most * num**2 > enumerated + EPS * scale).any()


@pytest.mark.parametrize("case", [*CLOSED, *ATTENTION], ids=str)
def test_no_violation_in_networks(case: Case) -> None:
    model, data = case.model(), case.data()
    most, true = variances(model, case.likelihood, data)
    assert (most >= true - EPS * true.max()).all()
    exact = flat(
        nm.fisher(model, case.likelihood, data, nm.Diagonal(), estimator=nm.Exact()).diagonal()
    )
    assert (most[exact > 0] > 0).all()


@pytest.mark.parametrize(
    ("likelihood", "model"),
    [
        (nm.Categorical(), nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))),
        (nm.Categorical(), Tokens()),
        (nm.Bernoulli(), nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))),
        (nm.Poisson(), nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))),
        (nm.Gaussian(), nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5))),
    ],
    ids=["two classes", "two classes at positions", "Bernoulli", "Poisson", "Gaussian"],
)
def test_equality(likelihood: nm.Likelihood, model: nn.Module) -> None:
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).double()
    most, true = variances(model.double(), likelihood, (x, None))
    torch.testing.assert_close(most, true, rtol=1e-10, atol=EPS * float(true.max()))


def test_it_shrinks_with_labels_and_inputs_like_the_variance() -> None:
    model, x = nn.Linear(4, 3).double(), torch.randn(8, 4).double()
    one = flat(nm.variance.bound(model, nm.Categorical(), x))
    ten = flat(nm.variance.bound(model, nm.Categorical(), x, estimator=nm.MonteCarlo(10)))
    twice = flat(nm.variance.bound(model, nm.Categorical(), [(x, None), (x, None)]))
    torch.testing.assert_close(ten, one / 10)
    torch.testing.assert_close(twice, one / 2)


@pytest.mark.parametrize("likelihood", [nm.Categorical(), nm.Bernoulli()], ids=repr)
def test_sure_outputs(likelihood: nm.Likelihood) -> None:
    """In single precision the least probabilities have no reciprocal, and their squares vanish."""
    model, x = nn.Linear(4, 3), torch.randn(8, 4)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([1.0, 0.0, -95.0]))
    most, true = variances(model, likelihood, x)
    assert most.isfinite().all()
    assert (true > 0).any()
    rounding = 16 * torch.finfo(true.dtype).eps  # two likely labels: an equality
    assert (most >= true * (1 - rounding)).all()


def test_a_measured_moment_has_no_bound() -> None:
    model, x = nn.Linear(3, 2), torch.ones(4, 3)
    normal = nm.FromDistribution(lambda f: torch.distributions.Normal(f, 1.0))
    with pytest.raises(nm.errors.UnsupportedError, match=r"no bound.*nm\.variance\.diagonal"):
        nm.variance.bound(model, normal, x)


def test_an_estimator_without_labels_has_no_bound() -> None:
    model, x = nn.Linear(3, 2), torch.ones(4, 3)
    with pytest.raises(nm.errors.UnsupportedError, match=r"RandomSigns\(probes=1\) samples none"):
        nm.variance.bound(model, nm.Categorical(), x, estimator=nm.RandomSigns(1))
