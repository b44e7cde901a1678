"""Files that keep the draws of an estimate, and what draws must have in common to share one."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from neuromanifold._estimation.state import State
from neuromanifold._files import atomic_path
from neuromanifold.capture import Batch, Data
from neuromanifold.errors import StorageError
from neuromanifold.linalg import Vector
from neuromanifold.structures import Source

__all__ = ["Keep", "fingerprint"]

VERSION = 1
KEY = "neuromanifold.estimate"
PREPARED = "prepared."


@dataclass(frozen=True)
class Keep:
    """A file for the draws of one request.

    Attributes:
        path: where it is, or will be.
        request: its fingerprint.
    """

    path: Path
    request: dict[str, Any]

    def write(self, state: State, prepared: dict[str, Tensor]) -> None:
        """Replace what is kept: the state, and what was found before the first draw."""
        entries = {field.name: getattr(state, field.name) for field in fields(state)}
        tensors = {k: v.cpu().clone() for k, v in entries.items() if isinstance(v, Tensor)}
        tensors |= {f"{PREPARED}{k}": v.cpu().contiguous() for k, v in prepared.items()}
        counts = {k: v for k, v in entries.items() if not isinstance(v, Tensor)}
        manifest = {"version": VERSION, "request": self.request, "counts": counts}
        with atomic_path(self.path) as partial:
            save_file(tensors, partial, metadata={KEY: json.dumps(manifest, sort_keys=True)})

    def read(self, device: torch.device) -> tuple[State, dict[str, Tensor]] | None:
        """What is kept, on a device; None if there is no file.

        Raises:
            StorageError: If it is of another request, or no file of this kind.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                manifest = json.loads((file.metadata() or {})[KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError) as error:
            raise StorageError(
                f"{os.fspath(self.path)!r} was not written by nm.estimate(..., path=...), or is "
                f"damaged ({error}). Give another path, or delete it."
            ) from error
        if manifest["version"] > VERSION:
            raise StorageError(
                f"{os.fspath(self.path)!r} was written by a newer version of neuromanifold. "
                f"Upgrade with pip install -U neuromanifold."
            )
        kept = manifest["request"]
        differing = [key for key, value in self.request.items() if kept.get(key) != value]
        if differing:
            raise StorageError(
                f"{os.fspath(self.path)!r} keeps the draws of another request: {differing} differ. "
                f"Give another path, or what it was written for."
            )
        generator = tensors.pop("generator")
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        prepared = {
            name.removeprefix(PREPARED): tensors.pop(name)
            for name in list(tensors)
            if name.startswith(PREPARED)
        }
        return State(**tensors, generator=generator, **manifest["counts"]), prepared


def fingerprint(
    source: Source, data: Data, batch: Batch, quantity: str, vector: Vector | None
) -> dict[str, Any]:
    """What draws must have in common to be put together; the tolerance is free."""
    model = source.plan.model
    return {
        "quantity": quantity,
        "likelihood": _written(source.likelihood),
        "estimator": _written(source.estimator),
        "params": _digest(list(source.plan.layout.shapes.items())),
        "model": _digest(dict(chain(model.named_parameters(), model.named_buffers()))),
        "mode": _digest([module.training for module in model.modules()]),
        "forward": _written(source.forward),
        "data": None if data.shuffles else _digest(asdict(batch)),
        "vector": None if vector is None else _digest(source.plan.layout.rows(vector)[0]),
    }


def _written(value: Any) -> str:
    """As it is written, without addresses in memory, which another process has elsewhere."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _digest(tree: Any) -> str:
    digest = hashlib.sha256()
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            flat = leaf.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
        else:
            digest.update(_written(leaf).encode())
    return digest.hexdigest()[:16]
