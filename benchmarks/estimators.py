"""`python -m benchmarks.estimators`: random signs against one sampled label, at equal cost.

Both send back one cotangent per input. The variances are closed forms, so that nothing is sampled
but the order of training.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn

import neuromanifold as nm
from benchmarks.harness import environment, write_results

EPOCHS = (0, 1, 20)
TRAINING = 1500
LAYERS = {"0": "first", "2": "second", "4": "last"}


def ratios(model: nn.Module, x: torch.Tensor) -> dict[str, float]:
    """Median over a layer's weights of the variance by signs over that by one label."""
    found = {}
    labels, signs = (
        nm.variance.diagonal(model, nm.Categorical(), x, estimator=estimator)
        for estimator in (nm.MonteCarlo(1), nm.RandomSigns(1))
    )
    for layer, name in LAYERS.items():
        label, probe = (
            variances[f"{layer}.weight"]
            for variances in (labels.variances["labels"], signs.variances["probes"])
        )
        seen = label > 0
        found[name] = float((probe[seen] / label[seen]).median())
    return found


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
            rows.append({"epoch": epoch, **ratios(model, x)})
        for batch in torch.randperm(TRAINING).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    table = Table("epoch", *LAYERS.values(), title="variance: random signs / one label, median")
    for row in rows:
        table.add_row(str(row["epoch"]), *(f"{row[name]:.2f}" for name in LAYERS.values()))
    Console(width=80).print(table)
    write_results("estimators", {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
