"""Minibatches of an epoch, whatever kind of data came in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from neuromanifold.capture import Batch, Data
from neuromanifold.errors import UnsupportedError

__all__ = ["Minibatches"]


class Minibatches:
    """Batches with targets, drawn anew in each epoch.

    A tensor pair or a mapping is cut into minibatches in random order; batches of a loader or a
    list come as they are.

    Args:
        data: what `nm.fisher` takes, with targets.
        model: whose convention labels follow.
        size: samples in a minibatch.

    Raises:
        UnsupportedError: If the data have no targets, or can be read only once.
    """

    def __init__(self, data: Any, model: nn.Module, size: int) -> None:
        self.source = data
        self._data = Data(data, model)
        self._data.require_repeatable("Training")
        self._size = size
        whole = isinstance(data, (Tensor, Mapping, tuple, Batch))
        self._whole = self._data.peek()[0] if whole else None

    def __len__(self) -> int:
        """Minibatches in an epoch; 0 if that is not known before."""
        if self._whole is None:
            return self._data.num_batches or 0
        return -(-self._whole.num_samples // self._size)

    def __iter__(self) -> Iterator[tuple[Any, Tensor, int]]:
        """Inputs, targets, and the number of samples."""
        batches = self._data if self._whole is None else self._drawn(self._whole)
        for batch in batches:
            yield _with_targets(batch)

    def _drawn(self, whole: Batch) -> Iterator[Batch]:
        leaves, build, has_rows = whole.flatten(whole.num_samples)
        targets = _with_targets(whole)[1]
        for rows in torch.randperm(whole.num_samples).split(self._size):
            rows = rows.to(targets.device)
            part = [leaf[rows] if r else leaf for leaf, r in zip(leaves, has_rows, strict=True)]
            yield replace(whole, inputs=build(part), targets=targets[rows])

    def in_order(self, size: int) -> Iterator[tuple[Any, Tensor, int]]:
        """All samples once, at most `size` at a time, for an evaluation."""
        for batch in self._data.cut(lambda _: size):
            yield _with_targets(batch)


def _with_targets(batch: Batch) -> tuple[Any, Tensor, int]:
    if batch.targets is None:
        raise UnsupportedError(
            "Training needs targets: give pairs (inputs, targets), or mappings with one of the "
            "keys 'labels', 'targets', 'target' or 'y'."
        )
    return batch.inputs, batch.targets, batch.num_samples
