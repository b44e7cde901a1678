"""`python -m benchmarks.spectral`: whole spectra and largest eigenvalues, against their bars.

All non-zero eigenvalues of the Monte Carlo Fisher of the MLP, in units of forward and backward; and
the ten largest of the exact Fisher of the conv net, against products of curvlinops with SciPy's
`eigsh` to the same residual. Where curvlinops is not installed, our own products stand in for its,
and the table says so. BENCH chooses how often: `smoke`, `quick` (the default) or `full`.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

import neuromanifold as nm
from benchmarks.harness import crowded, interleave, quartiles, write_results
from benchmarks.workloads import WORKLOADS, Batch, forward_backward

ROUNDS = {"smoke": 3, "quick": 9, "full": 31}
SPECTRUM_BAR = 3.0
SPEEDUP_BAR = 10.0
K = 10
BLOCK = 4
"""Vectors in our products; `eigsh` has one, and finds repeated eigenvalues no better."""
TOL = 1e-4
"""Of residuals, for SciPy relative to each eigenvalue."""
ROUNDING = 1e-6
"""Residuals, relative to the largest eigenvalue, below which float32 cannot be asked to go."""
LIKELIHOOD = nm.Categorical()


def spectrum(rounds: int) -> dict[str, Any]:
    """All eigenvalues that can be non-zero, as the public function gives them."""
    torch.manual_seed(0)
    batch = WORKLOADS["W1"].build()
    found: dict[str, nm.spectral.Density] = {}

    def ours() -> None:
        F = nm.fisher(batch.model, LIKELIHOOD, batch.inputs, nm.Gram())
        found["density"] = nm.spectral.density(F)

    tasks: dict[str, Callable[[], object]] = {
        "unit": lambda: forward_backward(batch),
        "ours": ours,
    }
    seconds = interleave(tasks, rounds)
    assert found["density"].exact
    assert found["density"].nodes.shape[1] == 512 + 1  # and one for all that are zero
    return {"quartiles": quartiles(seconds["ours"], seconds["unit"]), "bar": SPECTRUM_BAR}


def largest(rounds: int) -> dict[str, Any]:
    """Ten eigenpairs of the exact Fisher, each side checked by its residuals."""
    torch.manual_seed(0)
    batch = WORKLOADS["W2"].build()
    implicit = nm.fisher(batch.model, LIKELIHOOD, batch.inputs, nm.Implicit(), estimator=nm.Exact())
    peer, name = _peer(batch, implicit)
    answers: dict[str, Tensor] = {}

    def ours() -> None:
        F = nm.spectral.operator(batch.model, LIKELIHOOD, batch.inputs)
        answers["ours"] = nm.spectral.extremes(F, K, tol=tol, block=BLOCK).vectors

    def ours_by_products() -> None:
        answers["products"] = nm.spectral.extremes(implicit, K, tol=tol, block=BLOCK).vectors

    def theirs() -> None:
        start = np.random.default_rng(0).standard_normal(peer.shape[0]).astype(np.float32)
        answers["theirs"] = torch.from_numpy(eigsh(peer, k=K, tol=TOL, v0=start)[1].copy())

    theirs()
    # Its last restart goes well below what was asked for; we are asked for what it has reached.
    tol = max(_residual(implicit, answers["theirs"]), ROUNDING)
    tasks: dict[str, Callable[[], object]] = {
        "ours": ours,
        "products": ours_by_products,
        "theirs": theirs,
    }
    seconds = interleave(tasks, rounds)
    return {
        "peer": name,
        "parameters": implicit.num_parameters,
        "residuals": {who: _residual(implicit, vectors) for who, vectors in answers.items()},
        "speedup": quartiles(seconds["theirs"], seconds["ours"]),
        "speedup_by_products": quartiles(seconds["theirs"], seconds["products"]),
        "seconds": {who: statistics.median(times) for who, times in seconds.items()},
        "bar": SPEEDUP_BAR,
    }


def _residual(F: nm.FisherOperator, vectors: Tensor) -> float:
    """The largest of the ten, relative to the largest eigenvalue."""
    images = F.matmat(vectors)
    values = (vectors * images).sum(dim=0)
    return float((images - values * vectors).norm(dim=0).max() / values.max())


def _peer(batch: Batch, implicit: nm.FisherOperator) -> tuple[LinearOperator, str]:
    """Products of the peer, checked against ours; or ours where it is not installed."""
    if importlib.util.find_spec("curvlinops") is None:
        return implicit.to_scipy(), "our products (curvlinops is not installed) + eigsh"
    from curvlinops import GGNLinearOperator

    operator = GGNLinearOperator(
        batch.model,
        nn.CrossEntropyLoss(reduction="mean"),
        list(batch.model.parameters()),
        [(batch.inputs, batch.targets)],
        check_deterministic=False,
    )
    scipy = operator.to_scipy()
    v = torch.randn(implicit.num_parameters)
    expected = implicit @ v
    assert np.allclose(scipy @ v.numpy(), expected.numpy(), atol=1e-4 * float(expected.norm()))
    return scipy, "curvlinops + eigsh"


def main() -> None:
    """Time, print and store."""
    mode = os.environ.get("BENCH", "quick")
    if mode not in ROUNDS:
        sys.exit(f"BENCH={mode!r} is not a mode; choose one of {', '.join(ROUNDS)}.")
    busy = crowded()
    whole, top = spectrum(ROUNDS[mode]), largest(ROUNDS[mode])
    title = f"Spectra; {torch.get_num_threads()} threads" + (
        " (others used this machine: times mean nothing)" if busy else ""
    )
    table = Table("what", "median", "quartiles", "bar", title=title)
    rows = (
        ("MLP, N=512, all eigenvalues, in forward + backward", whole["quartiles"], "≤ 3"),
        (f"conv net, N=128, top {K}, {top['peer']} over ours", top["speedup"], "≥ 10"),
        ("the same, over ours by products alone", top["speedup_by_products"], ""),
    )
    for what, (low, median, high), bar in rows:
        table.add_row(what, f"{median:.2f}", f"{low:.2f} to {high:.2f}", bar)
    table.caption = f"Residuals: {', '.join(f'{k} {v:.1e}' for k, v in top['residuals'].items())}"
    Console().print(table)
    path = write_results(
        "spectral", {"mode": mode, "crowded_at_start": busy, "spectrum": whole, "largest": top}
    )
    print(f"All numbers: {path.relative_to(path.parents[2])}")


if __name__ == "__main__":
    main()
