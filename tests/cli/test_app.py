"""The commands as a user meets them: what they print, write, refuse, and leave behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import neuromanifold
from neuromanifold import _extras
from neuromanifold.cli import app

TARGET = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import neuromanifold as nm

print("said while loading")
x, y = torch.linspace(-1, 1, 40).reshape(10, 4), torch.arange(10) % 3
model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def pair():
    print("said while called")
    return model, nm.Categorical(), (x, y)


def loader():
    return model, nm.Categorical(), DataLoader(TensorDataset(x, y), batch_size=4)


class Off(nn.Module):
    def forward(self, x):
        return 0 * x


def flat():
    return nn.Sequential(nn.Linear(4, 3), Off()), nm.Categorical(), (x, y)


def wrong_width():
    return model, nm.Categorical(), (x[:, :3], y)


def needs_arguments(seed):
    return pair()


def breaks():
    raise KeyError("weights")


def leaves():
    raise SystemExit(3)


def interrupted():
    raise KeyboardInterrupt


def two():
    return model, nm.Categorical()


def no_model():
    return "resnet", nm.Categorical(), x


def a_loss():
    return model, nn.CrossEntropyLoss(), (x, y)


def bad_labels():
    return model, nm.Categorical(), (x, y + 1)


not_a_function = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder that holds `job.py` alone."""
    (tmp_path / "job.py").write_text(TARGET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"__pycache__"}


def test_version():
    assert run("--version").stdout == f"neuromanifold {neuromanifold.__version__}\n"


# ---- analyze ---------------------------------------------------------------------------------


def test_analyze_prints_tables_and_writes_the_page(folder):
    result = run("analyze", "job.py:pair")
    assert result.exit_code == 0, result.stderr
    for text in (
        "trainable parameters",
        "43",
        "trace",
        "unit-wise",
        "largest stable learning rate",
    ):
        assert text in result.stdout
    assert "job.py:pair" in (folder / "report.html").read_text()
    assert names(folder) == {"job.py", "report.html"}
    assert "Wrote report.html" in result.stderr


def test_json_is_all_there_is_on_stdout(folder):
    result = run("analyze", "job.py:pair", "--json")
    assert result.exit_code == 0, result.stderr
    [analysis] = json.loads(result.stdout, parse_constant=pytest.fail)  # no NaN, no Infinity
    assert analysis["name"] == "Sequential"
    assert analysis["num_samples"] == 10
    assert "said while loading" in result.stderr
    assert "said while called" in result.stderr
    assert names(folder) == {"job.py"}


def test_json_and_page_together(folder):
    result = run("analyze", "job.py:pair", "--json", "--out", "page.html")
    assert json.loads(result.stdout)
    assert names(folder) == {"job.py", "page.html"}


def test_a_model_whose_outputs_never_move(folder):
    result = run("analyze", "job.py:flat")
    assert result.exit_code == 0, result.stderr
    assert "learning rate" in result.stdout
    assert names(folder) == {"job.py", "report.html"}


def test_samples_cuts_across_batches(folder):
    cut = json.loads(run("analyze", "job.py:loader", "--json", "--samples", "6").stdout)
    assert cut[0]["num_samples"] == 6


def test_a_large_network_still_fits_on_a_screen(folder):
    (folder / "deep.py").write_text(
        "import torch, neuromanifold as nm\n"
        "from torch import nn\n"
        "def load():\n"
        "    inner = [nn.Linear(2, 2) for _ in range(50)]\n"
        "    model = nn.ModuleDict({'a_very_long_name_of_an_encoder': nn.Sequential(*inner)})\n"
        "    model.forward = lambda x: model['a_very_long_name_of_an_encoder'](x)\n"
        "    return model, nm.Gaussian(), torch.eye(2)\n"
    )
    result = run("analyze", "deep.py:load")
    assert result.exit_code == 0, result.stderr
    table = result.stdout.partition("layer by layer")[2]
    assert "20 more layers, with" in table
    assert "…" not in table
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert '"rule": "linear"' in run("analyze", "deep.py:load", "--json").stdout


def test_a_seed_gives_the_same_numbers(folder):
    first, second = (
        json.loads(run("analyze", "job.py:pair", "--json", "--seed", "5").stdout)[0]
        for _ in range(2)
    )
    assert first.pop("timing")
    assert second.pop("timing")
    assert first == second


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("job.py", "The target is FILE.PY:FUNCTION"),
        (":pair", "The target is FILE.PY:FUNCTION"),
        ("absent.py:pair", "There is no file 'absent.py'"),
        ("job.py:absent", "job.py has no function 'absent'. Its functions: pair, loader"),
        ("job.py:not_a_function", "has no function 'not_a_function'"),
        ("job.py:needs_arguments", "is called without arguments (missing a required argument"),
        ("job.py:breaks", "job.py:breaks raised KeyError: 'weights'"),
        ("job.py:leaves", "job.py:leaves raised SystemExit: 3"),
        ("job.py:two", "must return (model, likelihood, data); it returned a tuple of 2"),
        ("job.py:no_model", "its model is a str, not a torch.nn.Module"),
        ("job.py:a_loss", "its likelihood is a CrossEntropyLoss"),
        ("job.py:bad_labels", "Categorical"),
        ("broken.py:pair", "broken.py raised SyntaxError while it was being read"),
        ("lacking.py:pair", "No module named 'absent_module'\nInstall it"),
        ("leaving.py:pair", 'behind: if __name__ == "__main__"'),
        ("notes.txt:pair", "its name should end in .py"),
    ],
)
def test_a_target_that_will_not_do(folder, target, said):
    (folder / "broken.py").write_text("def pair(:\n")
    (folder / "lacking.py").write_text("import absent_module\n")
    (folder / "leaving.py").write_text("import sys\nsys.exit('usage: leaving.py WEIGHTS')\n")
    (folder / "notes.txt").write_text("pair\n")
    before = names(folder)
    result = run("analyze", target)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert names(folder) == before


def test_an_error_nobody_foresaw_names_its_type(folder):
    result = run("analyze", "job.py:wrong_width")
    assert result.exit_code == 1
    assert "RuntimeError: " in result.stderr
    assert "called with a torch.float32 tensor of shape (10, 3)" in result.stderr
    assert "--debug" in result.stderr


def test_debug_shows_the_traceback(folder):
    result = run("analyze", "job.py:breaks", "--debug")
    assert isinstance(result.exception, ValueError)
    assert isinstance(result.exception.__cause__, KeyError)


@pytest.mark.parametrize("arguments", [["--samples", "0"], ["--seed", "-1"], ["--out", "."]])
def test_options_out_of_range(folder, arguments):
    assert run("analyze", "job.py:pair", *arguments).exit_code == 2


def test_a_page_that_cannot_be_written_is_refused_before_the_work(folder):
    result = run("analyze", "job.py:pair", "--out", "absent/page.html")
    assert result.exit_code == 2
    assert "No folder absent" in result.stderr
    assert "said while loading" not in result.stderr


@pytest.mark.parametrize(("command", "extra"), [("analyze", "report"), ("demo", "demo")])
def test_a_missing_extra_names_its_install_command(folder, monkeypatch, command, extra):
    monkeypatch.setattr(_extras, "find_spec", lambda _: None)
    target = ["job.py:pair"] if command == "analyze" else ["--json"]
    result = run(command, *target)
    assert result.exit_code == 2
    assert f"pip install 'neuromanifold[{extra}]'" in result.stderr


# ---- what is left behind ---------------------------------------------------------------------


def test_ctrl_c_leaves_nothing(folder):
    result = run("analyze", "job.py:interrupted")
    assert result.exit_code == 130
    assert names(folder) == {"job.py"}


def test_ctrl_c_while_writing_leaves_the_old_page(folder, monkeypatch):
    (folder / "report.html").write_text("old")

    def write_half(path: Path, text: str, **_: object) -> None:
        path.write_bytes(text[: len(text) // 2].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", write_half)
    assert run("analyze", "job.py:pair").exit_code == 130
    assert (folder / "report.html").read_text() == "old"
    assert names(folder) == {"job.py", "report.html"}


# ---- demo ------------------------------------------------------------------------------------


def test_demo_trains_measures_and_reports(folder):
    arguments = ("--json", "--epochs", "2", "--samples", "16", "--out", "digits.html")
    result = run("demo", *arguments)
    assert result.exit_code == 0, result.stderr
    conv, mlp = json.loads(result.stdout, parse_constant=pytest.fail)
    assert (conv["name"], mlp["name"]) == ("conv net", "MLP")
    assert [layer["name"] for layer in conv["layers"]] == ["conv1", "conv2", "head"]
    assert [layer["name"] for layer in mlp["layers"]] == ["hidden1", "hidden2", "head"]
    for analysis in (conv, mlp):
        assert analysis["num_samples"] == 16
        first, second = analysis["training"]["loss"]
        assert second < first
    page = (folder / "digits.html").read_text()
    assert "conv net" in page
    assert "MLP" in page
