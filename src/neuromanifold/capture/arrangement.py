"""Which rows of a layer's input belong to which sample, and what is known of it from earlier.

The axis of the samples need not be the first, and rows of several samples may be folded together.
It is found by two cotangents at the outputs, of which the second is the first one times a factor
for each sample: gradients are linear in them, so rows of one sample come back multiplied by its
factor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_flatten

from neuromanifold.capture.layout import Place

__all__ = [
    "ARRANGEMENTS",
    "NO_REPEATS",
    "Arrangement",
    "Known",
    "Repeats",
    "Use",
    "factors_of",
    "find",
    "given",
    "known_of",
    "remember",
    "samples_first",
    "shapes_fit",
]

Arrangement = Literal["first", "second", "minor"]
"""Where the samples are in a layer's input: axis 0 (possibly with positions folded in behind the
samples), axis 1, or axis 0 with positions folded in front of the samples."""
ARRANGEMENTS: tuple[Arrangement, ...] = ("first", "second", "minor")


@dataclass
class Use:
    """One call of a module during the forward pass."""

    x: Tensor | None
    version: int
    edge: GradientEdge
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass
class Known:
    """What earlier passes found out about a model: finding it costs two sweeps.

    Attributes:
        arrangements: where the samples are, per place, by what decides it.
        repeats: which outputs are repeated for each sample, by what the model is given.
    """

    arrangements: dict[tuple[Any, ...], dict[Place, Arrangement]] = field(default_factory=dict)
    repeats: dict[tuple[Any, ...], Repeats] = field(default_factory=dict)


@dataclass(frozen=True)
class Repeats:
    """Modules whose output has no sample axis, because every sample has the same.

    Attributes:
        num_samples: N.
        places: those modules, and whether this holds for an output with N rows too: it may have as
            many positions as there are samples.
        keep_ones: whether a first axis of length one is the only position, not that of samples.
    """

    num_samples: int
    places: dict[Place, bool]
    keep_ones: bool

    def __call__(self, place: Place, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Input and output of a module, for each sample."""
        n, rows = self.num_samples, output.shape[0]
        if place not in self.places or (rows == n and not self.places[place]):
            return x, output
        lead = int(rows == 1 and not self.keep_ones)
        return x.expand(n, *x.shape[lead:]), output.expand(n, *output.shape[lead:])


NO_REPEATS = Repeats(0, {}, keep_ones=False)
_KNOWN: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()
"""What is known of each model, run in the usual way."""
_MOST_KNOWN = 256
"""Of each kind: sequences of every length are seen in the long run."""


def known_of(model: nn.Module) -> Known:
    """What is known of a model, to be added to."""
    return _KNOWN.setdefault(model, Known())


def given(model: nn.Module, inputs: Any) -> tuple[Any, ...]:
    """What decides how a model runs, but for values: its modules, their switches, and shapes.

    Layers may treat samples apart in evaluation, and mix them in training.
    """
    modules = (
        (
            type(module),
            *(value for value in vars(module).values() if isinstance(value, (bool, str))),
        )
        for module in model.modules()
    )
    leaves, spec = tree_flatten(inputs)
    kinds = (
        (leaf.shape, leaf.dtype)
        if isinstance(leaf, Tensor)
        else (type(leaf), leaf if isinstance(leaf, (bool, int, float, str)) else None)
        for leaf in leaves
    )
    return (hash(tuple(modules)), repr(spec), *kinds)


def remember(known: dict[tuple[Any, ...], Any], key: tuple[Any, ...], value: Any) -> None:
    """Keep a value; forget all others when there are too many."""
    if len(known) >= _MOST_KNOWN:
        known.clear()
    known[key] = value


def samples_first(x: Tensor, num_samples: int, arrangement: Arrangement, axis: int) -> Tensor:
    """Bring `(..., rows, ...)` with rows at `axis` to samples major."""
    if arrangement == "second":
        return x.transpose(axis, axis + 1)
    if arrangement == "minor":
        return (
            x.unflatten(axis, (-1, num_samples)).transpose(axis, axis + 1).flatten(axis, axis + 1)
        )
    return x


def factors_of(num: int) -> Tensor:
    """Numbers ±2^k in no order, different as long as there are some: products with them are exact.

    Example:
        >>> factors_of(4).unique().numel()
        4
    """
    generator = torch.Generator().manual_seed(0)
    shuffled = [torch.randperm(18, generator=generator) for _ in range(0, num, 18)]
    choice = torch.cat(shuffled)[:num]
    return (1 - 2 * (choice % 2)) * 2.0 ** (choice // 2 - 4)


def shapes_fit(use: Use, num_samples: int, arrangement: Arrangement) -> bool:
    """Whether input and output have the axes that an arrangement needs."""
    # Of a layer's input, one axis less tells the samples: indices have no features.
    for shape, features in ((use.shape, 1), (use.shape if use.x is None else use.x.shape, 0)):
        if arrangement == "second":
            if len(shape) < 2 + features or shape[1] != num_samples:
                return False
        elif len(shape) < 1 + features or shape[0] % num_samples or shape[0] == 0:
            return False
    return True


def _fits(use: Use, g: Tensor, factors: Tensor, arrangement: Arrangement) -> bool:
    """Whether, under an arrangement, the second gradient is the first one times the factors."""
    num_samples = len(factors)
    if not shapes_fit(use, num_samples, arrangement):
        return False
    rows = samples_first(g, num_samples, arrangement, 1).unflatten(1, (num_samples, -1)).flatten(2)
    expected = factors[:, None].to(rows) * rows[0]
    tolerance = torch.finfo(rows.dtype).eps ** 0.5 * expected.abs().amax(dim=1)
    return bool(((rows[1] - expected).abs().amax(dim=1) <= tolerance).all())


def find(
    uses: list[tuple[Place, Use]], gradients: list[Tensor | None], factors: Tensor
) -> tuple[dict[Place, Arrangement], bool]:
    """Tell arrangements from the gradients of two cotangents, the second `factors` times the first.

    Returns:
        Per place that has one, its arrangement; and whether that holds for other values too. It
        need not where several fit, as all of them do where a gradient is zero: behind weights that
        start at zero, the gradient comes with training.
    """
    num_samples = len(factors)
    candidates: dict[Place, list[Arrangement]] = {place: list(ARRANGEMENTS) for place, _ in uses}
    conclusive = True
    for (place, use), g in zip(uses, gradients, strict=True):
        if g is None:  # this call does not reach the outputs
            continue
        fitting = [a for a in candidates[place] if _fits(use, g, factors, a)]
        candidates[place] = fitting
        # Without positions folded in, the last one is the first one.
        several = len(fitting) - ("minor" in fitting and use.shape[0] == num_samples) > 1
        told_apart = num_samples == 1 or not several
        # NaN tells nothing.
        conclusive = conclusive and told_apart and bool(g.any()) and bool(g.isfinite().all())
    found = {place: fitting[0] for place, fitting in candidates.items() if fitting}
    return found, conclusive
