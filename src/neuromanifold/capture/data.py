"""Data in, batches out: tensors, pairs, mappings and loaders, told apart once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import RandomSampler

from neuromanifold.errors import UnsupportedError

__all__ = ["TARGET_KEYS", "Batch", "Data", "Forward", "call_model"]

TARGET_KEYS = ("labels", "targets", "target", "y")
"""Keys of a mapping that hold targets; they are not passed to the model."""

Forward = Callable[[nn.Module, Any], Any]
"""`forward(model, inputs) -> outputs`."""


@dataclass(frozen=True)
class Batch:
    """Inputs as the model takes them, and targets if there are any."""

    inputs: Any
    targets: Tensor | None

    @classmethod
    def of(cls, batch: Any) -> Batch:
        """Split what a loader yields into inputs and targets.

        Raises:
            TypeError: If it is no tensor, pair or mapping.
        """
        if isinstance(batch, Batch):
            return batch
        if isinstance(batch, Tensor):
            return cls(batch, None)
        if isinstance(batch, Mapping):
            targets = [key for key in TARGET_KEYS if key in batch]
            if len(targets) > 1:
                raise ValueError(
                    f"The batch has several target keys {targets}; keep one of {TARGET_KEYS}."
                )
            inputs = {key: value for key, value in batch.items() if key not in targets}
            return cls(inputs, batch[targets[0]] if targets else None)
        if isinstance(batch, (tuple, list)):
            if len(batch) == 1:
                return cls(batch[0], None)
            if len(batch) == 2:
                return cls(batch[0], batch[1])
            raise ValueError(
                f"A batch of {len(batch)} parts is ambiguous. Give a pair (inputs, targets), with "
                f"a tuple of inputs if the model takes several, or pass forward=..."
            )
        raise TypeError(
            f"A batch is a tensor, a pair (inputs, targets) or a mapping; "
            f"got {type(batch).__name__}."
        )

    def flatten(self, num_samples: int) -> tuple[list[Any], Callable[[list[Any]], Any], list[bool]]:
        """Flatten the inputs, telling which leaves carry the sample axis.

        Returns:
            The leaves, a function that builds inputs from leaves, and per leaf whether its first
            axis is the sample axis.
        """
        leaves, spec = tree_flatten(self.inputs)
        has_rows = [
            isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == num_samples
            for leaf in leaves
        ]
        return leaves, lambda new: tree_unflatten(new, spec), has_rows


class Data:
    """Batches of whatever kind of data came in.

    Args:
        data: a tensor, a pair, a mapping (one batch each), or an iterable of those.

    Raises:
        TypeError: If it is none of them.
        ValueError: If it is a list of plain tensors, which could mean two things.
    """

    def __init__(self, data: Any) -> None:
        if isinstance(data, list) and data and all(isinstance(part, Tensor) for part in data):
            raise ValueError(
                "A list of tensors is ambiguous: pass a tuple (inputs, targets) for one batch, or "
                "a list of such tuples for several batches."
            )
        if isinstance(data, (Tensor, Mapping, tuple, Batch)):
            self._batches: Iterable[Any] = [Batch.of(data)]
        elif isinstance(data, Iterable):
            self._batches = data
        else:
            raise TypeError(
                f"data is a tensor, a pair (inputs, targets), a mapping, or an iterable of batches "
                f"such as a DataLoader; got {type(data).__name__}."
            )

    @property
    def num_batches(self) -> int | None:
        """Number of batches, None if the iterable does not know."""
        try:
            return len(self._batches) if isinstance(self._batches, Sized) else None
        except TypeError:  # a DataLoader over an IterableDataset has a length that raises
            return None

    @property
    def shuffles(self) -> bool:
        """Whether each pass has another order."""
        return isinstance(getattr(self._batches, "sampler", None), RandomSampler)

    def __iter__(self) -> Iterator[Batch]:
        empty = True
        for batch in self._batches:
            empty = False
            yield Batch.of(batch)
        if empty:
            raise ValueError(
                "The data hold no batch. An iterator that was used up gives nothing a second time: "
                "pass the loader itself, not iter(loader)."
            )

    def require_repeatable(self, what: str) -> None:
        """Refuse one-shot iterators where the data are read more than once.

        Raises:
            UnsupportedError: If the data are an iterator.
        """
        if isinstance(self._batches, Iterator):
            raise UnsupportedError(
                f"{what} reads the data more than once, but {type(self._batches).__name__} can be "
                f"read only once. Pass a DataLoader or a list of batches."
            )


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model the usual way: a tuple is several arguments, a mapping keyword arguments.

    What the model raises for inputs of a wrong shape or type gets a note with what it was given.
    """
    try:
        if isinstance(inputs, Mapping):
            return model(**inputs)
        if isinstance(inputs, (tuple, list)):
            return model(*inputs)
        return model(inputs)
    except (RuntimeError, TypeError) as error:
        error.add_note(
            f"The model was called with {_described(inputs)}. Give inputs that the "
            f"model takes: a tensor, a tuple for model(*inputs), or a mapping for model(**inputs)."
        )
        raise


def _described(value: Any) -> str:
    """Types and shapes of what a model is given."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_described(part)}" for key, part in value.items()) or "nothing"
    if isinstance(value, (tuple, list)):
        return ", ".join(map(_described, value)) or "nothing"
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def logits_of(outputs: Any) -> Any:
    """The tensor a likelihood works on, out of what a model returns.

    Models of the Hugging Face family return an object or a mapping with `logits`.
    """
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]
    return getattr(outputs, "logits", outputs)


def check_devices(batch: Batch, device: torch.device) -> None:
    """Refuse a batch on another device than the model.

    Raises:
        ValueError: Naming both devices.
    """
    leaves, _ = tree_flatten((batch.inputs, batch.targets))
    elsewhere = {leaf.device for leaf in leaves if isinstance(leaf, Tensor)} - {device}
    if elsewhere:
        raise ValueError(
            f"The model is on {device}, but the batch has tensors on "
            f"{', '.join(sorted(map(str, elsewhere)))}. Move the batch with .to({str(device)!r})."
        )
