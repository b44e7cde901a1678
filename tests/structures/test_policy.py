"""A mapping from patterns to structures: every layer gets its own, and nothing is guessed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.capture import plan
from neuromanifold.errors import UnsupportedError
from neuromanifold.operators import BlockOperator, DirectSum
from neuromanifold.structures import AdditiveStructure, Structure, per_layer
from neuromanifold.testing import check_structure
from neuromanifold.testing.cases import CASES, Case

BY_NAME = {case.name: case for case in CASES}
SOME_CASES = [
    BY_NAME[name]
    for name in (
        "mlp-categorical",
        "conv1d-bernoulli",
        "conv2d-gaussian",
        "reused-poisson",
        "sequence_positions-categorical",
        "sequence_pooled-gaussian_mean_variance",
    )
]


class Block(nn.Module):
    """A raw parameter, two layers with a name in common, and a bias alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.key = nn.Linear(4, 3)
        self.value = nn.Linear(4, 3)
        self.value.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.key(x).tanh() * self.value(x)


class Network(nn.Module):
    """`attn.scale`, `attn.key`, `attn.value`, `norm` and `head`."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Block()
        self.norm = nn.Linear(3, 3, bias=False)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.attn(x)))


def seeded(make: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make().double()


def network() -> nn.Module:
    return seeded(Network)


def inputs(num_samples: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_samples, 4, generator=generator, dtype=torch.float64)


def measure(structure: Structure | Mapping[str, Structure], **arguments: Any) -> nm.FisherOperator:
    arguments.setdefault("estimator", nm.Exact())
    return nm.fisher(network(), nm.Categorical(), inputs(), structure, **arguments)


def structures_of(F: nm.FisherOperator) -> dict[str, str]:
    return {entry.parameter: entry.structure for entry in F.coverage}


# ---- the right numbers -------------------------------------------------------------------------

# In every case the first layer is 0, and others are among 2 to 5; "*" is for what else there is.
FIRST, OTHERS = "*body.0", "*body.[2-5]"
POLICIES: dict[str, Structure] = {
    "additive": per_layer({FIRST: nm.UnitWise(), OTHERS: nm.BlockDiagonal(), "*": nm.Diagonal()}),
    "Kronecker": per_layer({FIRST: nm.Kronecker(), "*": nm.UnitWise()}),
    "two passes": per_layer({FIRST: nm.Diagonal(), "*": nm.Gram()}),
    "low rank": per_layer({FIRST: nm.LowRank(4), "*": nm.EigenKronecker()}),
    "three passes": per_layer({FIRST: nm.Dense(), OTHERS: nm.Implicit(), "*": nm.Diagonal()}),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", SOME_CASES, ids=str)
def test_it_keeps_the_contract_of_a_structure(policy: str, case: Case) -> None:
    check_structure(POLICIES[policy], case)


CHOICES: dict[str, dict[str, Structure]] = {
    "one pass": {"attn.key": nm.Kronecker(), "head": nm.BlockDiagonal(), "*": nm.Diagonal()},
    "passes": {"attn.*": nm.Gram(), "head": nm.Dense(), "*": nm.Kronecker()},
}


@pytest.mark.parametrize("choices", CHOICES)
def test_sampled_labels_are_those_of_one_pass(choices: str) -> None:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    sampled = nm.MonteCarlo(2)
    F = measure(CHOICES[choices], estimator=sampled, generator=generator())
    for pattern, structure in CHOICES[choices].items():
        alone = measure(structure, estimator=sampled, generator=generator())
        names = [name for name in F.layout.names if name.startswith(pattern.rstrip("*."))]
        if pattern == "*":
            names = ["norm.weight"]
        expected = alone.restrict(names).to_dense()
        assert torch.allclose(F.restrict(names).to_dense(), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("choices", CHOICES)
def test_the_generator_moves_on_as_in_one_pass(choices: str) -> None:
    generator, reference = (torch.Generator().manual_seed(5) for _ in range(2))
    measure(CHOICES[choices], estimator=nm.MonteCarlo(2), generator=generator)
    measure(nm.Diagonal(), estimator=nm.MonteCarlo(2), generator=reference)
    assert torch.equal(generator.get_state(), reference.get_state())


@pytest.mark.parametrize("choices", CHOICES)
def test_without_sampling_no_random_number_is_drawn(choices: str) -> None:
    before = torch.get_rng_state()
    measure(CHOICES[choices], estimator=nm.Exact())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pattern_makes_one_matrix_of_all_that_it_takes() -> None:
    F = measure({"attn*": nm.Dense(), "*": nm.Dense()})
    whole = measure(nm.Dense()).to_dense()
    inside = torch.zeros(F.num_parameters, dtype=torch.bool)
    for name, place in F.layout.slices.items():
        inside[place] = name.startswith("attn")
    together = inside == inside[:, None]
    assert torch.allclose(F.to_dense(), whole * together, rtol=1e-10, atol=1e-14)


def test_several_processes_sum_every_pass() -> None:
    """Two processes with the same data, played by doubling."""

    def doubled(tensors: list[Tensor]) -> None:
        for tensor in tensors:
            tensor *= 2

    F = measure({"head": nm.Dense(), "*": nm.Diagonal()}, reducer=doubled)
    assert F.num_samples == 2 * len(inputs())
    alone = measure({"head": nm.Dense(), "*": nm.Diagonal()})
    assert torch.allclose(F.to_dense(), alone.to_dense(), rtol=1e-12)


class Sequence(nn.Module):
    """A table that is also the head, attention, and a recurrent layer: blocks of other shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
        self.cell = nn.GRU(4, 4, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.table(tokens)
        h = h + self.attn(h, h, h, need_weights=False)[0]
        return self.head(self.norm(self.cell(h)[0]))


@pytest.mark.parametrize("rest", [nm.Diagonal(), nm.Gram()], ids=repr)
@pytest.mark.parametrize(
    "first", [nm.Kronecker(), nm.UnitWise(), nm.BlockDiagonal(), nm.Dense()], ids=repr
)
@pytest.mark.parametrize("module", ["table", "attn", "cell", "head", "norm"])
def test_every_kind_of_block_is_what_is_measured_alone(
    module: str, first: Structure, rest: Structure
) -> None:
    model = seeded(Sequence)
    tokens = torch.tensor([[0, 1, 1], [2, 0, 4], [3, 3, 3], [4, 1, 0]])

    def measured(structure: Structure | Mapping[str, Structure]) -> nm.FisherOperator:
        return nm.fisher(model, nm.Categorical(), tokens, structure, estimator=nm.Exact())

    F = measured({module: first, "*": rest})
    names = [name for name in F.layout.names if name.startswith(f"{module}.")]
    others = [name for name in F.layout.names if name not in names]
    for structure, own in ((first, names), (rest, others)):
        expected = measured(structure).restrict(own).to_dense()
        assert torch.allclose(F.restrict(own).to_dense(), expected, rtol=1e-9, atol=1e-12)
    across = F.restrict([names[0], others[0]]).to_dense()
    width = F.restrict([F.layout.restrict([names[0], others[0]]).names[0]]).num_parameters
    assert not across[:width, width:].any()


@pytest.mark.parametrize("choices", [*CHOICES.values(), {"*": nm.Diagonal()}], ids=str)
def test_what_will_be_kept_is_known_before(choices: dict[str, Structure]) -> None:
    """All but what grows with the data."""
    structure = per_layer(choices)
    F = measure(structure)
    parts = F.parts if isinstance(F, DirectSum) else [F]
    kept = sum(
        tensor.numel()
        for part in parts
        if isinstance(part, BlockOperator)
        for matrix in part.blocks
        for tensor in matrix.tensors().values()
    )
    assert structure.constant_numel(plan(network(), None, "generic")) == kept


# ---- which pattern takes what ------------------------------------------------------------------


def test_coverage_shows_what_each_parameter_got() -> None:
    F = measure({"attn.key": nm.Kronecker(), "head": nm.Dense(), "*": nm.UnitWise()})
    assert structures_of(F) == {
        "attn.scale": "Diagonal",  # one entry alone
        "attn.key.weight": "Kronecker",
        "attn.key.bias": "Kronecker",
        "attn.value.bias": "Diagonal",
        "norm.weight": "UnitWise",
        "head.weight": "Dense",
        "head.bias": "Dense",
    }
    assert not F.coverage["attn.key.bias"].exact
    assert F.coverage["head.bias"].exact
    assert F.coverage["attn.scale"].note == "no rule for Block"


def test_the_matrix_is_called_by_the_mapping() -> None:
    F = measure({"head": nm.Gram(), "*": nm.Diagonal()})
    assert F.origin.structure == "{'head': Gram(), '*': Diagonal()}"
    assert F.num_samples == len(inputs())


def test_the_first_pattern_that_matches_counts() -> None:
    F = measure({"attn.key": nm.UnitWise(), "attn*": nm.BlockDiagonal(), "*": nm.Diagonal()})
    found = structures_of(F)
    assert found["attn.key.weight"] == "UnitWise"
    assert found["attn.value.bias"] == found["attn.scale"] == "BlockDiagonal"
    assert found["head.weight"] == "Diagonal"


@pytest.mark.parametrize("pattern", ["attn", "attn.*", "at[t]n*", "*key", "*.key.*"])
def test_a_pattern_names_modules_with_all_inside_or_parameters(pattern: str) -> None:
    found = structures_of(measure({pattern: nm.UnitWise(), "*": nm.Diagonal()}))
    assert found["attn.key.weight"] == found["attn.key.bias"] == "UnitWise"
    assert found["head.weight"] == found["norm.weight"] == "Diagonal"


def test_a_parameter_that_is_a_block_can_be_named() -> None:
    choices = {"attn.scale": nm.BlockDiagonal(), "norm.weight": nm.UnitWise(), "*": nm.Diagonal()}
    found = structures_of(measure(choices))
    assert found["attn.scale"] == "BlockDiagonal"
    assert found["norm.weight"] == "UnitWise"


def test_it_is_about_the_measured_parameters_only() -> None:
    F = measure({"norm": nm.UnitWise(), "*": nm.Gram()}, params=["norm.*", "head.bias"])
    assert structures_of(F) == {"norm.weight": "UnitWise", "head.bias": "Gram"}


def test_leftovers_may_be_nothing() -> None:
    F = measure({"attn": nm.UnitWise(), "norm": nm.Diagonal(), "head": nm.Gram(), "*": nm.Gram()})
    assert isinstance(F, DirectSum)
    assert len(F.parts) == 2


def test_names_with_brackets_are_taken_literally() -> None:
    class Bracketed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter("w[0]", nn.Parameter(torch.ones(2)))
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) * self._parameters["w[0]"]

    structure = {"head": nm.Dense(), "*": nm.Gram()}
    F = nm.fisher(seeded(Bracketed), nm.Gaussian(), inputs(), structure)
    assert structures_of(F)["w[0]"] == "Gram"


class Bypassed(nn.Module):
    """Its first layer is never called, but its weight is used; the plan learns it on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((x @ self.first.weight.T + self.first.bias).tanh())


@pytest.mark.parametrize("rest", [nm.Diagonal(), nm.Gram()], ids=repr)
def test_a_block_that_falls_apart_in_the_first_batch_keeps_its_structure(rest: Structure) -> None:
    structure = {"first": nm.BlockDiagonal(), "*": rest}
    F = nm.fisher(seeded(Bypassed), nm.Categorical(), inputs(), structure, estimator=nm.Exact())
    assert [F.coverage[f"first.{name}"].structure for name in ("weight", "bias")] == [
        "BlockDiagonal",
        "BlockDiagonal",
    ]
    assert F.coverage["first.weight"].rule == "generic"
    whole = nm.fisher(
        seeded(Bypassed), nm.Categorical(), inputs(), nm.Dense(), estimator=nm.Exact()
    )
    for name in ("first.weight", "first.bias"):
        expected = whole.restrict([name]).to_dense()
        assert torch.allclose(F.restrict([name]).to_dense(), expected, rtol=1e-10)


def test_a_shared_weight_is_found_under_the_name_that_is_measured() -> None:
    choices = {"head.weight": nm.Kronecker(), "*": nm.Diagonal()}
    message = r"'head.weight' is 'table.weight' under another name: match that"
    with pytest.raises(ValueError, match=message):
        nm.fisher(seeded(Sequence), nm.Categorical(), torch.tensor([[0, 1]]), choices)


# ---- passes ------------------------------------------------------------------------------------


def test_additive_structures_together_are_an_additive_structure() -> None:
    assert isinstance(per_layer(CHOICES["one pass"]), AdditiveStructure)
    assert not isinstance(per_layer(CHOICES["passes"]), AdditiveStructure)
    assert isinstance(measure(CHOICES["one pass"]), BlockOperator)


def test_additive_structures_read_the_data_once() -> None:
    batches = iter([inputs(4), inputs(2)])
    F = nm.fisher(network(), nm.Categorical(), batches, CHOICES["one pass"])
    assert F.num_samples == 6


def test_data_that_can_be_read_once_are_refused_for_several_passes() -> None:
    with pytest.raises(UnsupportedError, match=r"Gram\(\).*reads the data more than once"):
        nm.fisher(network(), nm.Categorical(), iter([inputs()]), CHOICES["passes"])


def test_progress_is_that_of_all_passes() -> None:
    seen: list[tuple[int, int | None]] = []
    nm.fisher(
        network(),
        nm.Categorical(),
        [(inputs(4),), (inputs(2),)],
        {"attn": nm.Gram(), "head": nm.Dense(), "*": nm.Diagonal()},
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 6) for done in range(1, 7)]


# ---- what is refused ---------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[Any, Any], type[Exception], str]] = {
    "nothing": ({}, ValueError, "empty mapping"),
    "a key that is no text": ({0: nm.Dense()}, TypeError, "patterns are texts.*got the key 0"),
    "a mapping inside": (
        {"attn": {"key": nm.Dense()}},
        TypeError,
        "'attn' is a mapping again.*inner patterns out in full",
    ),
    "a class": ({"*": nm.Dense}, TypeError, "for '\\*' is the object.*got class Dense"),
    "no structure": ({"*": "dense"}, TypeError, "for '\\*' is the object.*got 'dense'"),
    "auto inside": ({"*": nm.auto()}, TypeError, "for '\\*' is auto\\(\\).*Use it alone"),
    "a pattern for nothing": (
        {"decoder": nm.Dense(), "*": nm.Diagonal()},
        ValueError,
        "'decoder' matches no measured.*'attn.key'.*'head.bias'",
    ),
    "a pattern too late": (
        {"*": nm.Diagonal(), "head": nm.Dense()},
        ValueError,
        r"'head' comes too late.*\['head'\], is taken by \['\*'\]",
    ),
    "a bias too late": (
        {"*": nm.Diagonal(), "head.bias": nm.Dense()},
        ValueError,
        r"'head.bias' comes too late",
    ),
    "a weight without its bias": (
        {"*.weight": nm.Dense(), "*": nm.Diagonal()},
        ValueError,
        r"'\*.weight' matches \['attn.key.weight'\], but not \['attn.key.bias'\].*'attn.key'",
    ),
    "a block without pattern": (
        {"attn": nm.Dense(), "head": nm.Dense()},
        ValueError,
        r"No pattern.*'norm' with the parameters \['norm.weight'\].*\['attn', 'head'\].*Add a last",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    choices, error, message = REFUSED[what]
    with pytest.raises(error, match=message):
        measure(choices)
