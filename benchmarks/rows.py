"""What is timed through the public interface, as data: one `Row` for a quantity on a workload.

A new measurement is a new entry of `ROWS`; what it should give is an entry of `QUANTITIES`, and a
new network one of `WORKLOADS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import neuromanifold as nm
from benchmarks import floors
from benchmarks.quantities import PROBES, STEPS
from benchmarks.workloads import DAMPING, Batch, direction
from neuromanifold.operators import BlockOperator
from neuromanifold.structures import Structure
from neuromanifold.structures.kronecker import KroneckerMatrix

__all__ = ["CALLS", "LIKELIHOOD", "ROWS", "Prepare", "Row"]

LIKELIHOOD = nm.Categorical()

Prepare = Callable[[Batch, torch.Generator], Callable[[], Any]]
"""Set-up that is not timed; it returns the timed call. Labels are drawn with the generator."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        workload: key of `WORKLOADS`.
        quantity: key of `QUANTITIES`.
        prepare: makes the timed call.
        target: upper bar, in forward and backward passes; None if there is none.
        floor: the least number of operations that the quantity takes; None where most of them are
            iterations or decompositions, whose number is not known beforehand.
    """

    workload: str
    quantity: str
    prepare: Prepare
    target: float | None = None
    floor: floors.Floor | None = None


def measured(
    structure: Structure, *, exact: bool = False
) -> Callable[[Batch, torch.Generator], nm.FisherOperator]:
    """The Fisher matrix of a batch: of one sampled label per position, or of all."""

    def fisher(batch: Batch, generator: torch.Generator) -> nm.FisherOperator:
        estimator = nm.Exact() if exact else nm.MonteCarlo(1)
        return nm.fisher(
            batch.model,
            LIKELIHOOD,
            batch.inputs,
            structure,
            estimator=estimator,
            generator=generator,
        )

    return fisher


# --- diagonals and structures of units ---------------------------------------------------------


def diagonal(batch: Batch, generator: torch.Generator, *, exact: bool = False) -> Any:
    return lambda: measured(nm.Diagonal(), exact=exact)(batch, generator).diagonal()


def measurement(structure: Structure) -> Prepare:
    """Time to measure; a product with it is taken for the check."""

    def prepare(batch: Batch, generator: torch.Generator) -> Callable[[], Any]:
        def run() -> Callable[[], Tensor]:
            F = measured(structure)(batch, generator)
            return lambda: F @ direction(batch)

        return run

    return prepare


# --- products ----------------------------------------------------------------------------------


def first_product(batch: Batch, generator: torch.Generator) -> Callable[[], Tensor]:
    v = direction(batch)
    return lambda: measured(nm.Implicit(), exact=True)(batch, generator) @ v


def repeated_product(
    batch: Batch, generator: torch.Generator, *, structure: Structure, exact: bool
) -> Callable[[], Tensor]:
    F, v = measured(structure, exact=exact)(batch, generator), direction(batch)
    return lambda: F @ v


# --- Kronecker factors -------------------------------------------------------------------------


def kronecker(batch: Batch, generator: torch.Generator) -> Callable[[], Any]:
    def run() -> Callable[[], Any]:
        F = measured(nm.Kronecker())(batch, generator)
        return partial(factors, F)

    return run


def factors(F: nm.FisherOperator) -> dict[str, tuple[Tensor, Tensor]]:
    """A and G of every layer that has both as whole matrices."""
    assert isinstance(F, BlockOperator)
    return {
        matrix.block.name: (matrix.inputs[0], matrix.outputs[0])
        for matrix in F.blocks
        if isinstance(matrix, KroneckerMatrix) and matrix.inputs.ndim == matrix.outputs.ndim == 3
    }


def kronecker_solve(batch: Batch, generator: torch.Generator) -> Callable[[], Tensor]:
    F, v = measured(nm.Kronecker())(batch, generator), direction(batch)
    # A multiple is a new operator, whose eigenvectors nobody has computed yet.
    return lambda: (1.0 * F).solve(v, damping=DAMPING)


# --- sample space, spectra and solves ----------------------------------------------------------


def gram_spectrum(batch: Batch, generator: torch.Generator) -> Callable[[], Tensor]:
    return lambda: measured(nm.Gram())(batch, generator).eigenvalues()


def gram_matrix(batch: Batch, generator: torch.Generator) -> Callable[[], Any]:
    def run() -> Callable[[], Tensor]:
        F = measured(nm.Gram())(batch, generator)
        assert isinstance(F, nm.structures.gram.GramOperator)
        gram = F.gram
        return lambda: gram * F.num_samples

    return run


def largest(batch: Batch, _: torch.Generator) -> Callable[[], Tensor]:
    def run() -> Tensor:
        F = nm.spectral.operator(batch.model, LIKELIHOOD, batch.inputs)
        return nm.spectral.extremes(F, 10, tol=1e-3).values

    return run


def density(batch: Batch, generator: torch.Generator) -> Callable[[], dict[str, Tensor]]:
    def run() -> dict[str, Tensor]:
        F = nm.spectral.operator(batch.model, LIKELIHOOD, batch.inputs)
        found = nm.spectral.density(F, PROBES, STEPS, generator=generator)
        return {"nodes": found.nodes, "weights": found.weights}

    return run


def first_solve(batch: Batch, generator: torch.Generator) -> Callable[[], Tensor]:
    v = direction(batch)
    return lambda: measured(nm.Gram())(batch, generator).solve(v, damping=DAMPING)


def exact_solve(batch: Batch, generator: torch.Generator) -> Callable[[], Tensor]:
    v = direction(batch)

    def run() -> Tensor:
        F = measured(nm.Implicit(), exact=True)(batch, generator)
        return nm.linalg.krylov.conjugate_gradients(
            lambda x: F @ x + DAMPING * x, v, steps=SOLVE_STEPS
        )

    return run


SOLVE_STEPS = 12
"""The fewest even number with a residual below 1e-3 on W1: 4e-4."""


def further_solve(batch: Batch, generator: torch.Generator) -> Callable[[], Tensor]:
    F, v = measured(nm.Gram())(batch, generator), direction(batch)
    F.solve(v, damping=DAMPING)
    return lambda: F.solve(v, damping=DAMPING)


ONE_PERCENT = 0.0196
"""Half the width of a 95% interval whose standard error is one percent."""


def trace(batch: Batch, generator: torch.Generator) -> Callable[[], Tensor]:
    def run() -> Tensor:
        found = nm.estimate(
            batch.model, LIKELIHOOD, batch.inputs, "trace", rtol=ONE_PERCENT, generator=generator
        )
        assert isinstance(found.value, Tensor)
        return found.value

    return run


def error_bars(batch: Batch, _: torch.Generator) -> Callable[[], dict[str, Tensor]]:
    def run() -> dict[str, Tensor]:
        found = nm.variance.diagonal(batch.model, LIKELIHOOD, batch.inputs)
        value, variance = found.value, found.variances["labels"]
        assert isinstance(value, dict)
        assert isinstance(variance, dict)
        return {**value, **{f"{name}, variance": v for name, v in variance.items()}}

    return run


# --- the rows ----------------------------------------------------------------------------------

BY_SAMPLES = partial(repeated_product, structure=nm.Gram(), exact=False)
BY_MODEL = partial(repeated_product, structure=nm.Implicit(), exact=True)


def _everywhere(
    quantity: str,
    prepare: Callable[..., Callable[[], Any]],
    floor: floors.Floor,
    *targets: float | None,
) -> list[Row]:
    """On W1, W2, ..., with their targets."""
    return [
        Row(f"W{i}", quantity, prepare, target, floor) for i, target in enumerate(targets, start=1)
    ]


ROWS = [
    *_everywhere("diagonal", diagonal, floors.diagonal, 1.2, 1.9, 1.25, 1.8),
    *_everywhere("product, first", first_product, floors.first_product, 1.8, 1.65, 1.9, 1.65),
    *_everywhere("product, repeated", BY_MODEL, floors.product, 1.15, 1.3, 1.2, 1.3),
    *_everywhere("product, records kept", BY_SAMPLES, floors.kept_product, 0.85, 1.0, 0.9, 1.1),
    *_everywhere("Kronecker factors", kronecker, floors.kronecker, 1.6, 2.5, 1.55, None),
    *_everywhere(
        "diagonal, exact", partial(diagonal, exact=True), floors.exact_diagonal, None, None
    ),
    *_everywhere(
        "quasi-diagonal", measurement(nm.QuasiDiagonal()), floors.quasidiagonal, None, None
    ),
    Row("W1", "Kronecker solve", kronecker_solve),
    Row("W2", "Kronecker solve", kronecker_solve),
    Row("W1", "EK-FAC fit", measurement(nm.EigenKronecker())),
    Row("W2", "EK-FAC fit", measurement(nm.EigenKronecker())),
    Row("W1", "mean-field", measurement(nm.MeanField())),
    Row("W2", "unit-wise", measurement(nm.UnitWise())),
    Row("W1", "Gram spectrum, all eigenvalues", gram_spectrum, 2.2),
    Row("W1", "Gram matrix, NTK", gram_matrix, None, floors.gram),
    Row("W1", "top-10 eigenvalues", largest),
    Row("W1", "spectral density", density),
    Row("W1", "diagonal, error bars", error_bars, None, floors.error_bars),
    Row("W2", "diagonal, error bars", error_bars, None, floors.error_bars),
    Row("W1", "damped solve, first", first_solve, 4.0),
    Row("W1", "damped solve, further", further_solve, 2.0),
    Row("W1", "damped solve, exact Fisher", exact_solve),
    Row("W2", "trace, 1 %", trace),
]
"""With the targets that were set before any of this was measured."""

CALLS = {
    "diagonal": "nm.fisher(model, likelihood, x, nm.Diagonal())",
    "product, first": "nm.fisher(model, likelihood, x, nm.Implicit(), estimator=nm.Exact()) @ v",
    "product, repeated": "F @ v",
    "product, records kept": "F = nm.fisher(model, likelihood, x, nm.Gram()); F @ v",
    "Kronecker factors": "nm.fisher(model, likelihood, x, nm.Kronecker())",
    "diagonal, exact": "nm.fisher(model, likelihood, x, nm.Diagonal(), estimator=nm.Exact())",
    "quasi-diagonal": "nm.fisher(model, likelihood, x, nm.QuasiDiagonal())",
    "Kronecker solve": "nm.fisher(model, likelihood, x, nm.Kronecker()).solve(v, damping=0.01)",
    "EK-FAC fit": "nm.fisher(model, likelihood, x, nm.EigenKronecker())",
    "mean-field": "nm.fisher(model, likelihood, x, nm.MeanField())",
    "unit-wise": "nm.fisher(model, likelihood, x, nm.UnitWise())",
    "Gram spectrum, all eigenvalues": "nm.fisher(model, likelihood, x, nm.Gram()).eigenvalues()",
    "Gram matrix, NTK": "nm.fisher(model, likelihood, x, nm.Gram()).gram",
    "top-10 eigenvalues": "nm.spectral.extremes(nm.spectral.operator(model, likelihood, x), 10)",
    "spectral density": "F = nm.spectral.operator(model, likelihood, x); "
    "nm.spectral.density(F, probes=4, steps=16)",
    "diagonal, error bars": 'nm.variance.diagonal(model, likelihood, x).error("labels")',
    "damped solve, first": "nm.fisher(model, likelihood, x, nm.Gram()).solve(v, damping=0.01)",
    "damped solve, further": "F.solve(v, damping=0.01)",
    "damped solve, exact Fisher": "F = nm.fisher(model, likelihood, x, nm.Implicit(), "
    "estimator=nm.Exact()); "
    "nm.linalg.krylov.conjugate_gradients(lambda x: F @ x + 0.01 * x, v, steps=12)",
    "trace, 1 %": 'nm.estimate(model, likelihood, x, "trace", rtol=0.0196)',
}
"""How a user asks for each quantity."""
