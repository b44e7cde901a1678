"""What a peer is, and what the adapters share: copies of a model, and forms of answers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.workloads import Batch

__all__ = [
    "TRACE_PRODUCTS",
    "Factors",
    "Named",
    "Peer",
    "Prepare",
    "apart",
    "copied",
    "factored",
    "flat",
    "joint",
    "negative_log_likelihood",
    "on",
    "split",
    "without_positions",
]

Prepare = Callable[[Batch, Tensor], Callable[[], Any]]
"""`prepare(batch, labels)` imports the peer and gives the timed call. What that returns has the
form said in `quantities`, or is a function that brings it into that form and is not timed."""

TRACE_PRODUCTS = 27
"""With which Hutch++ has a standard error of 0.7 % on W2, over 300 repeats; with 24 it is 5 %.
Nine eigenvalues are large there, and a third of the products are for a sketch that finds them."""

Named = Mapping[str, Tensor]
Factors = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Peer:
    """Another library, as a good user of its documentation would call it.

    Attributes:
        name: for a reader.
        distribution: what pip installs.
        rows: by (workload, quantity).
        left_out: rows that it has but that are not run, and why.
    """

    name: str
    distribution: str
    rows: Mapping[tuple[str, str], Prepare]
    left_out: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def version(self) -> str | None:
        """Of what is installed; None where it is not."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None


def on(workloads: str, rows: Mapping[str, Prepare]) -> dict[tuple[str, str], Prepare]:
    """The same rows on several workloads: `on("W1 W2", {"diagonal": diagonal})`."""
    return {(w, quantity): prepare for w in workloads.split() for quantity, prepare in rows.items()}


# --- models --------------------------------------------------------------------------------------


def copied(batch: Batch) -> Batch:
    """One that a peer may wrap, hook and write to; the batch itself if no others share it."""
    if not batch.shared:
        return batch
    return Batch(copy.deepcopy(batch.model), batch.inputs.clone(), batch.targets)


class WithoutPositions(nn.Module):
    """A model whose positions are listed with the samples: logits (N * T, C)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (N, ...) to (N * T, C)."""
        return self.model(inputs).flatten(0, -2)


def without_positions(batch: Batch) -> tuple[nn.Module, float]:
    """A copy of the model with logits (N * T, C), and T.

    Most libraries take the loss as a mean over all rows of logits; a Fisher matrix of theirs, times
    T, is then the one per sample.
    """
    model = copied(batch).model
    if batch.targets.ndim == 1:
        return model, 1.0
    return WithoutPositions(model), float(batch.targets[0].numel())


def factored(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that Kronecker factors are asked of, by name."""
    layers = (nn.Linear, nn.Conv2d)
    return {name: m for name, m in model.named_modules() if isinstance(m, layers)}


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed over samples and positions, in nats."""
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")


# --- forms of answers ----------------------------------------------------------------------------


def flat(values: Iterable[Tensor]) -> Tensor:
    """One vector of tensors in the order of the parameters, (P,)."""
    return torch.cat([v.detach().flatten() for v in values])


def split(v: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """A flat vector by name, shaped like the parameters."""
    sizes = [p.numel() for p in model.parameters()]
    return {
        name: piece.view_as(p)
        for (name, p), piece in zip(model.named_parameters(), v.split(sizes), strict=True)
    }


def joint(v: Named, name: str, layer: nn.Module) -> Tensor:
    """A layer's piece of a vector as a matrix (O, I), the bias as its last column."""
    weight = v[f"{name}.weight"].flatten(1)
    return weight if layer.bias is None else torch.cat([weight, v[f"{name}.bias"][:, None]], dim=1)


def apart(model: nn.Module, matrices: Named) -> Tensor:
    """Of one matrix per layer, as from `joint`, the flat vector; zero for other parameters."""
    pieces = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for name, layer in factored(model).items():
        columns = layer.weight[0].numel()
        pieces[f"{name}.weight"] = matrices[name][:, :columns]
        if layer.bias is not None:
            pieces[f"{name}.bias"] = matrices[name][:, columns]
    return flat(pieces.values())
