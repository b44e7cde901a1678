"""Files: complete or absent, readable without the model, and refused when they are not ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import neuromanifold as nm
from neuromanifold.errors import StorageError, UnsupportedError
from neuromanifold.operators.storage import KEY, VERSION
from neuromanifold.structures import Structure

STRUCTURES = [
    nm.Dense(),
    nm.BlockDiagonal(),
    nm.UnitWise(),
    nm.QuasiDiagonal(),
    nm.Diagonal(),
    nm.Kronecker("reduce"),
    nm.Kronecker(inputs=nm.Full(widest=7)),
    nm.EigenKronecker(),
    nm.LowRank(5),
    nm.Gram(),
    nm.structures.per_layer({"0": nm.LowRank(3), "*": nm.EigenKronecker("reduce")}),
]


def measure(structure: Structure, dtype: torch.dtype = torch.float64) -> nm.FisherOperator:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, 6, generator=generator).to(dtype)
    model = nn.Sequential(nn.Conv1d(2, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)).to(dtype)
    batches = [(x[:3], None), (x[3:], None)]
    return nm.fisher(model, nm.Gaussian(), batches, structure, estimator=nm.Exact())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_round_trip(tmp_path: Path, structure: Structure, dtype: torch.dtype) -> None:
    F = measure(structure, dtype)
    F.save(tmp_path / "f")
    loaded = nm.load(tmp_path / "f")
    assert type(loaded) is type(F)
    assert repr(loaded) == repr(F)
    assert loaded.layout == F.layout
    assert loaded.coverage == F.coverage
    assert loaded.origin == F.origin
    v = torch.linspace(-1, 1, F.num_parameters, dtype=dtype)
    # Products of the same numbers may round differently in other memory.
    close = {"rtol": 0.0, "atol": 1e3 * torch.finfo(dtype).eps}
    assert torch.allclose(loaded._diagonal(), F._diagonal(), **close)
    assert torch.allclose(loaded @ v, F @ v, **close)
    assert torch.allclose(loaded.solve(v, damping=1.0), F.solve(v, damping=1.0), **close)
    assert torch.allclose((loaded + F).to_dense(), (F + F).to_dense(), **close)
    assert loaded.restrict(["0.bias"]).shape == (2, 2)


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_the_same_matrix_is_the_same_file(tmp_path: Path, structure: Structure) -> None:
    F = measure(structure)
    F.save(tmp_path / "one")
    nm.load(tmp_path / "one").save(str(tmp_path / "two"))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_loads_in_a_process_that_has_no_model(tmp_path: Path) -> None:
    F = measure(nm.Kronecker())
    F.save(tmp_path / "f")
    code = "import sys, neuromanifold as nm; print(repr(nm.load(sys.argv[1]).trace().item()))"
    shown = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "f"], capture_output=True, text=True, check=True
    )
    assert float(shown.stdout) == F.trace().item()


def test_a_file_is_replaced_at_once(tmp_path: Path) -> None:
    small, large = measure(nm.Diagonal()), measure(nm.Dense())
    small.save(tmp_path / "f")
    large.save(tmp_path / "f")
    assert torch.equal(nm.load(tmp_path / "f").to_dense(), large.to_dense())
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_failed_save_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    F = measure(nm.Diagonal())
    F.save(tmp_path / "f")

    def full(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("neuromanifold.operators.storage.save_file", full)
    with pytest.raises(OSError, match="no space"):
        measure(nm.Dense()).save(tmp_path / "f")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert torch.equal(nm.load(tmp_path / "f").to_dense(), F.to_dense())


def test_save_into_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Create it first"):
        measure(nm.Diagonal()).save(tmp_path / "no" / "f")
    assert not list(tmp_path.iterdir())


def test_implicit_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"no exact stored form.*nm.Kronecker\(\)"):
        measure(nm.Implicit()).save(tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_load_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        nm.load(tmp_path / "f")
    with pytest.raises(FileNotFoundError, match="no file"):
        nm.load(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_load_a_truncated_file(tmp_path: Path, kept: int) -> None:
    measure(nm.Kronecker()).save(tmp_path / "whole")
    (tmp_path / "part").write_bytes((tmp_path / "whole").read_bytes()[:kept])
    with pytest.raises(StorageError, match="truncated"):
        nm.load(tmp_path / "part")


def test_load_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a text of some length, which is no safetensors file")
    with pytest.raises(StorageError, match="not a complete safetensors file"):
        nm.load(tmp_path / "text")
    save_file({"weight": torch.ones(2)}, tmp_path / "weights")
    with pytest.raises(StorageError, match="not a Fisher matrix"):
        nm.load(tmp_path / "weights")


@pytest.mark.parametrize("change", [{"version": VERSION + 1}, {"kind": "hologram"}])
def test_load_a_file_of_the_future(tmp_path: Path, change: dict[str, object]) -> None:
    manifest = {"version": VERSION, "kind": "blocks", "tensors": ["x"]} | change
    save_file({"x": torch.ones(1)}, tmp_path / "f", metadata={KEY: json.dumps(manifest)})
    with pytest.raises(StorageError, match=r"newer version.*Upgrade"):
        nm.load(tmp_path / "f")
