"""`auto` gives each layer the richest structure that the budget allows, and says why."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.capture import plan
from neuromanifold.errors import TooLargeError, UnsupportedError
from neuromanifold.linalg import memory
from neuromanifold.operators import BlockOperator
from neuromanifold.testing import check_structure
from neuromanifold.testing.cases import CASES, Case

BY_NAME = {case.name: case for case in CASES}
SOME_CASES = [
    BY_NAME[name]
    for name in (
        "mlp-categorical",
        "conv1d-poisson",
        "conv2d-gaussian",
        "reused-bernoulli",
        "sequence_positions-categorical",
    )
]
RICHNESS = ["Diagonal", "Kronecker", "BlockDiagonal", "Dense"]


class Network(nn.Module):
    """Three layers and a raw vector. Numbers kept, and what the next structure needs more:

    | block  | Diagonal | Kronecker | BlockDiagonal |
    |--------|----------|-----------|---------------|
    | wide   |       60 |       169 |          3600 |
    | middle |       78 |       205 |          6084 |
    | last   |       18 |        45 |           324 |
    | scale  |        3 |         - |             9 |
    """

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(4, 12)
        self.middle = nn.Linear(12, 6)
        self.last = nn.Linear(6, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.wide(x).tanh()).tanh()) * self.scale


BLOCKS = ("wide.bias", "middle.weight", "last.weight", "scale")
D, K, B = RICHNESS[:3]
CHOICES = {
    159: (D, D, D, D),
    164: (D, D, D, D),
    165: (D, D, D, B),  # 6 more for the vector; the next Kronecker structure needs 27
    186: (D, D, K, D),  # Kronecker for the cheapest layer first
    295: (K, D, K, D),
    421: (K, D, K, B),
    422: (K, K, K, D),
    428: (K, K, K, B),
    706: (K, K, K, B),
    707: (K, K, B, B),
    4138: (B, K, B, B),
    10017: (B, B, B, B),
    25280: (B, B, B, B),
    25281: ("Dense",) * 4,  # the square of 159 parameters
}


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Network().double()


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 4, generator=generator, dtype=torch.float64)


def measure(max_bytes: int | str | None) -> nm.FisherOperator:
    return nm.fisher(network(), nm.Categorical(), inputs(), nm.auto(max_bytes))


@pytest.mark.parametrize("max_bytes", ["tight", "2 KiB", "40 KiB", None])
@pytest.mark.parametrize("case", SOME_CASES, ids=str)
def test_it_keeps_the_contract_of_a_structure(case: Case, max_bytes: str | None) -> None:
    if max_bytes == "tight":  # just enough for the parameters and one more
        parameters = sum(p.numel() for p in case.model().parameters())
        max_bytes = f"{8 * parameters + 8} B"
    check_structure(nm.auto(max_bytes), case)


@pytest.mark.parametrize("numbers", CHOICES)
def test_layers_are_raised_cheapest_first(numbers: int) -> None:
    F = measure(8 * numbers)
    assert tuple(F.coverage[name].structure for name in BLOCKS) == CHOICES[numbers]


@pytest.mark.parametrize("numbers", CHOICES)
def test_what_is_kept_fits_the_budget(numbers: int) -> None:
    F = measure(8 * numbers)
    assert isinstance(F, BlockOperator)
    kept = sum(t.numel() for matrix in F.blocks for t in matrix.tensors().values())
    assert kept <= numbers
    assert kept == nm.auto(8 * numbers).constant_numel(plan(network(), None, "generic"))


def test_each_layer_is_what_its_structure_measures_alone() -> None:
    def alone(structure: nm.structures.Structure) -> nm.FisherOperator:
        return nm.fisher(network(), nm.Categorical(), inputs(), structure, estimator=nm.Exact())

    F = nm.fisher(network(), nm.Categorical(), inputs(), nm.auto(8 * 707), estimator=nm.Exact())
    for name, structure in (("wide", nm.Kronecker()), ("last", nm.BlockDiagonal())):
        expected = alone(structure).block(name).to_dense()
        assert torch.allclose(F.block(name).to_dense(), expected, rtol=1e-12)


def test_coverage_says_what_the_next_richer_one_would_need() -> None:
    F = measure("8 KiB")  # 1024 numbers, 707 of them used
    notes = {name: F.coverage[name].note for name in BLOCKS}
    assert notes["wide.bias"] == (
        "auto: BlockDiagonal would need 28.1 KiB, the 8.0 KiB budget has 3.8 KiB for it"
    )
    assert notes["last.weight"] == "auto: Dense would need 197.5 KiB of the 8.0 KiB budget"
    assert notes["scale"].startswith("no rule for Network; auto: Dense would need")
    assert F.origin.structure == "auto('8 KiB')"
    dense = measure("1 MiB")
    assert dense.coverage["last.weight"].note == "auto: 197.5 KiB of the 1.0 MiB budget"


def test_more_memory_is_never_poorer_for_the_whole() -> None:
    """Numbers kept grow with the budget."""
    kept = []
    for numbers in range(159, 1000, 20):
        F = measure(8 * numbers)
        assert isinstance(F, BlockOperator)
        kept.append(sum(t.numel() for matrix in F.blocks for t in matrix.tensors().values()))
    assert kept == sorted(kept)


def test_a_layer_starts_with_the_smallest_there_is() -> None:
    """Of an embedding, a diagonal factor of 300 and a full one of 4 are less than the diagonal."""
    model = nn.Sequential(nn.Embedding(300, 4), nn.Flatten(), nn.Linear(8, 2)).double()
    tokens = torch.arange(8).reshape(4, 2)
    F = nm.fisher(model, nm.Categorical(), tokens, nm.auto(8 * (300 + 4**2 + 18)))
    assert F.coverage["0.weight"].structure == "Kronecker"
    assert F.coverage["2.weight"].structure == "Diagonal"


def test_a_budget_that_does_not_hold_the_diagonal_is_refused_with_both_sizes() -> None:
    with pytest.raises(
        TooLargeError, match=r"budget of 1.2 KiB.*159 parameters,.* needs 1.2 KiB"
    ) as e:
        measure(8 * 159 - 1)
    assert (e.value.bytes_needed, e.value.bytes_available) == (8 * 159, 8 * 159 - 1)


def test_without_a_budget_it_is_a_quarter_of_the_free_memory() -> None:
    note = measure(None).coverage["last.weight"].note
    found = re.fullmatch(r"auto: 197.5 KiB of the (.*) budget", note)
    assert found is not None
    quarter = memory.available(torch.device("cpu")) / 4
    assert 0.5 * quarter < memory.parse(found[1]) < 2 * quarter


def test_several_processes_need_a_budget() -> None:
    arguments = (network(), nm.Categorical(), inputs())
    with pytest.raises(UnsupportedError, match="differs between processes"):
        nm.fisher(*arguments, nm.auto(), reducer=lambda _: None)
    F = nm.fisher(*arguments, nm.auto("8 KiB"), reducer=lambda _: None)
    assert F.coverage["last.weight"].structure == "BlockDiagonal"


@pytest.mark.parametrize("max_bytes", [0, -1, True, 1.5, "much", "3 parsecs", ""])
def test_a_budget_that_is_no_size_is_refused_at_once(max_bytes: object) -> None:
    with pytest.raises(ValueError, match="A size is"):
        nm.auto(max_bytes)  # type: ignore[arg-type]


def test_a_block_that_falls_apart_in_the_first_batch_stays_in_the_budget() -> None:
    class Bypassed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 3)
            self.last = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last((x @ self.first.weight.T + self.first.bias).tanh())

    budget = 15**2 + 8**2  # both layers whole, but not the model
    model = Bypassed().double()
    F = nm.fisher(model, nm.Categorical(), inputs(), nm.auto(8 * budget), estimator=nm.Exact())
    assert {entry.structure for entry in F.coverage} == {"BlockDiagonal"}
    assert F.coverage["first.bias"].note.startswith("its Linear is bypassed; auto: Dense")
    whole = nm.fisher(model, nm.Categorical(), inputs(), nm.Dense(), estimator=nm.Exact())
    for names in (["first.weight"], ["first.bias"], ["last.weight", "last.bias"]):
        expected = whole.restrict(names).to_dense()
        assert torch.allclose(F.restrict(names).to_dense(), expected, rtol=1e-10)
