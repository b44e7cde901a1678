"""A value with its standard error, and how it is read."""

from __future__ import annotations

import json

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


def test_plain_data() -> None:
    read = json.loads(json.dumps(estimate().to_dict()))
    assert read["value"] == {"weight": [2.0, 0.0], "bias": [4.0]}
    assert read["errors"]["data"]["bias"] == [1.0]
    assert (read["num_samples"], read["draws"]) == (10, 3)


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
