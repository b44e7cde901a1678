"""Moving averages of the sums that a structure is made of.

Sums and the count that they are divided by decay alike, so that the mean is right from the first
measurement on, whatever the sizes of the batches: bias correction is the division.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

from neuromanifold.linalg.packed import WORTH_IT, pack, unpack

__all__ = ["RunningSums"]

Sums = Mapping[str, Mapping[str, Tensor]]

PACKED = "packed:"
"""Before the names of symmetric matrices, of which half is kept."""


class RunningSums:
    """Exponentially weighted sums of statistics by block, and of what normalises them.

    Attributes:
        sums: by block, then by statistic.
        counts: by block, of samples (or positions); a block that is new has a count of its own.
    """

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, Tensor]] = {}
        self.counts: dict[str, float] = {}

    def add(
        self,
        sums: Sums,
        count: float,
        decay: float,
        symmetric: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        """Let what was decay, and add a measurement.

        A block whose statistics have changed their shapes starts anew.

        Args:
            sums: of the measurement; of all blocks that there are now.
            count: samples, or positions.
            decay: of the old sums, in [0, 1).
            symmetric: which statistics of a block are symmetric matrices, by the last part of
                their name.
        """
        sums = {
            name: _packed(statistics, (symmetric or {}).get(name, ()))
            for name, statistics in sums.items()
        }
        for name in self.sums.keys() - sums.keys():  # frozen since
            del self.sums[name], self.counts[name]
        for name, new in sums.items():
            old = self.sums.get(name)
            if old is None or _shapes(old) != _shapes(new):
                # Numbers of uses, which are whole at first, decay as precisely as what they divide.
                dtype = _widest(new)
                self.sums[name] = {
                    key: value if value.is_floating_point() else value.to(dtype)
                    for key, value in new.items()
                }
                self.counts[name] = float(count)
                continue
            for key, value in new.items():
                old[key].mul_(decay).add_(value)
            self.counts[name] = decay * self.counts[name] + count

    def copy(self, name: str) -> dict[str, Tensor]:
        """The sums of a block, to be written over."""
        return {
            key.removeprefix(PACKED): unpack(value) if key.startswith(PACKED) else value.clone()
            for key, value in self.sums[name].items()
        }

    def state_dict(self) -> dict[str, object]:
        """Tensors and numbers, by name."""
        return {
            "sums": {name: dict(kept) for name, kept in self.sums.items()},
            "counts": {**self.counts},
        }

    def load_state_dict(
        self, state: Mapping[str, Mapping[str, object]], device: torch.device
    ) -> None:
        """The inverse of `state_dict`."""
        self.sums = {
            name: {key: value.detach().to(device, copy=True) for key, value in kept.items()}  # type: ignore[attr-defined]
            for name, kept in state["sums"].items()
        }
        self.counts = {name: float(count) for name, count in state["counts"].items()}  # type: ignore[arg-type]


def _packed(statistics: Mapping[str, Tensor], symmetric: tuple[str, ...]) -> dict[str, Tensor]:
    """With the halves of wide symmetric matrices; one kept by its diagonal has fewer axes."""
    found = {}
    for key, value in statistics.items():
        wide = value.ndim >= 3 and value.shape[-1] >= WORTH_IT
        if wide and key.rpartition(".")[2] in symmetric:
            found[PACKED + key] = pack(value)
        else:
            found[key] = value
    return found


def _shapes(statistics: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in statistics.items()}


def _widest(statistics: Mapping[str, Tensor]) -> torch.dtype:
    floating = (value.dtype for value in statistics.values() if value.is_floating_point())
    return reduce(torch.promote_types, floating, torch.float32)
