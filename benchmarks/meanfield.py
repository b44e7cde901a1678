"""`python -m benchmarks.meanfield`: predicted against measured spectra, and off-block entries.

Two tables of papers.md: mean and largest eigenvalue of the Fisher matrix of random networks (§2.5),
and how off-block entries and the largest eigenvalue go with the width (§2.3). The environment
variable BENCH chooses the widths: `quick` (the default) or `full`.
"""

from __future__ import annotations

import os
import statistics
import sys
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import neuromanifold as nm
from benchmarks.harness import write_results
from neuromanifold.meanfield import check, off_block

SPECTRA = {"quick": (200, 1000), "full": (25, 50, 100, 200, 400, 800, 1000, 1600)}
OFF_BLOCKS = {"quick": (25, 50, 100), "full": (25, 50, 100, 200)}
SEEDS = 5
SAMPLES, OUTPUTS = 10, 2
TARGET, TARGET_WIDTH = 0.1, 1000


class Erf(nn.Module):
    """`erf(u)`, entry by entry."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As it says."""
        return torch.erf(x)


ACTIVATIONS: dict[str, tuple[type[nn.Module], float]] = {
    "tanh": (nn.Tanh, 1.0),
    "relu": (nn.ReLU, 2.0),
    "erf": (Erf, 1.0),
}
BIAS_VARIANCE = 0.01


def network(activation: str, widths: list[int], seed: int) -> nn.Sequential:
    """Random weights and biases, linear outputs."""
    behind, weight_variance = ACTIVATIONS[activation]
    generator = torch.Generator().manual_seed(seed)
    modules: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layer = nn.Linear(fan_in, fan_out)
        with torch.no_grad():
            layer.weight.normal_(std=(weight_variance / fan_in) ** 0.5, generator=generator)
            layer.bias.normal_(std=BIAS_VARIANCE**0.5, generator=generator)
        modules += [layer, behind()]
    return nn.Sequential(*modules[:-1])


def inputs(num: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(1000 + seed))


def spectra(widths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Predicted by the nominal variances, and by a network's own and its data's overlaps."""
    rows = []
    for activation, (_, weight_variance) in ACTIVATIONS.items():
        for width in widths:
            sizes = [width, width, width, OUTPUTS]
            nominal = nm.meanfield.spectrum_statistics(
                nm.meanfield.propagate(
                    activation,
                    weight_variance=weight_variance,
                    bias_variance=BIAS_VARIANCE,
                    widths=sizes,
                ),
                SAMPLES,
            )
            found = [
                check(network(activation, sizes, seed), inputs(SAMPLES, width, seed))
                for seed in range(SEEDS)
            ]
            rows.append(
                {
                    "activation": activation,
                    "width": width,
                    "nominal": nominal.to_dict(),
                    "predicted": [one.predicted.to_dict() for one in found],
                    "measured": [one.measured.to_dict() for one in found],
                }
            )
    return rows


def off_blocks(widths: tuple[int, ...]) -> list[dict[str, Any]]:
    """With as many outputs as units, and with one."""
    rows = []
    for width in widths:
        for outputs in (width, 1):
            found = [
                off_block(
                    network("tanh", [width, width, width, outputs], seed),
                    inputs(SAMPLES, width, seed),
                )
                for seed in range(3)
            ]
            rows.append(
                {
                    "width": width,
                    "outputs": outputs,
                    "same_layer": [one.same_layer for one in found],
                    "cross_layer": [one.cross_layer for one in found],
                    "spectral_effect": [one.spectral_effect for one in found],
                }
            )
    return rows


def mean_of(entries: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(entry[key] for entry in entries)


def show_spectra(rows: list[dict[str, Any]]) -> None:
    title = f"predicted over measured: {SEEDS} networks, {SAMPLES} samples, {OUTPUTS} outputs"
    heads = ("φ", "n", "mean", "nominal", "own", "λ_max", "nominal", "own", "")
    table = Table(*heads, title=title)
    for row in rows:
        cells, worst = [], 0.0
        for key in ("mean", "largest"):
            measured = mean_of(row["measured"], key)
            ratios = [row["nominal"][key] / measured, mean_of(row["predicted"], key) / measured]
            worst = max(worst, *(abs(ratio - 1) for ratio in ratios))
            cells += [f"{measured:.4g}", *(f"{ratio:.3f}" for ratio in ratios)]
        judged = "[green]reached[/]" if worst <= TARGET else "[red]missed[/]"
        last = judged if row["width"] == TARGET_WIDTH else ""
        table.add_row(row["activation"], str(row["width"]), *cells, last)
    Console().print(table)


def show_off_blocks(rows: list[dict[str, Any]]) -> None:
    title = "tanh, off-block to block ratios, mean of 3 networks"
    table = Table("n", "outputs", "same", "cross", "same·√n", "cross·√n", "λ_max/unit", title=title)
    for row in rows:
        same, cross, effect = (
            statistics.fmean(row[key]) for key in ("same_layer", "cross_layer", "spectral_effect")
        )
        root = row["width"] ** 0.5
        numbers = (same, cross, same * root, cross * root, effect)
        table.add_row(str(row["width"]), str(row["outputs"]), *(f"{x:.3f}" for x in numbers))
    Console().print(table)


def main() -> None:
    mode = os.environ.get("BENCH", "quick")
    if mode not in SPECTRA:
        sys.exit(f"BENCH={mode!r} is not a mode; choose one of {', '.join(SPECTRA)}.")
    found = {"spectra": spectra(SPECTRA[mode]), "off_blocks": off_blocks(OFF_BLOCKS[mode])}
    show_spectra(found["spectra"])
    show_off_blocks(found["off_blocks"])
    path = write_results("meanfield", {"mode": mode, **found})
    print(f"All repeats: {path.relative_to(path.parents[2])}")


if __name__ == "__main__":
    main()
