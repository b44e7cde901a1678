"""Labels that depend on each other: unbiased, each alone like an independent one, less varied."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch import distributions as td

import neuromanifold as nm
from neuromanifold.estimators import Estimator
from neuromanifold.likelihoods import Likelihood
from neuromanifold.testing import check_estimator, reference

SURE = 6.0
"""Standard errors that a right answer is off once in five hundred million comparisons."""


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def binomial(outputs: Tensor) -> td.Distribution:
    return td.Binomial(3, logits=outputs)


LABELS = torch.tensor([[0, -100, 2], [-100, -100, -100]])
PROBLEMS: dict[str, tuple[Likelihood, Tensor, Tensor]] = {
    "categorical": (nm.Categorical(), 2 * randn(2, 4), torch.tensor([3, 0])),
    "categorical ignores": (nm.Categorical(), randn(2, 3, 3), LABELS),
    "categorical class axis": (
        nm.Categorical(class_axis=1),
        randn(2, 3, 3),
        LABELS.clamp(min=0),
    ),
    "bernoulli": (nm.Bernoulli(), randn(2, 3), torch.tensor([[0.0, 1, 1], [1, 0, 0]])),
    "gaussian": (nm.Gaussian(0.3), randn(2, 3), randn(2, 3)),
    "gaussian scalar": (nm.Gaussian(), randn(3), randn(3)),
    "gaussian mean variance": (nm.GaussianMeanVariance(), randn(2, 2, 2), randn(2, 2)),
    "distribution": (nm.FromDistribution(binomial), randn(3), torch.tensor([0.0, 2, 3])),
}
STRATIFIED = [("stratified", problem) for problem in PROBLEMS]
WEIGHTED = [
    ("weighted", problem)
    for problem in PROBLEMS
    if problem.startswith("categorical") or problem == "distribution"
]


@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize(("labels", "problem"), STRATIFIED + WEIGHTED)
def test_contract(labels: str, problem: str, samples: int) -> None:
    check_estimator(nm.MonteCarlo(samples, labels), *PROBLEMS[problem])


@pytest.mark.parametrize(("labels", "problem"), STRATIFIED + WEIGHTED)
def test_each_draw_alone_is_unbiased(labels: str, problem: str) -> None:
    """Also between the positions of a sample, and whichever of the draws it is."""
    likelihood, outputs, targets = PROBLEMS[problem]
    num_draws, samples = 4000, 3
    tiled = outputs.repeat(num_draws, *[1] * (outputs.ndim - 1))
    repeated = targets.repeat(num_draws, *[1] * (targets.ndim - 1))
    estimator = nm.MonteCarlo(samples, labels)
    expected = reference.output_fisher(likelihood, outputs, targets)
    for u in estimator.cotangents(likelihood, tiled, repeated, generator=seeded(1)):
        flat = math.sqrt(samples) * u.reshape(num_draws, len(outputs), -1)
        squares = torch.einsum("dne,dnf->dnef", flat, flat)
        stderr = squares.std(0) / num_draws**0.5
        assert ((squares.mean(0) - expected).abs() <= SURE * stderr + 1e-12).all()


def test_a_stratified_label_has_the_models_distribution() -> None:
    """The score of class y is `e_y − p`, up to its sign: the largest entry says which it is."""
    logits = randn(1, 5)
    p, num_draws = logits.softmax(-1)[0], 20_000
    for u in nm.Categorical().even_scores(logits.expand(num_draws, 5), 3, generator=seeded()):
        share = torch.bincount(u.abs().argmax(-1), minlength=5) / num_draws
        assert ((share - p).abs() <= SURE * (p * (1 - p) / num_draws).sqrt()).all()


@pytest.mark.parametrize("samples", [2, 4, 7])
def test_a_class_is_drawn_as_often_as_its_probability_says(samples: int) -> None:
    logits = 2 * randn(300, 5)
    expected = samples * logits.softmax(-1)
    scores = torch.stack(list(nm.Categorical().even_scores(logits, samples, generator=seeded())))
    counts = nn.functional.one_hot(scores.abs().argmax(-1), 5).sum(0)
    assert (counts >= (expected - 1e-9).floor()).all()
    assert (counts <= (expected + 1e-9).ceil()).all()


@pytest.mark.parametrize("labels", ["stratified", "weighted"])
def test_as_many_labels_as_equal_classes_are_exact(labels: str) -> None:
    """Each class is drawn once: nothing is left to chance."""
    model, x = nn.Linear(3, 4).double(), randn(6, 3)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    exact, drawn = (
        nm.fisher(model, nm.Categorical(), x, nm.Dense(), estimator=estimator, generator=seeded())
        for estimator in (nm.Exact(), nm.MonteCarlo(4, labels))
    )
    torch.testing.assert_close(drawn.to_dense(), exact.to_dense(), rtol=1e-12, atol=1e-12)


def variance(
    estimator: Estimator, likelihood: Likelihood, outputs: Tensor, j: Tensor
) -> tuple[float, float]:
    """Of `Σ_v (j·u_v)²` for one sample, over 20,000 draws, and its standard error."""
    num_draws = 20_000
    tiled = outputs.expand(num_draws, *outputs.shape[1:])
    u = estimator.cotangents(likelihood, tiled, None, generator=seeded())
    q = sum((v * j).flatten(1).sum(1).square() for v in u)
    assert isinstance(q, Tensor)
    w = (q - q.mean()).square()
    return float(w.mean()), float(w.std() / num_draws**0.5)


def ratio_is(labels: str, likelihood: Likelihood, outputs: Tensor, j: Tensor, samples: int):
    """Variance over that of independent labels, by which it is at least and at most."""
    (v, dv), (w, dw) = (
        variance(nm.MonteCarlo(samples, kind), likelihood, outputs, j)
        for kind in (labels, "independent")
    )
    error = SURE * math.hypot(dv / w, dw * v / w**2)
    return v / w - error, v / w + error


@pytest.mark.parametrize(("samples", "entries"), [(2, 5), (5, 5), (3, 8), (7, 5), (4, 1)])
def test_orthogonal_directions_of_gaussian_targets(samples: int, entries: int) -> None:
    """Two of a frame in K dimensions have the correlation `−1/(K + 1 + 1)` of squared products."""
    outputs, j = randn(1, entries), randn(1, entries)
    low, high = ratio_is("stratified", nm.Gaussian(0.7), outputs, j, samples)
    frames = [min(samples - start, entries) for start in range(0, samples, entries)]
    pairs = sum(size * (size - 1) for size in frames)
    assert low <= 1 - pairs / samples / (entries + 2) <= high


def test_a_target_and_its_mirror_image_say_the_same() -> None:
    """Antithetic signs, the common cure, are none here: `z zᵀ` does not see the sign of z."""
    likelihood, mean, z = nm.Gaussian(0.7), randn(3, 4), randn(4, 3, 1)[..., 0].T
    plus, minus = (likelihood.score(mean, mean + sign * z) for sign in (1, -1))
    outer = [torch.einsum("ne,nf->nef", u, u) for u in (plus, minus)]
    torch.testing.assert_close(*outer, rtol=1e-12, atol=1e-12)


def test_labels_of_many_outputs_do_not_compensate() -> None:
    """At p = ½ a squared score is constant: all that varies are products of two outputs' scores.

    Two labels of one output are opposite. Without random signs the two sums over outputs would be
    opposite as well, equal in square, and the second label worthless.
    """
    outputs = torch.zeros(1, 6, dtype=torch.float64)
    low, high = ratio_is("stratified", nm.Bernoulli(), outputs, randn(1, 6), 2)
    assert low <= 1 <= high


@pytest.mark.parametrize("labels", ["stratified", "weighted"])
@pytest.mark.parametrize("samples", [2, 3, 4])
def test_a_period_in_the_classes_does_no_harm(labels: str, samples: int) -> None:
    """Equidistant points would meet the same scores again, if classes kept their order."""
    outputs = torch.zeros(1, 8, dtype=torch.float64)
    j = torch.tensor([[1.0, 0, 0, 0, 1, 0, 0, 0]], dtype=torch.float64)
    assert ratio_is(labels, nm.Categorical(), outputs, j, samples)[1] < 1


@pytest.mark.parametrize("seed", range(6))
def test_a_sure_classifier_is_measured_by_the_labels_it_hardly_ever_draws(seed: int) -> None:
    outputs = torch.randn(1, 6, generator=seeded(seed), dtype=torch.float64)
    outputs[0, 0] = 8
    j = torch.randn(1, 6, generator=seeded(seed + 6), dtype=torch.float64)
    even = ratio_is("stratified", nm.Categorical(), outputs, j, 4)
    weighted = ratio_is("weighted", nm.Categorical(), outputs, j, 4)
    assert even[0] < 1.1
    assert weighted[1] < 0.05


@pytest.mark.parametrize("labels", ["stratified", "weighted"])
@pytest.mark.parametrize("gap", [20.0, 60.0, 200.0])
def test_saturated_logits_in_single_precision(labels: str, gap: float) -> None:
    outputs = torch.tensor([[0.0, gap, -gap, 0.0]])
    for u in nm.Categorical().even_scores(
        outputs.expand(50, 4), 3, weighted=labels == "weighted", generator=seeded()
    ):
        assert torch.isfinite(u).all()


@pytest.mark.parametrize("labels", ["stratified", "weighted"])
def test_estimate_measures_their_error(labels: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5)).double(), randn(40, 4)
    estimator = nm.MonteCarlo(3, labels)
    exact = nm.fisher(model, nm.Categorical(), x, nm.Diagonal(), estimator=nm.Exact()).trace()
    off = []
    for seed in range(60):
        got = nm.estimate(
            model, nm.Categorical(), x, rtol=0.5, estimator=estimator, generator=seeded(seed)
        )
        assert got.reached
        off.append(float((got.value - exact) / got.error("labels")))
    scores = torch.tensor(off)
    assert abs(float(scores.mean())) < SURE / 60**0.5
    assert 0.6 < float(scores.std()) < 1.5  # 1 ± 6 / √(2 · 60), and the errors are estimates too


@pytest.mark.parametrize("labels", ["stratified", "weighted"])
def test_no_closed_form_of_the_variance(labels: str) -> None:
    model, x = nn.Linear(3, 4), torch.ones(5, 3)
    estimator = nm.MonteCarlo(2, labels)
    for ask in (nm.variance.diagonal, nm.variance.bound, nm.variance.blocks):
        with pytest.raises(nm.errors.UnsupportedError, match=rf"{labels}.*nm\.estimate.*Carlo\(2"):
            ask(model, nm.Categorical(), x, estimator=estimator)


@pytest.mark.parametrize(
    ("likelihood", "labels", "message"),
    [
        (nm.Poisson(), "stratified", 'list of possible targets.*"independent".*RandomSigns'),
        (nm.Poisson(), "weighted", "random signs.*RandomSigns"),
        (nm.Bernoulli(), "weighted", "random signs.*RandomSigns"),
        (nm.Gaussian(), "weighted", "random signs.*RandomSigns"),
        (
            nm.FromDistribution(lambda f: td.Independent(td.Laplace(f, 1.0), 1)),
            "weighted",
            'no weighted labels.*"independent"',
        ),
    ],
)
def test_what_a_likelihood_cannot_do(likelihood: Likelihood, labels: str, message: str) -> None:
    model, x = nn.Linear(3, 2), torch.ones(5, 3)
    with pytest.raises(nm.errors.UnsupportedError, match=message):
        nm.fisher(model, likelihood, x, estimator=nm.MonteCarlo(2, labels))


def test_an_unknown_kind() -> None:
    with pytest.raises(ValueError, match=r"\['independent', 'stratified', 'weighted'\].*'even'"):
        nm.MonteCarlo(2, "even")


def test_repr_is_the_constructor() -> None:
    assert repr(nm.MonteCarlo(3)) == "MonteCarlo(samples=3)"
    assert repr(nm.MonteCarlo(3, "weighted")) == "MonteCarlo(samples=3, labels='weighted')"
