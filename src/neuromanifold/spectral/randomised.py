"""The trace and the diagonal from products with random vectors."""

from __future__ import annotations

from typing import Literal

import torch

from neuromanifold._estimate import Estimate
from neuromanifold.linalg import memory, traces
from neuromanifold.operators import FisherOperator
from neuromanifold.spectral.exact import (
    checked,
    estimate_of,
    exactly,
    known_diagonal,
    signs,
)

__all__ = ["diagonal", "trace"]

PROBES = 64
LEAST = {"hutchinson": 1, "hutch++": 3, "xtrace": 6}


def trace(
    F: FisherOperator,
    method: Literal["auto", "hutchinson", "hutch++", "xtrace"] = "auto",
    *,
    probes: int = PROBES,
    generator: torch.Generator | None = None,
) -> Estimate:
    """The trace of F, in nats/parameter².

    Args:
        F: any Fisher matrix.
        method: "auto" is exact where F can say it, else "xtrace". For spectra that decay, "xtrace"
            has by far the smallest error, then "hutch++"; for flat ones, "hutchinson".
        probes: products with F that an estimate takes, in one or two batches. With fewer than 50,
            and a trace that few eigenvalues make, intervals of 95 % hold in 91 % of cases.
        generator: source of the random vectors.

    Returns:
        A scalar; the variance is from "probes". `draws` counts products, 0 for an exact answer.

    Raises:
        ValueError: If there is no such method, there are too few probes for it, or as many of them
            as parameters.
        TooLargeError: If the vectors would not fit.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(40, 20), torch.randn(64, 40)
        >>> F = nm.fisher(model, nm.Gaussian(), x, nm.Implicit(), estimator=nm.Exact())
        >>> found = nm.spectral.trace(F, "xtrace", generator=torch.Generator().manual_seed(0))
        >>> bool((found.value - F.trace()).abs() < 5 * found.stderr)
        True
    """
    if method == "auto":
        known = known_diagonal(F)
        if known is not None:
            return exactly(F, F.layout.flatten(known).sum())
        method = "xtrace"
    if method not in LEAST:
        raise ValueError(f'method is "auto" or one of {list(LEAST)}, got {method!r}.')
    checked("probes", probes, LEAST[method])
    p = F.num_parameters
    if method != "hutchinson" and probes > p:
        raise ValueError(
            f'{probes} probes of "{method}" are more than the {p} parameters: the exact trace '
            f'takes fewer products. Use method="auto", or fewer probes.'
        )
    _require_fits(F, probes)
    if method == "hutchinson":
        found = traces.hutchinson(F._matmat, signs(F, probes, generator))
    elif method == "hutch++":
        sketch = probes // 3
        drawn = signs(F, probes - sketch, generator)
        found = traces.hutchpp(F._matmat, drawn[:sketch], drawn[sketch:])
    else:
        device = F.device if generator is None else generator.device
        tests = torch.randn(probes // 2, p, generator=generator, dtype=F.dtype, device=device)
        found = traces.xtrace(F._matmat, tests.to(F.device))
    value, variance = found
    return estimate_of(F, value.to(F.dtype), {"probes": variance.to(F.dtype)}, draws=probes)


def diagonal(
    F: FisherOperator,
    probes: int | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Estimate:
    """The diagonal of F, in nats/parameter², from `E z ∘ F z`.

    The variance of an entry is the sum of squares of the rest of its row, over the probes. Where F
    can say its diagonal, and most can, that is far better.

    Args:
        F: any Fisher matrix.
        probes: products with F, all at once. By default the answer is exact where F can say it, and
            from 64 probes elsewhere.
        generator: source of the random signs.

    Returns:
        By parameter; the variance is from "probes". `draws` is 0 for an exact answer.

    Raises:
        ValueError: If `probes` is no positive whole number.
        TooLargeError: If the vectors would not fit.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(4, 3), torch.randn(64, 4)
        >>> F = nm.fisher(model, nm.Categorical(), x, nm.Dense())
        >>> nm.spectral.diagonal(F, probes=8).value["bias"].shape
        torch.Size([3])
    """
    known = known_diagonal(F) if probes is None else None
    if known is not None:
        return exactly(F, known)
    num = PROBES if probes is None else checked("probes", probes, 1)
    _require_fits(F, num)
    drawn = signs(F, num, generator)
    value, variance = traces.mean(drawn * F._matmat(drawn))
    by_name = {"probes": F.layout.unflatten(variance)}
    return estimate_of(F, F.layout.unflatten(value), dict(by_name), draws=num)


def _require_fits(F: FisherOperator, probes: int) -> None:
    memory.require(
        4 * probes * F.num_parameters * F.dtype.itemsize,
        F.device,
        what=f"{probes} probes of {F.num_parameters} parameters with their products",
        instead="Use fewer probes.",
    )
