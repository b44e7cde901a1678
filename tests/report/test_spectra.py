"""The chart of a spectrum along training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neuromanifold as nm
from neuromanifold.spectral import Measured


def measured(step: int, error: float = 0.0) -> Measured:
    values = {"trace": 4.0 + step, "trace/0": 3.0, "trace/2": 1.0 + step, "stable_rank": 2.0}
    return Measured(step, 0.1, values, dict.fromkeys(values, error), "all eigenvalues")


def rows(chart, panel):
    whole = chart.to_dict()
    part = whole["concat"][panel]
    holder = next(each for each in (part["layer"][0], part, whole) if "data" in each)
    return holder["data"]["values"]


def test_each_number_has_a_panel_and_each_layer_a_line():
    chart = nm.report.spectra_chart([measured(0), measured(5)], ["trace", "stable_rank"])
    assert len(chart.concat) == 2
    assert {(row["layer"], row["step"]): row["value"] for row in rows(chart, 0)} == {
        ("all", 0): 4.0, ("0", 0): 3.0, ("2", 0): 1.0,
        ("all", 5): 9.0, ("0", 5): 3.0, ("2", 5): 6.0,
    }  # fmt: skip
    assert len(chart.to_dict()["concat"][0]["layer"]) == 1  # exact: no band


def test_estimates_have_a_band_of_95_percent():
    chart = nm.report.spectra_chart([measured(0, error=0.1)], ["stable_rank"])
    assert len(chart.to_dict()["concat"][0]["layer"]) == 2
    (row,) = rows(chart, 0)
    assert (row["low"], row["high"]) == pytest.approx((2 - 0.196, 2 + 0.196), abs=1e-4)


def test_of_a_monitor_as_a_page_without_the_network(tmp_path):
    monitor = nm.spectral.Monitor(nn.Linear(3, 2), nm.Categorical(), torch.randn(6, 3))
    monitor.measure()
    path = tmp_path / "spectra.html"
    nm.report.spectra_chart(monitor.history).save(str(path), inline=True)
    assert "largest eigenvalue" in path.read_text()
    assert "<script src=" not in path.read_text()


def test_what_is_not_there():
    with pytest.raises(ValueError, match="Nothing was measured yet"):
        nm.report.spectra_chart([])
    with pytest.raises(ValueError, match=r"among \['trace', 'stable_rank'\]; got \['tracee'\]"):
        nm.report.spectra_chart([measured(0)], ["tracee"])
