"""Numbers of the diagonal: how its entries are distributed in each parameter, with errors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from neuromanifold.report.known import finite
from neuromanifold.structures.gram import GramOperator
from neuromanifold.variance.spectrum import of_samples

__all__ = ["summary"]

NUM_BINS = 40
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

NEIGHBOURS = 0.025
"""Share of the entries to each side of a quantile that move like it."""


def summary(
    F: GramOperator, parameter: str, diagonal: Tensor, gradients: Tensor | None
) -> dict[str, Any]:
    """Distribution of the diagonal over one parameter's entries.

    Args:
        F: of the parameter's block.
        parameter: its name.
        diagonal: its entries, of any shape.
        gradients: the rows of F, `(R, P)`; None leaves the errors unknown.
    """
    values, order = diagonal.flatten().double().cpu().sort()
    ranks = {str(q): min(int(q * len(values)), len(values) - 1) for q in QUANTILES}
    own = None
    if gradients is not None and F.num_samples > 1:
        own = of_samples(F, gradients[:, F.layout.slices[parameter]].square())
    return {
        "parameter": parameter,
        "layer": F.coverage[parameter].block,
        "count": len(values),
        "mean": float(values.mean()),
        "min": float(values[0]),
        "max": float(values[-1]),
        "quantiles": {q: float(values[rank]) for q, rank in ranks.items()},
        "zeros": int((values == 0).sum()),
        "median_relative_error": None if own is None else _of_single_entries(own),
        "stderr": {
            "mean": None if own is None else _of_mean(own),
            "quantiles": {
                q: None if own is None else _of_mean(own[:, _around(order, rank).to(own.device)])
                for q, rank in ranks.items()
            },
        },
        "histogram": _histogram(values),
    }


def _of_mean(own: Tensor) -> float | None:
    """Standard error of the mean of some entries, from those of each sample `(N, entries)`."""
    return finite(float(own.mean(dim=1).double().std()) / math.sqrt(len(own)))


def _of_single_entries(own: Tensor) -> float | None:
    """Standard error over value of the median entry that is not zero; None if all are."""
    mean = own.mean(dim=0)
    known = mean > 0
    if not bool(known.any()):
        return None
    relative = (own[:, known] / mean[known]).std(dim=0)
    return finite(float(relative.median()) / math.sqrt(len(own)))


def _around(order: Tensor, rank: int) -> Tensor:
    """Which entries a quantile moves with: those of neighbouring ranks."""
    reach = int(NEIGHBOURS * len(order))
    return order[max(rank - reach, 0) : rank + reach + 1]


def _histogram(values: Tensor) -> dict[str, Any] | None:
    """Of the entries above zero, over their decimal logarithm."""
    logs = values[values > 0].log10()
    if not len(logs):
        return None
    low, high = float(logs[0]), float(logs[-1])
    edges = torch.linspace(low, max(high, low + 1e-6), NUM_BINS + 1, dtype=torch.float64)
    counts = torch.histogram(logs, edges).hist
    return {"log10_edges": edges.tolist(), "counts": [int(c) for c in counts]}
