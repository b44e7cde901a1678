"""`neuromanifold train`: comparisons, checkpoints, Ctrl-C, and runs that go on."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from neuromanifold.cli import app

TARGET = """
import os
import signal
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import neuromanifold as nm

generator = torch.Generator().manual_seed(0)
x = torch.randn(70, 4, generator=generator)
y = (x @ torch.randn(4, 3, generator=generator)).argmax(1)
train, test = (x[:50], y[:50]), (x[50:], y[50:])
print("said while loading")


class Net(nn.Sequential):
    calls = 0

    def forward(self, x):
        if self.training:
            Net.calls += 1
            if str(Net.calls) == os.environ.get("STOP_AT"):
                signal.raise_signal(signal.SIGINT)
        return super().forward(x)


def net():
    return Net(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))


def pair():
    return net(), nm.Categorical(), train, test


def loader():
    return net(), nm.Categorical(), DataLoader(TensorDataset(*train), 16, shuffle=True), test


def own_generator():
    loader = DataLoader(TensorDataset(*train), 16, shuffle=True, generator=torch.Generator())
    return net(), nm.Categorical(), loader, test


def without_test():
    return net(), nm.Categorical(), train


def regression():
    return nn.Linear(4, 1), nm.Gaussian(), (x, x.sum(1, keepdim=True))


def rows():
    return nn.Linear(4, 3), nm.Categorical(), (x[:60], y[:60])


def sequences():
    return nn.Linear(4, 3), nm.Categorical(), (x[:60].reshape(12, 5, 4), y[:60].reshape(12, 5))


def broken_sample():
    bad = x.clone()
    bad[3] = float("nan")
    return nn.Linear(4, 3), nm.Categorical(), (bad, y), test


def other():
    return nn.Linear(4, 3), nm.Categorical(), train, test


def no_targets():
    return nn.Linear(4, 3), nm.Categorical(), x


def used_up():
    return nn.Linear(4, 3), nm.Categorical(), iter([train])


def five():
    return 1, 2, 3, 4, 5
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "job.py").write_text(TARGET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("STOP_AT", raising=False)
    return tmp_path


def train(target: str, *arguments: str, stop_at: int | None = None):
    if stop_at is not None:
        os.environ["STOP_AT"] = str(stop_at)
    try:
        return CliRunner().invoke(app, ["train", f"job.py:{target}", *arguments])
    finally:
        os.environ.pop("STOP_AT", None)


def result(target: str, *arguments: str) -> dict:
    done = train(target, *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout, parse_constant=pytest.fail)


BOTH = ("--optimizer", "kfac", "--optimizer", "adamw:0.01", "--epochs", "2", "--batch-size", "16")


def test_a_comparison_on_the_terminal_and_as_a_page(folder: Path) -> None:
    done = train("pair", *BOTH)
    assert done.exit_code == 0, done.stderr
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {"job.py", "report.html"}
    assert "adamw:0.01 " in done.stdout
    assert "in one run of each" in " ".join(done.stdout.split())
    assert "said while loading" in done.stderr
    page = (folder / "report.html").read_text()
    assert "Training job.py:pair" in page
    assert "Who learns fastest by the clock?" in page


def test_what_a_run_holds(folder: Path) -> None:
    found = result("pair", *BOTH)
    natural, plain = found["runs"]
    assert (found["samples_per_epoch"], found["steps_per_epoch"]) == (50, 4)
    for run in (natural, plain):
        assert run["steps"] == 8
        assert [entry["step"] for entry in run["history"]] == [0, 4, 8]
        assert run["test_loss"] == run["history"][-1]["loss"]
        assert 0 <= run["test_accuracy"] <= 1
        assert sorted(point["seconds"] for point in run["curve"])[-1] == run["seconds"]
    assert (natural["lr"], plain["lr"]) == (0.15, 0.01)
    assert not plain["scalars"]
    assert natural["scalars"][-1].keys() >= {"kl", "damping", "curvature_share", "trace/0"}


def test_all_begin_with_the_same_weights_and_see_the_same_batches(folder: Path) -> None:
    natural, plain = result("pair", *BOTH)["runs"]
    assert natural["history"][0]["loss"] == plain["history"][0]["loss"]
    # Before the first step, on the first batch, through the same dropout.
    assert natural["curve"][0]["loss"] == plain["curve"][0]["loss"]


def test_each_seed_has_its_own_start(folder: Path) -> None:
    runs = result("pair", "--epochs", "1", "--seeds", "2", "--seed", "5")["runs"]
    assert [run["seed"] for run in runs] == [5, 6]
    assert runs[0]["history"][0]["loss"] != runs[1]["history"][0]["loss"]
    [again] = result("pair", "--epochs", "1", "--seed", "6")["runs"]
    assert without_times(again) == without_times(runs[1])


def test_without_test_data_the_training_loss_counts(folder: Path) -> None:
    found = result("without_test", *BOTH)
    assert not found["has_test"]
    assert found["runs"][0]["test_loss"] is None
    assert found["runs"][0]["train_loss"] == found["runs"][0]["history"][-1]["loss"]
    assert "with a train loss of" in train("without_test", *BOTH).stdout


def test_the_mean_over_positions_is_minimised(folder: Path) -> None:
    """So that a learning rate means the same for sequences of any length."""
    whole = ["--optimizer", "sgd", "--batch-size", "60"]
    (rows,), (sequences,) = (result(of, *whole)["runs"] for of in ("rows", "sequences"))
    assert sequences["train_loss"] == pytest.approx(5 * rows["train_loss"], rel=1e-5)
    assert sequences["train_accuracy"] == rows["train_accuracy"]


def test_targets_that_are_no_classes_have_no_accuracy(folder: Path) -> None:
    [run] = result("regression", "--epochs", "1")["runs"]
    assert run["train_accuracy"] is None
    assert run["train_loss"] > 0


# ---- going on --------------------------------------------------------------------------------


def without_times(value):
    """All numbers that do not depend on a clock."""
    timed = ("seconds", "curvature_seconds", "curvature_share")
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in timed}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state"]["model"]


@pytest.mark.parametrize(
    ("target", "optimizer", "stop_at"),
    [
        ("pair", "kfac", 4),
        ("pair", "ekfac", 11),
        ("pair", "gram", 10),
        ("pair", "adamw", 7),
        ("loader", "kfac", 9),
        ("loader", "sgd", 3),
        ("own_generator", "kfac", 12),
    ],
)
def test_a_stopped_run_that_goes_on_equals_one_that_never_stopped(
    folder: Path, target: str, optimizer: str, stop_at: int
) -> None:
    options = ("--optimizer", optimizer, "--epochs", "3", "--batch-size", "16", "--json")
    stopped = train(target, *options, "--checkpoint", "kept", stop_at=stop_at)
    assert stopped.exit_code == 130
    assert "with --resume goes on from kept" in stopped.stderr
    assert stopped.stdout == ""
    name = f"{optimizer}-seed0.pt"
    state = torch.load(folder / "kept" / name, weights_only=True)["state"]
    assert 0 < len(state["losses"]) < 12
    resumed = result(target, *options, "--checkpoint", "kept", "--resume")
    whole = result(target, *options, "--checkpoint", "whole")
    assert without_times(resumed) == without_times(whole)
    for key, value in weights(folder / "whole" / name).items():
        assert torch.equal(weights(folder / "kept" / name)[key], value)


def test_ctrl_c_loses_no_finished_step_and_leaves_the_signal_as_it_was(folder: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    # The warm-up calls the model once: this is the third of its minibatches.
    options = ("--optimizer", "adamw", "--batch-size", "16", "--checkpoint", "kept")
    assert train("pair", *options, stop_at=4).exit_code == 130
    state = torch.load(folder / "kept" / "adamw-seed0.pt", weights_only=True)["state"]
    assert (state["epoch"], state["done"]) == (0, 3)
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in (folder / "kept").iterdir()] == ["adamw-seed0.pt"]


def test_ctrl_c_without_checkpoints(folder: Path) -> None:
    stopped = train("pair", stop_at=3)
    assert stopped.exit_code == 130
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {"job.py"}


def test_more_epochs_of_a_finished_run(folder: Path) -> None:
    result("pair", "--epochs", "1", "--checkpoint", "kept")
    longer = result("pair", "--epochs", "2", "--checkpoint", "kept", "--resume")["runs"][0]
    whole = result("pair", "--epochs", "2")["runs"][0]
    for name in ("test_loss", "train_loss", "history"):
        assert without_times(longer[name]) == without_times(whole[name])


def test_optimizers_join_a_comparison_that_was_made(folder: Path) -> None:
    first = result("pair", "--optimizer", "sgd", "--epochs", "1", "--checkpoint", "kept")
    options = ("--optimizer", "sgd", "--optimizer", "adamw", "--epochs", "1")
    both = result("pair", *options, "--checkpoint", "kept", "--resume")
    assert both["runs"][0] == first["runs"][0]
    assert [run["optimizer"] for run in both["runs"]] == ["sgd", "adamw"]


# ---- what goes wrong -------------------------------------------------------------------------


def test_losses_that_are_not_finite_are_reported(folder: Path) -> None:
    options = ("--epochs", "3", "--batch-size", "16", "--seed", "1")
    found = result("broken_sample", "--optimizer", "sgd", "--optimizer", "kfac", *options)
    lost, kept = found["runs"]
    assert lost["diverged"]
    assert lost["epochs"] == 1
    assert lost["test_loss"] is None
    assert lost["non_finite"]["count"] > 0
    # Steps with NaN in their gradients are left out by natural gradients.
    assert not kept["diverged"]
    assert kept["non_finite"]["count"] == 3
    assert kept["test_loss"] > 0
    assert any("sgd, seed 1: stopped after epoch 1" in line for line in found["notes"])
    assert any("kfac, seed 1: 3 of 15 losses were NaN" in line for line in found["notes"])
    said = train("broken_sample", "--optimizer", "sgd", "--epochs", "1")
    assert said.exit_code == 0
    assert "NaN or infinite" in said.stdout
    assert "No optimizer ended at a finite test loss" in said.stdout
    assert "NaN or infinite" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("target", "arguments", "said"),
    [
        ("pair", ["--optimizer", "adam"], "no optimizer 'adam'. There are: kfac, projected"),
        ("pair", ["--optimizer", "kfac:fast"], "positive number, as in kfac:0.1; got 'fast'"),
        ("pair", ["--lr", "-1"], "positive number"),
        ("pair", ["--optimizer", "kfac", "--optimizer", "kfac"], "can take part once"),
        ("pair", ["--resume"], "--checkpoint FOLDER"),
        ("pair", ["--damping", "0"], "damping is a positive number"),
        ("no_targets", [], "Training needs targets"),
        ("used_up", [], "Pass a DataLoader or a list of batches"),
        ("five", [], "(model, likelihood, data[, test]); it returned a tuple of 5"),
    ],
)
def test_what_is_refused(folder: Path, target: str, arguments: list[str], said: str) -> None:
    done = train(target, *arguments)
    assert done.exit_code == 2, done.stderr
    assert said in done.stderr
    assert done.stdout == ""


def test_checkpoints_that_do_not_fit(folder: Path) -> None:
    options = ("--epochs", "1", "--checkpoint", "kept")
    result("pair", *options)
    assert "has checkpoints already (kfac-seed0.pt)" in train("pair", *options).stderr
    again = (*options, "--resume")
    assert "batch_size 64 (now 8)" in train("pair", *again, "--batch-size", "8").stderr
    assert "is of another model" in train("other", *again).stderr
    file = folder / "kept" / "kfac-seed0.pt"
    file.write_bytes(file.read_bytes()[:1000])
    broken = train("pair", *again)
    assert broken.exit_code == 2
    assert "is not a checkpoint of neuromanifold train" in broken.stderr
