"""Checkpoints: one file for each run, whole or not there at all."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from neuromanifold._files import atomic_path
from neuromanifold.errors import StorageError

__all__ = ["read", "write"]

_KIND, _VERSION = "neuromanifold.training", 1


def write(path: Path, settings: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Replace the checkpoint at once.

    Args:
        path: of the file, in a folder that exists.
        settings: plain values that a run must share with the one that goes on.
        state: plain containers, numbers and tensors.
    """
    content = {"kind": _KIND, "version": _VERSION, "settings": {**settings}, "state": {**state}}
    with atomic_path(path) as partial:
        torch.save(content, partial)


def read(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The state in a checkpoint; nothing that it holds is run.

    Raises:
        StorageError: If the file is no checkpoint of this version.
        ValueError: If it was written with other settings.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        written = content["kind"], content["version"]
    except (RuntimeError, pickle.UnpicklingError, KeyError, TypeError, EOFError) as error:
        raise StorageError(
            f"{path} is not a checkpoint of neuromanifold train ({error}). Move it away, or give "
            f"another folder."
        ) from error
    if written != (_KIND, _VERSION):
        raise StorageError(
            f"{path} holds {written[0]!r} of version {written[1]!r}, expected {_KIND!r} and "
            f"{_VERSION}. Give another folder."
        )
    kept = content["settings"]
    differing = [name for name in settings if kept.get(name) != settings[name]]
    if differing:
        said = ", ".join(f"{name} {kept.get(name)} (now {settings[name]})" for name in differing)
        raise ValueError(
            f"{path} was trained with {said}. Go on with the same, or give another folder."
        )
    found: dict[str, Any] = content["state"]
    return found
