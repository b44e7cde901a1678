"""A value with its standard error, and how it is read."""

from __future__ import annotations

import json
import math

import pytest
import torch

from neuromanifold._estimate import Estimate
from neuromanifold._intervals import plus_minus, quantile


def estimate() -> Estimate:
    return Estimate(
        {"weight": torch.tensor([2.0, 0.0]), "bias": torch.tensor([4.0])},
        {
            "data": {"weight": torch.tensor([0.09, 0.0]), "bias": torch.tensor([1.0])},
            "labels": {"weight": torch.tensor([0.16, 0.0]), "bias": torch.tensor([0.0])},
        },
        num_samples=10,
        draws=3,
    )


def test_sources_add_in_squares() -> None:
    found = estimate()
    torch.testing.assert_close(found.stderr["weight"], torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(found.error("labels")["weight"], torch.tensor([0.4, 0.0]))
    torch.testing.assert_close(found.relative["weight"], torch.tensor([0.25, 0.0]))
    with pytest.raises(KeyError, match=r"no error from 'probes'; there is \['data', 'labels'\]"):
        found.error("probes")


def test_interval() -> None:
    low, high = estimate().interval(0.6826894921370859)
    torch.testing.assert_close(low["weight"], torch.tensor([1.5, 0.0]))
    torch.testing.assert_close(high["bias"], torch.tensor([5.0]))
    for wrong in (0.0, 1.0, 95.0):
        with pytest.raises(ValueError, match=rf"between 0 and 1.*got {wrong}"):
            estimate().interval(wrong)


def test_interval_of_what_cannot_be_negative() -> None:
    """Symmetric in the logarithm; the symmetric interval where the error is small."""
    found = estimate()
    low, high = found.interval(0.6826894921370859, positive=True)
    torch.testing.assert_close(low["weight"], torch.tensor([2.0 * math.exp(-0.25), 0.0]))
    torch.testing.assert_close(high["weight"], torch.tensor([2.0 * math.exp(0.25), 0.0]))
    nothing = Estimate(torch.tensor(0.0), {"data": torch.tensor(4.0)})
    low, high = nothing.interval(0.6826894921370859, positive=True)
    torch.testing.assert_close(low, torch.tensor(0.0))
    torch.testing.assert_close(high, torch.tensor(2.0))
    negative = Estimate(torch.tensor(-3.0), {"data": torch.tensor(4.0)})
    with pytest.raises(ValueError, match=r"is -3, .*Use the symmetric interval"):
        negative.interval(positive=True)


def test_rare_large_contributions_are_covered_by_the_positive_interval() -> None:
    """One of ten inputs makes all of the value: misses are balanced, and there are fewer."""
    runs, num, truth = 4000, 100, 0.1
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(runs, num, generator=generator, dtype=torch.float64) < truth).double()
    found = Estimate(x.mean(dim=1), {"data": x.var(dim=1) / num}, num_samples=num)

    def misses(positive: bool) -> tuple[float, float]:
        low, high = found.interval(0.95, positive=positive)
        assert isinstance(low, torch.Tensor)
        assert isinstance(high, torch.Tensor)
        return float((high < truth).double().mean()), float((low > truth).double().mean())

    error = (0.05 * 0.95 / runs) ** 0.5
    assert sum(misses(positive=False)) > 0.05 + 3 * error
    assert sum(misses(positive=True)) < 0.05 + 3 * error
    assert misses(positive=True)[0] < misses(positive=False)[0] / 2


def test_plain_data() -> None:
    read = json.loads(json.dumps(estimate().to_dict()))
    assert read["value"] == {"weight": [2.0, 0.0], "bias": [4.0]}
    assert read["errors"]["data"]["bias"] == [1.0]
    assert (read["num_samples"], read["draws"]) == (10, 3)


def test_what_json_does_not_have_is_null() -> None:
    found = Estimate(torch.tensor([1.0, math.nan]), {"data": torch.tensor([math.inf, 4.0])})
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read["value"] == [1.0, None]
    assert read["stderr"] == [None, 2.0]
    assert read["errors"] == {"data": [None, 2.0]}


def test_without_any_error() -> None:
    exact = Estimate(torch.tensor(3.0), {"data": torch.tensor(0.0)}, num_samples=5)
    assert str(exact) == "3 ± 0 (5 samples)"
    assert str(estimate()) == "<Estimate of 3 numbers from 10 samples>"


@pytest.mark.parametrize(
    ("value", "stderr", "expected"),
    [
        (1.0, 0.1, "1.00 ± 0.10"),
        (0.001234, 0.000056, "0.001234 ± 0.000056"),
        (98765.0, 4321.0, "98800 ± 4300"),
        (float("nan"), float("inf"), "nan ± inf"),
    ],
)
def test_a_value_has_the_digits_of_its_error(value: float, stderr: float, expected: str) -> None:
    assert plus_minus(value, stderr) == expected


def test_quantiles_of_the_normal_distribution() -> None:
    assert abs(quantile(0.95) - 1.959963984540054) < 1e-12
