"""Traces of matrices known by their products, from random vectors, with standard errors.

Vectors are rows `(R, P)`; each function takes those it needs, so that randomness is the caller's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from neuromanifold.linalg.lanczos import Products

__all__ = ["hutchinson", "hutchpp", "mean", "xtrace"]


def mean(draws: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of independent draws `(S, ...)`, and its variance; infinite for a single one.

    The variance is known from S draws itself. What that adds is counted in from four draws on,
    where Student's distribution has a variance: intervals for normal errors then hold as often as
    they say, or nearly so.
    """
    value, num = draws.mean(dim=0), len(draws)
    if num == 1:
        return value, torch.full_like(value, math.inf)
    return value, draws.var(dim=0) / num * _student(num)


def _student(num: int) -> float:
    return (num - 1) / (num - 3) if num > 3 else 1.0


def hutchinson(product: Products, probes: Tensor) -> tuple[Tensor, Tensor]:
    """`E zᵀ A z` over vectors with independent entries of variance one.

    Args:
        product: with A, symmetric.
        probes: `(S, P)`, random signs.

    Returns:
        The trace and its variance, scalars.

    Source: Hutchinson, Communications in Statistics 18 (1989).
    """
    return mean((probes * product(probes)).sum(dim=1))


def hutchpp(product: Products, sketch: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """Exact on the range of a sketch, by probes on the rest.

    Args:
        product: with A, symmetric. It multiplies twice as many vectors as the sketch has, and the
            probes.
        sketch: random rows `(K, P)`.
        probes: `(S, P)`, random signs, independent of the sketch.

    Returns:
        The trace and its variance, scalars.

    Source: Meyer, Musco, Musco and Woodruff, arXiv 2010.09649.
    """
    basis = torch.linalg.qr(product(sketch).T)[0].T
    rest = probes - (probes @ basis.T) @ basis
    images = product(torch.cat([basis, rest]))
    inside = (basis * images[: len(basis)]).sum()
    outside, variance = mean((rest * images[len(basis) :]).sum(dim=1))
    return inside + outside, variance


def xtrace(product: Products, tests: Tensor) -> tuple[Tensor, Tensor]:
    """Each vector in turn is the probe, and all others are the sketch.

    Args:
        product: with A, symmetric. It multiplies twice as many vectors as there are tests.
        tests: Gaussian rows `(K, P)`, 2 < K < P.

    Returns:
        The trace and its variance, scalars.

    Source: Epperly, Tropp and Webber, arXiv 2301.07825, with their normalisation of the probes.
    """
    k, size = tests.shape
    columns = tests.T
    basis, triangle = torch.linalg.qr(product(tests).T)
    inside = (basis.T @ product(basis.T).T).double()  # QᵀAQ
    own = (columns * (basis @ triangle)).sum(dim=0).double()  # ωᵀAω
    length = columns.double().square().sum(dim=0)
    along = (basis.T @ columns).double()  # QᵀΩ
    small = _Small((inside + inside.T) / 2, triangle.double(), along, own, length, size - k)
    away = _directions(small.images, torch.finfo(basis.dtype).eps)
    single, of_pairs = small.without_one(away), small.without_two(away)
    value, spread = mean(single)
    # The answers share their sketches. What is due to one vector at a time is in their spread;
    # what is due to pairs of vectors is so by half only, and twice in the variance of leaving out
    # one vector (the jackknife), which has still more of what is due to larger groups.
    left_out = (of_pairs.sum(dim=0) - of_pairs.diagonal()) / (k - 1)
    jackknife = left_out.var(correction=0) * (k - 1) * _student(k)
    return value, torch.minimum((2 * spread + jackknife) / 3, 2 * spread)


def _directions(triangle: Tensor, eps: float) -> Tensor:
    """Columns: what the range of a sketch, `R = QᵀAΩ`, loses without each of its vectors.

    Those of `R^{-T}`, with length one. If A has lower rank than the sketch, they lie where R is
    zero, and nothing is lost.
    """
    left, singular, right = torch.linalg.svd(triangle)
    smallest = (eps * singular[0]).clamp(min=torch.finfo(singular.dtype).tiny)
    singular = torch.maximum(singular, smallest)
    away = left @ (right / singular[:, None])
    return away / torch.linalg.vector_norm(away, dim=0)


@dataclass(frozen=True)
class _Small:
    """All that XTrace needs of the matrix A, in the basis Q of a sketch `AΩ`, in float64.

    Attributes:
        inside: `QᵀAQ`, `(K, K)`.
        images: `QᵀAΩ`, `(K, K)`.
        along: `QᵀΩ`, `(K, K)`.
        own: `ωᵀAω`, `(K,)`.
        length: `ωᵀω`, `(K,)`.
        outside: P − K.
    """

    inside: Tensor
    images: Tensor
    along: Tensor
    own: Tensor
    length: Tensor
    outside: int

    def without_one(self, away: Tensor) -> Tensor:
        """The trace with each vector as the probe and the sketch of all others, `(K,)`."""
        along = self._along(away)
        square = self.own - 2 * (along * self.images).sum(dim=0)
        square = square + (along * (self.inside @ along)).sum(dim=0)
        length = self.length - along.square().sum(dim=0)
        known = self.inside.trace() - (away * (self.inside @ away)).sum(dim=0)
        return known + (self.outside + 1) * square / length

    def without_two(self, away: Tensor) -> Tensor:
        """With vector i as the probe, and the sketch without j too: `(K, K)`, by i and j.

        The second direction lost is `t = (s_j − c s_i) / √(1 − c²)`, with c the cosine of both.
        """
        along = self._along(away)
        cosines = away.T @ away
        sines = (1 - cosines.square()).clamp(min=0).sqrt()
        distinct = sines > torch.finfo(sines.dtype).eps ** 0.5

        def second(of: Tensor) -> Tensor:
            """`tᵀ x_i` from all `s_jᵀ x_i`, by i and j."""
            part = of.T - cosines * of.diagonal()[:, None]
            return torch.where(distinct, part / sines, 0)

        pressed = self.inside @ along
        of_away = away.T @ self.inside @ away
        share = second(away.T @ along)
        square = self.own - 2 * (along * self.images).sum(dim=0) + (along * pressed).sum(dim=0)
        length = self.length - along.square().sum(dim=0)
        own = of_away.diagonal()
        lost = own - 2 * cosines * of_away + cosines.square() * own[:, None]
        lost = torch.where(distinct, lost / sines.square(), 0)
        known = self.inside.trace() - own[:, None] - lost
        square = square[:, None] + 2 * share * (
            second(away.T @ self.images) - second(away.T @ pressed)
        )
        square = square + share.square() * lost
        return known + (self.outside + 2) * square / (length[:, None] + share.square())

    def _along(self, away: Tensor) -> Tensor:
        """Each vector in the sketch of all others."""
        return self.along - away * (away * self.along).sum(dim=0)
