"""curvlinops: linear operators of curvature matrices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers._peer import (
    TRACE_PRODUCTS,
    Factors,
    Peer,
    apart,
    factored,
    flat,
    on,
    split,
    without_positions,
)
from benchmarks.quantities import PROBES, STEPS
from benchmarks.workloads import DAMPING, Batch, direction

__all__ = ["CURVLINOPS"]

RESIDUAL = 1e-3
"""Of solves, as `quantities` asks for."""


def factory(
    kind: str, batch: Batch, labels: Tensor, **settings: Any
) -> tuple[Callable[[], Any], float]:
    """Makes one of its operators per position; and the number of positions.

    K-FAC and EK-FAC get the layers that they can factor, the others all parameters.
    """
    import curvlinops

    model, positions = without_positions(batch)
    modules = factored(model).values() if "KFAC" in kind else [model]
    parameters = [p for module in modules for p in module.parameters()]
    loss, data = nn.CrossEntropyLoss(), [(batch.inputs, labels.flatten())]
    settings |= {"check_deterministic": False, "num_data": len(labels)}
    build = getattr(curvlinops, f"{kind}LinearOperator")
    return lambda: build(model, loss, parameters, data, **settings), positions


# --- products ------------------------------------------------------------------------------------
# Fused attention has no forward derivative in torch, so they run inside the plain kernel.


def product_first(batch: Batch, _: Tensor) -> Callable[[], Callable[[], Tensor]]:
    make, positions = factory("GGN", batch, batch.targets)
    v = list(split(direction(batch), batch.model).values())

    def call() -> Callable[[], Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            pieces = make() @ v
        return lambda: positions * flat(pieces)

    return call


def product_repeated(batch: Batch, _: Tensor) -> Callable[[], Callable[[], Tensor]]:
    return repeated("GGN", batch, batch.targets)


def product_labels(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Tensor]]:
    """With positions, of each of them alone: not of a sample's sum."""
    return repeated("EF", batch, labels)


def repeated(kind: str, batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Tensor]]:
    make, positions = factory(kind, batch, labels)
    F, v = make(), list(split(direction(batch), batch.model).values())

    def call() -> Callable[[], Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            pieces = F @ v
        return lambda: positions * flat(pieces)

    return call


# --- Kronecker -----------------------------------------------------------------------------------


def kronecker_factory(kind: str, batch: Batch, labels: Tensor) -> tuple[Callable[[], Any], float]:
    """With the labels as they are, and the bias as a column of the weight."""
    return factory(
        kind,
        batch,
        labels,
        fisher_type="empirical",
        separate_weight_and_bias=False,
        num_per_example_loss_terms=labels[0].numel(),
    )


def pieces(batch: Batch) -> list[Tensor]:
    """The direction at the parameters of those layers."""
    v = split(direction(batch), batch.model)
    layers = factored(batch.model).items()
    return [v[f"{name}.{p}"] for name, layer in layers for p, _ in layer.named_parameters()]


def rejoined(batch: Batch, answer: list[Tensor], scale: float) -> Tensor:
    given = iter(answer)
    matrices = {}
    for name, layer in factored(batch.model).items():
        matrix = next(given).flatten(1)
        if layer.bias is not None:
            matrix = torch.cat([matrix, next(given)[:, None]], dim=1)
        matrices[name] = scale * matrix
    return apart(batch.model, matrices)


def kronecker(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Factors]]:
    make, _ = kronecker_factory("KFAC", batch, labels)

    def answer(K: Any) -> Factors:
        inputs, gradients = K._input_covariances, K._gradient_covariances
        return {name.removeprefix("model."): (inputs[name], gradients[name]) for name in inputs}

    def call() -> Callable[[], Factors]:
        K = make()
        K.compute_kronecker_factors()
        return lambda: answer(K)

    return call


def solve(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Tensor]]:
    from curvlinops import KFACInverseLinearOperator

    make, positions = kronecker_factory("KFAC", batch, labels)
    K = make()
    K.compute_kronecker_factors()
    v = pieces(batch)

    def call() -> Callable[[], Tensor]:
        # Its matrix is per position: (T K + damping) x = v is (K + damping / T) (T x) = v.
        inverse = KFACInverseLinearOperator(
            K, damping=DAMPING / positions, use_exact_damping=True, cache=False
        )
        x = inverse @ v
        return lambda: rejoined(batch, x, 1 / positions)

    return call


def ekfac(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Tensor]]:
    make, positions = kronecker_factory("EKFAC", batch, labels)
    v = pieces(batch)

    def call() -> Callable[[], Tensor]:
        E = make()
        E._maybe_compute_ekfac()
        return lambda: rejoined(batch, E @ v, positions)

    return call


# --- spectra and solves --------------------------------------------------------------------------


def top_eigenvalues(batch: Batch, _: Tensor) -> Callable[[], Callable[[], Tensor]]:
    """SciPy's Lanczos on its products, as in its documentation."""
    from scipy.sparse.linalg import eigsh

    make, positions = factory("GGN", batch, batch.targets)
    matrix = make().to_scipy()
    start = np.random.default_rng(0).standard_normal(matrix.shape[0]).astype(np.float32)

    def call() -> Callable[[], Tensor]:
        values = eigsh(matrix, k=10, tol=1e-3, v0=start, return_eigenvectors=False)
        return lambda: positions * torch.from_numpy(np.sort(values)[::-1].copy())

    return call


def density(batch: Batch, _: Tensor) -> Callable[[], Callable[[], dict[str, Tensor]]]:
    """The iterations of its `lanczos_approximate_spectrum`, which has no nodes and weights."""
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    make, positions = factory("GGN", batch, batch.targets)

    def answer(runs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        nodes = [positions * values for values, _ in runs]
        weights = [vectors[0].square() for _, vectors in runs]
        return {"nodes": torch.stack(nodes), "weights": torch.stack(weights)}

    def call() -> Callable[[], dict[str, Tensor]]:
        F = make()
        runs = [fast_lanczos(F, STEPS) for _ in range(PROBES)]
        return lambda: answer(runs)

    return call


def inverses(kind: str, batch: Batch, labels: Tensor) -> Callable[[], Any]:
    """Makes a damped operator's inverse by conjugate gradients."""
    from curvlinops import CGInverseLinearOperator
    from curvlinops.examples import IdentityLinearOperator

    make, _ = factory(kind, batch, labels)
    shapes = [tuple(p.shape) for p in batch.model.parameters()]
    identity = IdentityLinearOperator(shapes, batch.inputs.device, torch.float32)
    settings = {"tolerance": RESIDUAL, "eps": 0, "max_iter": 1000, "max_tridiag_iter": 0}
    return lambda: CGInverseLinearOperator(make() + DAMPING * identity, **settings)


def damped_first(batch: Batch, labels: Tensor, *, kind: str) -> Callable[[], Tensor]:
    make, v = inverses(kind, batch, labels), direction(batch)
    return lambda: make() @ v


def damped_further(batch: Batch, labels: Tensor) -> Callable[[], Tensor]:
    inverse, v = inverses("EF", batch, labels)(), direction(batch)
    return lambda: inverse @ v


def trace(batch: Batch, _: Tensor) -> Callable[[], Callable[[], Tensor]]:
    from curvlinops import hutchpp_trace

    make, positions = factory("GGN", batch, batch.targets)
    F = make()

    def call() -> Callable[[], Tensor]:
        value = hutchpp_trace(F, num_matvecs=TRACE_PRODUCTS)
        return lambda: positions * value

    return call


CURVLINOPS = Peer(
    "curvlinops",
    "curvlinops-for-pytorch",
    {
        **on(
            "W1 W2 W3 W4",
            {
                "product, first": product_first,
                "product, repeated": product_repeated,
                "product, records kept": product_labels,
                "Kronecker factors": kronecker,
            },
        ),
        **on("W1 W2", {"Kronecker solve": solve, "EK-FAC fit": ekfac}),
        **on(
            "W1",
            {
                "top-10 eigenvalues": top_eigenvalues,
                "spectral density": density,
                "damped solve, first": partial(damped_first, kind="EF"),
                "damped solve, further": damped_further,
                "damped solve, exact Fisher": partial(damped_first, kind="GGN"),
            },
        ),
        **on("W2", {"trace, 1 %": trace}),
    },
)
