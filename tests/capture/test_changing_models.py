"""Models that compute otherwise from call to call: with other parameters, or other axes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import neuromanifold as nm
from neuromanifold.errors import CaptureError
from neuromanifold.testing import reference

N, WIDTH = 5, 4
TOLERANCE = 1e-9
"""Relative, in float64: some thousand roundings."""


class Net(nn.Module):
    """A layer of some kind and a linear one, and a forward function over them."""

    def __init__(self, forward: Callable[..., Tensor], layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(WIDTH, 3)
        self.later = False
        self._function = forward

    def forward(self, *args: Any) -> Tensor:
        return self._function(self, *args)


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield
    torch.set_default_dtype(torch.float32)


def plain_fisher(model: nn.Module, *batches: tuple[Any, ...]) -> Tensor:
    """`(1/N) Σ_n J_nᵀ J_n` by a backward pass per output entry: no hooks, no torch.func."""
    parameters = list(model.parameters())
    total, num_samples = torch.zeros(()), 0
    for args in batches:
        outputs = model(*args)
        num_samples += len(outputs)
        for entry in outputs.flatten():
            row = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
            found = zip(parameters, row, strict=True)
            j = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in found])
            total = total + j.outer(j)
    return total / num_samples


def assert_right(model: nn.Module, *batches: tuple[Any, ...]) -> nm.FisherOperator:
    data = [(args, None) for args in batches]
    measured = nm.fisher(model, nm.Gaussian(), data, nm.Dense(), estimator=nm.Exact())
    expected = plain_fisher(model, *batches)
    assert (measured.to_dense() - expected).norm() <= TOLERANCE * expected.norm()
    return measured


# ---- other parameters ---------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Callable[..., Tensor]]]] = {
    "linear": (lambda: nn.Linear(WIDTH, WIDTH), lambda call: call),
    "norm": (lambda: nn.LayerNorm(WIDTH), lambda call: call),
    "attention": (
        lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True),
        lambda call: lambda x: call(x, x, x)[0],
    ),
    "recurrent": (
        lambda: nn.GRU(WIDTH, WIDTH, batch_first=True),
        lambda call: lambda x: call(x)[0],
    ),
}

REPLACED: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda p: 2 * p,
    "detached": lambda p: p.detach(),
    "another": lambda p: nn.Parameter(p.detach() + 1),
}


@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("as_it_is_too", [False, True])
def test_layer_called_with_other_parameters(
    kind: str, replace: Callable[[Tensor], Tensor], as_it_is_too: bool
) -> None:
    make, called = LAYERS[kind]

    def forward(net: Net, x: Tensor) -> Tensor:
        def call(*args: Tensor) -> Any:
            others = {name: replace(p) for name, p in net.layer.named_parameters()}
            return functional_call(net.layer, others, args)

        y = called(call)(x)
        y = y + called(net.layer)(x.cos()) if as_it_is_too else y
        return net.head(y.tanh())

    net, x = Net(forward, make()), torch.randn(N, 3, WIDTH)
    # What is alone may leave out parameters altogether: then they have no information.
    assert_right(net, (x,))


@pytest.mark.parametrize("frozen", ["", "weight"])
def test_layer_frozen_for_one_call(frozen: str) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        parameters = [p for name, p in net.layer.named_parameters() if name.startswith(frozen)]
        for p in parameters:
            p.requires_grad_(False)
        first = net.layer(x)
        for p in parameters:
            p.requires_grad_(True)
        return net.head((net.layer(first.tanh()) + first).tanh())

    assert_right(Net(forward, nn.Linear(WIDTH, WIDTH)), (torch.randn(N, WIDTH),))


# ---- other axes, with the same shapes -----------------------------------------------------------


def sequence_first_or_second(net: Net, x: Tensor, later: bool) -> Tensor:
    if later:
        return net.head(net.layer(x.transpose(0, 1)).tanh().sum(dim=0))
    return net.head(net.layer(x).tanh().sum(dim=1))


def test_an_argument_that_moves_the_samples() -> None:
    net, x = Net(sequence_first_or_second, nn.Linear(WIDTH, WIDTH)), torch.randn(N, N, WIDTH)
    assert_right(net, (x, False), (x, True))


def test_a_switch_of_the_model_that_moves_the_samples() -> None:
    net = Net(lambda net, x: sequence_first_or_second(net, x, net.later), nn.Linear(WIDTH, WIDTH))
    x = torch.randn(N, N, WIDTH)
    assert_right(net, (x,))
    net.later = True
    assert_right(net, (x,))


def test_a_layer_that_is_replaced() -> None:
    class Other(nn.Linear):
        def __init__(self) -> None:
            super().__init__(WIDTH, WIDTH)
            self.register_forward_pre_hook(lambda _, args: args[0].transpose(0, 1))
            self.register_forward_hook(lambda _, args, output: output.transpose(0, 1))  # noqa: ARG005

    net = Net(lambda net, x: net.head(net.layer(x).tanh()), nn.Linear(WIDTH, WIDTH))
    x = torch.randn(N, N, WIDTH)
    assert_right(net, (x,))
    net.layer = Other()
    assert_right(net, (x,))


def test_nothing_is_concluded_from_samples_without_gradient() -> None:
    """One sample alone, at one position, fits any arrangement."""

    def forward(net: Net, x: Tensor, weights: Tensor) -> Tensor:
        return net.head(net.layer(x.transpose(0, 1))[0].tanh() * weights[:, None])

    net, x = Net(forward, nn.Linear(WIDTH, WIDTH)), torch.randn(2, 2, WIDTH)
    assert_right(net, (x, torch.tensor([1.0, 0.0])), (x, torch.tensor([1.0, 1.0])))


def test_a_call_whose_output_does_not_arrive_says_nothing_of_axes() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        y = net.layer(x)
        net.layer(2 * x)
        return net.head(y.tanh()).transpose(0, 1)

    measured = assert_right(Net(forward, nn.Linear(WIDTH, WIDTH)), (torch.randn(N, 3, WIDTH),))
    assert {entry.rule for entry in measured.coverage} == {"linear"}


# ---- gradients that are no derivatives ----------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["rule", "generic"])
@pytest.mark.parametrize("option", ["scale_grad_by_freq", "sparse"])
@pytest.mark.parametrize("structure", [nm.Dense(), nm.Implicit()], ids=str)
def test_tables_have_derivatives(option: str, tied: bool, structure: Any) -> None:
    class Table(nn.Module):
        def __init__(self, **options: bool) -> None:
            super().__init__()
            self.table = nn.Embedding(6, WIDTH, **options)
            self.head = nn.Linear(WIDTH, 6)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.table(tokens).mean(dim=1).tanh()
            return x @ self.table.weight.T if tied else self.head(x)

    plain, model = Table(), Table(**{option: True})
    model.load_state_dict(plain.state_dict())
    tokens = torch.tensor([[0, 1, 1], [1, 1, 1], [2, 1, 0]])
    expected = reference.dense_fisher(plain, nm.Categorical(), tokens)
    measured = nm.fisher(model, nm.Categorical(), tokens, structure, estimator=nm.Exact())
    assert (measured.to_dense() - expected).norm() <= TOLERANCE * expected.norm()
    assert getattr(model.table, option)


# ---- threads ------------------------------------------------------------------------------------


def test_a_model_that_another_thread_measures() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 3))
    x = torch.randn(N, WIDTH)
    entered, done = threading.Event(), threading.Event()

    def batches() -> Any:
        yield x
        entered.set()
        done.wait(timeout=60)

    other = threading.Thread(target=nm.fisher, args=(model, nm.Categorical(), batches()))
    other.start()
    try:
        assert entered.wait(timeout=60)
        with pytest.raises(CaptureError, match="another thread"):
            nm.fisher(model, nm.Categorical(), x)
    finally:
        done.set()
        other.join()
    nm.fisher(model, nm.Categorical(), x)


def test_a_measurement_inside_another() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 3))
    x = torch.randn(N, WIDTH)

    def batches() -> Any:
        nm.fisher(model, nm.Categorical(), x)
        yield x
        nm.fisher(model, nm.Categorical(), x)

    nm.fisher(model, nm.Categorical(), batches())
    assert not model[0]._forward_hooks
