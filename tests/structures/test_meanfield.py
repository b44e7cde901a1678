"""A diagonal plus rank two, against its definition from moments and against Gaussian inputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.structures import MeanField

ROUNDING = {"rtol": 1e-10, "atol": 1e-13}
COVARIANCES = ["diagonal", "full"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def seeded(model: nn.Module) -> nn.Module:
    for i, p in enumerate(model.parameters()):
        p.data = randn(*p.shape, seed=100 + i) * 0.5
    return model.double().eval()


def mlp(*, bias: bool = True) -> nn.Sequential:
    return seeded(nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias)))


def measure(model: nn.Module, x: Tensor, covariance: str, **options: object) -> nm.FisherOperator:
    options = {"estimator": nm.Exact(), **options}
    return nm.fisher(model, nm.Categorical(), x, MeanField(covariance), **options)


def by_definition(a: Tensor, u: Tensor, squares: Tensor, w: Tensor, covariance: str) -> Tensor:
    """The formula of papers.md §2.4, unit by unit.

    Args:
        a: inputs `(N, I)`.
        u: pre-activations `(N, O)`.
        squares: squared signals `(N, O)`.
        w: weights `(O, I)`.
        covariance: "diagonal" or "full".
    """
    m, s = a.mean(0), torch.cov(a.T, correction=0)
    if covariance == "diagonal":
        s = s.diagonal().diag()
    units = []
    for unit in range(w.shape[0]):
        v = (u[:, unit] - u[:, unit].mean()) / u[:, unit].std(correction=0)
        a0, a1, a2 = ((squares[:, unit] * v**k).mean() for k in range(3))
        c = s @ w[unit] / (w[unit] @ s @ w[unit]).sqrt()
        ww = a0 * (torch.outer(m, m) + s - torch.outer(c, c))
        ww = ww + a1 * (torch.outer(m, c) + torch.outer(c, m)) + a2 * torch.outer(c, c)
        wb = a0 * m + a1 * c
        top = torch.cat([ww, wb[:, None]], dim=1)
        units.append(torch.cat([top, torch.cat([wb, a0[None]])[None]]))
    return torch.stack(units)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_units_are_made_of_moments(covariance: str) -> None:
    model, x = mlp(), randn(40, 4) + 0.5
    F = measure(model, x, covariance)
    u = model[0](x)
    logits = model(x)
    p = logits.softmax(1)
    scores = p.sqrt()[..., None] * (torch.eye(3, dtype=p.dtype) - p[:, None])  # (N, class, logit)
    signals = [scores @ model[2].weight * (1 - torch.tanh(u).square())[:, None], scores]
    cases = zip(
        F.blocks, (model[0], model[2]), (x, torch.tanh(u)), (u, logits), signals, strict=True
    )
    for block, layer, a, pre, g in cases:
        exact = by_definition(a, pre, g.square().sum(1), layer.weight, covariance)
        torch.testing.assert_close(block.units(), exact, **ROUNDING)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_its_algebra_is_that_of_the_dense_matrix(covariance: str, bias: bool) -> None:
    F = measure(mlp(bias=bias), randn(40, 4) + 0.5, covariance)
    dense = F.to_dense()
    identity = torch.eye(len(dense), dtype=dense.dtype)
    assert torch.linalg.eigvalsh(dense).min() > 0
    diagonal = torch.cat([v.flatten() for v in F.diagonal().values()])
    torch.testing.assert_close(diagonal, dense.diagonal(), **ROUNDING)
    torch.testing.assert_close(F.matmat(identity), dense, **ROUNDING)
    for damping in (1e-6, 0.01, 10.0):
        inverse = torch.linalg.inv(dense + damping * identity)
        found = torch.stack([F.solve(row, damping=damping) for row in identity])
        torch.testing.assert_close(found, inverse, rtol=1e-9, atol=1e-9 * inverse.abs().max())
    values = F.eigenvalues()
    torch.testing.assert_close(values.sort().values, torch.linalg.eigvalsh(dense), **ROUNDING)
    for block in F.blocks:
        torch.testing.assert_close(block.norm(), block.dense().norm(), **ROUNDING)
    torch.testing.assert_close((2.0 * F).to_dense(), 2 * dense, **ROUNDING)
    kept = F.restrict(["0.weight"]).to_dense()
    torch.testing.assert_close(kept, dense[:20, :20], **ROUNDING)


def test_it_is_exact_where_signals_do_not_depend_on_inputs() -> None:
    layer, x = seeded(nn.Linear(4, 3)), randn(30, 4) + 1
    options = {"estimator": nm.Exact()}
    found = nm.fisher(layer, nm.Gaussian(), x, MeanField("full"), **options)
    exact = nm.fisher(layer, nm.Gaussian(), x, nm.UnitWise(), **options)
    torch.testing.assert_close(found.to_dense(), exact.to_dense(), **ROUNDING)


def test_it_is_exact_for_gaussian_inputs_and_one_hidden_layer() -> None:
    """Signals of a regression with one output depend on the inputs through u alone."""
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    mixing = randn(3, 3, seed=7)
    draws = []
    for seed in range(20):
        x = randn(20_000, 3, seed=seed) @ mixing + 0.3
        options = {"params": ["0.*"], "estimator": nm.Exact()}
        found = nm.fisher(model, nm.Gaussian(), x, MeanField("full"), **options).to_dense()
        exact = nm.fisher(model, nm.Gaussian(), x, nm.UnitWise(), **options).to_dense()
        draws.append(found - exact)
    error = torch.stack(draws)
    mean, stderr = error.mean(0), error.std(0) / len(draws) ** 0.5
    assert (mean.abs() <= 5 * stderr + 1e-12).all()
    assert mean.abs().max() < 0.002 * exact.abs().max()


def test_positions_count_as_samples() -> None:
    """A kernel of one pixel is a linear layer at each position."""
    conv, layer = seeded(nn.Conv2d(3, 2, 1)), nn.Linear(3, 2).double()
    layer.weight.data, layer.bias.data = conv.weight.data.flatten(1), conv.bias.data
    x = randn(5, 3, 2, 2)
    options = {"estimator": nm.Exact()}
    found = nm.fisher(conv, nm.Gaussian(), x, MeanField("full"), **options)
    rows = x.movedim(1, -1).reshape(-1, 3)
    exact = nm.fisher(layer, nm.Gaussian(), rows, MeanField("full"), **options)
    torch.testing.assert_close(found.to_dense(), 4 * exact.to_dense(), **ROUNDING)


def test_normalisation_has_exact_blocks() -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)))
    x = randn(9, 4)
    found, exact = (
        measure(model, x, "diagonal"),
        nm.fisher(model, nm.Categorical(), x, nm.UnitWise(), estimator=nm.Exact()),
    )
    torch.testing.assert_close(found.blocks[1].matrices, exact.blocks[1].matrices, **ROUNDING)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_a_constant_input_and_a_dead_unit_do_no_harm(covariance: str) -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    model[0].bias.data[1] = -100  # never active
    x = randn(20, 4)
    x[:, 2] = 1.5
    F = measure(model, x, covariance)
    dense = F.to_dense()
    assert torch.isfinite(dense).all()
    v = randn(len(dense), seed=5)
    exact = torch.linalg.solve(dense + 0.1 * torch.eye(len(dense), dtype=dense.dtype), v)
    torch.testing.assert_close(F.solve(v, damping=0.1), exact, **ROUNDING)


def test_batches_add_up() -> None:
    model, x = mlp(), randn(7, 4)
    parts = measure(model, [(x[:3], None), (x[3:], None)], "full")
    torch.testing.assert_close(parts.to_dense(), measure(model, x, "full").to_dense(), **ROUNDING)


def test_it_is_saved_and_does_not_follow_the_model(tmp_path: object) -> None:
    model, x = mlp(), randn(7, 4)
    F = measure(model, x, "full")
    before = copy.deepcopy(F.to_dense())
    F.save(tmp_path / "F.safetensors")
    for p in model.parameters():
        p.data.add_(1)
    assert torch.equal(F.to_dense(), before)
    assert torch.equal(nm.load(tmp_path / "F.safetensors").to_dense(), before)


def test_layers_may_have_structures_of_their_own() -> None:
    model, x = mlp(), randn(7, 4)
    F = nm.fisher(
        model,
        nm.Categorical(),
        x,
        {"0": MeanField("full"), "*": nm.Diagonal()},
        estimator=nm.Exact(),
    )
    alone = measure(model, x, "full")
    torch.testing.assert_close(F.blocks[0].units(), alone.blocks[0].units(), **ROUNDING)


def test_the_option_is_checked() -> None:
    with pytest.raises(ValueError, match="diagonal"):
        MeanField("low rank")
