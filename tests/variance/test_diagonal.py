"""Closed forms of the variance of the diagonal, against enumerated and integrated labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch import distributions as td

import neuromanifold as nm
from neuromanifold.testing import layer_cases, reference
from neuromanifold.testing.cases import CASES, Case

RTOL = 1e-10
NETWORKS = ("mlp", "conv2d", "reused")
FAMILIES = ("categorical", "bernoulli", "gaussian", "gaussian_per_entry")
FAMILIES += ("gaussian_mean_variance", "poisson")
CLOSED = [
    case
    for case in CASES
    if str(case).partition("-")[0] in NETWORKS and str(case).partition("-")[2] in FAMILIES
]
POSITIONS = [case for case in CASES if str(case) == "sequence_positions-categorical"]
ATTENTION = [case for case in layer_cases.LAYERS if str(case) in ("attention_self", "tied_head")]


def labels_of(case: Case, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Labels `(L, 1, ...)` of one sample and weights that integrate a polynomial of degree 8."""
    distribution = case.likelihood.distribution(outputs)
    base = distribution.base_dist if hasattr(distribution, "base_dist") else distribution
    if isinstance(base, torch.distributions.Normal):
        # Gauss-Hermite in every entry: nodes of exp(−z²/2), from the Golub-Welsch matrix.
        beta = torch.arange(1, 8, dtype=torch.float64).sqrt()
        nodes, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
        values, weights = nodes, vectors[0].square()
        one = [
            base.mean.flatten()[k] + base.stddev.flatten()[k] * values
            for k in range(base.mean.numel())
        ]
        each = [weights] * len(one)
    elif isinstance(base, torch.distributions.Poisson):
        counts = torch.arange(math.ceil(float(base.rate.max()) * 3) + 60, dtype=torch.float64)
        one = [counts] * base.rate.numel()
        each = [
            (counts * rate.log() - rate - (counts + 1).lgamma()).exp()
            for rate in base.rate.flatten()
        ]
    else:
        support = base.enumerate_support(expand=False).flatten()
        shape = base.batch_shape.numel()
        one = [support] * shape
        probabilities = base.log_prob(
            support.reshape(-1, *[1] * len(base.batch_shape)).expand(-1, *base.batch_shape)
        ).exp()
        each = list(probabilities.flatten(1).T)
    grid = torch.cartesian_prod(*one).reshape(-1, len(one))
    weights = torch.cartesian_prod(*each).reshape(-1, len(each)).prod(dim=1)
    event = base.batch_shape[1:]
    labels = grid.reshape(len(grid), 1, *event)
    return labels, weights


def brute_force(case: Case) -> tuple[Tensor, Tensor]:
    """Information of every sample, and the variance of one squared score, `(N, P)` each."""
    model, (x, _) = case.model(), case.data()
    information, variance = [], []
    with torch.no_grad():
        outputs = model(x)
    jacobian = reference.jacobian(model, x)
    for n in range(len(outputs)):
        output = outputs[n : n + 1]
        labels, weights = labels_of(case, output)
        scores = torch.cat(
            [case.likelihood.score(output, label).flatten(1) for label in labels]
        )  # (L, E)
        squares = (scores @ jacobian[n]).square()
        mean = weights @ squares
        information.append(mean)
        variance.append(weights @ squares.square() - mean.square())
    return torch.stack(information), torch.stack(variance)


def flat(params: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in params.values()])


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).norm() <= RTOL * expected.norm()


@pytest.mark.parametrize("case", CLOSED, ids=str)
def test_variance_of_a_sampled_label(case: Case) -> None:
    model, (x, _) = case.model(), case.data()
    information, variance = brute_force(case)
    n = len(information)
    for draws in (1, 5):
        got = nm.variance.diagonal(model, case.likelihood, x, estimator=nm.MonteCarlo(draws))
        assert_same(flat(got.value), information.mean(0))
        assert_same(flat(got.variances["labels"]), variance.mean(0) / (n * draws))
        assert_same(flat(got.variances["data"]), information.var(0) / n)
        assert_same(
            flat(got.stderr).square(),
            information.var(0) / n + variance.mean(0) / (n * draws),
        )


@pytest.mark.parametrize("case", [*POSITIONS, *ATTENTION], ids=str)
def test_positions_are_independent_and_some_are_ignored(case: Case) -> None:
    """Against the fourth moments of the likelihood, parameter by parameter."""
    model, (x, y) = case.model(), case.data()
    with torch.no_grad():
        outputs = model(x)
    jacobian = reference.jacobian(model, x).unflatten(1, outputs.shape[1:])
    columns = case.likelihood.mask_cotangent(jacobian.permute(3, 0, 1, 2), outputs, y)
    fourth = case.likelihood.score_fourth_moment(outputs, columns).T  # (N, P)
    got = nm.variance.diagonal(model, case.likelihood, (x, y))
    exact = nm.fisher(model, case.likelihood, (x, y), nm.Diagonal(), estimator=nm.Exact())
    per_sample = torch.stack(
        [
            flat(
                nm.fisher(
                    model,
                    case.likelihood,
                    (x[n : n + 1], y[n : n + 1]),
                    nm.Diagonal(),
                    estimator=nm.Exact(),
                ).diagonal()
            )
            for n in range(len(x))
        ]
    )
    assert_same(flat(got.value), flat(exact.diagonal()))
    expected = (fourth - per_sample.square()).mean(0) / len(x)
    assert_same(flat(got.variances["labels"]), expected)


@pytest.mark.parametrize("case", CLOSED, ids=str)
def test_variance_of_random_signs_over_all_sign_patterns(case: Case) -> None:
    model, (x, _) = case.model(), case.data()
    with torch.no_grad():
        outputs = model(x)
    columns = torch.stack(list(case.likelihood.fisher_columns(outputs))).flatten(2)  # (V, N, E)
    jacobian = reference.jacobian(model, x)
    components = torch.einsum("vne,nep->vnp", columns, jacobian)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * len(columns))
    squares = torch.einsum("sv,vnp->snp", signs.reshape(-1, len(columns)), components).square()
    expected = squares.var(dim=0, correction=0).mean(0) / len(x)
    got = nm.variance.diagonal(model, case.likelihood, x, estimator=nm.RandomSigns(1))
    assert_same(flat(got.value), squares.mean(dim=(0, 1)))
    assert_same(flat(got.variances["probes"]), expected)


@pytest.mark.parametrize("case", [*CLOSED, *POSITIONS, *ATTENTION], ids=str)
def test_batches_and_exact(case: Case) -> None:
    model, (x, y) = case.model(), case.data()
    whole = nm.variance.diagonal(model, case.likelihood, (x, y), estimator=nm.Exact())
    parts = nm.variance.diagonal(
        model, case.likelihood, [(x[:3], y[:3]), (x[3:], y[3:])], estimator=nm.Exact()
    )
    assert set(whole.variances) == {"data"}
    assert whole.num_samples == parts.num_samples == len(x)
    exact = nm.fisher(model, case.likelihood, (x, y), nm.Diagonal(), estimator=nm.Exact())
    assert_same(flat(whole.value), flat(exact.diagonal()))
    assert_same(flat(parts.value), flat(whole.value))
    # Variances, not their roots: of a constant, rounding is all there is.
    assert_same(flat(parts.variances["data"]), flat(whole.variances["data"]))


def test_gaussian_labels_have_one_relative_error_whatever_the_network() -> None:
    """`√(2/N)` (papers.md §3.4)."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = torch.randn(1, 3, dtype=torch.float64)
    got = nm.variance.diagonal(model, nm.Gaussian(), x, estimator=nm.MonteCarlo(8))
    relative = flat(got.error("labels")) / flat(got.value)
    assert_same(relative, torch.full_like(relative, (2 / 8) ** 0.5))
    assert flat(got.stderr).isinf().all()  # one input says nothing of others


def test_what_has_no_closed_form_is_refused() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with pytest.raises(nm.errors.UnsupportedError, match=r"Empirical.*no closed form"):
        nm.variance.diagonal(model, nm.Gaussian(), (x, torch.randn(4, 2)), estimator=nm.Empirical())
    laplace = nm.FromDistribution(lambda f: td.Independent(td.Laplace(f, 1.0), 1))
    for estimator in (nm.Exact(), nm.RandomSigns()):
        with pytest.raises(nm.errors.UnsupportedError, match=r"output Fisher.*MonteCarlo"):
            nm.variance.diagonal(model, laplace, x, estimator=estimator)


@pytest.mark.parametrize(
    ("fn", "closed"),
    [
        (lambda f: td.Categorical(logits=f), nm.Categorical()),
        (lambda f: td.Bernoulli(logits=f[:, 0]), nm.Categorical()),
    ],
)
def test_a_finite_support_is_enumerated(
    fn: Callable[[Tensor], td.Distribution], closed: nm.Likelihood
) -> None:
    """Also for blocks and bounds, since it is one form of the fourth moment."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, own = torch.randn(9, 3, dtype=torch.float64), nm.FromDistribution(fn)

    def of_two(x: Tensor) -> Tensor:
        """The logits of yes and no, where there is but one."""
        out = model(x)
        return out if "Categorical" in str(fn(out)) else nn.functional.pad(out[:, :1], (1, 0))

    for estimator in (nm.MonteCarlo(2), nm.RandomSigns(3), nm.Exact()):
        got, expected = (
            nm.variance.diagonal(model, own, x, estimator=estimator),
            nm.variance.diagonal(
                model, closed, x, estimator=estimator, forward=lambda _, batch: of_two(batch)
            ),
        )
        assert not got.variance_errors
        assert_same(flat(got.value), flat(expected.value))
        for source, variance in expected.variances.items():
            assert_same(flat(got.variances[source]), flat(variance))
    assert (
        flat(nm.variance.bound(model, own, x))
        >= flat(nm.variance.diagonal(model, own, x).variances["labels"]) * (1 - RTOL)
    ).all()


def normal(f: Tensor) -> td.Distribution:
    return td.Independent(td.Normal(f, 0.7), 1)


def laplace(f: Tensor) -> td.Distribution:
    return td.Independent(td.Laplace(f, 0.7), 1)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def measured(model: nn.Module, fn: Callable[[Tensor], td.Distribution], x: Tensor) -> Measured:
    """Value, its error, both variances, and the error of the latter, `(seeds, P)` each."""
    rows = []
    for seed in range(60):
        rng = torch.Generator().manual_seed(seed)
        got = nm.variance.diagonal(model, nm.FromDistribution(fn), x, generator=rng)
        labels = flat(got.variances["labels"])
        rows.append(
            (
                flat(got.value),
                (labels / 64).sqrt(),  # of 64 labels instead of one
                flat(got.variances["data"]),
                labels,
                flat(got.variance_errors["labels"]),
            )
        )
    return Measured(*(torch.stack(column) for column in zip(*rows, strict=True)))


class Measured(NamedTuple):
    value: Tensor
    value_error: Tensor
    data: Tensor
    labels: Tensor
    labels_error: Tensor


def assert_unbiased(draws: Tensor, expected: Tensor) -> None:
    stderr = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() <= 6 * stderr).all()


def assert_spread(draws: Tensor, errors: Tensor) -> None:
    """The errors that were stated are those that are seen, over all parameters together."""
    ratio = errors.square().mean(0) / draws.var(0)
    assert 0.8 < ratio.mean() < 1.25


def test_moments_are_measured_with_their_own_error() -> None:
    model, x = network(), torch.randn(25, 3, dtype=torch.float64)
    expected = nm.variance.diagonal(model, nm.Gaussian(0.7**2), x)
    got = measured(model, normal, x)
    for value, data in zip(got.value, got.data, strict=True):
        assert_same(value, flat(expected.value))
        assert_same(data, flat(expected.variances["data"]))
    assert_unbiased(got.labels, flat(expected.variances["labels"]))
    assert_spread(got.labels, got.labels_error)


def test_where_the_output_fisher_has_no_exact_form_either() -> None:
    """A Laplace score is a sign over the scale b: `E z² = 1/b²` and κ₄ = −2/b⁴ per output."""
    model, x = network(), torch.randn(25, 3, dtype=torch.float64)
    same = nm.variance.diagonal(model, nm.Gaussian(0.7**2), x)
    quartic = reference.jacobian(model, x).pow(4).sum(1).mean(0) / 0.7**4
    expected = flat(same.variances["labels"]) - 2 * quartic / len(x)
    certain = expected <= 1e-12 * expected.max()  # the last layer: a parameter for each output
    got = measured(model, laplace, x)
    for name, truth in (("value", flat(same.value)), ("labels", expected)):
        draws, errors = getattr(got, name), getattr(got, f"{name}_error")
        assert_unbiased(draws[:, ~certain], truth[~certain])
        assert_spread(draws[:, ~certain], errors[:, ~certain])
        assert_same(draws[0, certain] + 1, truth[certain] + 1)
    assert not got.labels[:, certain].any()
    assert_unbiased(got.data[:, ~certain], flat(same.variances["data"])[~certain])


def test_any_likelihood_is_compared() -> None:
    model, x = network(), torch.randn(25, 3, dtype=torch.float64)
    for fn in (normal, lambda f: td.Categorical(logits=f)):
        table = nm.variance.compare(model, nm.FromDistribution(fn), x)
        assert len(table["all parameters"]) == 3


def test_variances_that_the_precision_does_not_have_are_refused() -> None:
    model, x = nn.Linear(4, 3, bias=False), 1e-12 * torch.randn(20, 4)
    with pytest.raises(nm.errors.UnsupportedError, match=r"'weight'.*no number in torch.float32"):
        nm.variance.diagonal(model, nm.Categorical(), x)
    found = nm.variance.diagonal(model.double(), nm.Categorical(), x.double())
    assert found.error("labels")["weight"].min() > 0
    assert nm.variance.plan(model.float(), nm.Categorical(), x, rtol=0.3).inputs > 1
