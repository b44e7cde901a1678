"""What is computed, by name: the form of the answer, what it should be, and how far it may be off.

Every library gives an answer in the form that is said here, or a function without arguments that
makes it of what was computed; that function is called for the check only and is not timed. Flat
vectors have the order of `model.named_parameters()`. A sample's log-probability is summed over its
positions, and F is the mean over samples. "Labels" are the sampled ones of a run, (N, *T); exact is
the expectation over all labels; v is `direction(batch)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.reference import Probed, Reference
from benchmarks.workloads import DAMPING

__all__ = ["PROBES", "QUANTITIES", "STEPS", "Drawn", "Quantity", "check", "check_drawn"]

ROUNDINGS = 10.0
"""How much more than float32 does to the gradient of the loss it may do to an answer."""

LEAST_ROUNDING = 1024 * torch.finfo(torch.float32).eps
"""Relative to an answer's norm: sums here have some 10³ terms, in any order."""

CANCELLED = 1e-4
"""A parameter whose norm is below this share of the whole may be off by rounding of the whole."""

ITERATED = 1e-3
"""What iterations are asked for."""

STANDARD_ERRORS = 6.0

PROBES, STEPS = 4, 16
"""Random vectors of a spectral density, and products with each: enough for the largest eigenvalue
to be as accurate as iterations are asked to be."""

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""A and G by layer."""


@dataclass(frozen=True)
class Drawn:
    """An answer with labels that the library drew by itself: right on average only."""

    answer: Any


@dataclass(frozen=True)
class Quantity:
    """One thing to compute.

    Attributes:
        form: of the answer, for whoever writes one.
        expected: the reference's answer.
        compare: `compare(answer, expected, rounding)` raises AssertionError unless they agree up
            to the rounding, relative to norms.
        total: a number to judge answers with labels of their own by; None if they cannot be judged.
    """

    form: str
    expected: Callable[[Reference], Any]
    compare: Callable[[Any, Any, float], None]
    total: Callable[[Any], Tensor] | None = None


def check(quantity: Quantity, answer: Any, expected: Any, reference: Reference) -> None:
    """Raise AssertionError, with what is wrong, unless an answer is right."""
    rounding = max(LEAST_ROUNDING, ROUNDINGS * reference.rounding)
    quantity.compare(_settled(answer), expected, rounding)


def check_drawn(quantity: Quantity, drawn: Drawn, references: Iterable[Reference]) -> None:
    """The same for an answer with other labels, from several draws of them by the reference."""
    assert quantity.total is not None, "labels of its own: no check is known."
    totals = torch.stack([quantity.total(quantity.expected(r)) for r in references]).cpu()
    found = quantity.total(_settled(drawn.answer)).double().cpu()
    stderr = totals.std() * math.sqrt(1 + 1 / len(totals))
    apart = float((found - totals.mean()).abs() / stderr)
    assert apart <= STANDARD_ERRORS, (
        f"total {float(found):.3g}, expected {float(totals.mean()):.3g}: "
        f"{apart:.0f} standard errors apart."
    )


def _settled(answer: Any) -> Any:
    return answer() if callable(answer) else answer


# --- how answers are compared ------------------------------------------------------------------


def close(answer: Tensor, expected: Tensor, rounding: float) -> None:
    """The whole of two tensors."""
    _require_close(answer, expected, rounding * float(expected.norm()))


def close_as_iterated(answer: Tensor, expected: Tensor, rounding: float) -> None:
    """The same for answers that iterations may give."""
    close(answer, expected, max(rounding, ITERATED))


def _require_close(answer: Tensor, expected: Tensor, bound: float, where: str = "") -> None:
    assert answer.shape == expected.shape, (
        f"{where}shape {tuple(answer.shape)}, expected {tuple(expected.shape)}."
    )
    error = float((answer.to(expected) - expected).norm())
    assert error <= bound, (
        f"{where}off by {error / float(expected.norm()):.1e} of its norm, "
        f"allowed {bound / float(expected.norm()):.1e}."
    )


def close_by_name(
    answer: Mapping[str, Tensor], expected: Mapping[str, Tensor], rounding: float
) -> None:
    """Each parameter for itself."""
    least = CANCELLED * math.hypot(*(float(e.norm()) for e in expected.values()))
    for name, e in expected.items():
        assert name in answer, f"{name} is missing."
        bound = rounding * max(float(e.norm()), least)
        _require_close(answer[name].reshape(e.shape), e, bound, f"{name}: ")


def same_factors(answer: Factors, expected: Factors, rounding: float) -> None:
    """Both factors of each layer up to a factor; the bias may be left out."""
    for name, sides in expected.items():
        assert name in answer, f"{name} is missing."
        for side, given, right in zip("AG", answer[name], sides, strict=True):
            part, mine = right[: len(given), : len(given)], given.to(right)
            _require_close(mine / mine.norm(), part / part.norm(), rounding, f"{name}, {side}: ")


def solves(answer: Tensor, reference: Reference, rounding: float) -> None:
    """Residual of the exact Fisher."""
    x = answer.to(reference.direction)
    left = reference.exact_product(x) + DAMPING * x
    v = reference.direction
    _require_close(left, v, max(rounding, ITERATED) * float(v.norm()), "residual: ")


def within_percents(answer: Tensor, expected: Tensor, rounding: float) -> None:
    """An estimate with a standard error of 1 %."""
    error = float((torch.as_tensor(answer).double().cpu() - expected.cpu()) / expected.cpu())
    assert abs(error) <= 0.01 * STANDARD_ERRORS + rounding, f"off by {error:.1%}."


def same_density(answer: Mapping[str, Tensor], expected: Probed, rounding: float) -> None:
    """Its upper end, and its mean, which is known from other probes."""
    nodes, weights = (answer[key].double().to(expected.largest) for key in ("nodes", "weights"))
    assert nodes.shape == weights.shape == (PROBES, STEPS), (
        f"shapes {tuple(nodes.shape)} and {tuple(weights.shape)}, expected {(PROBES, STEPS)}."
    )
    close_as_iterated(nodes.amax(dim=1), expected.largest.expand(PROBES), rounding)
    draws = expected.draws
    stderr = float(draws.std()) * math.sqrt(1 / PROBES + 1 / len(draws))
    error = float((nodes * weights).sum(dim=1).mean() - draws.mean())
    assert abs(error) <= STANDARD_ERRORS * stderr, f"mean off by {error / stderr:.0f} errors."


# --- totals ------------------------------------------------------------------------------------


def total_by_name(answer: Mapping[str, Tensor]) -> Tensor:
    """Sum of all entries."""
    return torch.stack([x.sum() for x in answer.values()]).sum()


def spread_of_gradients(answer: Factors) -> Tensor:
    """Norm over trace of the factors G, which does not depend on their scale; a mean of layers."""
    return torch.stack([g.norm() / g.trace() for _, g in answer.values()]).mean()


QUANTITIES = {
    "diagonal": Quantity(
        "diag F with labels; by name, shaped like the parameters",
        Reference.diagonal,
        close_by_name,
        total_by_name,
    ),
    "diagonal, exact": Quantity(
        "diag F, exact; by name, shaped like the parameters",
        Reference.exact_diagonal,
        close_by_name,
    ),
    "product, first": Quantity("F v, exact, with all set-up; (P,)", Reference.exact_product, close),
    "product, repeated": Quantity(
        "F v, exact, set-up not timed; (P,)", Reference.exact_product, close
    ),
    "product, records kept": Quantity(
        "F v with labels, set-up not timed; (P,)", Reference.product, close
    ),
    "Kronecker factors": Quantity(
        "factors with labels, all positions as samples ('expand'); by name of the Linear or Conv2d "
        "layer the pair A (I or I + 1 for the bias, squared) and G (O, O), each up to a factor",
        Reference.factors,
        same_factors,
        spread_of_gradients,
    ),
    "Kronecker solve": Quantity(
        "x with (K + DAMPING) x = v, K = (Σ a aᵀ / NT) ⊗ (Σ g gᵀ / N) with labels, by layer, bias "
        "as last column; factors given, but not decomposed; (P,)",
        Reference.kronecker_solve,
        close_as_iterated,
    ),
    "EK-FAC fit": Quantity(
        "E v: factors with labels, their eigenbases, in them second moments of the samples' "
        "gradients with the same labels; (P,)",
        Reference.eigenkronecker,
        close_as_iterated,
        Tensor.norm,
    ),
    "Gram spectrum, all eigenvalues": Quantity(
        "of F with labels, the N that can be non-zero, descending",
        Reference.eigenvalues,
        close,
        Tensor.sum,
    ),
    "Gram matrix, NTK": Quantity(
        "inner products of the samples' gradients with labels; (N, N)",
        lambda reference: reference.gram,
        close,
        Tensor.trace,
    ),
    "top-10 eigenvalues": Quantity(
        "of F, exact, descending, to a relative accuracy of 1e-3; (10,)",
        lambda reference: reference.largest(10),
        close_as_iterated,
    ),
    "spectral density": Quantity(
        f"of F, exact, by Lanczos' quadrature: mapping of nodes and weights, ({PROBES}, {STEPS}) "
        "for as many random vectors and products with each",
        Reference.probed,
        same_density,
    ),
    "diagonal, error bars": Quantity(
        "diag F, exact, and 'NAME, variance', that of the diagonal with one label per input; by "
        "name, shaped like the parameters",
        lambda reference: reference.diagonal_and_variance,
        close_by_name,
    ),
    "damped solve, first": Quantity(
        "x with (F + DAMPING) x = v, F with labels, with all set-up, to 1e-3; (P,)",
        Reference.solve,
        close_as_iterated,
    ),
    "damped solve, further": Quantity(
        "the same, set-up not timed; (P,)", Reference.solve, close_as_iterated
    ),
    "damped solve, exact Fisher": Quantity(
        "the same with exact F, with all set-up, to a residual of 1e-3; (P,)",
        lambda reference: reference,
        solves,
    ),
    "trace, 1 %": Quantity(
        "tr F, exact Fisher, with a standard error of 1 % of it or less; a scalar",
        Reference.exact_trace,
        within_percents,
    ),
    "unit-wise": Quantity(
        "F v of one block per unit (a row of a layer's weight with its bias), with labels; (P,)",
        Reference.unitwise,
        close,
    ),
    "quasi-diagonal": Quantity(
        "F v of the diagonal and each unit's couplings with its bias, with labels; (P,)",
        Reference.quasidiagonal,
        close,
    ),
    "mean-field": Quantity(
        "F v of the mean-field metric, with labels; (P,)", Reference.meanfield, close
    ),
}
"""By name; a row of the suite is one of these on one workload."""
