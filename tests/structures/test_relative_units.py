"""Metrics of single units, against the Jacobian of each unit's response."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional

import neuromanifold as nm
from neuromanifold.structures import RelativeUnits

ROUNDING = {"rtol": 1e-11, "atol": 1e-13}


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def seeded(model: nn.Module) -> nn.Module:
    for i, p in enumerate(model.parameters()):
        p.data = randn(*p.shape, seed=100 + i) * 0.5
    return model.double().eval()


def oracle(layer: nn.Module, x: Tensor, response: nn.Module, information: Tensor) -> Tensor:
    """`(1/N) Σ_n Σ_t J_tᵀ I_t J_t` of the layer's parameters, unit after unit, bias last.

    Args:
        layer: linear or a convolution.
        x: its inputs `(N, ...)`.
        response: what the units make of its outputs.
        information: of each response, `(N, units, *positions)` as the response is laid out.
    """
    params = dict(layer.named_parameters())

    def respond(params: dict[str, Tensor], row: Tensor) -> Tensor:
        return response(functional_call(layer, params, (row[None],)))[0]

    jacobians = vmap(jacrev(respond), in_dims=(None, 0))(params, x)
    weights = layer.weight.shape
    units = weights[0]
    rows = information.shape[1:].numel()
    parts = [j.reshape(len(x), rows, units, -1) for j in jacobians.values()]
    j = torch.cat(parts, dim=-1)  # (N, responses, units, fan-in)
    return torch.einsum("nr,nroi,nroj->oij", information.flatten(1), j, j) / len(x)


def measure(model: nn.Module, x: Tensor, **options: object) -> nm.FisherOperator:
    return nm.fisher(model, nm.Categorical(), x, RelativeUnits(**options))


class Functional(nn.Module):
    """Activation functions that are no modules, one of them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.gelu(2 * self.first(x) + 0.1)
        h = functional.relu(self.second(h), inplace=True)
        return self.last(h)


def test_units_respond_behind_their_activation_function() -> None:
    model = seeded(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.ELU(), nn.Linear(6, 3))
    )
    x = randn(9, 4)
    found = measure(model, x)
    for index in (0, 2):
        inputs = model[:index](x)
        exact = oracle(
            model[index], inputs, model[index + 1], torch.ones_like(model[index](inputs))
        )
        torch.testing.assert_close(found.blocks[index // 2].matrices, exact, **ROUNDING)


def test_functions_are_followed_as_modules_are() -> None:
    model = seeded(Functional())
    x = randn(7, 4)
    found = measure(model, x)
    exact = oracle(
        model.first, x, lambda u: functional.gelu(2 * u + 0.1), torch.ones(7, 5).double()
    )
    torch.testing.assert_close(found.block("first").blocks[0].matrices, exact, **ROUNDING)
    h = functional.gelu(2 * model.first(x) + 0.1)
    exact = oracle(model.second, h, functional.relu, torch.ones(7, 5).double())
    torch.testing.assert_close(found.block("second").blocks[0].matrices, exact, **ROUNDING)


def test_frozen_normalisation_is_part_of_the_unit() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double()
    model(randn(30, 4, seed=5) * 2 + 1)
    model = seeded(model)
    x = randn(9, 4)
    found = measure(model, x)
    ones = torch.ones(9, 5).double()
    exact = oracle(model[0], x, nn.Sequential(model[1], nn.ReLU()), ones)
    torch.testing.assert_close(found.block("0").blocks[0].matrices, exact, **ROUNDING)
    normalised = model[1]
    a = (model[0](x) - normalised.running_mean) / (normalised.running_var + normalised.eps).sqrt()
    slopes = (model[1](model[0](x)) > 0).double()
    columns = torch.stack([a, torch.ones_like(a)], dim=-1)
    exact = torch.einsum("no,noi,noj->oij", slopes, columns, columns) / 9
    torch.testing.assert_close(found.block("1").blocks[0].matrices, exact, **ROUNDING)


@pytest.mark.parametrize("groups", [1, 2])
def test_positions_of_a_convolution_respond_one_by_one(groups: int) -> None:
    conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=groups)
    model = seeded(nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)))
    x = randn(5, 2, 4, 4)
    found = measure(model, x)
    exact = oracle(conv, x, nn.Tanh(), torch.ones(5, 4, 2, 2).double())
    torch.testing.assert_close(found.blocks[0].matrices, exact, **ROUNDING)


def test_the_output_layer_responds_by_the_likelihood() -> None:
    """Its units have the blocks of the exact matrix."""
    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    x = randn(9, 4)
    for likelihood in (nm.Categorical(), nm.Bernoulli(), nm.Gaussian(0.3)):
        found = nm.fisher(model, likelihood, x, RelativeUnits())
        exact = nm.fisher(model, likelihood, x, nm.UnitWise(), estimator=nm.Exact())
        torch.testing.assert_close(found.blocks[1].matrices, exact.blocks[1].matrices, **ROUNDING)


def test_ignored_positions_have_no_response_at_the_output() -> None:
    model = seeded(nn.Linear(4, 3))
    x, y = randn(5, 2, 4), torch.tensor([[0, 1], [2, -100], [1, 1], [0, 0], [-100, 2]])
    found = nm.fisher(model, nm.Categorical(), (x, y), RelativeUnits())
    exact = nm.fisher(model, nm.Categorical(), (x, y), nm.Diagonal(), estimator=nm.Exact())
    torch.testing.assert_close(found.diagonal()["bias"], exact.diagonal()["bias"], **ROUNDING)


def test_a_layer_without_activation_responds_by_what_it_computes() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x + self.inner(x))

    model = seeded(Residual())
    x = randn(9, 4)
    found = measure(model, x, response=nm.Gaussian(0.5))
    a = torch.cat([x, torch.ones(9, 1)], dim=1)
    exact = (a.mT @ a / 9 / 0.5).expand(4, 5, 5)
    torch.testing.assert_close(found.block("inner").blocks[0].matrices, exact, **ROUNDING)


def test_responses_are_chosen_by_module() -> None:
    model = seeded(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    )
    x = randn(9, 4)
    binary = nm.relative.Binary((-1.0, 1.0))
    found = measure(model, x, response={"2": binary, "*": nm.Gaussian()})
    u = model[0](x)
    exact = oracle(model[0], x, nn.Tanh(), torch.ones_like(u))
    torch.testing.assert_close(found.blocks[0].matrices, exact, **ROUNDING)
    h = model[1](u)
    exact = oracle(model[2], h, nn.Identity(), 1 - torch.tanh(model[2](h)) ** 2)  # sech²
    torch.testing.assert_close(found.blocks[1].matrices, exact, **ROUNDING)


@pytest.mark.parametrize("conv", [False, True])
def test_wide_layers_share_the_mean_of_their_units(conv: bool) -> None:
    head = (
        [nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten()]
        if conv
        else [nn.Linear(4, 8), nn.Tanh()]
    )
    model = seeded(nn.Sequential(*head, nn.Linear(16 if conv else 8, 3)))
    x = randn(5, 2, 4, 4) if conv else randn(5, 4)
    units = measure(model, x).blocks[0]
    found = measure(model, x, widest=1).blocks[0]
    groups = units.block.groups
    shared = units.matrices.unflatten(0, (groups, -1)).mean(dim=1)
    torch.testing.assert_close(found.inputs, shared, **ROUNDING)
    assert torch.equal(found.outputs, torch.ones_like(found.outputs))
    quasi = measure(model, x, widest=1, wide="quasidiagonal").blocks[0]
    torch.testing.assert_close(quasi.diagonal(), units.diagonal(), **ROUNDING)
    row = quasi.matmul(
        torch.eye(units.block.fan_in, dtype=x.dtype)[-1].expand(1, *units.block.shape)
    )
    exact = units.matrices[:, -1].reshape(units.block.shape)
    torch.testing.assert_close(row[0], exact, **ROUNDING)


def test_coverage_says_what_is_kept() -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    coverage = measure(model, randn(5, 4), widest=200).coverage
    assert coverage["0.weight"].structure == "RelativeUnits, UnitWise"
    assert coverage["2.weight"].structure == "RelativeUnits, Shared"
    assert "over 200 numbers" in coverage["2.weight"].note


def test_batches_add_up() -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    x = randn(7, 4)
    whole = measure(model, x)
    parts = nm.fisher(model, nm.Categorical(), [(x[:3], None), (x[3:], None)], RelativeUnits())
    torch.testing.assert_close(parts.to_dense(), whole.to_dense(), **ROUNDING)


def test_nothing_is_left_behind() -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    before = copy.deepcopy(model.state_dict())
    measure(model, randn(5, 4))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_response_of_dependent_entries_is_refused() -> None:
    with pytest.raises(TypeError, match="entries are independent"):
        RelativeUnits(nm.Categorical())


def test_a_module_without_a_response_is_named() -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    with pytest.raises(ValueError, match="No response is given for the units of '0'"):
        measure(model, randn(5, 4), response={"conv*": nm.Gaussian()})


@pytest.mark.parametrize(("option", "value"), [("wide", "low rank"), ("widest", 0)])
def test_options_are_checked(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=option):
        RelativeUnits(**{option: value})
