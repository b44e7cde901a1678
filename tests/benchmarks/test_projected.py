"""The parts of the comparison of projected K-FAC, each by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import projected


def test_a_part_replaces_its_own_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projected, "RESULTS", tmp_path)
    projected.store("digits", {"ends": [1]})
    projected.store("recursion", {"streams": [2]})
    projected.store("digits", {"ends": [3]})
    stored = json.loads((tmp_path / "projected.json").read_text())
    assert stored == {"digits": {"ends": [3]}, "recursion": {"streams": [2]}}


def test_an_inverse_that_follows_stays_right() -> None:
    row = projected.recursion("never inverted", measurements=60)
    assert row["measurements"] == 60
    assert row["inversions"] == 1
    assert row["renewed/residual"] == 0
    assert 0 < row["residual"] <= projected.RESIDUAL < row["residual_with_damping_asked_for"] < 0.5
