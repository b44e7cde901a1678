"""laplace-torch: curvature for Laplace approximations, with its default backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.peers._peer import Named, Peer, copied, on, split
from benchmarks.workloads import Batch

__all__ = ["LAPLACE"]


def interface(kind: str, batch: Batch) -> Any:
    """Its curvature of a copied model: sums over samples."""
    from laplace import curvature

    return getattr(curvature, kind)(copied(batch).model, "classification")


def diagonal(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Named]]:
    return diagonal_of(interface("CurvlinopsEF", batch), batch, labels)


def diagonal_exact(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Named]]:
    return diagonal_of(interface("CurvlinopsGGN", batch), batch, labels)


def diagonal_of(curvature: Any, batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Named]]:
    def call() -> Callable[[], Named]:
        _, diagonal = curvature.diag(batch.inputs, labels)
        return lambda: split(diagonal / len(labels), batch.model)

    return call


LAPLACE = Peer(
    "laplace-torch",
    "laplace-torch",
    on("W1 W2 W3", {"diagonal": diagonal}) | on("W2", {"diagonal, exact": diagonal_exact}),
    {("W1", "diagonal, exact"): "it keeps the Jacobian of all logits, 14 GB"},
)
