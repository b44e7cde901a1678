"""What a report says of the units' own metrics, as `nm.relative.compare` measures them."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from torch import nn

import neuromanifold as nm
from neuromanifold.relative import compare
from neuromanifold.report import collect
from neuromanifold.report.own_metrics import own_metrics


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)
    )


def inputs() -> torch.Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(1))


def measured(model: nn.Module, notes: list[str], num_rows: int = 48) -> dict[str, Any] | None:
    return own_metrics(
        model, nm.Categorical(), inputs(), num_rows=num_rows, num_parameters=83, notes=notes
    )


def test_numbers_are_those_of_the_comparison() -> None:
    model = network().eval()
    with torch.no_grad():
        model[0].bias[0] = -100
    analysis = collect(model, nm.Categorical(), inputs(), name="net")
    json.dumps(analysis, allow_nan=False)
    assert analysis["notes"] == []
    found = compare(model, nm.Categorical(), inputs())
    layers = {layer["name"]: layer for layer in analysis["own_metrics"]["layers"]}
    assert list(layers) == ["0", "5"]
    assert (layers["0"]["units"], layers["0"]["dead"]) == (6, 1)
    for name in ("factor", "cosine", "variation"):
        assert layers["0"][name]["median"] == pytest.approx(found["0"].summary[name].median)
    assert layers["5"]["factor"]["upper"] == pytest.approx(1, abs=1e-5)
    assert analysis["own_metrics"]["left_out"] == dict(found.left_out)
    assert "no activation function" in found.left_out["2"]


def test_dead_layers_have_no_numbers() -> None:
    model = network()
    with torch.no_grad():
        model[0].bias.fill_(-100)
    notes: list[str] = []
    assert measured(model, notes) is None
    assert "no layer but those of the outputs" in notes[0]


def test_what_takes_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(sys.modules[own_metrics.__module__], "MOST_ROWS", 40)
    assert measured(network(), notes) is None
    assert notes[0].startswith("The units' own metrics were not looked at: that takes 48 gradients")


def test_what_has_no_exact_fisher_says_so() -> None:
    laplace = nm.FromDistribution(
        lambda f: torch.distributions.Independent(torch.distributions.Laplace(f, 1.0), 1)
    )
    notes: list[str] = []
    found = own_metrics(network(), laplace, inputs(), num_rows=48, num_parameters=83, notes=notes)
    assert found is None
    assert len(notes) == 1
