"""Numbers of the units' own metrics: what they see of the exact blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from neuromanifold.errors import CaptureError, UnsupportedError
from neuromanifold.likelihoods import Likelihood
from neuromanifold.relative.sensitivity import Layer, compare
from neuromanifold.report.known import finite

__all__ = ["own_metrics", "sees_everything"]

MOST_ROWS = 2**14
"""Samples times columns up to which the units are looked at."""

MOST_ENTRIES = 2**30
"""Samples times columns times parameters, likewise: of some seconds."""

ROUNDING = 1e-2
"""What numbers of a layer that sees everything are off by, also in float32."""


def own_metrics(
    model: nn.Module,
    likelihood: Likelihood,
    data: Any,
    *,
    num_rows: int,
    num_parameters: int,
    notes: list[str],
) -> dict[str, Any] | None:
    """What `nm.relative.compare` finds, with quartiles over the units of each layer.

    Args:
        model: as for `nm.fisher`, like the next two.
        likelihood: what the outputs mean.
        data: inputs, with or without targets.
        num_rows: samples times columns of the output Fisher.
        num_parameters: that are measured.
        notes: where is said why units were not looked at.

    Returns:
        Layers, and why others were left out; None if there is nothing to be seen.
    """
    if num_rows > MOST_ROWS or num_rows * num_parameters > MOST_ENTRIES:
        notes.append(
            f"The units' own metrics were not looked at: that takes {num_rows:,} gradients of "
            f"{num_parameters:,} entries. Call nm.relative.compare on fewer samples."
        )
        return None
    try:
        found = compare(model, likelihood, data)
    except (CaptureError, UnsupportedError) as error:
        notes.append(f"The units' own metrics were not looked at: {error}")
        return None
    layers = [_plain(layer) for layer in found.layers]
    if all(map(sees_everything, layers)):
        notes.append(
            "The units' own metrics were not looked at: no layer but those of the outputs has an "
            "activation function of its own."
        )
        return None
    return {"layers": layers, "left_out": dict(found.left_out)}


def sees_everything(layer: Mapping[str, Any]) -> bool:
    """Whether a layer's own metric is its exact block, as that of the outputs is; or it is dead."""
    factor, variation = layer["factor"], layer["variation"]
    if factor is None:
        return True
    off = [factor["lower"] - 1, factor["upper"] - 1, variation["upper"]]
    return all(abs(number) < ROUNDING for number in off)


def _plain(layer: Layer) -> dict[str, Any]:
    """Quartiles; None for a layer without living units, and for cosines of a wide one."""
    quartiles = {
        name: {"lower": each.lower, "median": each.median, "upper": each.upper}
        for name, each in layer.summary.items()
        if finite(each.median) is not None
    }
    return {
        "name": layer.name,
        "units": len(layer.factor),
        "dead": layer.dead,
        "num_parameters": layer.num_parameters,
        **{name: quartiles.get(name) for name in ("factor", "cosine", "variation")},
    }
