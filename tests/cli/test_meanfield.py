"""`neuromanifold meanfield`: random networks, the user's own, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from neuromanifold.cli import app

TARGET = """
import torch
from torch import nn
import neuromanifold as nm


def load():
    print("said while loading")
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    return model, nm.Categorical(), torch.randn(20, 6)


def normed():
    model = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.ReLU(), nn.Linear(9, 3))
    return model, nm.Categorical(), torch.randn(20, 6)
"""
SMALL = ("--width", "12", "--depth", "3", "--samples", "3", "--seeds", "2")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(TARGET, encoding="utf-8")

    def command(*options: str):
        return CliRunner().invoke(app, ["meanfield", *options])

    return command


def study(run, *options: str):
    result = run("--json", *options)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_random_networks_get_tables_a_verdict_and_a_page(run):
    result = run(*SMALL, "--depth", "20", "--activation", "erf")
    assert result.exit_code == 0, result.stderr
    for words in (
        "erf, 20 layers: predicted / measured",
        "learning-rate bound 2/λmax",
        "ordered phase",
        "raise weight variance",
        "Recommended: weights of variance",
    ):
        assert words in result.stdout
    assert "Drawing 2 random networks of 20 layers" in result.stderr
    assert "Drawing" not in result.stdout
    assert "Order or chaos?" in Path("report.html").read_text(encoding="utf-8")


def test_very_deep_networks_are_shown_at_both_ends(run):
    result = run(*SMALL, "--depth", "40", "--activation", "relu", "--init", "kaiming")
    assert "10 layers between them are in the page" in " ".join(result.stdout.split())


def test_json_is_one_document_and_writes_no_page(run):
    found = study(run, *SMALL, "--activation", "relu", "--seed", "7")
    assert found["kind"] == "neuromanifold.meanfield"
    assert found["seeds"] == [7, 8]
    assert found["samples"] == 3
    assert [layer["fan_in"] for layer in found["layers"]] == [12, 12, 12]
    assert not Path("report.html").exists()


@pytest.mark.parametrize(
    ("options", "weight", "bias"),
    [
        ((), 1 / 3, 1 / 36),
        (("--init", "xavier"), 1.0, 0.0),
        (("--init", "kaiming"), 2.0, 0.0),
        (("--init", "critical"), 2.0, 0.0),
        (("--init", "kaiming", "--bias-variance", "0.1"), 2.0, 0.1),
        (("--weight-variance", "1.5"), 1.5, 0.0),
    ],
)
def test_initialisations(run, options, weight, bias):
    found = study(run, *SMALL, "--activation", "relu", *options)
    assert found["weight_variance"] == pytest.approx(weight)
    assert found["bias_variance"] == pytest.approx(bias)


def test_a_model_of_the_users_own(run):
    result = run("net.py:load")
    assert result.exit_code == 0, result.stderr
    assert "Sequential: predicted / measured" in result.stdout
    assert "said while loading" in result.stderr
    assert "one network, 20 samples" in result.stdout
    assert Path("report.html").exists()


def test_what_is_not_in_the_theory_is_said(run):
    assert "Not in the theory" in run("net.py:normed", "--samples", "5").stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("net.py:load", "--depth", "3"), "--depth describe random networks"),
        (("--weight-variance", "1", "--init", "xavier"), "both set the weights"),
        (("--weight-variance", "-1"), "--weight-variance is a variance"),
        (("--bias-variance", "nan"), "--bias-variance is a variance"),
        (("--activation", "tahn"), "No activation is called 'tahn'"),
        (("--out", "nowhere/report.html"), "No folder nowhere"),
    ],
)
def test_what_can_be_mended_is_said_in_words(run, options, words):
    result = run(*options)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
