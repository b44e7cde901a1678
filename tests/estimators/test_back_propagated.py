"""The back-propagated metric, against the recursion of squares that defines it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.estimators import BackPropagated

PROBES = 3000


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def net() -> nn.Sequential:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()
    for i, p in enumerate(model.parameters()):
        p.data = randn(*p.shape, seed=10 + i)
    return model


def recursion(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """Squared signals at the outputs of the linear layers, from the first to the last."""
    inputs = [model[:i](x) for i in (0, 2, 4)]
    u = [model[i](a) for i, a in zip((0, 2, 4), inputs, strict=True)]
    p = u[-1].softmax(-1)
    squares = [p * (1 - p)]
    for i in (4, 2):
        slopes = 1 - torch.tanh(u[i // 2 - 1]).square()
        squares.insert(0, slopes.square() * (squares[0] @ model[i].weight.square()))
    return squares


def test_squared_signals_follow_the_recursion() -> None:
    """The mean over probes, to five standard errors."""
    model, x = net(), randn(2, 3)
    generator = torch.Generator().manual_seed(1)
    draws = []
    for _ in range(12):
        F = nm.fisher(
            model,
            nm.Categorical(),
            x,
            nm.Diagonal(),
            estimator=BackPropagated(PROBES // 12),
            generator=generator,
        )
        draws.append(torch.cat([F.diagonal()[f"{i}.bias"] for i in (0, 2, 4)]))
    found = torch.stack(draws)
    stderr = found.std(dim=0) / len(found) ** 0.5
    exact = torch.cat([d.mean(dim=0) for d in recursion(model, x)])
    away = (found.mean(dim=0) - exact).abs()
    assert (away <= 5 * stderr + 1e-12).all()
    signals = nm.fisher(model, nm.Categorical(), x, nm.Diagonal(), estimator=nm.Exact())
    true = torch.cat([signals.diagonal()[f"{i}.bias"] for i in (0, 2, 4)])
    assert ((true - exact).abs() > 10 * stderr).any()  # it is another metric


def test_the_last_layer_is_exact() -> None:
    model, x = net(), randn(4, 3)
    found = nm.fisher(model, nm.Categorical(), x, nm.Diagonal(), estimator=BackPropagated())
    exact = nm.fisher(model, nm.Categorical(), x, nm.Diagonal(), estimator=nm.Exact())
    for name in ("4.weight", "4.bias"):
        torch.testing.assert_close(found.diagonal()[name], exact.diagonal()[name])


def test_the_same_seed_gives_the_same_answer() -> None:
    model, x = net(), randn(4, 3)
    first, second = (
        nm.fisher(
            model,
            nm.Categorical(),
            x,
            nm.QuasiDiagonal(),
            estimator=BackPropagated(),
            generator=torch.Generator().manual_seed(3),
        ).to_dense()
        for _ in range(2)
    )
    assert torch.equal(first, second)


def test_probes_are_counted() -> None:
    with pytest.raises(ValueError, match="at least 1 probe"):
        BackPropagated(0)
