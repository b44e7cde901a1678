"""Fisher matrices on disk: one safetensors file with a manifest; no pickle, no model, no data."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from neuromanifold._files import atomic_path
from neuromanifold.errors import StorageError
from neuromanifold.linalg import Layout
from neuromanifold.operators._base import FisherOperator, Origin
from neuromanifold.operators.coverage import Coverage

__all__ = ["load", "restore", "save", "storable", "under"]

VERSION = 1
# One key only: with several, safetensors writes them in an order that varies between runs.
KEY = "neuromanifold"

_KINDS: dict[str, Any] = {}
Operator = TypeVar("Operator", bound=type[FisherOperator])


def storable(kind: str) -> Callable[[Operator], Operator]:
    """Register an operator class, which has `_state` and `_restore`, under a name."""

    def register(operator: Operator) -> Operator:
        _KINDS[kind] = operator
        operator.storage_kind = kind  # type: ignore[attr-defined]
        return operator

    return register


def save(operator: FisherOperator, path: str | os.PathLike[str]) -> None:
    """Write an operator to `path`, completely or not at all."""
    state, tensors = operator._state()
    manifest = {
        "version": VERSION,
        "kind": operator.storage_kind,  # type: ignore[attr-defined]
        "shapes": {name: list(shape) for name, shape in operator.layout.shapes.items()},
        "order": list(operator.layout.names),
        "coverage": operator.coverage.to_list(),
        "origin": asdict(operator.origin),
        "state": state,
        "tensors": sorted(tensors),
    }
    # Clones: safetensors refuses views that share memory.
    distinct = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()
    }
    with atomic_path(path) as partial:
        save_file(distinct, partial, metadata={KEY: json.dumps(manifest, sort_keys=True)})


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> FisherOperator:
    """Read an operator written by `save`.

    Raises:
        FileNotFoundError: If there is no file.
        StorageError: If the file is truncated, foreign, or written by a newer version.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {os.fspath(path)!r}.")
    try:
        return _read(path, device)
    except StorageError:
        raise
    except SafetensorError as error:
        raise StorageError(
            f"{os.fspath(path)!r} is not a complete safetensors file ({error}). Was it truncated, "
            f"or written by something else than F.save(path)?"
        ) from error
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise StorageError(
            f"{os.fspath(path)!r} has a {KEY!r} manifest that makes no sense ({error!r}). Was it "
            f"written by something else than F.save(path)?"
        ) from error


def _read(path: str | os.PathLike[str], device: str | torch.device) -> FisherOperator:
    with safe_open(path, framework="pt", device=str(device)) as file:
        manifest = _manifest(file.metadata(), path)
        tensors = {name: file.get_tensor(name) for name in manifest["tensors"]}
    layout = Layout({name: tuple(manifest["shapes"][name]) for name in manifest["order"]})
    coverage = Coverage.from_list(manifest["coverage"])
    return restore(
        manifest["kind"], layout, coverage, manifest["origin"], manifest["state"], tensors
    )


def restore(
    kind: str,
    layout: Layout,
    coverage: Coverage,
    origin: dict[str, Any],
    state: dict[str, Any],
    tensors: dict[str, Tensor],
) -> FisherOperator:
    """An operator of a registered kind, out of what a manifest says of it."""
    known = Origin(**origin | {"notes": tuple(origin["notes"])})
    return _KINDS[kind]._restore(layout, coverage, known, state, tensors)


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix and a dot, without these."""
    start = f"{prefix}."
    return {
        name.removeprefix(start): tensor
        for name, tensor in tensors.items()
        if name.startswith(start)
    }


def _manifest(metadata: dict[str, str] | None, path: str | os.PathLike[str]) -> dict[str, Any]:
    if not metadata or KEY not in metadata:
        raise StorageError(
            f"{os.fspath(path)!r} is a safetensors file, but not a Fisher matrix: it has no "
            f"{KEY!r} manifest. Files are written by F.save(path)."
        )
    manifest: dict[str, Any] = json.loads(metadata[KEY])
    if manifest["version"] > VERSION or manifest["kind"] not in _KINDS:
        raise StorageError(
            f"{os.fspath(path)!r} was written by a newer version of neuromanifold (format "
            f"{manifest['version']}, kind {manifest['kind']!r}; this one reads format {VERSION}). "
            f"Upgrade with pip install -U neuromanifold."
        )
    return manifest
