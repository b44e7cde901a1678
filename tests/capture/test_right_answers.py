"""Models that are easily captured wrongly, against one plain backward pass per output entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as pruning
from torch.utils.checkpoint import checkpoint

import neuromanifold as nm
from neuromanifold.testing import cases, reference

N, T = 5, 3
TOLERANCE = 1e-9
"""Relative, in float64: some thousand roundings."""


class Net(nn.Module):
    """Modules and parameters by name, and a forward function over them."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._function = forward

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._function(self, *args, **kwargs)


class Unknown(nn.Module):
    """A layer that no rule reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.weight * x) + self.bias


def plain_fisher(model: nn.Module, likelihood: nm.likelihoods.Likelihood, *args: Tensor) -> Tensor:
    """`(1/N) Σ_n J_nᵀ Σ_n J_n` by a backward pass per output entry: no hooks, no torch.func."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    outputs = model(*args)
    entries = outputs.reshape(len(outputs), -1)
    rows = [
        torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
        for entry in entries.flatten()
    ]
    j = torch.stack(
        [
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g.to_dense()).flatten()
                    for p, g in zip(parameters, row, strict=True)
                ]
            )
            for row in rows
        ]
    ).unflatten(0, entries.shape)
    sigma = reference.output_fisher(likelihood, outputs.detach())
    return torch.einsum("nep,nef,nfq->pq", j, sigma, j) / len(outputs)


def assert_right(
    model: nn.Module,
    *args: Tensor,
    expected: Tensor | None = None,
    generic: set[str] | None = None,
    likelihood: nm.likelihoods.Likelihood | None = None,
) -> nm.FisherOperator:
    """The exact matrix equals the oracle's; `generic` are the parameters read without a rule."""
    likelihood = nm.Categorical() if likelihood is None else likelihood
    if expected is None:
        expected = plain_fisher(model, likelihood, *args)
    data = args[0] if len(args) == 1 else (args, None)
    measured = nm.fisher(model, likelihood, data, nm.Dense(), estimator=nm.Exact())
    error = torch.linalg.matrix_norm(measured.to_dense() - expected)
    assert error <= TOLERANCE * torch.linalg.matrix_norm(expected)
    read = {entry.parameter for entry in measured.coverage if entry.rule == "generic"}
    assert generic is None or read == generic
    return measured


pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("case", cases.CASES[::9], ids=str)
def test_the_two_oracles_agree(case) -> None:
    model, (x, _) = case.model(), case.data()
    expected = reference.dense_fisher(model, case.likelihood, x)
    torch.testing.assert_close(plain_fisher(model, case.likelihood, x), expected)


# ---- in-place operations ------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(N, 4), (N, T, 4), (N, 2, T, 4)], ids=str)
def test_in_place_activation_after_linear(shape, bias) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        h = net.b(F.relu_(net.a(x)))
        return h if h.ndim == 2 else h.flatten(1, -2).mean(1)

    net = Net(forward, a=nn.Linear(4, 6, bias=bias), b=nn.Linear(6, 3))
    assert_right(net, torch.randn(shape), generic=set())


def test_in_place_activation_after_linear_on_a_transposed_input() -> None:
    net = Net(
        lambda net, x: net.b(F.relu_(net.a(x.mT))).mean(1), a=nn.Linear(T, 6), b=nn.Linear(6, 3)
    )
    assert_right(net, torch.randn(N, T, 4), generic=set())


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_in_place_activation_after_convolution(dims) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](2, 3, 2)
    model = nn.Sequential(conv, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(3 * 2**dims, 3))
    assert_right(model, torch.randn(N, 2, *[3] * dims), generic=set())


def test_in_place_operations_on_the_output_and_on_a_part_of_it() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        h = net.a(x)
        h.mul_(2).add_(x.sum(-1, keepdim=True))
        h[..., :3].tanh_()
        return net.b(h).mean(1)

    net = Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 3))
    assert_right(net, torch.randn(N, T, 4), generic=set())


# ---- one module, several uses -------------------------------------------------------------------


def test_module_called_twice() -> None:
    net = Net(lambda net, x: net.b(net.a(net.a(x).tanh())), a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    assert_right(net, torch.randn(N, 4), generic=set())


def test_module_at_two_places() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(
        nn.Sequential(shared, nn.Tanh()), nn.Sequential(shared, nn.Tanh()), nn.Linear(4, 3)
    )
    measured = assert_right(model, torch.randn(N, 4), generic=set())
    assert measured.layout.names == ("0.0.weight", "0.0.bias", "2.weight", "2.bias")


def test_module_called_with_and_without_positions() -> None:
    net = Net(
        lambda net, x: net.b(net.a(x).tanh().mean(1) + net.a(x[:, 0])),
        a=nn.Linear(4, 6),
        b=nn.Linear(6, 3),
    )
    assert_right(net, torch.randn(N, T, 4), generic=set())


def test_weight_used_outside_its_module() -> None:
    net = Net(lambda net, x: net.a(x) + F.linear(x**2, net.a.weight), a=nn.Linear(4, 3))
    assert_right(net, torch.randn(N, 4), generic={"a.weight", "a.bias"})


def test_weight_used_only_outside_its_module() -> None:
    net = Net(lambda net, x: F.linear(x, net.a.weight, net.a.bias), a=nn.Linear(4, 3))
    assert_right(net, torch.randn(N, 4), generic={"a.weight", "a.bias"})


def test_weight_used_outside_and_call_thrown_away() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        net.a(x)
        return F.linear(x**2, net.a.weight, net.a.bias)

    net = Net(forward, a=nn.Linear(4, 3))
    assert_right(net, torch.randn(N, 4), generic={"a.weight", "a.bias"})


def test_tied_embedding_and_head() -> None:
    embedding, head = nn.Embedding(3, 4), nn.Linear(4, 3, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, nn.Tanh(), head)
    measured = assert_right(model, torch.randint(3, (N,)), generic=set())
    assert measured.coverage["0.weight"].rule == "embedding + linear"


def test_generic_module_over_several_batches() -> None:
    net = Net(lambda net, x: net.a(x) + F.linear(x**2, net.a.weight), a=nn.Linear(4, 3))
    x = torch.randn(N, 4)
    whole = nm.fisher(net, nm.Categorical(), x, nm.Dense(), estimator=nm.Exact())
    parts = nm.fisher(net, nm.Categorical(), [(x[:2],), (x[2:],)], nm.Dense(), estimator=nm.Exact())
    torch.testing.assert_close(parts.to_dense(), whole.to_dense())


# ---- which rows belong to which sample ----------------------------------------------------------

POOLS = {"mean": lambda h: h.mean(1), "last": lambda h: h[:, -1], "first": lambda h: h[:, 0]}
"""Of features (N, T, O)."""


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("positions", [1, 2, N, 2 * N])
class TestRows:
    def test_samples_first(self, positions, pool) -> None:
        net = Net(
            lambda net, x: net.b(POOLS[pool](net.a(x).tanh())), a=nn.Linear(4, 6), b=nn.Linear(6, 3)
        )
        assert_right(net, torch.randn(N, positions, 4), generic=set())

    def test_positions_first(self, positions, pool) -> None:
        net = Net(
            lambda net, x: net.b(POOLS[pool](net.a(x).tanh().transpose(0, 1))),
            a=nn.Linear(4, 6),
            b=nn.Linear(6, 3),
        )
        assert_right(net, torch.randn(positions, N, 4), generic=set())

    def test_folded_samples_major(self, positions, pool) -> None:
        net = Net(
            lambda net, x: net.b(POOLS[pool](net.a(x.flatten(0, 1)).tanh().unflatten(0, (N, -1)))),
            a=nn.Linear(4, 6),
            b=nn.Linear(6, 3),
        )
        assert_right(net, torch.randn(N, positions, 4), generic=set())

    def test_folded_positions_major(self, positions, pool) -> None:
        def forward(net: Net, x: Tensor) -> Tensor:
            h = net.a(x.transpose(0, 1).flatten(0, 1)).tanh()
            return net.b(POOLS[pool](h.unflatten(0, (-1, N)).transpose(0, 1)))

        net = Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 3))
        assert_right(net, torch.randn(N, positions, 4), generic=set())

    def test_one_call_per_sample(self, positions, pool) -> None:
        def forward(net: Net, x: Tensor) -> Tensor:
            return net.b(POOLS[pool](torch.stack([net.a(row).tanh() for row in x])))

        net = Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 3))
        assert_right(net, torch.randn(N, positions, 4))


def test_rows_in_another_order() -> None:
    order = torch.tensor([2, 0, 3, 1, 4])  # the last one stays in its place
    net = Net(
        lambda net, x: net.b(net.a(x[order]).tanh()[order.argsort()]),
        a=nn.Linear(4, 6),
        b=nn.Linear(6, 3),
    )
    assert_right(net, torch.randn(N, 4), generic={"a.weight", "a.bias"})


def test_rows_in_an_order_that_depends_on_the_values() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return net.b(net.a(x[order]).tanh()[order.argsort()])

    net = Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 3))
    x = torch.randn(N, 4)
    assert_right(net, x[x[:, 0].argsort()], generic=set())  # in order by chance
    assert_right(net, x[x[:, 0].argsort(descending=True)], generic={"a.weight", "a.bias"})


def test_what_is_known_of_one_forward_is_not_assumed_of_another() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(N, N, 4)

    def measure(forward: Callable[..., Tensor]) -> Tensor:
        measured = nm.fisher(
            model, nm.Categorical(), x, nm.Dense(), estimator=nm.Exact(), forward=forward
        )
        return measured.to_dense()

    last_position = measure(lambda model, x: model(x)[:, -1])
    transposed = measure(lambda model, x: model(x.transpose(0, 1))[-1])
    torch.testing.assert_close(transposed, last_position)


def test_nothing_is_concluded_from_gradients_that_are_zero() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.b(torch.tanh(net.a(x.transpose(0, 1))).mean(0))

    net = Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 3))
    nn.init.zeros_(net.b.weight)
    x = torch.randn(N, N, 4)
    assert_right(net, x)
    nn.init.normal_(net.b.weight)
    assert_right(net, x, generic=set())


def test_input_without_a_sample_axis() -> None:
    for rows in (2, N, 2 * N):
        net = Net(
            lambda net, x: x @ net.a(net.table).tanh().mT[:, :4].mT,
            a=nn.Linear(4, 3),
            table=nn.Parameter(torch.randn(rows, 4), requires_grad=False),
        )
        x = torch.randn(N, min(rows, 4))
        assert_right(net, x, generic={"a.weight", "a.bias"})


def test_outputs_that_are_a_broadcast_parameter() -> None:
    net = Net(lambda net, x: net.bias.expand(len(x), -1), bias=nn.Parameter(torch.randn(3)))
    assert_right(net, torch.randn(N, 4), generic={"bias"})


def test_positions_folded_into_the_outputs() -> None:
    net = Net(lambda net, x: net.a(x).flatten(0, 1), a=nn.Linear(4, 3))
    measured = assert_right(net, torch.randn(N, T, 4))
    assert measured.num_samples == N * T


# ---- what takes part, and what does not ---------------------------------------------------------


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "0.*", "2.weight", "2.bias"])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_frozen_parameters(kind, frozen) -> None:
    if kind == "linear":
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        x = torch.randn(N, 4)
    else:
        model = nn.Sequential(nn.Conv1d(2, 2, 2), nn.Tanh(), nn.Conv1d(2, 3, 3), nn.Flatten())
        x = torch.randn(N, 2, 4)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen.rstrip("*")))
    measured = assert_right(model, x, generic=set())
    assert not any(name.startswith(frozen.rstrip("*")) for name in measured.layout.names)


def test_some_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 6), Unknown(6), nn.Linear(6, 3))
    x = torch.randn(N, 4)
    names = ["1.weight", "2.bias"]
    whole = nm.fisher(model, nm.Categorical(), x, nm.Dense(), estimator=nm.Exact())
    part = nm.fisher(model, nm.Categorical(), x, nm.Dense(), estimator=nm.Exact(), params=names)
    torch.testing.assert_close(part.to_dense(), whole.restrict(names).to_dense())


def test_unused_module_has_no_information() -> None:
    net = Net(lambda net, x: net.a(x), a=nn.Linear(4, 3), unused=nn.Linear(4, 4))
    measured = assert_right(net, torch.randn(N, 4))
    assert measured.restrict(["unused.weight", "unused.bias"]).trace() == 0


def test_output_that_does_not_arrive_has_no_information() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        net.aside(x)
        return net.a(x)

    net = Net(forward, a=nn.Linear(4, 3), aside=nn.Linear(4, 4))
    assert assert_right(net, torch.randn(N, 4)).block("aside").trace() == 0


def test_detached_branch_has_no_information() -> None:
    net = Net(lambda net, x: net.b(net.a(x).detach()), a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    assert assert_right(net, torch.randn(N, 4)).block("a").trace() == 0


# ---- layers that are not what they seem ---------------------------------------------------------


def test_keyword_only_calls() -> None:
    net = Net(
        lambda net, *, x: net.b(input=net.a(input=x).tanh()), a=nn.Linear(4, 6), b=nn.Linear(6, 3)
    )
    x = torch.randn(N, 4)
    measured = nm.fisher(net, nm.Categorical(), {"x": x}, nm.Dense(), estimator=nm.Exact())
    same = Net(lambda net, x: net.b(net.a(x).tanh()), a=net.a, b=net.b)
    torch.testing.assert_close(measured.to_dense(), plain_fisher(same, nm.Categorical(), x))


def test_a_shared_weight_has_every_owner_s_name() -> None:
    net = Net(lambda net, x: net.b(net.a(x).tanh()), a=nn.Embedding(7, 4), b=nn.Linear(4, 7))
    net.b.weight = net.a.weight
    x = torch.randint(7, (N, T))
    whole = nm.fisher(net, nm.Categorical(), x, nm.Dense(), estimator=nm.Exact())
    for pattern, names in (
        ("b.weight", ["a.weight"]),
        ("b.*", ["a.weight", "b.bias"]),
        ("a.*", ["a.weight"]),
    ):
        part = nm.fisher(net, nm.Categorical(), x, nm.Dense(), estimator=nm.Exact(), params=pattern)
        assert list(part.layout.names) == names
        torch.testing.assert_close(part.to_dense(), whole.restrict(names).to_dense())


def test_keyword_calls_in_any_order() -> None:
    """The input need not be the first keyword."""
    net = Net(
        lambda net, x: net.a(output_size=[9], input=x).flatten(1),
        a=nn.ConvTranspose1d(2, 3, 3, stride=2),
    )
    assert_right(net, torch.randn(N, 2, 4), generic=set())


@pytest.mark.parametrize("prepend", [False, True])
def test_hooks_of_the_user(prepend) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    model[0].register_forward_pre_hook(lambda _, args: (args[0] * 3,))
    model[0].register_forward_hook(lambda *call: call[-1] ** 2 + 1, prepend=prepend)
    assert_right(model, torch.randn(N, 4), generic=set())


def test_subclass_with_its_own_forward() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, 2 * self.weight, self.bias)

    model = nn.Sequential(Doubled(4, 6), nn.Tanh(), nn.Linear(6, 3))
    assert_right(model, torch.randn(N, 4), generic={"0.weight", "0.bias"})


def test_subclass_without_a_forward() -> None:
    class Named(nn.Linear):
        pass

    assert_right(nn.Sequential(Named(4, 3)), torch.randn(N, 4), generic=set())


def test_object_with_its_own_forward() -> None:
    linear = nn.Linear(4, 6)
    linear.forward = lambda x: F.linear(x, 2 * linear.weight, linear.bias)
    model = nn.Sequential(linear, nn.Tanh(), nn.Linear(6, 3))
    assert_right(model, torch.randn(N, 4), generic={"0.weight", "0.bias"})


def test_computed_weights() -> None:
    normed = parametrizations.weight_norm(nn.Linear(4, 6))
    pruned = nn.Linear(6, 6)
    pruning.l1_unstructured(pruned, "weight", 0.5)
    spectral = parametrizations.spectral_norm(nn.Linear(6, 3))
    model = nn.Sequential(normed, nn.Tanh(), pruned, nn.Tanh(), spectral).eval()
    measured = assert_right(model, torch.randn(N, 4))
    assert measured.coverage["2.bias"].rule == "linear"
    assert measured.coverage["2.weight_orig"].rule == "generic"


def test_parameters_that_modules_read_from_a_list() -> None:
    hidden = nn.Linear(4, 6)
    net = Net(
        lambda net, x: net.b(net.hidden[0](x).tanh()),
        held=nn.ParameterList(hidden.parameters()),
        b=nn.Linear(6, 3),
    )
    vars(net)["hidden"] = [hidden]  # as a module's own list, which registers nothing
    assert_right(net, torch.randn(N, 4), generic={"held.0", "held.1"})


def test_sparse_gradients() -> None:
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True, padding_idx=0), nn.Linear(4, 3))
    assert_right(model, torch.randint(7, (N,)), generic=set())


def test_custom_function() -> None:
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
            ctx.save_for_backward(x, scale)
            return x * scale

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
            x, scale = ctx.saved_tensors
            return g * scale, (g * x).sum(0)

    net = Net(
        lambda net, x: net.b(Scale.apply(net.a(x), net.scale).tanh()),
        a=nn.Linear(4, 6),
        b=nn.Linear(6, 3),
        scale=nn.Parameter(torch.randn(6)),
    )
    assert_right(net, torch.randn(N, 4), generic={"scale"})


# ---- without a layer rule -----------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, *, batch_first: bool, need_weights: bool) -> None:
        super().__init__()
        self.inputs = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.norm = nn.LayerNorm(8)
        self.position = nn.Parameter(torch.randn(T, 8))
        self.head = nn.Linear(8, 3)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        batch_first = self.attention.batch_first
        h = self.inputs(x) + (self.position if batch_first else self.position[:, None])
        h = h + self.attention(h, h, h, need_weights=self.need_weights)[0]
        return self.head(self.norm(h).mean(1 if batch_first else 0))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_attention_norm_and_a_raw_parameter(batch_first, need_weights, mode) -> None:
    model = Attention(batch_first=batch_first, need_weights=need_weights).train(mode == "train")
    x = torch.randn(N, T, 6) if batch_first else torch.randn(T, N, 6)
    assert_right(model, x, generic={"position"})


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_transformer_layer(mode) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = Net(lambda net, x: net.head(net.layer(x).mean(1)), layer=layer, head=nn.Linear(8, 3))
    measured = assert_right(net.train(mode == "train"), torch.randn(N, T, 8))
    assert measured.coverage["layer.linear1.weight"].rule == "linear"


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind, batch_first) -> None:
    axis = 1 if batch_first else 0
    net = Net(
        lambda net, x: net.head(net.cell(x)[0].select(axis, -1)),
        cell=kind(4, 3, batch_first=batch_first),
        head=nn.Linear(3, 3),
    )
    x = torch.randn(N, T, 4) if batch_first else torch.randn(T, N, 4)
    assert_right(net, x, generic=set())


def test_batch_norm_with_fixed_statistics() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    model(torch.randn(50, 4))  # statistics that are not those of a fresh module
    assert_right(model.eval(), torch.randn(N, 4), generic=set())


@pytest.mark.parametrize("kind", ["weight_norm", "lstm", "attention"])
def test_products_where_torch_has_no_forward_mode(kind) -> None:
    if kind == "lstm":
        model = Net(
            lambda net, x: net.b(net.a(x)[0][:, -1]),
            a=nn.LSTM(4, 3, batch_first=True),
            b=nn.Linear(3, 3),
        )
    elif kind == "attention":
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        model = Net(lambda net, x: net.b(net.a(x)[:, -1]), a=layer, b=nn.Linear(4, 3))
    else:
        model = Net(
            lambda net, x: net.b(net.a(x).tanh().mean(1)),
            a=parametrizations.weight_norm(nn.Linear(4, 3)),
            b=nn.Linear(3, 3),
        )
    x = torch.randn(N, T, 4)
    measured = nm.fisher(model, nm.Categorical(), x, nm.Implicit(), estimator=nm.Exact())
    torch.testing.assert_close(measured.to_dense(), plain_fisher(model, nm.Categorical(), x))


# ---- how the model is run -----------------------------------------------------------------------


def test_checkpointing() -> None:
    def inside(net: Net, x: Tensor) -> Tensor:
        return F.relu_(net.b(net.a(x).tanh()))

    def block(net: Net, x: Tensor) -> Tensor:
        return inside(net, x) * net.scale

    parts = {"a": nn.Linear(4, 6), "b": nn.Linear(6, 6), "head": nn.Linear(6, 3)}
    x = torch.randn(N, 4)
    model = Net(lambda net, x: net.head(checkpoint(inside, net, x, use_reentrant=False)), **parts)
    assert_right(model, x, generic=set())
    with_scale = Net(
        lambda net, x: net.head(checkpoint(block, net, x, use_reentrant=False)),
        scale=nn.Parameter(torch.randn(6)),
        **parts,
    )
    assert_right(with_scale, x, generic={"scale"})


@pytest.mark.parametrize("raw_parameter", [False, True])
def test_dropout_in_training_mode(raw_parameter) -> None:
    """The matrix of the network with the units that were dropped in this pass."""
    masks = []

    class Dropout(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            masks.append(super().forward(torch.ones_like(x)))
            return x * masks[-1]

    def forward(net: Net, x: Tensor) -> Tensor:
        h = net.drop(net.a(x)).tanh()
        return net.b(h * net.scale)

    scale = nn.Parameter(torch.randn(6), requires_grad=raw_parameter)
    net = Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 3), drop=Dropout(0.5), scale=scale)
    x = torch.randn(N, 4)
    measured = nm.fisher(net, nm.Categorical(), x, nm.Dense(), estimator=nm.Exact())
    net.drop = Net(lambda _, x, mask=masks[0]: x * mask)
    torch.testing.assert_close(measured.to_dense(), plain_fisher(net, nm.Categorical(), x))


def test_dropout_beside_an_embedding_of_positions() -> None:
    """Its output has no samples, which a second run shows: with the masks of the first."""

    def forward(net: Net, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1])[None]
        return net.b(net.drop(net.a(tokens) + net.p(positions)).tanh())

    layers = {"a": nn.Embedding(7, 6), "p": nn.Embedding(5, 6), "b": nn.Linear(6, 3)}
    net, tokens = Net(forward, drop=nn.Dropout(0.5), **layers), torch.randint(7, (N, 5))
    seed = torch.get_rng_state()
    measured = nm.fisher(net, nm.Categorical(), tokens, nm.Dense(), estimator=nm.Exact())
    after = torch.get_rng_state()
    torch.set_rng_state(seed)
    mask = net.drop(torch.ones(N, 5, 6))
    assert torch.equal(torch.get_rng_state(), after)
    assert measured.coverage["p.weight"].rule != "generic"
    net.drop = Net(lambda _, x: x * mask)
    torch.testing.assert_close(measured.to_dense(), plain_fisher(net, nm.Categorical(), tokens))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_switched_off_by_the_caller(context) -> None:
    model = nn.Sequential(nn.Linear(4, 6), Unknown(6), nn.Linear(6, 3))
    x = torch.randn(N, 4)
    expected = plain_fisher(model, nm.Categorical(), x)
    with context():
        measured = nm.fisher(model, nm.Categorical(), x, nm.Dense(), estimator=nm.Exact())
        torch.testing.assert_close(measured.to_dense(), expected)


@pytest.mark.parametrize(
    "structure",
    [nm.Dense(), nm.BlockDiagonal(), nm.UnitWise(), nm.Diagonal(), nm.Kronecker(), nm.Gram()],
    ids=repr,
)
def test_results_carry_no_graph(structure) -> None:
    model = nn.Sequential(nn.Linear(4, 6), Unknown(6), nn.Linear(6, 3))
    measured = nm.fisher(model, nm.Categorical(), torch.randn(N, 4), structure)
    assert not (measured @ torch.ones(measured.num_parameters)).requires_grad
    assert not measured.trace().requires_grad


def test_products_of_a_part_carry_no_graph() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(N, 4)
    measured = nm.fisher(model, nm.Categorical(), x, nm.Implicit(), params="0.*")
    assert not (measured @ torch.ones(measured.num_parameters)).requires_grad


@pytest.mark.parametrize("in_place", [False, True])
def test_whole_model_compiled(in_place) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=in_place), nn.Linear(6, 3))
    x = torch.randn(N, 4)
    expected = plain_fisher(model, nm.Categorical(), x)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    measured = assert_right(compiled, x, expected=expected, generic=set())
    assert measured.layout.names[0] == "0.weight"


@pytest.mark.parametrize("sizes", [(3, 1, 1), (2, 2, 1), (1, 4)])
def test_uneven_batches(sizes) -> None:
    model = nn.Sequential(nn.Linear(4, 6), Unknown(6), nn.Linear(6, 3))
    x = torch.randn(N, 4)
    batches = [(part, None) for part in x.split(sizes)]
    measured = nm.fisher(model, nm.Categorical(), batches, nm.Dense(), estimator=nm.Exact())
    assert measured.num_samples == N
    torch.testing.assert_close(measured.to_dense(), plain_fisher(model, nm.Categorical(), x))


def test_autocast() -> None:
    """Within the precision of bfloat16, 2⁻⁸ per rounding, and kept in float32."""
    model = nn.Sequential(
        nn.Linear(8, 16),
        nn.ReLU(),
        nn.LayerNorm(16),
        nn.Linear(16, 16),
        nn.Tanh(),
        nn.Linear(16, 3),
    ).float()
    x = torch.randn(32, 8).float()
    full = nm.fisher(model, nm.Categorical(), x, nm.Dense(), estimator=nm.Exact()).to_dense()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = nm.fisher(model, nm.Categorical(), x, nm.Dense(), estimator=nm.Exact())
    assert cast.dtype == torch.float32
    # Three layers, each rounding inputs, weights and outputs forward and back, squared in F.
    roundings = 3 * 6 * 2
    error = torch.linalg.matrix_norm(cast.to_dense() - full)
    assert 0 < error <= roundings * 2**-8 * torch.linalg.matrix_norm(full)


def test_autocast_of_attention() -> None:
    """Samples alone run through other kernels; what these round differently is no mixing."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    net = Net(lambda net, x: net.b(net.a(x).mean(1)), a=layer, b=nn.Linear(16, 3)).float()
    x = torch.randn(32, T, 16).float()
    full = nm.fisher(net, nm.Categorical(), x, nm.Diagonal(), estimator=nm.Exact()).trace()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = nm.fisher(net, nm.Categorical(), x, nm.Diagonal(), estimator=nm.Exact()).trace()
    roundings = 8 * 6 * 2  # of eight layers, as above
    assert 0 < abs(cast - full) <= roundings * 2**-8 * full


def test_autocast_inside_the_model_with_a_module_called_twice() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net.b(net.a(net.a(x).tanh())).float()

    net = Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 3)).float()
    measured = nm.fisher(net, nm.Categorical(), torch.randn(N, 4).float(), nm.Dense())
    assert {entry.rule for entry in measured.coverage} == {"linear"}
