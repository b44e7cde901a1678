"""What an operator can say exactly, found out by asking it."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from neuromanifold._estimate import Estimate, Quantity
from neuromanifold._typing import Params
from neuromanifold.errors import UnsupportedError
from neuromanifold.likelihoods._base import rademacher
from neuromanifold.linalg import psd
from neuromanifold.operators import FisherOperator, NaiveFallbackWarning

__all__ = ["checked", "dense", "estimate_of", "exactly", "known_diagonal", "signs", "spectrum"]

SMALL = 512
"""Parameters up to which the whole matrix costs no more products than an estimate."""
TOGETHER = 64
"""Products at once for it: they may need a model's activations each."""


def checked(name: str, value: int, least: int) -> int:
    """A whole number of probes, steps or eigenvalues.

    Raises:
        ValueError: If it is none, or less than the least that makes sense.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is a whole number >= {least}, got {value!r}.")
    return value


def signs(F: FisherOperator, num: int, generator: torch.Generator | None) -> Tensor:
    """Random signs `(num, P)`."""
    like = torch.empty(0, dtype=F.dtype, device=F.device)
    return rademacher(torch.Size((num, F.num_parameters)), like, generator)


def dense(F: FisherOperator) -> Tensor:
    """The matrix `(P, P)` of few parameters, from products."""
    eye = torch.eye(F.num_parameters, dtype=F.dtype, device=F.device)
    whole = torch.cat([F._matmat(some) for some in eye.split(TOGETHER)])
    return (whole + whole.T) / 2


def spectrum(F: FisherOperator) -> Tensor | None:
    """Eigenvalues, descending, in float64; zeros may be left out. None if F cannot say."""
    try:
        return F.eigenvalues().double()
    except UnsupportedError:
        pass
    if F.num_parameters > SMALL:
        return None
    return psd.eigenvalues(dense(F).double()).flip(0)


def known_diagonal(F: FisherOperator) -> Params | None:
    """The diagonal, unless that takes as many products as there are parameters, and these many."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", NaiveFallbackWarning)
        try:
            return F.diagonal()
        except (NaiveFallbackWarning, UnsupportedError):
            pass
    if F.num_parameters > SMALL:
        return None
    return F.layout.unflatten(dense(F).diagonal())


def exactly(F: FisherOperator, value: Quantity) -> Estimate:
    """A value without an error."""
    return estimate_of(F, value, {}, draws=0)


def estimate_of(
    F: FisherOperator, value: Quantity, variances: dict[str, Quantity], *, draws: int
) -> Estimate:
    """A value with its errors, those from probes among them even if there are none."""
    if "probes" not in variances:
        zero = (
            torch.zeros_like(value)
            if isinstance(value, Tensor)
            else {name: torch.zeros_like(part) for name, part in value.items()}
        )
        variances = {"probes": zero, **variances}
    return Estimate(value, variances, num_samples=F.num_samples, draws=draws)
