"""Attention: the rule does what the module does, and what it reports is the Fisher information."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import neuromanifold as nm
from neuromanifold.layers import AttentionRule
from neuromanifold.structures import Structure
from neuromanifold.testing import check_composite_rule, reference

N, L, S, E, H = 2, 3, 5, 4, 2


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).double()


PAST = torch.ones(L, S, dtype=torch.bool).triu(2)
PADDING = torch.tensor([[False] * S, [False] * (S - 2) + [True] * 2])

MODULES: dict[str, dict[str, Any]] = {
    "packed": {},
    "no bias": {"bias": False},
    "separate": {"kdim": 3, "vdim": 5},
    "separate, no bias": {"kdim": 3, "bias": False},
    "added key": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "everything": {"kdim": 3, "vdim": 5, "add_bias_kv": True, "add_zero_attn": True},
}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights of heads": {"average_attn_weights": False},
    "fused": {"need_weights": False},
    "pairs": {"attn_mask": PAST},
    "pairs, fused": {"attn_mask": PAST, "need_weights": False},
    "pairs, float": {"attn_mask": randn(L, S)},
    "pairs of each head": {"attn_mask": randn(N * H, L, S), "need_weights": False},
    "keys": {"key_padding_mask": PADDING},
    "keys, fused": {"key_padding_mask": PADDING, "need_weights": False},
    "keys, float": {"key_padding_mask": randn(N, S)},
    "both": {"attn_mask": PAST, "key_padding_mask": PADDING},
    "both, float": {"attn_mask": randn(N * H, L, S), "key_padding_mask": randn(N, S)},
    "both, fused": {"attn_mask": PAST, "key_padding_mask": PADDING, "need_weights": False},
    "causal": {"attn_mask": PAST, "is_causal": True},
    "causal, fused": {"attn_mask": PAST, "is_causal": True, "need_weights": False},
    "causal, keys": {
        "attn_mask": PAST,
        "is_causal": True,
        "key_padding_mask": PADDING,
        "need_weights": False,
    },
}


def inputs(module: nn.MultiheadAttention) -> tuple[Tensor, Tensor, Tensor]:
    rows = randn(N, L, E), randn(N, S, module.kdim), randn(N, S, module.vdim)
    q, k, v = rows if module.batch_first else (x.transpose(0, 1) for x in rows)
    return q, k, v


@pytest.fixture(params=[True, False], ids=["batch first", "sequence first"])
def batch_first(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("options", MODULES)
def test_contract(options: str, call: str, batch_first: bool) -> None:
    module = nn.MultiheadAttention(E, H, batch_first=batch_first, **MODULES[options])
    check_composite_rule(module.eval(), *inputs(module), kwargs=CALLS[call])


def test_contract_of_self_attention(batch_first: bool) -> None:
    module = nn.MultiheadAttention(E, H, batch_first=batch_first)
    x = randn(N, L, E)
    check_composite_rule(module, x, x, x)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_draws_what_the_module_draws(need_weights: bool, batch_first: bool) -> None:
    module = nn.MultiheadAttention(E, H, dropout=0.5, batch_first=batch_first).train()
    check_composite_rule(module, *inputs(module), kwargs={"need_weights": need_weights})


class Refuses:
    """A reporter for calls that are left to the module."""

    def __call__(self, port: str, x: Tensor | None, output: Tensor) -> Tensor:
        raise AssertionError(port)


def test_inputs_without_samples_are_left_to_the_module() -> None:
    module = nn.MultiheadAttention(E, H).double()
    q, k = randn(L, E), randn(S, E)
    out, weights = AttentionRule().forward(module, Refuses(), q, k, k)
    expected, expected_weights = module(q, k, k)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize(
    "wrong",
    [
        {"attn_mask": randn(1, S)},
        {"attn_mask": randn(1, L, S)},
        {"key_padding_mask": PADDING[:1]},
        {"attn_mask": PAST.long()},
        {"is_causal": True},
    ],
    ids=["one row", "one head", "one sample", "integers", "a hint alone"],
)
def test_what_the_module_refuses_is_refused(wrong: dict[str, Any]) -> None:
    module = nn.MultiheadAttention(E, H, batch_first=True).double()
    with pytest.raises(Exception) as own:  # noqa: PT011 - whatever it raises
        module(*inputs(module), **wrong)
    with pytest.raises(type(own.value)):
        AttentionRule().forward(module, Refuses(), *inputs(module), **wrong)


def passed(port: str, x: Tensor | None, output: Tensor) -> Tensor:
    return output


class ByRule(nn.Module):
    """The module run by its rule."""

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return AttentionRule().forward(self.module, passed, *args, **kwargs)


@pytest.mark.parametrize("options", MODULES)
def test_function_transformations(options: str) -> None:
    module = nn.MultiheadAttention(E, H, batch_first=True, **MODULES[options]).double()
    by_rule, x = ByRule(module), inputs(module)
    params = {name: p.detach() for name, p in by_rule.named_parameters()}

    def output(params: dict[str, Tensor], *sample: Tensor) -> Tensor:
        rows = tuple(part[None] for part in sample)
        return functional_call(by_rule, params, rows)[0].square().sum()

    gradients = vmap(grad(output), in_dims=(None, 0, 0, 0))(params, *x)
    module(*x)[0].square().sum().backward()
    for name, p in by_rule.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(gradients[name].sum(0), p.grad)


@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast(need_weights: bool) -> None:
    module = nn.MultiheadAttention(E, H, add_bias_kv=True, batch_first=True)
    x = [part.float() for part in inputs(module)]
    kwargs = {"attn_mask": PAST, "key_padding_mask": PADDING, "need_weights": need_weights}
    with torch.autocast("cpu", torch.bfloat16):
        (got, _), (expected, _) = ByRule(module)(*x, **kwargs), module(*x, **kwargs)
    assert got.dtype == expected.dtype
    eps = torch.finfo(torch.bfloat16).eps
    assert (got - expected).norm() <= 10 * eps * expected.norm()


# ---- the Fisher information -------------------------------------------------------------------


class Cross(nn.Module):
    """Attention of a first sequence to a second one; its outputs `(N, L, E)`."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, batch_first=True, **options)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(q, k, v, need_weights=False)[0]


class Positions(nn.Module):
    """A raw parameter before attention: the rule's forward runs inside `torch.func` too."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(randn(L, E))
        self.attention = nn.MultiheadAttention(E, H, add_bias_kv=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions
        return self.attention(x, x, x)[0]


class Decoder(nn.Module):
    """A decoder layer under a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(E, H, 2, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.layer(x, memory, tgt_mask=mask, tgt_is_causal=True)


STRUCTURES: dict[str, Structure] = {
    "Dense": nm.Dense(),
    "BlockDiagonal": nm.BlockDiagonal(),
    "UnitWise": nm.UnitWise(),
    "Diagonal": nm.Diagonal(),
}
MODELS: dict[str, tuple[nn.Module, Any]] = {
    "encoder layer": (nn.TransformerEncoderLayer(E, H, 2, batch_first=True), randn(N, L, E)),
    "decoder layer": (Decoder(), (randn(N, L, E), randn(N, S, E))),
    "positions": (Positions(), randn(N, L, E)),
    "added key": (Cross(add_bias_kv=True), (randn(N, L, E), randn(N, S, E), randn(N, S, E))),
}
for model, _ in MODELS.values():
    model.double().eval()
    for p in model.parameters():  # norms and biases have no special values
        nn.init.normal_(p, std=0.5, generator=torch.Generator().manual_seed(p.numel()))

PROJECTIONS = ("in_proj_weight", "in_proj_bias", "_proj_weight", "bias_k", "bias_v")


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", MODELS)
def test_is_the_projected_oracle(name: str, structure: str) -> None:
    model, x = MODELS[name]
    data, likelihood = (x, None), nm.Gaussian()
    F = nm.fisher(model, likelihood, data, STRUCTURES[structure], estimator=nm.Exact())
    oracle = reference.dense_fisher(model, likelihood, data)
    assert_same(F.to_dense(), reference.project(oracle, model, structure))  # type: ignore[arg-type]
    for entry in F.coverage:
        if entry.parameter.endswith(PROJECTIONS):
            assert entry.rule == "attention", entry
        elif "out_proj" in entry.parameter:
            assert entry.rule == "linear", entry


@pytest.mark.parametrize("key_width", [E, 3], ids=["packed", "separate"])
@pytest.mark.parametrize("trainable", ["weight", "bias", "bias_k", "in_proj", "out_proj"])
def test_some_parameters(key_width: int, trainable: str) -> None:
    torch.manual_seed(0)
    model = Cross(kdim=key_width, add_bias_kv=True).double()
    x = randn(N, L, E), randn(N, S, key_width), randn(N, S, E)
    for name, p in model.named_parameters():
        p.requires_grad_(trainable in name)
    F = nm.fisher(model, nm.Gaussian(), (x, None), nm.Dense(), estimator=nm.Exact())
    assert_same(F.to_dense(), reference.dense_fisher(model, nm.Gaussian(), (x, None)))


@pytest.mark.parametrize("name", MODELS)
def test_kronecker(name: str) -> None:
    model, x = MODELS[name]
    F = nm.fisher(model, nm.Gaussian(), (x, None), nm.Kronecker(), estimator=nm.Exact())
    kept = {e.parameter: e.structure for e in F.coverage if e.parameter.endswith("in_proj_weight")}
    assert set(kept.values()) == {"Kronecker"}
    assert F.eigenvalues().min() >= -1e-12 * F.trace()


def test_kronecker_is_exact_for_one_sample_and_one_query() -> None:
    """Queries are used at one position; keys and values are not, but values of one key are."""
    torch.manual_seed(0)
    model = Cross(kdim=3, vdim=5, bias=False).double()
    for span, name in ((S, "attention.q_proj_weight"), (1, "attention.v_proj_weight")):
        data = ((randn(1, 1, E), randn(1, span, 3), randn(1, span, 5)), None)
        F = nm.fisher(model, nm.Gaussian(), data, nm.Kronecker(), estimator=nm.Exact())
        oracle = reference.dense_fisher(model, nm.Gaussian(), data)
        part = F.layout.slices[name]
        assert oracle[part, part].norm() > 0
        assert_same(F.to_dense()[part, part], oracle[part, part])
