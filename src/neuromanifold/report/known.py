"""Numbers with their standard errors as JSON has them: None stands for what is not known."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from neuromanifold._estimate import Estimate

__all__ = ["finite", "stderr"]


def finite(number: float | None) -> float | None:
    """A number, or None if it is not one.

    Example:
        >>> finite(1.5), finite(float("inf")), finite(None)
        (1.5, None, None)
    """
    return number if number is not None and math.isfinite(number) else None


def stderr(estimate: Estimate) -> Any:
    """The standard error of one number, or a list of those of several.

    Example:
        >>> import torch
        >>> stderr(Estimate(torch.ones(2), {"data": torch.tensor([4.0, float("inf")])}))
        [2.0, None]
    """
    found = estimate.stderr
    assert isinstance(found, Tensor)
    return finite(float(found)) if found.ndim == 0 else [finite(x) for x in found.tolist()]
