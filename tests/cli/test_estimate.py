"""`neuromanifold estimate`: error bars, exit codes, and a run that can be stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from neuromanifold.cli import app

TARGET = """
import time
import torch
from torch import nn
import neuromanifold as nm

torch.manual_seed(0)
x = torch.randn(60, 4)
model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


class Slow:
    def __init__(self, seconds):
        self.seconds = seconds

    def __iter__(self):
        for part in x.split(20):
            time.sleep(self.seconds)
            yield (part,)


def load():
    return model, nm.Categorical(), Slow(0.0)


def slow():
    return model, nm.Categorical(), Slow(0.1)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "job.py").write_text(TARGET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def run(*arguments: str):
    return CliRunner().invoke(app, ["estimate", *arguments])


@pytest.mark.parametrize(
    ("quantity", "rows"),
    [("trace", 1), ("layers", 2), ("diagonal", 4), ("entries", 4), ("eigenvalue", 1)],
)
def test_a_row_for_each_number(folder: Path, quantity: str, rows: int) -> None:
    result = run("job.py:load", "--quantity", quantity, "--rtol", "0.5")
    assert result.exit_code == 0, result.stderr
    assert sum(line.count("±") == 4 for line in result.stdout.splitlines()) == rows
    assert "60 inputs" in result.stdout


def test_json(folder: Path) -> None:
    result = run("job.py:load", "--rtol", "0.5", "--json")
    found = json.loads(result.stdout)
    assert found["reached"]
    assert set(found["errors"]) == {"data", "labels"}
    assert found["value"] > found["stderr"] > 0


def test_a_tolerance_that_these_inputs_cannot_give(folder: Path) -> None:
    result = run("job.py:load", "--rtol", "0.001")
    assert result.exit_code == 3
    assert "more than" in result.stderr
    assert "inputs would be needed" in result.stderr


def test_a_share_of_the_entries(folder: Path) -> None:
    few, all_ = (
        run("job.py:load", "--quantity", "entries", "--rtol", "0.6", "--quantile", share).exit_code
        for share in ("0.1", "1")
    )
    assert (few, all_) == (0, 3)


def test_bad_options(folder: Path) -> None:
    assert "rtol is a positive number" in run("job.py:load", "--rtol", "-1").stderr
    assert "goes with quantity" in run("job.py:load", "--quantile", "0.5").stderr
    assert run("job.py:load", "--quantity", "entropy").exit_code == 2


def test_a_stopped_run_goes_on(folder: Path) -> None:
    """SIGINT while it draws: the file is whole, and the end is that of a run without a stop."""
    arguments = ["--rtol", "0.3", "--json", "--quantity", "layers"]
    command = [sys.executable, "-m", "neuromanifold", "estimate", "job.py:slow", *arguments]
    stopped = subprocess.Popen(
        [*command, "--keep", "draws"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (folder / "draws").exists() and stopped.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    stopped.send_signal(signal.SIGINT)
    _, said = stopped.communicate(timeout=60)
    if stopped.returncode != 0:  # it may just have finished
        assert "the same command goes on" in said
    resumed = run("job.py:slow", *arguments, "--keep", "draws")
    plain = run("job.py:slow", *arguments)
    assert json.loads(resumed.stdout) == json.loads(plain.stdout)
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {"job.py", "draws"}
