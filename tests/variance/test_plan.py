"""`nm.variance.plan`: as many inputs and labels as it says are enough, and hardly too many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neuromanifold as nm

RTOL = 0.1


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def inputs(num: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 3, generator=generator, dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_diagonal_asks_for_what_its_variances_say() -> None:
    model, x = network(), inputs(400)
    plan = nm.variance.plan(model, nm.Categorical(), x, rtol=RTOL, confidence=0.9)
    moments = nm.variance.diagonal(model, nm.Categorical(), x)
    for name, value in moments.value.items():  # type: ignore[union-attr]
        data, label = (
            400 * moments.variances[source][name].sum() / value.square().sum()
            for source in ("data", "labels")
        )
        asked = 1.6448536 / RTOL  # of the normal distribution
        for labels in (1, 7):
            expected = float((data + label / labels) * asked**2)
            assert expected <= plan.demands[name].inputs(labels) < expected + 1.001
    assert plan.inputs == max(plan.needed.values())
    # No other number of labels costs less, a pass for each of them and one forward.
    passes = plan.inputs * (1 + plan.labels)
    for labels in (1, 2, 4, 8):
        inputs_then = max(demand.inputs(labels) for demand in plan.demands.values())
        assert inputs_then * (1 + labels) >= passes


@pytest.mark.parametrize("quantity", ["trace", "quadratic", "diagonal"])
@pytest.mark.parametrize("estimator", [nm.MonteCarlo(1), nm.RandomSigns(1)], ids=str)
def test_what_is_planned_is_enough(quantity: Any, estimator: nm.estimators.Estimator) -> None:
    """Of 200 runs of the plan's size, 95 % are within the tolerance; some of it, not by far."""
    model, runs, rtol = network(), 200, 0.05 if quantity == "trace" else 0.1
    asked: dict[str, Any] = {"quantity": quantity}
    if quantity == "quadratic":
        asked["vector"] = torch.linspace(-1, 2, 31, dtype=torch.float64)
    plan = nm.variance.plan(
        model,
        nm.Categorical(),
        inputs(2000),
        rtol=rtol,
        estimator=estimator,
        generator=seeded(0),
        **asked,
    )
    population = inputs(100_000, seed=1)
    truth = nm.estimate(model, nm.Categorical(), population, estimator=nm.Exact(), **asked).value
    draws = type(estimator)(plan.labels)  # type: ignore[call-arg]
    worst = max(plan.needed, key=lambda name: plan.needed[name])
    good = 0
    for run in range(runs):
        x = inputs(plan.inputs, seed=run + 2)
        F = nm.fisher(
            model, nm.Categorical(), x, nm.Dense(), estimator=draws, generator=seeded(run)
        )
        if quantity == "diagonal":
            got, true = F.diagonal()[worst], truth[worst]  # type: ignore[index]
        else:
            v = asked.get("vector")
            got, true = (F.trace() if v is None else v @ (F @ v)), truth
        good += bool((torch.as_tensor(got) - true).norm() <= rtol * true.norm())
    assert good >= 0.92 * runs
    if quantity != "diagonal":  # of a norm, the interval is wider than it need be
        assert good <= 0.985 * runs


@pytest.mark.parametrize("share", [None, 0.9])
def test_so_many_entries_are_known_with_what_is_planned(share: float | None) -> None:
    model = network()
    plan = nm.variance.plan(
        model, nm.Categorical(), inputs(2000), rtol=RTOL, quantity="entries", quantile=share
    )
    x = inputs(plan.inputs, seed=1)
    found = nm.variance.diagonal(
        model, nm.Categorical(), x, estimator=nm.MonteCarlo(plan.labels)
    ).relative
    within = {name: float((1.96 * e <= RTOL).double().mean()) for name, e in found.items()}  # type: ignore[union-attr]
    # Of the parameter that asks for most; tensors of three entries know shares to a third.
    worst = max(plan.needed, key=lambda name: plan.needed[name])
    assert abs(within[worst] - (share or 0.5)) <= 0.34
    assert min(within.values()) >= (share or 0.5) - 0.34
    more = nm.variance.plan(model, nm.Categorical(), inputs(2000), rtol=RTOL, quantity="diagonal")
    assert plan.inputs != more.inputs


def test_the_eigenvalue_asks_for_what_its_variances_say() -> None:
    model, x = network(), inputs(2000)
    plan = nm.variance.plan(model, nm.Categorical(), x, quantity="eigenvalue", generator=seeded(0))
    got = nm.estimate(model, nm.Categorical(), x, "eigenvalue", estimator=nm.Exact(), rtol=RTOL)
    F = nm.fisher(model, nm.Categorical(), x, nm.Dense(), estimator=nm.Exact())
    data = float(2000 * got.variances["data"] / F.eigenvalues(1)[0] ** 2)  # type: ignore[operator]
    (demand,) = plan.demands.values()
    assert demand.data == pytest.approx(data, rel=0.3)
    assert plan.inputs == demand.inputs(plan.labels)


def test_labels_for_the_inputs_at_hand() -> None:
    plan = nm.variance.plan(network(), nm.Categorical(), inputs(400), rtol=RTOL)
    labels = plan.labels_for(plan.inputs)
    assert labels is not None
    assert 1 <= labels <= plan.labels
    assert plan.labels_for(10 * plan.inputs) == 1
    assert plan.labels_for(2) is None
    for demand in plan.demands.values():
        found = demand.labels(plan.inputs)
        assert found is not None
        assert demand.inputs(found) <= plan.inputs


def test_without_a_closed_form_the_noise_of_labels_is_measured() -> None:
    model, x = network(), inputs(1000)
    normal = nm.FromDistribution(
        lambda f: torch.distributions.Independent(torch.distributions.Normal(f, 1.0), 1)
    )
    got = nm.variance.plan(model, normal, x, rtol=RTOL, generator=seeded(0))
    closed = nm.variance.plan(model, nm.Gaussian(), x, rtol=RTOL)
    for name, demand in closed.demands.items():
        assert got.demands[name].data == pytest.approx(demand.data, rel=1e-6)
        assert got.demands[name].drawn == pytest.approx(demand.drawn, rel=0.1)


def test_exact_has_no_labels() -> None:
    model, x = network(), inputs(400)
    plan = nm.variance.plan(model, nm.Categorical(), x, rtol=RTOL, estimator=nm.Exact())
    assert plan.labels == 1
    assert all(demand.drawn == 0 for demand in plan.demands.values())
    assert plan.labels_for(plan.inputs) == 1


def test_a_parameter_without_information_asks_for_nothing() -> None:
    model = network()
    with torch.no_grad():
        model[2].weight.zero_()
    plan = nm.variance.plan(model, nm.Categorical(), inputs(400), rtol=RTOL)
    assert plan.needed["0.weight"] == 1
    assert plan.needed["2.weight"] > 1


def test_seconds_bytes_and_how_it_reads() -> None:
    model, x = network(), inputs(400)
    plan = nm.variance.plan(model, nm.Categorical(), x, rtol=RTOL, params=iter(["2.*"]))
    assert plan.seconds is not None
    assert plan.seconds > 0
    assert plan.bytes > 0
    assert list(plan.demands) == ["2.weight", "2.bias"]
    text = str(plan)
    assert f"{plan.inputs:,} inputs" in text
    assert "diagonal within 10.0% at 95% confidence" in text
    assert "2.weight" in text
    known = plan.to_dict()
    assert known["needed"] == plan.needed
    assert (known["inputs"], known["labels"]) == (plan.inputs, plan.labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimator": nm.MonteCarlo(3)}, r"nm\.MonteCarlo\(1\)"),
        ({"estimator": nm.Empirical()}, "targets"),
        ({"rtol": -1.0}, "rtol is a positive number"),
        ({"confidence": 1.0}, "between 0 and 1"),
        ({"quantity": "rank"}, "quantity is one of"),
        ({"quantity": "quadratic"}, "give vector"),
        ({"quantile": 0.5}, "goes with quantity="),
        ({"vector": torch.ones(31)}, "take no vector"),
        ({"data": inputs(1)}, "at least 2 inputs"),
        ({"data": iter([inputs(8)])}, "only once"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    asked = {"model": network(), "likelihood": nm.Categorical(), "data": inputs(8)}
    with pytest.raises(ValueError, match=message):
        nm.variance.plan(**(asked | arguments))
