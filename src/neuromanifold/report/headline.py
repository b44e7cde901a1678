"""The few numbers that come first, each with a caption in plain language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neuromanifold.report.numerals import MISSING, count, percent, quantity

__all__ = ["Fact", "effective_dimension", "facts", "reference_damping"]


@dataclass(frozen=True)
class Fact:
    """One headline number.

    Attributes:
        term: id of its entry in the glossary, or "" if it needs none.
        error: standard error of the value, or "".
    """

    label: str
    value: str
    unit: str
    caption: str
    term: str = ""
    error: str = ""


def reference_damping(analysis: Mapping[str, Any]) -> float | None:
    """The damping at which directions are counted: a hundredth of the largest eigenvalue.

    Relative to the spectrum, so that the count does not depend on the scale of the loss.

    Returns:
        In nats per parameter²; None if no eigenvalue above zero was measured.
    """
    spectrum = analysis.get("spectrum")
    return spectrum["eigenvalues"][0] / 100 if spectrum and spectrum["eigenvalues"] else None


def effective_dimension(eigenvalues: Sequence[float], damping: float) -> float:
    """Directions that the data determine more strongly than the damping: Σ λ / (λ + damping).

    Example:
        >>> effective_dimension([1.0, 1.0, 0.0], damping=1.0)
        1.0
    """
    return sum(value / (value + damping) for value in eigenvalues)


def facts(analysis: Mapping[str, Any]) -> list[Fact]:
    """The headline numbers of one model; the same labels, in the same order, for every model."""
    return [
        _trace(analysis),
        _largest_eigenvalue(analysis),
        _learning_rate(analysis),
        _effective_dimension(analysis),
        _parameters(analysis),
        _samples(analysis),
    ]


def _error(analysis: Mapping[str, Any], name: str) -> str:
    """The standard error of a headline number, "" if it is not known."""
    stderr = (analysis.get("stderr") or {}).get(name)
    return "" if stderr is None else f"± {quantity(stderr, digits=2)}"


def _trace(analysis: Mapping[str, Any]) -> Fact:
    return Fact(
        "Trace",
        quantity(analysis["trace"]),
        "nats per parameter²",
        "How sensitive the predictions are in total: the Fisher information of all parameters, "
        "added up.",
        "term-trace",
        _error(analysis, "trace"),
    )


def _largest_eigenvalue(analysis: Mapping[str, Any]) -> Fact:
    largest, trace = analysis["largest_eigenvalue"], analysis["trace"]
    caption = "Sensitivity along the most sensitive direction of all."
    if largest and trace:
        caption = (
            f"Sensitivity along the most sensitive direction of all; this one direction holds "
            f"{percent(largest / trace)} of the trace."
        )
    return Fact(
        "Largest eigenvalue",
        quantity(largest),
        "nats per parameter²",
        caption,
        "term-eigenvalue",
        _error(analysis, "largest_eigenvalue"),
    )


def _learning_rate(analysis: Mapping[str, Any]) -> Fact:
    return Fact(
        "Largest stable learning rate",
        quantity(analysis["max_learning_rate"]),
        "parameter² per nat",
        "Two over the largest eigenvalue. Plain gradient descent on the mean loss overshoots along "
        "that direction when it takes larger steps.",
        "term-learning-rate",
        _error(analysis, "max_learning_rate"),
    )


def _effective_dimension(analysis: Mapping[str, Any]) -> Fact:
    label, term = "Effective dimension", "term-effective-dimension"
    damping = reference_damping(analysis)
    if damping is None:
        return Fact(label, MISSING, "directions", "No eigenvalue above zero was measured.", term)
    value = effective_dimension(analysis["spectrum"]["eigenvalues"], damping)
    caption = (
        f"How many of {count(analysis['spectrum']['total_dimension'])} matter, against a damping "
        f"of {quantity(damping)}, a hundredth of the largest eigenvalue."
    )
    error = _error(analysis, "effective_dimension")
    return Fact(label, quantity(value), "directions", caption, term, error)


def _parameters(analysis: Mapping[str, Any]) -> Fact:
    total, trainable = analysis["model"]["num_parameters"], analysis["model"]["num_trainable"]
    caption = "All of them are trained, and measured here."
    if trainable != total:
        caption = f"Of {count(total)} in all; the others are frozen and not measured."
    return Fact("Trainable parameters", count(trainable), "", caption)


def _samples(analysis: Mapping[str, Any]) -> Fact:
    caption = (
        f"Inputs over which the matrix is a mean; {count(analysis['num_rows'])} gradients were "
        f"sent back through the network."
    )
    return Fact("Samples", count(analysis["num_samples"]), "", caption)
