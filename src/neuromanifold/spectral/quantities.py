"""What a spectrum says in a few numbers, each with its error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from neuromanifold._estimate import Estimate
from neuromanifold._intervals import plus_minus
from neuromanifold.linalg import lanczos, traces
from neuromanifold.operators import FisherOperator
from neuromanifold.spectral.eigenpairs import extremes
from neuromanifold.spectral.exact import estimate_of, exactly, known_diagonal, spectrum
from neuromanifold.spectral.quadrature import bracketed, quadrature, require_damping

__all__ = ["Summary", "summary"]


@dataclass(frozen=True)
class Summary:
    """Numbers that describe the spectrum λ of a Fisher matrix.

    Errors are from "probes", standard errors, and from "iteration", bounds: how far more steps
    would move the number at most. Both are zero for an exact one, whose `draws` is 0.

    Attributes:
        trace: `Σ λ`, in nats/parameter².
        norm: Frobenius norm, `√Σ λ²`, in nats/parameter².
        effective_dimension: `Σ λ / (λ + damping)`, directions that the data determine more strongly
            than the damping.
        participation_ratio: `(Σ λ)² / Σ λ²`, how many eigenvalues share the trace.
        stable_rank: `Σ λ / λ_max`.
        condition_number: `(λ_max + damping) / (λ_min + damping)`.
        largest_eigenvalue: `λ_max`, in nats/parameter².
        learning_rate_bound: `2 / λ_max`, above which gradient descent on the quadratic model of the
            loss diverges.
        damping: in nats/parameter².
        method: what was done.
        layers: the same of each layer's block, by its name, if asked for.
    """

    trace: Estimate
    norm: Estimate
    effective_dimension: Estimate
    participation_ratio: Estimate
    stable_rank: Estimate
    condition_number: Estimate
    largest_eigenvalue: Estimate
    learning_rate_bound: Estimate
    damping: float
    method: str
    layers: Mapping[str, Summary] = field(default_factory=dict)

    @property
    def numbers(self) -> dict[str, Estimate]:
        """All of them, by name."""
        found = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Estimate)}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            **{name: number.to_dict() for name, number in self.numbers.items()},
            "damping": self.damping,
            "method": self.method,
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
        }

    def __str__(self) -> str:
        columns = [("all", self), *self.layers.items()]
        rows = [["", *(name for name, _ in columns)]]
        rows += [
            [name.replace("_", " "), *(_shown(column.numbers[name]) for _, column in columns)]
            for name in self.numbers
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows[0 if self.layers else 1 :]
        ]
        return "\n".join([*table, f"damping {self.damping:g}; {self.method}"])


def _shown(number: Estimate) -> str:
    value, stderr = number.value, number.stderr
    assert isinstance(value, Tensor)
    assert isinstance(stderr, Tensor)
    if not number.draws and not bool(stderr > 0):
        return f"{float(value):.4g}"
    return plus_minus(float(value), float(stderr))


def summary(
    F: FisherOperator,
    *,
    damping: float,
    per_layer: bool = False,
    probes: int | None = None,
    steps: int | None = None,
    tol: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Summary:
    """Trace, norm, dimensions, condition and largest eigenvalue of F, each with its error.

    Args:
        F: any Fisher matrix.
        damping: positive, in nats/parameter².
        per_layer: the same numbers of each layer's diagonal block too.
        probes: as for `density`: without probes and steps, numbers are exact where F can say them.
        steps: as for `density`.
        tol: as for `extremes`, where the largest eigenvalue is iterated.
        generator: source of the random vectors.

    Returns:
        The numbers; `print` shows a table.

    Raises:
        ValueError: If an argument makes no sense.
        TooLargeError: If probes times steps vectors would not fit.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(1, 1, bias=False), torch.full((8, 1), 2.0)
        >>> F = nm.fisher(model, nm.Gaussian(), x, nm.Gram(), estimator=nm.Exact())
        >>> print(nm.spectral.summary(F, damping=1.0))
        trace                4
        norm                 4
        effective dimension  0.8
        participation ratio  1
        stable rank          1
        condition number     1
        largest eigenvalue   4
        learning rate bound  0.5
        damping 1; all eigenvalues
    """
    require_damping(damping)
    values = spectrum(F) if probes is None and steps is None else None
    layers: dict[str, Summary] = {}
    again = partial(
        summary, damping=damping, probes=probes, steps=steps, tol=tol, generator=generator
    )
    if per_layer:
        names = dict.fromkeys(entry.block for entry in F.coverage)
        layers = {name: again(F.block(name)) for name in names}
    if values is not None:
        numbers, method = _of_spectrum(F, values, damping), "all eigenvalues"
    else:
        numbers, method = _of_products(F, damping, probes, steps, tol, generator)
    return Summary(**numbers, damping=damping, method=method, layers=layers)


def _of_spectrum(F: FisherOperator, values: Tensor, damping: float) -> dict[str, Estimate]:
    """From eigenvalues, descending, of which zeros may be missing."""
    trace, squares, top = values.sum(), values.square().sum(), values[0]
    lowest = values[-1] if len(values) == F.num_parameters else torch.zeros_like(top)
    found = {
        "trace": trace,
        "norm": squares.sqrt(),
        "effective_dimension": (values / (values + damping)).sum(),
        "participation_ratio": torch.where(squares > 0, trace.square() / squares, 0),
        "stable_rank": torch.where(top > 0, trace / top, 0),
        "condition_number": (top + damping) / (lowest + damping),
        "largest_eigenvalue": top,
        "learning_rate_bound": 2 / top,
    }
    return {name: exactly(F, value) for name, value in found.items()}


def _of_products(
    F: FisherOperator,
    damping: float,
    probes: int | None,
    steps: int | None,
    tol: float,
    generator: torch.Generator | None,
) -> tuple[dict[str, Estimate], str]:
    """From Lanczos' quadrature, and the largest eigenvalue by itself."""
    krylov = quadrature(F, probes, steps, generator)
    nodes, weights = krylov.gauss()
    draws = len(nodes)
    traced = F.num_parameters * (weights * nodes).sum(dim=1)
    squared = F.num_parameters * (weights * nodes.square()).sum(dim=1)
    known = known_diagonal(F)
    exact_trace = None if known is None else F.layout.flatten(known).double().sum()
    if exact_trace is not None:
        traced = exact_trace.expand(draws)
    trace, squares = traced.mean(), squared.mean()
    largest = extremes(F, 1, tol=tol, generator=generator)
    top, missing = largest.values[0].double(), largest.bounds[0].double()

    def number(value: Tensor, influences: Tensor | None, iteration: Tensor | float) -> Estimate:
        """Influences of the probes on it, to first order, and how far iteration may move it."""
        bound = torch.as_tensor(iteration, dtype=torch.float64, device=value.device)
        variances = {"iteration": bound.square()}
        if influences is None:
            return estimate_of(F, value, dict(variances), draws=0)
        variances["probes"] = traces.mean(influences)[1]
        return estimate_of(F, value, dict(variances), draws=draws)

    condition = (top + damping) / damping
    # The smallest eigenvalue is at least zero, and at most each node.
    at_least = (top + damping) / (nodes.amin() + damping)
    numbers = {
        "trace": number(trace, traced if exact_trace is None else None, 0.0),
        "norm": number(squares.sqrt(), squared / (2 * squares.sqrt()), 0.0),
        "effective_dimension": _effective_dimension(F, krylov, damping),
        "participation_ratio": number(
            trace.square() / squares,
            2 * trace * traced / squares - trace.square() * squared / squares.square(),
            0.0,
        ),
        "stable_rank": number(
            trace / top, traced / top if exact_trace is None else None, trace / top**2 * missing
        ),
        "condition_number": number(
            condition, None, torch.maximum(missing / damping, condition - at_least)
        ),
        "largest_eigenvalue": number(top, None, missing),
        "learning_rate_bound": number(2 / top, None, 2 / top**2 * missing),
    }
    method = f"Lanczos quadrature, {draws} probes, {nodes.shape[1]} steps; {largest.method}"
    return numbers, method


def _effective_dimension(
    F: FisherOperator, krylov: lanczos.Tridiagonal, damping: float
) -> Estimate:
    found = bracketed(F, krylov, lambda values: values / (values + damping), damping)
    probes, steps = found.variances["probes"], found.variances["steps"]
    return estimate_of(F, found.value, {"probes": probes, "iteration": steps}, draws=found.draws)
