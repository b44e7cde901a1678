"""hessian-eigenthings: Lanczos and trace estimates on products of the Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers._peer import TRACE_PRODUCTS, Peer, copied, on
from benchmarks.quantities import PROBES, STEPS
from benchmarks.workloads import Batch, direction

__all__ = ["HESSIAN_EIGENTHINGS"]


def factory(batch: Batch) -> tuple[Callable[[], Any], float]:
    """Makes the exact Fisher matrix per position; and the number of positions."""
    from hessian_eigenthings.operators.ggn import GGNOperator

    own = copied(batch)
    data = [(own.inputs, own.targets.flatten())]

    def make() -> Any:
        return GGNOperator(
            own.model,
            data,
            lambda model, pair: model(pair[0]).flatten(0, -2),
            lambda logits, pair: functional.cross_entropy(logits, pair[1]),
        )

    return make, float(own.targets[0].numel())


def product_first(batch: Batch, _: Tensor) -> Callable[[], Callable[[], Tensor]]:
    make, positions = factory(batch)
    v = direction(batch)

    def call() -> Callable[[], Tensor]:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no forward derivative
            product = make().matvec(v)
        return lambda: positions * product.detach()

    return call


def product_repeated(batch: Batch, _: Tensor) -> Callable[[], Callable[[], Tensor]]:
    make, positions = factory(batch)
    F, v = make(), direction(batch)

    def call() -> Callable[[], Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            product = F.matvec(v)
        return lambda: positions * product.detach()

    return call


def top_eigenvalues(batch: Batch, _: Tensor) -> Callable[[], Callable[[], Tensor]]:
    from hessian_eigenthings.algorithms.lanczos import lanczos

    make, positions = factory(batch)
    F = make()

    def call() -> Callable[[], Tensor]:
        found = lanczos(F, k=10, tol=1e-3, which="LA", seed=0)
        return lambda: positions * found.eigenvalues.sort(descending=True).values

    return call


def density(batch: Batch, _: Tensor) -> Callable[[], Callable[[], dict[str, Tensor]]]:
    from hessian_eigenthings.algorithms.spectral_density import spectral_density

    make, positions = factory(batch)

    def call() -> Callable[[], dict[str, Tensor]]:
        found = spectral_density(make(), num_runs=PROBES, lanczos_steps=STEPS, seed=0)
        nodes, weights = found.raw_eigenvalues, found.raw_weights
        return lambda: {"nodes": positions * nodes, "weights": weights}

    return call


def trace(batch: Batch, _: Tensor) -> Callable[[], Callable[[], Tensor]]:
    from hessian_eigenthings.algorithms.trace import trace as estimated

    make, positions = factory(batch)
    F = make()

    def call() -> Callable[[], Tensor]:
        found = estimated(F, num_matvecs=TRACE_PRODUCTS, method="hutch++")
        return lambda: positions * torch.tensor(found.estimate)

    return call


HESSIAN_EIGENTHINGS = Peer(
    "hessian-eigenthings",
    "hessian-eigenthings",
    {
        **on(
            "W1 W2 W3 W4", {"product, first": product_first, "product, repeated": product_repeated}
        ),
        **on("W1", {"top-10 eigenvalues": top_eigenvalues, "spectral density": density}),
        **on("W2", {"trace, 1 %": trace}),
    },
)
