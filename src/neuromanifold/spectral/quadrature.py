"""The density of eigenvalues, and traces of functions, by Lanczos' quadrature from random signs.

Sources: Ubaru, Chen and Saad, SIAM Journal on Matrix Analysis and Applications 38 (2017); Golub and
Meurant, Matrices, Moments and Quadrature, 2010, for the bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from neuromanifold._estimate import Estimate
from neuromanifold.linalg import lanczos, traces
from neuromanifold.operators import FisherOperator
from neuromanifold.spectral.exact import checked, estimate_of, exactly, signs, spectrum

__all__ = ["Density", "density", "logdet", "quadrature"]

PROBES = 16
STEPS = 32
LOWEST_DAMPING = 0.5
"""Share of the damping that a prescribed node may lie below zero, because of rounding."""


@dataclass(frozen=True)
class Density:
    """How eigenvalues are distributed, by points and their weights, for each of S probes.

    Attributes:
        nodes: `(S, m)` in nats/parameter², ascending: Ritz values, or eigenvalues where exact.
        weights: `(S, m)`, shares of the P eigenvalues, which sum to one for each probe.
        num_parameters: P.
        num_samples: N of the Fisher matrix.
        steps: m, products for each probe; 0 if the nodes are the eigenvalues.
    """

    nodes: Tensor
    weights: Tensor
    num_parameters: int
    num_samples: int
    steps: int

    @property
    def exact(self) -> bool:
        """Whether the nodes are the eigenvalues."""
        return self.steps == 0

    @property
    def method(self) -> str:
        """What was done, for a reader."""
        if self.exact:
            return "all eigenvalues"
        return f"Lanczos quadrature, {len(self.nodes)} probes, {self.steps} steps"

    def total(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """`tr f(F)`, the sum of a function over all eigenvalues.

        The standard error is that of the probes. Polynomials of degree up to `2 steps − 1` have no
        other; functions with a narrow feature need steps enough to see it.

        Args:
            function: acts on tensors of eigenvalues, elementwise.

        Example:
            >>> import torch, neuromanifold as nm
            >>> model, x = torch.nn.Linear(4, 3), torch.randn(64, 4)
            >>> F = nm.fisher(model, nm.Categorical(), x, nm.Dense())
            >>> found = nm.spectral.density(F)
            >>> bool(torch.isclose(found.total(lambda e: e).value, F.trace().double()))
            True
        """
        return self._estimate(self.num_parameters * (self.weights * function(self.nodes)).sum(1))

    def smoothed(self, grid: Tensor, width: float = 0.1, *, decades: bool = True) -> Estimate:
        """The density on a grid: the share of eigenvalues per decade, or per nat/parameter².

        Args:
            grid: eigenvalues `(M,)`, positive where decades are asked for.
            width: standard deviation of the normal kernel that smooths it, in decades or in
                nats/parameter².
            decades: smooth along the logarithm. Eigenvalues of zero, of which there are many, are
                then far to the left of any grid.

        Returns:
            `(M,)`, whose integral over the (logarithmic) axis is one less the share of zeros.

        Raises:
            ValueError: If the width is not positive, or a logarithm is asked of a number <= 0.
        """
        if not width > 0:
            raise ValueError(f"width is a number > 0, got {width!r}.")
        grid = grid.to(self.nodes)
        if decades and not bool((grid > 0).all()):
            raise ValueError("A grid of decades takes eigenvalues > 0; got one that is not.")
        points, centres = (grid.log10(), self.nodes.log10()) if decades else (grid, self.nodes)
        # One point at a time: (S, m, M) numbers may be many.
        heights = torch.stack(
            [
                (self.weights * (-0.5 * ((x - centres) / width).square()).exp()).sum(dim=1)
                for x in points
            ],
            dim=1,
        )
        return self._estimate(heights / (width * math.sqrt(2 * math.pi)))

    def cumulative(self, grid: Tensor) -> Estimate:
        """The share of eigenvalues that are at most as large as each point of a grid `(M,)`."""
        grid = grid.to(self.nodes)
        sums = torch.cat([torch.zeros_like(self.weights[:, :1]), self.weights.cumsum(1)], dim=1)
        many = grid.expand(len(self.nodes), -1).contiguous()
        return self._estimate(sums.gather(1, torch.searchsorted(self.nodes, many, right=True)))

    def _estimate(self, draws: Tensor) -> Estimate:
        value, variance = traces.mean(draws)
        if self.exact:
            variance = torch.zeros_like(value)
        count = 0 if self.exact else len(draws)
        return Estimate(value, {"probes": variance}, num_samples=self.num_samples, draws=count)


def density(
    F: FisherOperator,
    probes: int | None = None,
    steps: int | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Density:
    """How the eigenvalues of F are distributed.

    Args:
        F: any Fisher matrix.
        probes: random vectors; each product is taken for all of them at once. Without probes and
            steps, eigenvalues are exact where F can say them; elsewhere there are 16 probes and
            32 steps. Where few eigenvalues make most of a sum, intervals of 95 % need some 50
            probes to hold as often as that; with 24 it is 90 %.
        steps: products for each probe.
        generator: source of the random signs.

    Returns:
        Nodes and weights in float64, which can be smoothed, accumulated, and summed up.

    Raises:
        ValueError: If probes or steps are no positive whole numbers.
        TooLargeError: If probes times steps vectors would not fit.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(40, 20), torch.randn(64, 40)
        >>> F = nm.fisher(model, nm.Gaussian(), x, nm.Implicit(), estimator=nm.Exact())
        >>> found = nm.spectral.density(F, probes=4, steps=8)
        >>> found.nodes.shape, found.method
        (torch.Size([4, 8]), 'Lanczos quadrature, 4 probes, 8 steps')
    """
    if probes is None and steps is None and (values := spectrum(F)) is not None:
        return of_eigenvalues(F, values)
    nodes, weights = quadrature(F, probes, steps, generator).gauss()
    return Density(nodes, weights, F.num_parameters, F.num_samples, nodes.shape[1])


def of_eigenvalues(F: FisherOperator, values: Tensor) -> Density:
    """The exact density; eigenvalues that are zero and not listed are one node."""
    p = F.num_parameters
    weights = torch.full_like(values, 1 / p)
    if len(values) < p:
        values = torch.cat([values, values.new_zeros(1)])
        weights = torch.cat([weights, weights.new_full((1,), 1 - len(weights) / p)])
    return Density(values.flip(0)[None], weights.flip(0)[None], p, F.num_samples, steps=0)


def quadrature(
    F: FisherOperator, probes: int | None, steps: int | None, generator: torch.Generator | None
) -> lanczos.Tridiagonal:
    """Lanczos' iteration with F from random signs."""
    num = PROBES if probes is None else checked("probes", probes, 1)
    steps = STEPS if steps is None else checked("steps", steps, 1)
    steps = min(steps, F.num_parameters)
    like = torch.empty(0, dtype=F.dtype, device=F.device)
    lanczos.require_fits(num, steps, F.num_parameters, like)
    return lanczos.tridiagonal(F._matmat, signs(F, num, generator), steps)


def logdet(
    F: FisherOperator,
    *,
    damping: float,
    probes: int | None = None,
    steps: int | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    """`log det(F + damping · I)`, by Lanczos' quadrature where F has no exact answer.

    Args:
        F: any Fisher matrix.
        damping: positive, in nats/parameter².
        probes: as for `density`.
        steps: as for `density`. More of them are needed the smaller the damping is.
        generator: source of the random signs.

    Returns:
        A scalar; variances are from "probes", and from "steps": the square of half the distance
        of two bounds, Gauss's and Radau's, between which more steps would end.

    Raises:
        ValueError: If the damping is not positive and finite.
        TooLargeError: If probes times steps vectors would not fit.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(40, 20), torch.randn(64, 40)
        >>> F = nm.fisher(model, nm.Gaussian(), x, nm.Gram(), estimator=nm.Exact())
        >>> found = nm.spectral.logdet(F, damping=0.1, probes=8)
        >>> bool((found.value - F.logdet(damping=0.1)).abs() < 5 * found.stderr)
        True
    """
    require_damping(damping)
    if probes is None and steps is None and (values := spectrum(F)) is not None:
        logs = (values / damping).log1p().sum() + F.num_parameters * math.log(damping)
        return exactly(F, logs)
    found = quadrature(F, probes, steps, generator)
    return bracketed(F, found, lambda values: (values + damping).log(), damping)


def bracketed(
    F: FisherOperator,
    found: lanczos.Tridiagonal,
    function: Callable[[Tensor], Tensor],
    damping: float,
) -> Estimate:
    """`tr f(F)` for an f that grows ever more slowly from `−damping` on, between two bounds."""
    (nodes, weights), (lower_nodes, lower_weights) = found.gauss(), found.radau()
    lower_nodes = lower_nodes.clamp(min=-LOWEST_DAMPING * damping)
    upper = F.num_parameters * (weights * function(nodes)).sum(dim=1)
    lower = F.num_parameters * (lower_weights * function(lower_nodes)).sum(dim=1)
    value, variance = traces.mean((upper + lower) / 2)
    half = (upper - lower).mean() / 2
    variances = {"probes": variance, "steps": half.square()}
    return estimate_of(F, value, dict(variances), draws=len(nodes))


def require_damping(damping: float) -> None:
    """Refuse what is no positive damping.

    Raises:
        ValueError: If it is not positive and finite.
    """
    if not (isinstance(damping, (int, float)) and math.isfinite(damping) and damping > 0):
        raise ValueError(f"damping is a finite number > 0 in nats/parameter², got {damping!r}.")
