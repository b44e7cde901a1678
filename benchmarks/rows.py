"""What is timed through the public interface, as data: one `Row` each, with a target and a check.

A new measurement is a new entry of `ROWS`; a new network is a new entry of `WORKLOADS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import neuromanifold as nm
from benchmarks.reference import Reference, check_close
from benchmarks.workloads import Batch

__all__ = ["LIKELIHOOD", "ROWS", "Row"]

LIKELIHOOD = nm.Categorical()


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        workload: key of `WORKLOADS`.
        quantity: what is computed, for a reader.
        target: upper bar, in forward and backward passes.
        prepare: untimed set-up, which returns the timed call. Labels are drawn with the generator.
        check: raises AssertionError unless the call's first answer agrees with the reference.
    """

    workload: str
    quantity: str
    target: float
    prepare: Callable[[Batch, torch.Generator], Callable[[], Any]]
    check: Callable[[Any, Reference], None]


def fisher(
    batch: Batch, structure: nm.structures.Structure, generator: torch.Generator
) -> nm.FisherOperator:
    """The Fisher of one sampled label per position."""
    return nm.fisher(batch.model, LIKELIHOOD, batch.inputs, structure, generator=generator)


# --- diagonal ------------------------------------------------------------------------------------


def diagonal(batch: Batch, generator: torch.Generator) -> Callable[[], nm.FisherOperator]:
    return lambda: fisher(batch, nm.Diagonal(), generator)


def check_diagonal(F: nm.FisherOperator, reference: Reference) -> None:
    answer = F.diagonal()
    for name, gradients in reference.gradients.items():
        check_close(answer[name], gradients.square().mean(0), terms=reference.num_samples)


# --- Kronecker factors ---------------------------------------------------------------------------


def kronecker(batch: Batch, generator: torch.Generator) -> Callable[[], nm.FisherOperator]:
    return lambda: fisher(batch, nm.Kronecker(), generator)


def check_kronecker(F: nm.FisherOperator, reference: Reference) -> None:
    """For Linear layers with one position: G V A, with A of the inputs and G of the gradients."""
    num_samples = reference.num_samples
    v = {name: torch.randn(g.shape[1:]) for name, g in reference.gradients.items()}
    answer = F @ v
    for layer, inputs in reference.inputs.items():
        weight, bias = f"{layer}.weight", f"{layer}.bias"
        a = torch.cat([inputs, torch.ones(num_samples, 1)], dim=1)
        g = reference.gradients[bias]  # of a single position: the gradient at the output
        matrix = torch.cat([v[weight], v[bias][:, None]], dim=1).double()
        product = (g.mT @ (g @ matrix @ a.mT) @ a) / num_samples**2
        check_close(answer[weight], product[:, :-1], terms=num_samples)
        check_close(answer[bias], product[:, -1], terms=num_samples)


# --- Gram ----------------------------------------------------------------------------------------


def gram_spectrum(batch: Batch, generator: torch.Generator) -> Callable[[], Tensor]:
    return lambda: fisher(batch, nm.Gram(), generator).eigenvalues()


def check_spectrum(eigenvalues: Tensor, reference: Reference) -> None:
    rows = reference.rows()
    exact = torch.linalg.eigvalsh(rows @ rows.mT / reference.num_samples).flip(0)
    check_close(eigenvalues, exact, terms=reference.num_samples)


@dataclass(frozen=True)
class Product:
    """A vector and its product with a Fisher matrix, both flat."""

    v: Tensor
    product: Tensor


def gram_product(batch: Batch, generator: torch.Generator) -> Callable[[], Product]:
    F = fisher(batch, nm.Gram(), generator)
    v = torch.randn(F.num_parameters)
    return lambda: Product(v, F @ v)


def check_product(answer: Product, reference: Reference) -> None:
    rows = reference.rows()
    expected = rows.mT @ (rows @ answer.v.double()) / reference.num_samples
    check_close(answer.product, expected, terms=reference.num_samples)


ROWS = [
    Row("W1", "diagonal", 1.25, diagonal, check_diagonal),
    Row("W1", "Kronecker factors", 1.75, kronecker, check_kronecker),
    Row("W1", "Gram spectrum, all 512 eigenvalues", 2.5, gram_spectrum, check_spectrum),
    Row("W1", "Gram product, repeated", 0.95, gram_product, check_product),
]
