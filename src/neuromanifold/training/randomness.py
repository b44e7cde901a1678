"""The random states of a process: set at the start of an epoch, kept in checkpoints."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["restore", "seed_epoch", "states"]

EPOCHS_PER_SEED = 1_000_003
"""A number that no training has more epochs than: seeds of different runs do not meet."""


def seed_epoch(data: Any, seed: int, epoch: int) -> None:
    """Seed everything that batches may be drawn from, by the epoch alone.

    So the order of batches does not depend on what an optimizer, dropout or an evaluation drew
    before.

    Args:
        data: whose own generator, as a loader may have one, is seeded too.
        seed: of the run.
        epoch: from 0.
    """
    own = seed * EPOCHS_PER_SEED + epoch
    torch.manual_seed(own)
    random.seed(own)
    np.random.seed(own % 2**32)
    for holder in (data, getattr(data, "sampler", None)):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(own)


def states() -> dict[str, Any]:
    """All states, as plain numbers and tensors."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
    }


def restore(found: Mapping[str, Any]) -> None:
    """The inverse of `states`."""
    torch.set_rng_state(found["torch"].cpu())
    if found["cuda"]:
        torch.cuda.set_rng_state_all([state.cpu() for state in found["cuda"]])
    version, internal, gauss = found["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = found["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
