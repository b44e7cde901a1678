"""Recurrent layers: the rule does what the module does, and reports the Fisher information."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import neuromanifold as nm
from neuromanifold.layers import CompositeRule, rule_for
from neuromanifold.structures import Structure
from neuromanifold.testing import check_composite_rule, reference

N, T, D, H = 2, 3, 3, 2


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).double()


LAYERS: dict[str, Callable[..., nn.RNNBase]] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
CELLS: dict[str, Callable[..., nn.RNNCellBase]] = {
    "rnn": nn.RNNCell,
    "gru": nn.GRUCell,
    "lstm": nn.LSTMCell,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "no bias": {"bias": False},
    "two layers": {"num_layers": 2},
    "two directions": {"bidirectional": True},
    "both": {"num_layers": 2, "bidirectional": True},
    "dropout of nothing": {"num_layers": 2, "dropout": 0.5},
}


@pytest.fixture(params=LAYERS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[True, False], ids=["batch first", "sequence first"])
def batch_first(request: pytest.FixtureRequest) -> bool:
    return request.param


def state(module: nn.RNNBase) -> Any:
    lead = module.num_layers * (1 + module.bidirectional), N
    h, c = randn(*lead, module.proj_size or H), randn(*lead, module.hidden_size)
    return (h, c) if module.mode == "LSTM" else h


def sequence(batch_first: bool) -> Tensor:
    return randn(N, T, D) if batch_first else randn(T, N, D)


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "given state"])
@pytest.mark.parametrize("options", OPTIONS)
def test_contract(kind: str, options: str, given: bool, batch_first: bool) -> None:
    module = LAYERS[kind](D, H, batch_first=batch_first, **OPTIONS[options]).eval()
    check_composite_rule(module, sequence(batch_first), *[state(module)][: int(given)])


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "given state"])
@pytest.mark.parametrize("options", OPTIONS)
def test_contract_of_projections(options: str, given: bool, batch_first: bool) -> None:
    module = nn.LSTM(D, 4, proj_size=H, batch_first=batch_first, **OPTIONS[options]).eval()
    check_composite_rule(module, sequence(batch_first), *[state(module)][: int(given)])


def test_contract_of_rectified() -> None:
    check_composite_rule(nn.RNN(D, H, nonlinearity="relu"), sequence(batch_first=False))
    check_composite_rule(nn.RNNCell(D, H, nonlinearity="relu"), randn(N, D), randn(N, H))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "given state"])
def test_contract_of_cells(kind: str, bias: bool, given: bool) -> None:
    h, c = randn(N, H), randn(N, H).flip(0)
    hx = (h, c) if kind == "lstm" else h
    check_composite_rule(CELLS[kind](D, H, bias=bias), randn(N, D), *[hx][: int(given)])


def by_rule(module: nn.Module, *args: Any, silent: bool = False) -> Any:
    """The module run by its rule; silent where it should be left to the module."""

    def use(port: str, x: Tensor | None, output: Tensor) -> Tensor:
        assert not silent, port
        return output

    rule = rule_for(module)
    assert isinstance(rule, CompositeRule)
    return rule.forward(module, use, *args)


def test_what_is_left_to_the_module(kind: str) -> None:
    layer, cell = LAYERS[kind](D, H).double(), CELLS[kind](D, H).double()
    packed = nn.utils.rnn.pack_padded_sequence(randn(T, N, D), torch.tensor([3, 2]))
    for module, x in ((layer, packed), (layer, randn(T, D)), (cell, randn(D))):
        torch.testing.assert_close(by_rule(module, x, silent=True), module(x))


def test_dropout_draws_what_the_module_draws(kind: str) -> None:
    module = LAYERS[kind](D, H, num_layers=2, dropout=0.5).double().train()
    torch.manual_seed(0)
    expected = module(randn(T, N, D))
    torch.manual_seed(0)
    torch.testing.assert_close(by_rule(module, randn(T, N, D), silent=True), expected)


def test_states_that_the_module_refuses_are_refused(kind: str) -> None:
    one, wide = randn(1, 1, H), randn(1, N, H + 1)
    for h in (one, wide):
        hx = (h, h) if kind == "lstm" else h
        with pytest.raises(RuntimeError, match="hidden"):
            by_rule(LAYERS[kind](D, H).double(), randn(T, N, D), hx, silent=True)
        hx = (h[0], h[0]) if kind == "lstm" else h[0]
        with pytest.raises(RuntimeError, match="hidden"):
            by_rule(CELLS[kind](D, H).double(), randn(N, D), hx, silent=True)


class ByRule(nn.Module):
    """The module run by its rule."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return by_rule(self.module, x)[0]


def test_function_transformations(kind: str) -> None:
    module = LAYERS[kind](D, H, bidirectional=True, batch_first=True).double()
    model, x = ByRule(module), sequence(batch_first=True)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def output(params: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, params, (sample[None],)).square().sum()

    gradients = vmap(grad(output), in_dims=(None, 0))(params, x)
    module(x)[0].square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(gradients[name].sum(0), p.grad)


# ---- the Fisher information -------------------------------------------------------------------


class Tagger(nn.Module):
    """Outputs `(N, T, ·)` of a recurrent layer of either layout."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x if self.layer.batch_first else x.transpose(0, 1))[0]
        return h if self.layer.batch_first else h.transpose(0, 1)


class Loop(nn.Module):
    """A cell with a state before the first input that is learned; its last state."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell
        self.first = nn.Parameter(randn(H))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first.expand(len(x), -1)
        hx: Any = (h, h) if isinstance(self.cell, nn.LSTMCell) else h
        for x_t in x.unbind(dim=1):
            hx = self.cell(x_t, hx)
        return hx[0] if isinstance(hx, tuple) else hx


STRUCTURES: dict[str, Structure] = {
    "Dense": nm.Dense(),
    "BlockDiagonal": nm.BlockDiagonal(),
    "UnitWise": nm.UnitWise(),
    "Diagonal": nm.Diagonal(),
}
MATRICES = ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh")


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).norm() <= 1e-10 * expected.norm()


def assert_read_by_the_rule(F: nm.FisherOperator) -> None:
    for entry in F.coverage:
        if any(matrix in entry.parameter for matrix in MATRICES):
            assert entry.rule == "recurrent", entry


@pytest.mark.parametrize("structure", STRUCTURES)
def test_is_the_projected_oracle(kind: str, structure: str, batch_first: bool) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    options |= {"proj_size": 1} if kind == "lstm" else {}
    model, data = Tagger(LAYERS[kind](D, H, **options)).double(), (randn(N, T, D), None)
    F = nm.fisher(model, nm.Gaussian(), data, STRUCTURES[structure], estimator=nm.Exact())
    oracle = reference.dense_fisher(model, nm.Gaussian(), data)
    assert_same(F.to_dense(), reference.project(oracle, model, structure))  # type: ignore[arg-type]
    assert_read_by_the_rule(F)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_cells_are_the_projected_oracle(kind: str, structure: str) -> None:
    torch.manual_seed(0)
    model, data = Loop(CELLS[kind](D, H)).double(), (randn(N, T, D), None)
    F = nm.fisher(model, nm.Gaussian(), data, STRUCTURES[structure], estimator=nm.Exact())
    oracle = reference.dense_fisher(model, nm.Gaussian(), data)
    assert_same(F.to_dense(), reference.project(oracle, model, structure))  # type: ignore[arg-type]
    assert_read_by_the_rule(F)


@pytest.mark.parametrize("trainable", ["weight", "bias", "ih", "hh", "hr", "_l0"])
def test_some_parameters(trainable: str) -> None:
    torch.manual_seed(0)
    model, data = Tagger(nn.LSTM(D, 3, num_layers=2, proj_size=H)).double(), (randn(N, T, D), None)
    for name, p in model.named_parameters():
        p.requires_grad_(trainable in name)
    F = nm.fisher(model, nm.Gaussian(), data, nm.Dense(), estimator=nm.Exact())
    assert_same(F.to_dense(), reference.dense_fisher(model, nm.Gaussian(), data))
    assert_read_by_the_rule(F)


def test_packed_sequences_go_the_generic_way() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(D, H, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            lengths = torch.full((len(x),), T)
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            return nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0]

    torch.manual_seed(0)
    model, data = Packed().double(), (randn(N, T, D), None)
    F = nm.fisher(model, nm.Gaussian(), data, nm.Dense(), estimator=nm.Exact())
    assert {entry.rule for entry in F.coverage} == {"generic"}
    oracle = reference.dense_fisher(Tagger(model.layer), nm.Gaussian(), data)
    assert_same(F.to_dense(), oracle)


def test_kronecker_is_exact_for_one_sample_and_one_step(kind: str) -> None:
    torch.manual_seed(0)
    model, data = Loop(CELLS[kind](D, H)).double(), (randn(1, 1, D), None)
    F = nm.fisher(model, nm.Gaussian(), data, nm.Kronecker(), estimator=nm.Exact())
    oracle = reference.dense_fisher(model, nm.Gaussian(), data)
    expected = reference.project(oracle, model, "BlockDiagonal")
    assert_read_by_the_rule(F)
    got = F.restrict([name for name in F.layout.names if name.startswith("cell")])
    assert {entry.structure for entry in got.coverage} == {"Kronecker"}
    cell = slice(F.layout.slices["cell.weight_ih"].start, None)
    assert_same(got.to_dense(), expected[cell, cell])


def test_kronecker_over_time_is_positive(kind: str) -> None:
    torch.manual_seed(0)
    model, data = Tagger(LAYERS[kind](D, H, num_layers=2)).double(), (randn(N, T, D), None)
    for sharing in ("expand", "reduce"):
        F = nm.fisher(
            model, nm.Gaussian(), data, nm.Kronecker(weight_sharing=sharing), estimator=nm.Exact()
        )
        assert_read_by_the_rule(F)
        assert F.trace() > 0
        assert F.eigenvalues().min() >= -1e-12 * F.trace()
