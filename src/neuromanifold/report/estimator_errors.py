"""Numbers of the estimators: how sure each is of the diagonal, and which one is worth its cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from neuromanifold.errors import UnsupportedError
from neuromanifold.likelihoods import Likelihood
from neuromanifold.report.known import finite
from neuromanifold.variance import Row, compare

__all__ = ["estimator_errors"]

MOST_ROWS = 2**14
"""Samples times columns up to which estimators are compared."""

MOST_ENTRIES = 2**31
"""Samples times columns times parameters, likewise: of minutes."""


def estimator_errors(
    model: nn.Module,
    likelihood: Likelihood,
    data: Any,
    *,
    num_rows: int,
    num_parameters: int,
    generator: torch.Generator,
    notes: list[str],
) -> dict[str, Any] | None:
    """What `nm.variance.compare` finds for the model and its layers.

    Args:
        model: as for `nm.fisher`, like the next two.
        likelihood: what the outputs mean.
        data: inputs, with or without targets.
        num_rows: samples times columns of the output Fisher.
        num_parameters: that are measured.
        generator: source of the labels, where moments are measured from some.
        notes: where is said why estimators were not compared.

    Returns:
        Rows by group and estimator, advice by group, and the cost of each estimator in forward and
        backward passes, which is timed; None if they were not compared.
    """
    if num_rows > MOST_ROWS or num_rows * num_parameters > MOST_ENTRIES:
        notes.append(
            f"Estimators were not compared: that takes {num_rows:,} gradients of "
            f"{num_parameters:,} entries. Call nm.variance.compare on fewer samples."
        )
        return None
    try:
        found = compare(model, likelihood, data, generator=generator)
    except UnsupportedError as error:
        notes.append(f"Estimators were not compared: {error}")
        return None
    return {
        "rows": [_plain(row) for row in found.rows if row.kind != "parameter"],
        "advice": [
            {
                "group": advice.group,
                "estimator": advice.estimator,
                "sweeps": advice.sweeps,
                "reason": advice.reason,
            }
            for advice in found.advice
        ],
        "cost": {row.estimator: finite(row.cost) for row in found.rows if row.kind == "model"},
    }


def _plain(row: Row) -> dict[str, Any]:
    """Medians over the entries of a group; errors are relative to the entries."""
    return {
        "group": row.group,
        "kind": row.kind,
        "estimator": row.estimator,
        "sweeps": row.sweeps,
        "trace": row.trace,
        "relative_error": finite(row.stderr.median),
        "relative_error_of_draws": finite(row.draws.median),
        "bound_of_draws": finite(row.bound),
        "tightness": finite(row.tightness),
    }
