"""Data in, batches out: tensors, pairs, mappings and loaders, told apart once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import RandomSampler

from neuromanifold.errors import UnsupportedError

__all__ = ["TARGET_KEYS", "Batch", "Data", "Forward", "call_model"]

TARGET_KEYS = ("labels", "targets", "target", "y")
"""Keys of a mapping that hold targets; they are not passed to the model."""

MASK_KEY = "attention_mask"
"""Key of a mapping under which 0 marks padded positions; it is passed to the model."""

LOSS_KEYS = ("num_items_in_batch",)
"""Keys that trainers add for the model's own loss, which is not asked for."""

IGNORED_LABEL = -100
"""Label of positions that a model's own loss leaves out, where the library of models says so."""

Forward = Callable[[nn.Module, Any], Any]
"""`forward(model, inputs) -> outputs`."""


@dataclass(frozen=True)
class Batch:
    """Inputs as the model takes them, and targets if there are any.

    Attributes:
        inputs: what the model is called with.
        targets: one for every position of the outputs.
        observed: which positions count where there are no targets, boolean `(N, T)`.
        as_labels: whether the targets are as the model's own loss takes them, which need not be
            where the outputs that predict them are: see `aligned`.
    """

    inputs: Any
    targets: Tensor | None
    observed: Tensor | None = None
    as_labels: bool = False

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
            return cls._of_mapping(batch)
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

    @classmethod
    def _of_mapping(cls, batch: Mapping[str, Any]) -> Batch:
        keys = [key for key in TARGET_KEYS if key in batch]
        if len(keys) > 1:
            raise ValueError(
                f"The batch has several target keys {keys}; keep one of {TARGET_KEYS}."
            )
        inputs = {key: value for key, value in batch.items() if key not in (*keys, *LOSS_KEYS)}
        targets = batch[keys[0]] if keys else None
        mask = inputs.get(MASK_KEY)
        if targets is None and isinstance(mask, Tensor) and mask.ndim == 2 and not mask.all():
            return cls(inputs, None, observed=mask != 0)
        return cls(inputs, targets, as_labels=keys == ["labels"])

    def aligned(self, model: nn.Module) -> Batch:
        """With every target at the output that predicts it.

        The output of a causal language model at position t predicts the label at t + 1; the last
        one predicts nothing that is known. Decoders are given what their own loss would give them.
        """
        if not self.as_labels or self.targets is None:
            return self
        inputs, targets = self.inputs, self.targets
        decoder_inputs = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if decoder_inputs is not None and "decoder_input_ids" not in inputs:
            inputs = {**inputs, "decoder_input_ids": decoder_inputs(labels=targets)}
        elif _predicts_next(model, inputs, targets):
            targets = functional.pad(targets[:, 1:], (0, 1), value=IGNORED_LABEL)
        return Batch(inputs, targets)

    @property
    def present(self) -> Tensor | None:
        """Which positions are not padded, boolean `(N, T)`; None if nothing says so."""
        mask = self.inputs.get(MASK_KEY) if isinstance(self.inputs, Mapping) else None
        return mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None

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

    @property
    def num_samples(self) -> int:
        """N, read off the tensors before the model has run.

        Raises:
            UnsupportedError: If they do not tell.
        """
        for rows in (self.targets, self.observed):
            if rows is not None and rows.ndim > 0:
                return len(rows)
        leaves = [leaf for leaf in tree_flatten(self.inputs)[0] if isinstance(leaf, Tensor)]
        lengths = {leaf.shape[0] for leaf in leaves if leaf.ndim > 0}
        # A first axis of 1 is broadcast over the samples, where others have more.
        lengths = lengths - {1} or lengths
        if len(lengths) != 1:
            found = f"have first axes of {sorted(lengths)}" if lengths else "hold no tensor"
            raise UnsupportedError(
                f"The inputs {found}, so it is not known which axis has the samples. Give targets "
                f"too, as a pair (inputs, targets) with one row of targets per sample."
            )
        return lengths.pop()

    def samples(self, start: int, stop: int) -> Batch:
        """The part of this batch that belongs to some samples; what all of them share stays whole.

        Raises:
            UnsupportedError: If it is not known which axis has the samples.
        """
        leaves, build, has_rows = self.flatten(self.num_samples)
        some = slice(start, stop)
        part = [leaf[some] if rowed else leaf for leaf, rowed in zip(leaves, has_rows, strict=True)]
        return replace(
            self,
            inputs=build(part),
            targets=None if self.targets is None else self.targets[some],
            observed=None if self.observed is None else self.observed[some],
        )


class Data:
    """Batches of whatever kind of data came in.

    Args:
        data: a tensor, a pair, a mapping (one batch each), or an iterable of those.
        model: whose labels a mapping holds under "labels"; the convention of its own loss says
            where they belong (`Batch.aligned`). None leaves them where they are.
        size: how many samples of a batch may go through the model at once; None for all.

    Raises:
        TypeError: If it is none of them.
        ValueError: If it is a list of plain tensors, which could mean two things.
    """

    def __init__(
        self,
        data: Any,
        model: nn.Module | None = None,
        size: Callable[[Batch], int] | None = None,
    ) -> None:
        self._model = model
        self._size = size
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
        """Number of batches, None if the iterable does not know or they are cut."""
        if self._size is not None:
            return None
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
            aligned = Batch.of(batch)
            if self._model is not None:
                aligned = aligned.aligned(self._model)
            yield from [aligned] if self._size is None else _cut(aligned, self._size(aligned))
        if empty:
            raise ValueError(
                "The data hold no batch. An iterator that was used up gives nothing a second time: "
                "pass the loader itself, not iter(loader)."
            )

    def peek(self) -> tuple[Batch, Data]:
        """The first batch, and the data with it still to come."""
        batches = iter(self)
        first = next(batches)
        if isinstance(self._batches, Iterator):
            return first, Data(chain([first], batches))
        return first, self

    def cut(self, size: Callable[[Batch], int]) -> Data:
        """The same data in micro-batches.

        Args:
            size: how many samples of a batch may go through the model at once.
        """
        return Data(self._batches, self._model, size)

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


def _cut(batch: Batch, size: int) -> Iterator[Batch]:
    """Parts of at most `size` samples, as equal as can be; the batch itself if it is no larger."""
    num_samples = batch.num_samples
    parts = -(-num_samples // size)
    if parts <= 1:
        yield batch
        return
    for part in range(parts):
        yield batch.samples(part * num_samples // parts, (part + 1) * num_samples // parts)


_PREDICTS_NEXT: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""What `_predicts_next` found out by running a model."""


def _predicts_next(model: nn.Module, inputs: Any, labels: Tensor) -> bool:
    """Whether the model's own loss compares the output at t with the label at t + 1.

    Models of the Hugging Face family name their loss. Some causal ones do not; these are asked for
    the loss of this batch, and it is compared with either reading.
    """
    loss_type = getattr(model, "loss_type", None)
    if loss_type is not None:
        return bool(loss_type == "ForCausalLM")
    generates: Callable[[], bool] | None = getattr(model, "can_generate", None)
    if generates is None or not generates() or labels.ndim != 2:
        return False
    if model not in _PREDICTS_NEXT:
        with torch.no_grad():
            outputs = model(**inputs, labels=labels)
        logits = outputs.logits.float()
        here = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        ahead = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        gaps = (outputs.loss - ahead).abs(), (outputs.loss - here).abs()
        if not bool(torch.isfinite(sum(gaps))):  # every label is ignored: nothing to find out
            return True
        _PREDICTS_NEXT[model] = bool(gaps[0] < gaps[1])
    return _PREDICTS_NEXT[model]


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
    except Exception as error:
        note = (
            f"The model was called with {_described(inputs)}. Give inputs that the "
            f"model takes: a tensor, a tuple for model(*inputs), or a mapping for model(**inputs)."
        )
        if note not in getattr(error, "__notes__", ()):  # as the same error may pass here twice
            error.add_note(note)
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
