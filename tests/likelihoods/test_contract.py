"""Every likelihood, in every layout, keeps the contract."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch import distributions as td

from neuromanifold._typing import Outputs
from neuromanifold.likelihoods import (
    Bernoulli,
    Categorical,
    FromDistribution,
    Gaussian,
    GaussianMeanVariance,
    Likelihood,
    Poisson,
)
from neuromanifold.testing.likelihood_checks import check_likelihood


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def labels(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def ignoring(targets: Tensor, value: int = -100) -> Tensor:
    targets = targets.clone()
    targets.view(-1)[::3] = value
    return targets


def positive_definite(outputs: Tensor) -> td.Distribution:
    """A mean and the Cholesky factor of a covariance, from five outputs per sample."""
    log_a, b, log_c = outputs[:, 2:].unbind(1)
    lower = torch.stack((log_a.exp(), torch.zeros_like(b), b, log_c.exp()), -1).view(-1, 2, 2)
    return td.MultivariateNormal(outputs[:, :2], scale_tril=lower)


def uneven_binomial(outputs: Tensor) -> td.Distribution:
    """One, two or five trials: supports of different sizes."""
    trials = torch.tensor([1.0, 2.0, 5.0]).repeat(len(outputs) // 3)
    return td.Binomial(trials, logits=outputs)


def mixture(outputs: Tensor) -> td.Distribution:
    components = td.Normal(outputs[:, 2:4], outputs[:, 4:].exp())
    return td.MixtureSameFamily(td.Categorical(logits=outputs[:, :2]), components)


@dataclass(frozen=True)
class Case:
    name: str
    likelihood: Likelihood
    outputs: Outputs
    targets: Tensor


CASES = [
    Case("categorical", Categorical(), randn(3, 4), labels(4, 3)),
    Case("categorical positions", Categorical(), randn(2, 3, 3), labels(3, 2, 3)),
    Case("categorical image", Categorical(), randn(2, 2, 2, 3), labels(3, 2, 2, 2)),
    Case("categorical ignores", Categorical(), randn(2, 4, 3), ignoring(labels(3, 2, 4))),
    Case("categorical ignores 255", Categorical(255), randn(3, 3), ignoring(labels(3, 3), 255)),
    Case("categorical class axis", Categorical(class_axis=1), randn(3, 4), labels(4, 3)),
    Case(
        "categorical class axis of an image",
        Categorical(class_axis=1),
        randn(2, 3, 2, 2),
        ignoring(labels(3, 2, 2, 2)),
    ),
    Case("bernoulli", Bernoulli(), randn(4), labels(2, 4).double()),
    Case("bernoulli vector", Bernoulli(), randn(3, 2), labels(2, 3, 2).bool()),
    Case("bernoulli image", Bernoulli(), randn(2, 2, 3), labels(2, 2, 2, 3)),
    Case("gaussian", Gaussian(), randn(4), randn(4)),
    Case("gaussian vector", Gaussian(0.3), randn(3, 2), randn(3, 2)),
    Case("gaussian image", Gaussian(2.0), randn(2, 2, 3), randn(2, 2, 3)),
    Case("gaussian entries", Gaussian(randn(2, 2).exp()), randn(3, 2, 2), randn(3, 2, 2)),
    Case("gaussian per event", Gaussian(0.5, per_event=True), randn(2, 3), randn(2, 3)),
    Case("mean variance", GaussianMeanVariance(), randn(3, 2), randn(3)),
    Case("mean variance vector", GaussianMeanVariance(), randn(2, 2, 3), randn(2, 3)),
    Case("mean variance tuple", GaussianMeanVariance(), (randn(3), randn(3) / 2), randn(3)),
    Case(
        "mean variance tuple image",
        GaussianMeanVariance(log_variance=False),
        (randn(2, 2, 1), randn(2, 2, 1).exp()),
        randn(2, 2, 1),
    ),
    Case("poisson", Poisson(), randn(4), labels(4, 4)),
    Case("poisson vector", Poisson(), randn(3, 2), labels(4, 3, 2).double()),
    Case("poisson image", Poisson(), randn(2, 2, 2), labels(4, 2, 2, 2)),
    Case(
        "from normal",
        FromDistribution(lambda f: td.Normal(f[:, 0], f[:, 1].exp())),
        randn(3, 2),
        randn(3),
    ),
    Case(
        "from independent normal",
        FromDistribution(lambda f: td.Independent(td.Normal(f, 0.5), 1)),
        randn(3, 2),
        randn(3, 2),
    ),
    Case(
        "from normal with two batch axes",
        FromDistribution(lambda f: td.Normal(f, 0.5)),
        randn(3, 2),
        randn(3, 2),
    ),
    Case(
        "from gamma",
        FromDistribution(lambda f: td.Gamma(f[:, 0].exp(), f[:, 1].exp())),
        randn(3, 2),
        randn(3).exp(),
    ),
    Case(
        "from log normal",
        FromDistribution(lambda f: td.LogNormal(f[:, 0], f[:, 1].exp())),
        randn(3, 2) / 2,
        randn(3).exp(),
    ),
    Case(
        "from gumbel",
        FromDistribution(lambda f: td.Gumbel(f[:, 0], f[:, 1].exp())),
        randn(3, 2) / 2,
        randn(3),
    ),
    Case(
        "from half normal",
        FromDistribution(lambda f: td.HalfNormal(f.exp())),
        randn(3),
        randn(3).exp(),
    ),
    Case(
        "from categorical",
        FromDistribution(lambda f: td.Categorical(logits=f)),
        randn(3, 4),
        labels(4, 3),
    ),
    Case(
        "from categorical with positions",
        FromDistribution(lambda f: td.Independent(td.Categorical(logits=f), 1)),
        randn(2, 2, 3),
        labels(3, 2, 2),
    ),
    Case(
        "from bernoulli image",
        FromDistribution(lambda f: td.Independent(td.Bernoulli(logits=f), 2)),
        randn(2, 2, 3),
        labels(2, 2, 2, 3).double(),
    ),
    Case(
        "from one-hot positions",
        FromDistribution(lambda f: td.Independent(td.OneHotCategorical(logits=f), 1)),
        randn(2, 2, 3),
        torch.eye(3, dtype=torch.float64)[labels(3, 2, 2)],
    ),
    Case(
        "from binomial",
        FromDistribution(lambda f: td.Binomial(5, logits=f)),
        randn(3),
        labels(6, 3).double(),
    ),
    Case(
        "from uneven binomial",
        FromDistribution(uneven_binomial),
        randn(3),
        labels(2, 3).double(),
    ),
    Case("from multivariate normal", FromDistribution(positive_definite), randn(2, 5), randn(2, 2)),
    Case("from mixture", FromDistribution(mixture), randn(2, 6) / 2, randn(2)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_contract(case: Case) -> None:
    check_likelihood(case.likelihood, case.outputs, case.targets)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_half_precision_is_computed_in_float32(case: Case) -> None:
    likelihood = case.likelihood
    targets = case.targets.float() if case.targets.is_floating_point() else case.targets
    wide = likelihood.canonical(case.outputs).bfloat16().float()
    half = wide.bfloat16()
    score = likelihood.score(half, targets)
    assert score.dtype == torch.bfloat16
    assert torch.equal(score, likelihood.score(wide, targets).bfloat16())
    assert likelihood.log_prob(half, targets).dtype == torch.float32
    assert torch.equal(likelihood.log_prob(half, targets), likelihood.log_prob(wide, targets))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sampling_without_a_generator_follows_the_global_seed(case: Case) -> None:
    with torch.random.fork_rng():
        draws = []
        for _ in range(2):
            torch.manual_seed(1)
            draws.append(case.likelihood.sample(case.outputs, 3))
        draws.append(case.likelihood.sample(case.outputs, 3))
    assert torch.equal(draws[0], draws[1])
    assert draws[0].shape == draws[2].shape


class Broken(Bernoulli):
    """Scores that are twice too large."""

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 2 * super().score(outputs, targets)


class WithoutHalf(GaussianMeanVariance):
    """The output Fisher of the log variance is forgotten to be halved."""

    def _information(self, outputs: Tensor) -> Tensor:
        information = super()._information(outputs)
        information[:, 1] *= 2
        return information


class WrongKurtosis(Bernoulli):
    def _fourth_cumulants(self, outputs: Tensor, j: Tensor) -> Tensor:
        return torch.zeros_like(outputs * j)


class Leaky(Gaussian):
    """Draws from the global generator."""

    def sample(
        self, outputs: Outputs, num: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        del generator
        return super().sample(outputs, num)


class SharedSigns(Likelihood):
    """The minimum to write, but with one sign for all samples."""

    def distribution(self, outputs: Outputs) -> td.Distribution:
        return td.Normal(outputs, 1.0)

    def fisher_columns(self, outputs: Tensor):
        yield torch.ones_like(outputs)

    def random_signs(self, outputs, num, *, generator=None):
        for _ in range(num):
            yield torch.randint(2, (), generator=generator) * 2.0 - 1 + torch.zeros_like(outputs)


@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets", "message"),
    [
        (Broken(), randn(3), labels(2, 3), "score differs from the gradient"),
        (WithoutHalf(), randn(3, 2), randn(3), "covariance of the scores is .* standard errors"),
        (WrongKurtosis(), 3 + randn(3), labels(2, 3), "score.⁴ is .* standard errors"),
        (Leaky(), randn(3), randn(3), "moved the global random state"),
        (SharedSigns(), randn(3), randn(3), "random_signs is .* standard errors"),
    ],
)
def test_a_broken_likelihood_is_caught(likelihood, outputs, targets, message) -> None:
    with torch.random.fork_rng(), pytest.raises(AssertionError, match=message):
        check_likelihood(likelihood, outputs, targets)


class Minimal(Likelihood):
    """Distribution and columns are all that a likelihood has to write."""

    def distribution(self, outputs: Outputs) -> td.Distribution:
        return td.Bernoulli(logits=outputs)

    def fisher_columns(self, outputs: Tensor):
        p = outputs.detach().sigmoid()
        yield (p * (1 - p)).sqrt()


def test_the_defaults_are_enough() -> None:
    outputs, targets = randn(4), labels(2, 4).double()
    check_likelihood(Minimal(), outputs, targets)
    j = randn(2, 4)
    torch.testing.assert_close(
        Minimal().score_fourth_moment(outputs, j), Bernoulli().score_fourth_moment(outputs, j)
    )
