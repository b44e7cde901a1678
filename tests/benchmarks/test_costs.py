"""What quantities cost, in counted operations: no clock, so that no machine is too slow for it."""

import copy
import json

import pytest
from benchmarks.costs import STORED, grown, measured


@pytest.fixture(scope="module")
def costs():
    return measured()


def test_no_quantity_costs_more_or_less_than_recorded(costs):
    found = grown(costs, json.loads(STORED.read_text()))
    assert not found, (
        "Counted costs have changed:\n  "
        + "\n  ".join(found)
        + "\nIf that is meant, record them: python -m benchmarks.costs --record"
    )


@pytest.mark.parametrize(("kind", "factor"), [("operations", 1.02), ("calls", 1.2)])
def test_a_quantity_that_grew_is_named(costs, kind, factor):
    name = "W1, diagonal"
    more = copy.deepcopy(costs)
    more[name][kind] = round(factor * more[name][kind])
    (line,) = grown(more, costs)
    assert line.startswith(f"{name}: {kind} grew")


def test_what_is_not_recorded_or_no_longer_measured_is_named(costs):
    fewer = {name: cost for name, cost in costs.items() if name != "W2, unit-wise"}
    assert grown(costs, fewer) == ["W2, unit-wise: not recorded"]
    assert grown(fewer, costs) == ["W2, unit-wise: recorded, but no longer measured"]
