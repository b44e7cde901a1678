"""Whole models, unchanged: exact structures are the oracle's matrix, parameter by parameter."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import neuromanifold as nm
from neuromanifold.structures import Structure
from neuromanifold.testing import reference
from neuromanifold.testing.cases import Case
from neuromanifold.testing.model_cases import MODELS

RTOL = {"llama": 10 * torch.finfo(torch.float32).eps}
"""Llama normalises in float32, whatever the parameters are; the others compute in float64."""
GRADIENT_ROUNDING = 1e-12
"""Of the largest gradients: what a gradient may be that is zero but for rounding."""

RAW = {
    "vit": {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"},
    "graph_network": {"gate", "first.weight", "first.bias", "second.weight", "second.bias"},
}
"""Parameters of modules that are the model's own."""

STRUCTURES: dict[str, Structure] = {
    "BlockDiagonal": nm.BlockDiagonal(),
    "UnitWise": nm.UnitWise(),
    "Diagonal": nm.Diagonal(),
    "Gram": nm.Gram(),
    "Implicit": nm.Implicit(),
}
WHOLE = ("Gram", "Implicit")  # what they represent is the whole matrix


@pytest.fixture(params=MODELS, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@cache
def oracle(case: Case) -> Tensor:
    return reference.dense_fisher(case.model(), case.likelihood, case.data())


def measure(case: Case, structure: Structure, **options: object) -> nm.FisherOperator:
    options = {"estimator": nm.Exact(), **options}
    return nm.fisher(case.model(), case.likelihood, case.data(), structure, **options)


def assert_same_everywhere(case: Case, F: nm.FisherOperator, expected: Tensor) -> None:
    """As a whole, and in the block of each parameter, however small its entries are."""
    got, rtol = F.to_dense(), RTOL.get(case.name, 1e-8)
    floor = GRADIENT_ROUNDING**2 * expected.norm()
    for name, s in {"": slice(None), **F.layout.slices}.items():
        error = (got[s, s] - expected[s, s]).norm()
        assert error <= rtol * expected[s, s].norm() + floor, name


def assert_covers_everything(case: Case, F: nm.FisherOperator) -> None:
    trainable = [name for name, p in case.model().named_parameters() if p.requires_grad]
    assert [entry.parameter for entry in F.coverage] == trainable
    assert all(entry.rule and entry.structure for entry in F.coverage)
    assert all(entry.note for entry in F.coverage if entry.rule == "generic")


def test_a_case_is_small_double_precision_and_the_same_each_time(case: Case) -> None:
    state = torch.get_rng_state()
    model, again, (_, y) = case.model(), case.model(), case.data()
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(p.numel() for p in model.parameters()) <= 2500
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    values = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(value, same) for value, same in values)
    assert torch.equal(y, case.data()[1])
    assert len(y) == 7


@pytest.mark.parametrize("structure", STRUCTURES)
def test_exact_is_the_projected_oracle(case: Case, structure: str) -> None:
    F = measure(case, STRUCTURES[structure])
    kept = "Dense" if structure in WHOLE else structure
    expected = reference.project(oracle(case), case.model(), kept)  # type: ignore[arg-type]
    assert_same_everywhere(case, F, expected)
    assert_covers_everything(case, F)
    assert all(entry.exact for entry in F.coverage)


def test_rules_read_all_but_raw_parameters(case: Case) -> None:
    coverage = measure(case, nm.Diagonal()).coverage
    generic = {entry.parameter for entry in coverage if entry.rule == "generic"}
    assert generic == RAW.get(case.name, set())


def test_per_position_divides_by_the_observed_positions(case: Case) -> None:
    model, data = case.model(), case.data()
    F = measure(case, nm.Diagonal(), per="position")
    expected = reference.dense_fisher(model, case.likelihood, data, per="position")
    assert_same_everywhere(case, F, expected.diagonal().diag())


def test_kronecker_covers_the_whole_model(case: Case) -> None:
    F = measure(case, nm.Kronecker())
    assert_covers_everything(case, F)
    eigenvalues, trace = F.eigenvalues(), F.trace()
    assert torch.isfinite(eigenvalues).all()
    assert eigenvalues.min() >= -1e-8 * trace
    assert trace > 0
