"""The diagonal plus the bias row, against its definition and the update rule of its source."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.errors import NotPositiveDefiniteError, TooLargeError
from neuromanifold.linalg import memory
from neuromanifold.structures import QuasiDiagonal
from neuromanifold.testing import check_structure, reference
from neuromanifold.testing.cases import CASES, Case
from neuromanifold.testing.layer_cases import LAYERS

ROUNDING = 1e-12
"""Relative, in float64: sums of some dozen terms."""


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def linear(fan_in: int = 4, fan_out: int = 3) -> nn.Linear:
    layer = nn.Linear(fan_in, fan_out).double()
    layer.weight.data = randn(fan_out, fan_in, seed=1)
    layer.bias.data = randn(fan_out, seed=2)
    return layer


def measure(model: nn.Module, x: Tensor, **options: object) -> nm.FisherOperator:
    options = {"estimator": nm.Exact()} | options
    return nm.fisher(model, nm.Categorical(), x, QuasiDiagonal(), **options)


def by_definition(moment: Tensor, model: nn.Module) -> Tensor:
    """Keep each unit's diagonal and bias row, and make the rest as if weights were uncorrelated.

    Units are told apart by names, shapes and nothing else: `x.bias[o]` belongs to `x.weight[o]`.
    """
    position, start = {}, 0
    for name, p in model.named_parameters():
        position[name] = torch.arange(start, start := start + p.numel()).reshape(p.shape)
    out = moment.diagonal().diag()
    for name, where in position.items():
        layer, _, local = name.rpartition(".")
        weight = position.get(f"{layer}.weight".removeprefix("."))
        if local != "bias" or weight is None:
            continue
        for bias, incoming in zip(where, weight.flatten(1), strict=True):
            row = moment[bias, incoming]
            between = torch.outer(row, row) / moment[bias, bias]
            between.fill_diagonal_(0)
            out[incoming[:, None], incoming] += between
            out[bias, incoming] = out[incoming, bias] = row
    return out


def assert_close(got: Tensor, expected: Tensor, relative: float = ROUNDING) -> None:
    assert got.shape == expected.shape
    assert torch.linalg.vector_norm(got - expected) <= relative * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case) -> None:
    check_structure(QuasiDiagonal(), case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_definition(case: Case) -> None:
    model, data = case.model(), case.data()
    F = nm.fisher(model, case.likelihood, data, QuasiDiagonal(), estimator=nm.Exact())
    oracle = reference.dense_fisher(model, case.likelihood, data)
    assert_close(F.to_dense(), by_definition(oracle, model))
    assert_close(F.trace(), oracle.trace())


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_diagonal_and_definiteness_for_every_layer_type(case: Case) -> None:
    model, data = case.model(), case.data()
    F = nm.fisher(model, case.likelihood, data, QuasiDiagonal(), estimator=nm.Exact())
    oracle = reference.dense_fisher(model, case.likelihood, data)
    assert_close(F.layout.flatten(F.diagonal()), oracle.diagonal())
    values = torch.linalg.eigvalsh(F.to_dense())
    assert values[0] >= -ROUNDING * values[-1]
    claimed = [name for name in F.layout.names if F.coverage[name].exact]
    for name in claimed:
        part, where = F.restrict([name]).to_dense(), F.layout.slices[name]
        kept = part != 0
        assert_close(part[kept], oracle[where, where][kept])


def test_coverage_says_what_is_exact() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    coverage = measure(model, randn(5, 3)).coverage
    weight, bias, unbiased = (coverage[name] for name in ("0.weight", "0.bias", "2.weight"))
    for entry in (weight, bias):
        assert (entry.structure, entry.exact) == ("QuasiDiagonal", False)
        assert "through its bias only" in entry.note
    assert (unbiased.structure, unbiased.exact) == ("Diagonal", True)


@pytest.mark.parametrize("estimator", [nm.Exact(), nm.Empirical()], ids=repr)
def test_step_is_the_update_rule_of_the_source(estimator: nm.estimators.Estimator) -> None:
    layer, x = linear(), randn(9, 4, seed=3) + 1
    y = torch.arange(9) % 3
    p = layer(x).softmax(dim=1).detach()
    if isinstance(estimator, nm.Empirical):
        signal = (p - nn.functional.one_hot(y, 3)).square()
    else:  # the expected square of a score, over labels
        signal = p * (1 - p)
    m_ii, m_0i, m_00 = signal.T @ x**2 / 9, signal.T @ x / 9, signal.mean(0)[:, None]
    g, g_0 = randn(3, 4, seed=4), randn(3, 1, seed=5)
    step = (g * m_00 - g_0 * m_0i) / (m_ii * m_00 - m_0i**2)
    step_0 = g_0 / m_00 - (m_0i / m_00 * step).sum(dim=1, keepdim=True)

    F = measure(layer, (x, y), estimator=estimator)
    for damping, relative in ((0.0, ROUNDING), (1e-14, 1e-10)):
        solution = F.solve({"weight": g, "bias": g_0[:, 0]}, damping=damping)
        assert_close(solution["weight"], step, relative)
        assert_close(solution["bias"], step_0[:, 0], relative)


def test_a_step_does_not_see_offset_and_scale_of_the_inputs() -> None:
    layer, x, offset, scale = linear(), randn(9, 4, seed=3), randn(4, seed=4), randn(4, seed=5)
    same = linear()
    with torch.no_grad():  # the same function of x, through inputs scale · x + offset
        same.weight.div_(scale)
        same.bias.sub_(same.weight @ offset)

    def motion(layer: nn.Linear, inputs: Tensor, structure: nm.structures.Structure) -> Tensor:
        likelihood, y = nm.Categorical(), torch.arange(9) % 3
        loss = likelihood.loss(layer(inputs), y)
        weight, bias = torch.autograd.grad(loss, list(layer.parameters()))
        F = nm.fisher(layer, likelihood, inputs, structure, estimator=nm.Exact())
        step = F.solve({"weight": weight, "bias": bias}, damping=0.0)
        return inputs @ step["weight"].T + step["bias"]

    def change(structure: nm.structures.Structure) -> float:
        one, other = motion(layer, x, structure), motion(same, scale * x + offset, structure)
        return float((one - other).norm() / one.norm())

    assert change(QuasiDiagonal()) <= 1e-10
    assert change(nm.Diagonal()) > 0.1  # which is why the bias row is worth its memory


def test_a_unit_without_gradient_and_an_input_that_never_changes() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
        model[0].bias.copy_(torch.tensor([9.0, -1.0]))  # the second unit never fires
    x = randn(6, 3)
    x[:, 1] = 2.0
    F = measure(model, x)
    dense = F.block("0").to_dense()
    assert torch.isfinite(dense).all()
    assert dense[3:6].abs().max() == 0
    assert dense[7].abs().max() == 0
    values = torch.linalg.eigvalsh(dense)
    assert values[0] >= -1e-14 * values[-1]
    # A weight on a constant input and the bias do the same: the matrix is singular, and says so.
    with pytest.raises(NotPositiveDefiniteError):
        F.solve(torch.ones(F.num_parameters).double(), damping=0.0)
    solution = F.solve(torch.ones(F.num_parameters).double(), damping=1e-6)
    residual = F @ solution + 1e-6 * solution - 1
    assert residual.abs().max() <= 1e-8


def test_weights_alone_are_inverted_without_damping() -> None:
    x = randn(20, 3)
    x[:, 1] = 2.0  # nothing is left of its diagonal beside the bias, which is not there
    F = measure(linear(3, 2), x).restrict(["weight"])
    v = randn(6, seed=6)
    assert_close(F.solve(v, damping=0.0), torch.linalg.solve(F.to_dense(), v))
    damped = F.to_dense() + 1e-9 * torch.eye(6).double()
    assert_close(F.solve(v, damping=1e-9), torch.linalg.solve(damped, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_biases_whose_gradients_cancel_have_no_row(dtype: torch.dtype) -> None:
    """A bias of attention keys does nothing; what is left of its gradients is rounding."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key, self.value = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            weights = (x @ self.key(x).mT).softmax(dim=-1)
            return (weights @ self.value(x)).mean(dim=1)

    torch.manual_seed(0)
    model, x = Attention().to(dtype), randn(9, 5, 4).to(dtype)
    F = measure(model, x)
    key, value = F.blocks
    assert not key.row.any()
    assert value.row.abs().min() > 0
    exact = nm.fisher(model, nm.Categorical(), x, nm.Diagonal(), estimator=nm.Exact())
    eps = torch.finfo(dtype).eps
    for name, diagonal in exact.diagonal().items():
        assert_close(F.diagonal()[name], diagonal, 100 * eps)
    split = measure(model, [(some, None) for some in x.split(2)])
    assert_close(split.to_dense(), F.to_dense(), 100 * eps)


def test_float32_stays_positive() -> None:
    layer, x = linear().float(), randn(50, 4).float() * 1e-3 + 100
    values = measure(layer, x).eigenvalues()
    assert values.dtype == torch.float32
    assert (values >= 0).all()


def test_eigenvectors_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    F = measure(nn.Linear(2000, 2), randn(3, 2000).float())
    monkeypatch.setattr(memory, "available", lambda _: 2**20)
    with pytest.raises(TooLargeError, match=r"eigenvectors of QuasiDiagonal.*nm\.Diagonal"):
        F.sqrt_matvec(torch.ones(F.num_parameters))
    assert torch.isfinite(F.solve(torch.ones(F.num_parameters), damping=1e-3)).all()
