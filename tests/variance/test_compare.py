"""The comparison of estimators: its numbers against the diagonal's, its advice against draws."""

from __future__ import annotations

import json
import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.variance import Comparison

DEFAULT = (nm.MonteCarlo(1), nm.RandomSigns(1), nm.Exact())
ALL = "all parameters"


def mlp(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


def inputs(num: int = 40) -> Tensor:
    return torch.randn(num, 4, generator=torch.Generator().manual_seed(3)).double()


@pytest.fixture(scope="module")
def digits() -> Comparison:
    """A trained network on digits."""
    data = load_digits()
    x = torch.tensor(data.data / 16).float()
    y = torch.tensor(data.target)
    torch.manual_seed(0)
    layers = [nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 10)]
    model = nn.Sequential(*layers)
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        adam.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        adam.step()
    return nm.variance.compare(model, nm.Categorical(), (x[:512], y[:512]))


def middle(values: Tensor, q: float) -> float:
    return float(values.sort().values[min(int(q * len(values)), len(values) - 1)])


def test_rows_are_those_of_the_diagonal() -> None:
    model, x = mlp(), inputs()
    estimators = (nm.MonteCarlo(2), nm.RandomSigns(3), nm.Exact())
    got = nm.variance.compare(model, nm.Categorical(), x, estimators=estimators)
    groups = {
        ALL: ["0.weight", "0.bias", "2.weight", "2.bias"],
        "0": ["0.weight", "0.bias"],
        "2": ["2.weight", "2.bias"],
        "0.weight": ["0.weight"],
        "0.bias": ["0.bias"],
        "2.weight": ["2.weight"],
        "2.bias": ["2.bias"],
    }
    assert [row.group for row in got.rows] == [group for group in groups for _ in estimators]
    sources = ("labels", "probes", None)
    for i, (estimator, sweeps) in enumerate(zip(estimators, (2, 3, 3), strict=True)):
        estimate = nm.variance.diagonal(model, nm.Categorical(), x, estimator=estimator)
        relative = estimate.relative
        for group, names in groups.items():
            row = got[group][i]
            errors = torch.cat([relative[name].flatten() for name in names])
            assert (row.estimator, row.sweeps, row.source) == (repr(estimator), sweeps, sources[i])
            assert (row.num_parameters, row.zeros) == (len(errors), 0)
            trace = sum(float(estimate.value[name].sum()) for name in names)
            assert math.isclose(row.trace, trace, rel_tol=1e-10)
            assert math.isclose(row.stderr.median, middle(errors, 0.5), rel_tol=1e-10)
            assert math.isclose(row.stderr.high, middle(errors, 0.95), rel_tol=1e-10)
            for spread, source in ((row.data, "data"), (row.draws, sources[i])):
                if source is None:
                    assert (spread.median, spread.high) == (0, 0)
                    continue
                parts = [estimate.error(source)[n] / estimate.value[n] for n in names]
                part = torch.cat([part.flatten() for part in parts])
                assert math.isclose(spread.median, middle(part, 0.5), rel_tol=1e-10)


def test_bound_and_tightness() -> None:
    model, x = mlp(), inputs()
    labels, signs, exact = nm.variance.compare(model, nm.Categorical(), x)["0"]
    most = nm.variance.bound(model, nm.Categorical(), x)
    true = nm.variance.diagonal(model, nm.Categorical(), x)
    names = ("0.weight", "0.bias")
    tightness = torch.cat([(most[n] / true.variances["labels"][n]).flatten() for n in names])
    relative = torch.cat([(most[n].sqrt() / true.value[n]).flatten() for n in names])
    assert labels.tightness is not None
    assert labels.bound is not None
    assert math.isclose(labels.tightness, middle(tightness, 0.5), rel_tol=1e-10)
    assert math.isclose(labels.bound, middle(relative, 0.5), rel_tol=1e-10)
    assert labels.bound >= labels.draws.median
    assert signs.bound is signs.tightness is exact.bound is exact.tightness is None
    gaussian = nm.variance.compare(model, nm.Gaussian(), x)[ALL][0]
    assert gaussian.tightness is not None
    assert math.isclose(gaussian.tightness, 1, rel_tol=1e-10)


def test_signs_beat_labels_on_digits_in_every_layer(digits: Comparison) -> None:
    """And the gain is the ratio of their median relative variances."""
    for advice in digits.advice:
        labels, signs, exact = digits[advice.group]
        assert exact.draws.median == 0
        assert signs.draws.median < labels.draws.median
        assert advice.gain is not None
        assert advice.gain > 1
        ratio = labels.draws.median**2 / signs.draws.median**2
        assert math.isclose(advice.gain, ratio, rel_tol=1e-10)
        assert "at equal sweeps MonteCarlo(samples=1) varies" in advice.reason


def test_the_advised_number_of_sweeps_is_enough_and_no_less_is() -> None:
    model, x = mlp(10), inputs(60)
    advice = nm.variance.compare(model, nm.Categorical(), x).advice[0]
    assert advice.estimator == "RandomSigns(probes=1)"
    assert advice.sweeps > 1
    few, enough = nm.variance.compare(
        model,
        nm.Categorical(),
        x,
        estimators=[nm.RandomSigns(advice.sweeps - 1), nm.RandomSigns(advice.sweeps)],
    )[ALL]
    data = few.data.median
    assert math.hypot(data, enough.draws.median) <= 1.1 * data
    assert math.hypot(data, few.draws.median) > 1.1 * data


def test_relative_error_of_draws_is_what_draws_have() -> None:
    """Each estimator a thousand times: median over entries of the relative error."""
    model, x, rng = mlp(), inputs(6), torch.Generator().manual_seed(0)

    def drawn(estimator: nm.estimators.Estimator) -> Tensor:
        F = nm.fisher(model, nm.Categorical(), x, nm.Diagonal(), estimator=estimator, generator=rng)
        return torch.cat([value.flatten() for value in F.diagonal().values()])

    exact = drawn(nm.Exact())
    rows = nm.variance.compare(model, nm.Categorical(), x)[ALL]
    for row, estimator in zip(rows[:2], DEFAULT[:2], strict=True):
        errors = (torch.stack([drawn(estimator) for _ in range(1000)]) - exact) / exact
        variances = errors.square().mean(0)
        stderr = errors.square().std(0) / 1000**0.5
        # Entries share their draws, so the median is as far off as one of them may be.
        k = int((variances - middle(variances, 0.5)).abs().argmin())
        assert abs(float(variances[k]) - row.draws.median**2) < 4 * float(stderr[k])


@pytest.mark.parametrize(
    ("estimators", "model", "likelihood", "num", "estimator", "sweeps", "reason"),
    [
        (DEFAULT, mlp(3), nm.Categorical(), 40, "Exact()", 3, "would be enough to add less"),
        (DEFAULT, mlp(1), nm.Gaussian(), 40, "RandomSigns(probes=1)", 1, "add no error"),
        (DEFAULT[:1], mlp(3), nm.Categorical(), 1, "MonteCarlo(samples=1)", 1, "one input leaves"),
        (DEFAULT[2:], mlp(3), nm.Categorical(), 40, "Exact()", 3, "only more inputs"),
        (
            (nm.MonteCarlo(1000), nm.Exact()),
            mlp(3),
            nm.Categorical(),
            40,
            "MonteCarlo(samples=1000)",
            1000,
            "more inputs help, more draws do not",
        ),
    ],
    ids=["exact is affordable", "signs are exact", "one input", "no draws", "enough draws"],
)
def test_advice(
    estimators: tuple[nm.estimators.Estimator, ...],
    model: nn.Module,
    likelihood: nm.Likelihood,
    num: int,
    estimator: str,
    sweeps: int,
    reason: str,
) -> None:
    got = nm.variance.compare(model, likelihood, inputs(num), estimators=estimators)
    advice = got.advice[0]
    assert (advice.group, advice.estimator, advice.sweeps) == (ALL, estimator, sweeps)
    assert reason in advice.reason


def test_second_derivatives_beside_the_others() -> None:
    """Their error is the closed form, zero in the last layer, where they may be advised."""
    model, x = mlp(), inputs()
    got = nm.variance.compare(
        model, nm.Categorical(), x, estimators=[nm.MonteCarlo(1), nm.Hessian(2)]
    )
    closed = nm.variance.second_derivative(model, nm.Categorical(), x, samples=2)
    errors = [
        (closed.error("labels")[name] / closed.value[name]).flatten()  # type: ignore[index]
        for name in ("0.weight", "0.bias")
    ]
    hidden, last = got["0"][1], got["2"][1]
    assert hidden.estimator == "Hessian(samples=2)"
    assert math.isclose(hidden.draws.median, middle(torch.cat(errors), 0.5), rel_tol=1e-10)
    assert (last.draws.median, last.draws.high, last.source) == (0, 0, "labels")
    assert hidden.trace == got["0"][0].trace
    assert hidden.cost > 0
    # With nothing else to choose it is advised, and the cheaper one that has no error if there is.
    for others, advised in (([], "Hessian(samples=2)"), ([nm.Exact()], "Exact()")):
        table = nm.variance.compare(model, nm.Categorical(), x, estimators=[nm.Hessian(2), *others])
        of_last = next(advice for advice in table.advice if advice.group == "2")
        assert of_last.estimator == advised
        assert "add no error" in of_last.reason


def test_the_cost_of_more_sweeps_is_more() -> None:
    wide = nn.Sequential(nn.Linear(4, 300), nn.Tanh(), nn.Linear(300, 10)).double()
    few, many = nm.variance.compare(
        wide, nm.Categorical(), inputs(1000), estimators=[nm.MonteCarlo(1), nm.MonteCarlo(100)]
    )[ALL]
    assert 0 < few.cost < many.cost


def test_entries_without_information_are_counted_and_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([-100.0, 1.0, 1.0]))
    got = nm.variance.compare(model, nm.Categorical(), inputs())
    assert got["0"][0].zeros == 5
    assert math.isfinite(got["0"][0].stderr.median)
    assert got["0.bias"][0].zeros == 1
    dead = nm.variance.compare(
        model, nm.Categorical(), torch.zeros(3, 4).double(), params=["0.weight"]
    )
    assert dead.rows[0].zeros == dead.rows[0].num_parameters
    assert dead.advice[0].reason == "all entries are zero."
    assert "–" in str(dead)


def test_table_and_json(digits: Comparison) -> None:
    lines = str(digits).splitlines()
    assert "N = 512" in lines[0]
    assert lines[2].split()[:5] == ["layer", "entries", "trace", "estimator", "sweeps"]
    assert "forward and backward passes" in lines[0]
    table = lines[3 : 3 + 4 * len(DEFAULT)]
    assert [line.split()[0] for line in table[3::3]] == ["0", "2", "4"]
    assert sum(line.count("RandomSigns(probes=1)") for line in table) == 4
    assert lines[-4:] == [f"{advice.group}: {advice.reason}" for advice in digits.advice]
    plain = json.loads(json.dumps(digits.to_dict(), allow_nan=False))
    assert plain["num_samples"] == 512
    assert plain["rows"][0]["stderr"]["median"] == digits.rows[0].stderr.median
    assert [row["kind"] for row in plain["rows"][::3]] == ["model"] + 3 * ["layer"] + 6 * [
        "parameter"
    ]


def test_one_input_in_json_is_null() -> None:
    got = nm.variance.compare(mlp(), nm.Categorical(), inputs(1))
    plain = json.loads(json.dumps(got.to_dict(), allow_nan=False))
    assert plain["rows"][0]["data"] == {"median": None, "high": None}


def test_moments_from_labels_are_those_of_the_generator() -> None:
    laplace = nm.FromDistribution(
        lambda f: torch.distributions.Independent(torch.distributions.Laplace(f, 1.0), 1)
    )

    def errors(seed: int) -> list[nm.variance.Spread]:
        generator = torch.Generator().manual_seed(seed)
        found = nm.variance.compare(
            *(mlp(), laplace, inputs()),
            estimators=[nm.MonteCarlo(1)],
            generator=generator,
        )
        return [row.draws for row in found.rows]

    assert errors(0) == errors(0) != errors(1)


def test_batches_of_an_iterator_are_each_read_once() -> None:
    x = inputs()
    whole = nm.variance.compare(mlp(), nm.Categorical(), x)
    parts = nm.variance.compare(mlp(), nm.Categorical(), iter([(x[:15], None), (x[15:], None)]))
    for one, other in zip(whole.rows, parts.rows, strict=True):
        assert math.isclose(one.trace, other.trace, rel_tol=1e-10)
        assert math.isclose(one.stderr.high, other.stderr.high, rel_tol=1e-8)
    assert whole.num_samples == parts.num_samples == 40


def test_refusals() -> None:
    model, x = mlp(), inputs()
    with pytest.raises(ValueError, match=r"no estimator.*give at least one"):
        nm.variance.compare(model, nm.Categorical(), x, estimators=[])
    with pytest.raises(TypeError, match=r"nm\.MonteCarlo\(1\).*MonteCarlo'>"):
        nm.variance.compare(model, nm.Categorical(), x, estimators=[nm.MonteCarlo])
    with pytest.raises(nm.errors.UnsupportedError, match=r"Empirical.*no closed form"):
        nm.variance.compare(model, nm.Categorical(), x, estimators=[nm.Empirical()])
    once = iter([(x, None)])
    with pytest.raises(nm.errors.UnsupportedError, match=r"Hessian reads the data more than once"):
        nm.variance.compare(model, nm.Categorical(), once, estimators=[nm.Hessian()])
    with pytest.raises(KeyError, match=r"no group 'head'.*'0'"):
        nm.variance.compare(model, nm.Categorical(), x)["head"]
