"""What an estimate that runs to a tolerance gives, and how far its numbers are known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuromanifold._estimate import Estimate, Quantity

__all__ = ["Estimated", "shares"]

FLOORS = ("data", "iteration")
"""Sources of error that no draws make smaller."""


@dataclass(frozen=True)
class Estimated(Estimate):
    """An estimate that was run to a tolerance.

    Attributes:
        reached: whether every number that was asked for is within the tolerance.
        note: why not, and what would help.
        quantile: of "entries", the share of each tensor's entries that had to be within it.
    """

    reached: bool = True
    note: str = ""
    quantile: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**super().to_dict(), "reached": self.reached, "note": self.note}

    def __str__(self) -> str:
        return super().__str__() if self.reached else f"{super().__str__()}. {self.note}"


def shares(estimate: Estimate) -> tuple[list[str], Tensor]:
    """Of each number that was asked for: its name and, `(3, M)`, its square and two variances.

    Of a tensor by parameter it is the squared Euclidean norm and the sums of its variances; of
    entries, the squared norm and variances that have the ratio to it which the worst of the asked
    for share of the entries has, so that the sum of both is right, and the first of them.

    The variances are that which draws do not change, and that from what is drawn.
    """
    names = list(estimate.value) if not isinstance(estimate.value, Tensor) else [""]
    share = estimate.quantile if isinstance(estimate, Estimated) else None

    def by_name(quantity: Quantity) -> list[Tensor]:
        parts = [quantity] if isinstance(quantity, Tensor) else [quantity[name] for name in names]
        return [part.double() for part in parts]

    columns = []
    variances = {source: by_name(variance) for source, variance in estimate.variances.items()}
    for i, value in enumerate(by_name(estimate.value)):
        square = value.square().sum()
        parts = {source: of_all[i] for source, of_all in variances.items()}
        floor = torch.stack([part for source, part in parts.items() if source in FLOORS]).sum(dim=0)
        both = torch.stack(list(parts.values())).sum(dim=0)
        if share is None:
            columns.append(torch.stack([square, floor.sum(), both.sum()]))
            continue
        known = value != 0
        squares = value[known].square()
        of_entries = (_at_quantile(part[known] / squares, share) for part in (floor, both))
        columns.append(torch.stack([square, *(square * ratio for ratio in of_entries)]))
    squares, floors, totals = torch.stack(columns, dim=1)
    return names, torch.stack([squares, floors, totals - floors]).cpu()


def _at_quantile(ratios: Tensor, share: float) -> Tensor:
    """The least number that this share of the ratios does not exceed; 0 if there are none."""
    if ratios.numel() == 0:
        return ratios.new_zeros(())
    return ratios.flatten().kthvalue(max(math.ceil(share * ratios.numel()), 1)).values
