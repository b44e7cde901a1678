"""The bias of the empirical Fisher: against the oracle, and where the answer is known."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.testing import layer_cases, reference
from neuromanifold.testing.cases import CASES, Case

RTOL = 1e-10
NAMES = ("mlp-categorical", "mlp-gaussian_mean_variance", "conv2d-bernoulli", "reused-poisson")
NAMES += ("mlp-distribution_categorical", "sequence_positions-categorical")
LAYERS = ("tied_head", "layer_norm", "embedding_positions", "attention_self", "gru_cell")
ORACLE = [case for case in CASES if str(case) in NAMES]
ORACLE += [case for case in layer_cases.LAYERS if str(case) in LAYERS]


def flat(params: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in params.values()])


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).norm() <= RTOL * expected.norm()


@pytest.mark.parametrize("case", ORACLE, ids=str)
def test_against_the_oracle_sample_by_sample(case: Case) -> None:
    model, (x, y) = case.model(), case.data()
    n = len(x)
    samples = [(x[i : i + 1], y[i : i + 1]) for i in range(n)]
    empirical, true = (
        torch.stack([matrix(model, case.likelihood, one).diagonal() for one in samples])
        for matrix in (reference.dense_empirical, reference.dense_fisher)
    )
    bias = nm.variance.empirical(model, case.likelihood, (x, y))
    assert bias.num_samples == n
    assert_same(flat(bias.empirical), empirical.mean(0))
    assert_same(flat(bias.true), true.mean(0))
    assert_same(flat(bias.difference.value), (empirical - true).mean(0))
    assert_same(flat(bias.difference.variances["data"]), (empirical - true).var(0) / n)
    e, t = empirical.sum(1), true.sum(1)
    ratio = e.mean() / t.mean()
    assert_same(bias.ratio.value, ratio)
    assert_same(bias.ratio.variances["data"], (e - ratio * t).var() / n / t.mean() ** 2)
    parts = nm.variance.empirical(model, case.likelihood, [(x[:3], y[:3]), (x[3:], y[3:])])
    assert_same(flat(parts.difference.variances["data"]), (empirical - true).var(0) / n)
    assert_same(parts.ratio.stderr, bias.ratio.stderr)


def test_by_layer() -> None:
    case = ORACLE[0]
    model, data = case.model(), case.data()
    bias = nm.variance.empirical(model, case.likelihood, data)
    assert len(bias.ratios) > 1
    whole = [0.0, 0.0]
    for layer, (above, below) in bias.traces.items():
        F, E = (
            nm.fisher(model, case.likelihood, data, nm.Diagonal(), estimator=estimator)
            .block(layer)
            .trace()
            for estimator in (nm.Exact(), nm.Empirical())
        )
        assert above == pytest.approx(float(E), rel=RTOL)
        assert below == pytest.approx(float(F), rel=RTOL)
        assert float(bias.ratios[layer].value) == pytest.approx(above / below, rel=RTOL)
        assert bias.decomposition["misfit"][layer] == (0.0, above)
        assert bias.decomposition["covariance"][layer] == (-below, above - below)
        whole[0] += above
        whole[1] += below
    assert float(bias.ratio.value) == pytest.approx(whole[0] / whole[1], rel=RTOL)


@pytest.mark.parametrize(
    "likelihood", [nm.Categorical(), nm.Bernoulli(), nm.Gaussian(2.0), nm.Poisson()], ids=repr
)
def test_labels_of_the_model_itself_show_no_bias(likelihood: nm.Likelihood) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(2000, 4, dtype=torch.float64)
    with torch.no_grad():
        y = likelihood.sample(model(x), 1, generator=torch.Generator().manual_seed(1))[0]
    bias = nm.variance.empirical(model, likelihood, (x, y))
    for ratio in (bias.ratio, *bias.ratios.values()):
        assert 0 < ratio.stderr < 0.1
        assert abs(ratio.value - 1) < 4 * ratio.stderr
    z = flat(bias.difference.value) / flat(bias.difference.stderr)
    assert z.abs().max() < 6


def test_a_model_that_fits_its_labels_exactly() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x = torch.randn(100, 4, dtype=torch.float64)
    bias = nm.variance.empirical(model, nm.Gaussian(), (x, model(x).detach()))
    assert bias.ratio.value == 0
    for layer, (above, below) in bias.traces.items():
        assert above == 0
        assert bias.decomposition["covariance"][layer] == (-below, -below)


def test_misfit_and_noise_look_the_same() -> None:
    """A shift of every label by one, and noise of variance one more: twice the true trace."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1).double(), torch.randn(4000, 3, dtype=torch.float64)
    noise = torch.randn(4000, 1, dtype=torch.float64)
    for residual in (noise + 1, noise * 2**0.5):
        bias = nm.variance.empirical(model, nm.Gaussian(), (x, model(x).detach() + residual))
        assert bias.ratio.stderr < 0.15
        assert abs(bias.ratio.value - 2) < 4 * bias.ratio.stderr


def test_the_stated_error_is_the_spread_of_repeated_data() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    ratios, errors = [], []
    for _ in range(200):
        x = torch.randn(200, 2, dtype=torch.float64)
        y = torch.randint(3, (200,))
        bias = nm.variance.empirical(model, nm.Categorical(), (x, y))
        ratios.append(bias.ratio.value)
        errors.append(bias.ratio.stderr)
    # The standard deviation of 200 values is known to about 5 %.
    assert torch.stack(ratios).std() == pytest.approx(float(torch.stack(errors).mean()), rel=0.2)


def test_as_text_and_as_data() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    data = torch.randn(64, 4), torch.randint(3, (64,))
    bias = nm.variance.empirical(model, nm.Categorical(), data)
    head, *rows = str(bias).splitlines()
    assert head.startswith("The empirical trace is ")
    assert " ± " in head
    assert head.endswith(" times the true one (64 samples). By layer:")
    assert [row.split()[0] for row in rows] == ["0", "2"]
    plain = json.loads(json.dumps(bias.to_dict()))
    assert plain["layers"]["0"]["empirical"] == bias.traces["0"][0]
    assert plain["layers"]["2"]["ratio"]["stderr"] == float(bias.ratios["2"].stderr)
    assert plain["decomposition"]["misfit"]["0"] == [0.0, bias.traces["0"][0]]


def test_one_sample_says_nothing_of_others() -> None:
    data = torch.randn(1, 3), torch.zeros(1, 2)
    bias = nm.variance.empirical(nn.Linear(3, 2), nm.Gaussian(), data)
    assert bias.ratio.stderr == torch.inf
    assert str(bias).splitlines()[-1].startswith("(root) ")
    assert flat(bias.difference.stderr).isinf().all()


def test_labels_are_needed() -> None:
    with pytest.raises(ValueError, match=r"needs the labels of the data: pass \(inputs, targets\)"):
        nm.variance.empirical(nn.Linear(3, 2), nm.Gaussian(), torch.randn(4, 3))


def test_part_of_a_model_its_own_forward_and_progress() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randint(2, (12,))
    seen: list[int] = []
    got = nm.variance.empirical(
        model,
        nm.Categorical(),
        [(x[:6], y[:6]), (x[6:], y[6:])],
        params=["2.*"],
        forward=lambda model, inputs: model(2 * inputs),
        progress=lambda done, _: seen.append(done),
    )
    whole = nm.variance.empirical(model, nm.Categorical(), (2 * x, y))
    assert list(got.ratios) == ["2"]
    assert_same(got.ratio.value, whole.ratios["2"].value)
    assert_same(got.ratio.stderr, whole.ratios["2"].stderr)
    assert seen == [1, 2]


def test_a_layer_without_information() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.constant_(model[0].bias, -100.0)  # no unit is ever active
    data = torch.randn(8, 3), torch.randn(8, 2)
    bias = nm.variance.empirical(model, nm.Gaussian(), data)
    assert bias.traces["0"] == (0.0, 0.0)
    assert bias.ratios["0"].value.isnan()
    assert bias.ratio.value == bias.ratios["2"].value
