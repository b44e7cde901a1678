"""`python -m benchmarks.estimators`: what one sweep buys, by how its cotangent is drawn.

For each layer of a digits classifier, before, early in and after training: the variance of the
diagonal of the Fisher matrix over that of independent labels, at as many sweeps; below one is
better. That of random signs is a closed form; that of dependent labels is measured over repeated
draws, around the exact diagonal. Last, what control variates could gain with the best coefficients.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import neuromanifold as nm
from benchmarks.harness import environment, write_results

EPOCHS = (0, 1, 20)
TRAINING = 1500
MEASURED = 300
"""Inputs of which the diagonal is drawn again and again."""
REPEATS = 100
CONTROLLED = 100
"""Inputs whose scores are listed, class by class, to find the best control variate."""
SAMPLES = (2, 4, 10)
LAYERS = {"0": "first", "2": "second", "4": "last"}

Ratios = dict[str, float]
"""By layer, the median over its weights."""


def main() -> None:
    """Train on digits, measure before, on the way and after."""
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32)[:TRAINING] / 16
    y = torch.tensor(digits.target)[:TRAINING]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    rows = []
    for epoch in range(max(EPOCHS) + 1):
        if epoch in EPOCHS:
            found = {"random signs": signs(model, x), **dependent(model, x[:MEASURED])}
            found |= controls(model, x[:CONTROLLED])
            rows += [{"epoch": epoch, "cotangents": name, **r} for name, r in found.items()]
        for batch in torch.randperm(TRAINING).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    table = Table(
        "epoch", "cotangents", *LAYERS.values(), title="variance over that of independent labels"
    )
    for row in rows:
        figures = (f"{row[name]:.3f}" for name in LAYERS.values())
        table.add_row(str(row["epoch"]), str(row["cotangents"]), *figures)
    Console(width=80).print(table)
    write_results("estimators", {"environment": environment(), "rows": rows})


def signs(model: nn.Module, x: Tensor) -> Ratios:
    """One random sign for each column."""
    labels, probes = (
        nm.variance.diagonal(model, nm.Categorical(), x, estimator=estimator)
        for estimator in (nm.MonteCarlo(1), nm.RandomSigns(1))
    )
    return medians(probes.variances["probes"], labels.variances["labels"])


def dependent(model: nn.Module, x: Tensor) -> dict[str, Ratios]:
    """Stratified and weighted labels."""
    found = nm.variance.diagonal(model, nm.Categorical(), x)
    generator = torch.Generator().manual_seed(0)
    ratios = {}
    for kind, samples in (("stratified", SAMPLES), ("weighted", (1, *SAMPLES))):
        for num in samples:
            squares = {name: torch.zeros_like(value) for name, value in found.value.items()}
            for _ in range(REPEATS):
                drawn = nm.fisher(
                    model,
                    nm.Categorical(),
                    x,
                    nm.Diagonal(),
                    estimator=nm.MonteCarlo(num, kind),
                    generator=generator,
                ).diagonal()
                for name, square in squares.items():
                    # Over the mean of as many independent labels.
                    square += num / REPEATS * (drawn[name] - found.value[name]).square()
            ratios[f"{num} {kind}"] = medians(squares, found.variances["labels"])
    return ratios


def controls(model: nn.Module, x: Tensor) -> dict[str, Ratios]:
    """Control variates with known means, each weight with its own best coefficients.

    Of the drawn labels `‖z‖²`, and how often each class was drawn.
    """
    p = model(x).detach().double().softmax(-1)  # (N, C)
    parameters = dict(model.named_parameters())
    jacobian = vmap(jacrev(lambda at, row: functional_call(model, at, (row[None],))[0]), (None, 0))(
        parameters, x
    )
    norms = (1 - 2 * p + p.square().sum(1, keepdim=True))[..., None]
    counts = torch.eye(p.shape[1], dtype=p.dtype).expand(len(x), -1, -1)
    found: dict[str, Ratios] = {"control by ‖z‖²": {}, "control by classes": {}}
    for layer, name in LAYERS.items():
        j = jacobian[f"{layer}.weight"].detach().flatten(2).double()  # (N, C, P)
        scores = (j - (p[..., None] * j).sum(1, keepdim=True)).square()
        for ratios, control in zip(found.values(), (norms, counts), strict=True):
            ratios[name] = residual(p, scores, control)
    return found


def residual(p: Tensor, scores: Tensor, control: Tensor) -> float:
    """Share of the variance of `scores (N, C, P)` that `control (N, C, K)` leaves, median."""
    centred, control = (v - (p[..., None] * v).sum(1, keepdim=True) for v in (scores, control))
    weighted = (p[..., None] * control).flatten(0, 1)
    covariance = weighted.T @ centred.flatten(0, 1)  # (K, P)
    explained = torch.linalg.pinv(weighted.T @ control.flatten(0, 1)) @ covariance
    variance = (p[..., None] * centred.square()).sum((0, 1))
    seen = variance > 0
    return float((1 - (covariance * explained).sum(0) / variance)[seen].median())


def medians(variances: dict[str, Tensor], reference: dict[str, Tensor]) -> Ratios:
    """Of the ratio, over the weights of each layer that are seen."""
    ratios = {}
    for layer, name in LAYERS.items():
        value, label = (params[f"{layer}.weight"] for params in (variances, reference))
        seen = label > 0
        ratios[name] = float((value[seen] / label[seen]).median())
    return ratios


if __name__ == "__main__":
    main()
