"""Every layer type, in every exact structure, is the oracle's matrix, parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.structures import Structure
from neuromanifold.testing import reference
from neuromanifold.testing.cases import Case
from neuromanifold.testing.layer_cases import LAYERS

RTOL = 1e-8
GRADIENT_ROUNDING = 1e-12
"""Of the largest gradients: what a gradient may be that is zero but for rounding."""

STRUCTURES: dict[str, Structure] = {
    "Dense": nm.Dense(),
    "BlockDiagonal": nm.BlockDiagonal(),
    "UnitWise": nm.UnitWise(),
    "Diagonal": nm.Diagonal(),
    "Gram": nm.Gram(),
    "Implicit": nm.Implicit(),
}
WHOLE = ("Gram", "Implicit")  # what they represent is the whole matrix

APART = {"embedding_as_head": ("embedding.weight",)}
"""Parameters that a model also uses outside of the module that owns them."""

GENERIC = {
    "embedding_bag_sum",
    "embedding_bag_mean",
    "embedding_as_head",
    "bilinear",
    "bilinear_without_bias",
    "raw_adapter",
    "raw_parameters",
}
"""Cases with parameters that no layer rule reads."""

ONE_USE = (
    "embedding",
    "layer_norm",
    "rms_norm",
    "group_norm_vector",
    "batch_norm1d",
    "prelu",
    "prelu_per_unit",
    "hugging_face_conv1d",
    "bilinear",
    "low_rank_adapter",
)
"""Cases whose every layer is used once per sample, at one position."""


def test_names_are_unique() -> None:
    names = [case.name for case in LAYERS]
    assert len(set(names)) == len(names)


@pytest.fixture(params=LAYERS, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@cache
def oracle(case: Case) -> Tensor:
    return reference.dense_fisher(case.model(), case.likelihood, case.data())


def measure(case: Case, structure: Structure) -> nm.FisherOperator:
    return nm.fisher(case.model(), case.likelihood, case.data(), structure, estimator=nm.Exact())


def assert_same_everywhere(F: nm.FisherOperator, expected: Tensor, got: Tensor) -> None:
    """As a whole, and in the block of each parameter, however small its entries are."""
    floor = GRADIENT_ROUNDING**2 * expected.norm()
    for name, s in {"": slice(None), **F.layout.slices}.items():
        error = (got[s, s] - expected[s, s]).norm()
        assert error <= RTOL * expected[s, s].norm() + floor, name


def test_a_case_is_small_double_precision_and_the_same_each_time(case: Case) -> None:
    state = torch.get_rng_state()
    model, again, (x, y) = case.model(), case.model(), case.data()
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(p.numel() for p in model.parameters()) <= 200
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert torch.equal(flat(model), flat(again))
    assert torch.equal(y, case.data()[1])
    assert len(y) == 7
    case.likelihood.check(model(*x) if isinstance(x, tuple) else model(x), y)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_exact_is_the_projected_oracle(case: Case, structure: str) -> None:
    F = measure(case, STRUCTURES[structure])
    kept = "Dense" if structure in WHOLE else structure
    apart = APART.get(case.name, ())
    expected = reference.project(oracle(case), case.model(), kept, apart=apart)  # type: ignore[arg-type]
    assert_same_everywhere(F, expected, F.to_dense())
    assert all(entry.exact for entry in F.coverage)


@pytest.mark.parametrize("structure", [*STRUCTURES.values(), nm.Kronecker()], ids=repr)
def test_coverage_names_every_trainable_parameter(case: Case, structure: Structure) -> None:
    trainable = [name for name, p in case.model().named_parameters() if p.requires_grad]
    coverage = measure(case, structure).coverage
    assert [entry.parameter for entry in coverage] == trainable
    assert all(entry.rule and entry.structure for entry in coverage)
    assert all(entry.note for entry in coverage if entry.rule == "generic")


def test_only_what_has_no_rule_is_read_by_the_generic_path(case: Case) -> None:
    coverage = measure(case, nm.Diagonal()).coverage
    assert any(entry.rule == "generic" for entry in coverage) == (case.name in GENERIC)


def test_kronecker_is_a_finite_positive_matrix(case: Case) -> None:
    F = measure(case, nm.Kronecker())
    eigenvalues, trace = F.eigenvalues(), F.trace()
    assert torch.isfinite(eigenvalues).all()
    assert eigenvalues.min() >= -RTOL * trace
    assert trace > 0
    torch.testing.assert_close(F.layout.flatten(F.diagonal()).sum(), trace)


@pytest.mark.parametrize("case", [c for c in LAYERS if c.name in ONE_USE], ids=str)
def test_kronecker_is_exact_for_one_sample_at_one_position(case: Case) -> None:
    model, (x, _) = case.model(), case.data()
    x = tuple(part[:1] for part in x) if isinstance(x, tuple) else x[:1]
    F = nm.fisher(model, case.likelihood, (x, None), nm.Kronecker(), estimator=nm.Exact())
    exact = reference.dense_fisher(model, case.likelihood, (x, None))
    kept = {"Kronecker": "BlockDiagonal"}
    got, expected = F.to_dense(), torch.zeros_like(exact)
    for name, s in F.layout.slices.items():
        structure = F.coverage[name].structure
        part = reference.project(exact, model, kept.get(structure, structure))  # type: ignore[arg-type]
        expected[s] = part[s]
    assert_same_everywhere(F, expected, got)


# ---- Kronecker factors from their definition by uses ------------------------------------------

WEIGHT_SHARING = pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])

WITH_TWIN = ("embedding", "attention", "transformer", "rnn", "gru", "lstm", "tied", "shared")
"""Cases with layers that the oracle does not know: see the twins below."""


@WEIGHT_SHARING
@pytest.mark.parametrize("case", [c for c in LAYERS if not c.name.startswith(WITH_TWIN)], ids=str)
def test_kronecker_factors_are_the_oracles(case: Case, weight_sharing: Any) -> None:
    F = measure(case, nm.Kronecker(weight_sharing))
    expected = reference.kronecker(case.model(), case.likelihood, case.data(), weight_sharing)
    assert_same_everywhere(F, expected, F.to_dense())


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """The layer with these values."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).double()
    layer.weight.data = weight.detach().clone()
    if bias is not None:
        layer.bias.data = bias.detach().clone()
    return layer


class OneHot(nn.Module):
    """Tokens to `(..., vocabulary)`."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.one_hot(tokens, self.vocabulary).double()


def lookup_twin(model: nn.Module) -> nn.Module:
    """An embedding as a linear layer of one-hot vectors."""
    weight = model[0].weight
    return nn.Sequential(OneHot(len(weight)), linear(weight.T), *model[1:])


class AttentionTwin(nn.Module):
    """Attention of four linear layers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        attention = model.attention
        if attention.in_proj_weight is not None:
            weights = attention.in_proj_weight.chunk(3)
        else:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            weights = tuple(getattr(attention, name) for name in names)
        bias = attention.in_proj_bias
        biases = (None, None, None) if bias is None else bias.chunk(3)
        self.queries, self.keys, self.values = map(linear, weights, biases)
        self.out = linear(attention.out_proj.weight, attention.out_proj.bias)
        self.heads = attention.num_heads

    def forward(
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None
    ) -> Tensor:
        key = query if key is None else key
        value = key if value is None else value
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.queries, query), (self.keys, key), (self.values, value))
        )
        scores = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
        return self.out((scores @ v).transpose(1, 2).flatten(2))


class RecurrentTwin(nn.Module):
    """The cells of one direction unrolled, each of two linear layers called at every step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        layer = model.layer if hasattr(model, "layer") else model.cell
        suffixes = [f"_l{i}" for i in range(layer.num_layers)] if hasattr(model, "layer") else [""]
        self.step = {"RNN": rnn_step, "GRU": gru_step, "LSTM": lstm_step}[
            type(layer).__name__.removesuffix("Cell")
        ]
        self.inputs, self.hidden = (
            nn.ModuleList(
                linear(
                    getattr(layer, f"weight_{kind}{suffix}"), getattr(layer, f"bias_{kind}{suffix}")
                )
                for suffix in suffixes
            )
            for kind in ("ih", "hh")
        )
        self.head = linear(model.head.weight, model.head.bias) if hasattr(model, "head") else None

    def forward(self, x: Tensor) -> Tensor:
        for inputs, hidden in zip(self.inputs, self.hidden, strict=True):
            h = c = x.new_zeros(len(x), hidden.in_features)
            states = []
            for x_t in x.unbind(dim=1):
                h, c = self.step(inputs(x_t), hidden(h), h, c)
                states.append(h)
            x = torch.stack(states, dim=1)
        return h if self.head is None else self.head(x)


def rnn_step(i: Tensor, h: Tensor, old: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    return (i + h).tanh(), cell


def gru_step(i: Tensor, h: Tensor, old: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    (i_r, i_z, i_n), (h_r, h_z, h_n) = i.chunk(3, dim=1), h.chunk(3, dim=1)
    z = (i_z + h_z).sigmoid()
    return (1 - z) * (i_n + (i_r + h_r).sigmoid() * h_n).tanh() + z * old, cell


def lstm_step(i: Tensor, h: Tensor, old: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    enter, forget, new, out = (i + h).chunk(4, dim=1)
    cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
    return out.sigmoid() * cell.tanh(), cell


TWINS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "embedding": lookup_twin,
    "embedding_positions": lookup_twin,
    "embedding_two_axes": lookup_twin,
    "attention_self": AttentionTwin,
    "attention_self_fused": AttentionTwin,
    "attention_cross": AttentionTwin,
    "attention_separate_without_bias": AttentionTwin,
    "rnn": RecurrentTwin,
    "rnn_cell": RecurrentTwin,
    "gru_cell": RecurrentTwin,
    "lstm": RecurrentTwin,
    "lstm_cell": RecurrentTwin,
}
"""The same function made of linear layers only."""


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@WEIGHT_SHARING
@pytest.mark.parametrize("case", [c for c in LAYERS if c.name in TWINS], ids=str)
def test_kronecker_factors_are_those_of_the_linear_layers_inside(
    case: Case, weight_sharing: Any
) -> None:
    model, (x, y) = case.model(), case.data()
    twin = TWINS[case.name](model)
    called = model(*x) if isinstance(x, tuple) else model(x)
    torch.testing.assert_close(twin(*x) if isinstance(x, tuple) else twin(x), called)
    expected = reference.kronecker(twin, case.likelihood, (x, y), weight_sharing)
    F = measure(case, nm.Kronecker(weight_sharing))
    # Numbered parameters tell where each of the twin's comes from.
    size = sum(p.numel() for p in model.parameters())
    nn.utils.vector_to_parameters(torch.arange(size, dtype=torch.float64), model.parameters())
    order = flat(TWINS[case.name](model)).long()
    back = order.argsort()
    assert_same_everywhere(F, expected[back[:, None], back], F.to_dense())
