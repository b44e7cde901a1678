from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

import neuromanifold as nm
from neuromanifold.errors import UnsupportedError
from neuromanifold.relative.coordinates import input_changed, observed, with_parameters
from neuromanifold.relative.invariance import check_invariance
from neuromanifold.relative.responses import Binary
from neuromanifold.testing import reference

SURROUNDINGS, COORDINATES = "surroundings", "input coordinates"
UNIT, ORDER = "unit of the outputs", "order of the units"


@pytest.fixture
def seeded():
    torch.manual_seed(0)
    return torch.Generator().manual_seed(1)


def numbers(*sizes):
    return torch.randn(sizes, dtype=torch.float64)


class Attention(nn.Module):
    """Three layers read the input."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)


class Residual(nn.Module):
    """The input has a way around the layer."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.inner(x).tanh()


class Tagged(nn.Module):
    """Takes a mask beside its input, and returns a mapping."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, mask, features):
        return {"logits": mask[:, None] * self.layer(features)}


EVERY = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), (9, 6), {}),
    "linear": (lambda: nn.Linear(6, 3), (9, 6), {}),
    "attention": (Attention, (5, 3, 6), {}),
    "pointwise": (lambda: nn.Sequential(nn.Conv2d(4, 3, 1), nn.Sigmoid()), (5, 4, 3, 3), {}),
    "kernel": (lambda: nn.Conv1d(4, 3, 3, stride=2), (5, 4, 9), {}),
    "padded": (lambda: nn.Conv2d(4, 3, 3, padding=1), (5, 4, 4, 4), {}),
    "circular": (lambda: nn.Conv1d(4, 3, 3, padding=1, padding_mode="circular"), (5, 4, 5), {}),
    "groups": (lambda: nn.Conv1d(4, 6, 3, groups=2), (5, 4, 5), {ORDER}),
    "residual": (Residual, (9, 6), {COORDINATES, ORDER}),
    "normalised": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)),
        (9, 6),
        {ORDER},
    ),
}


@pytest.mark.parametrize("case", EVERY)
def test_the_metric_of_a_component_is_its_own(case, seeded):
    make, shape, not_applicable = EVERY[case]
    component = make().double()
    if case == "normalised":
        nn.init.normal_(component[1].weight)
    before = {name: p.clone() for name, p in component.named_parameters()}

    found = check_invariance(component, numbers(*shape), nm.Gaussian(0.5), generator=seeded)

    assert found.passed, str(found)
    assert {check.name for check in found.checks if check.passed is None} == set(not_applicable)
    assert all(c.deviation <= 1e-12 for c in found.checks if c.deviation is not None), str(found)
    assert all(check.tolerance <= 1e-12 for check in found.checks)
    assert found.full_blocks_apart > 0.01
    assert all(torch.equal(p, before[name]) for name, p in component.named_parameters())
    assert all(p.grad is None for p in component.parameters())


def test_offsets_are_tried_where_a_bias_can_make_up_for_them(seeded):
    x = numbers(5, 4, 6)
    offsets = {
        "bias": nn.Conv1d(4, 3, 3),
        "padding": nn.Conv1d(4, 3, 3, padding="same"),
        "no bias": nn.Conv1d(4, 3, 3, bias=False),
        "frozen": nn.Conv1d(4, 3, 3),
    }
    offsets["frozen"].bias.requires_grad_(False)
    notes = {
        name: check_invariance(layer.double(), x, nm.Gaussian(), generator=seeded)[COORDINATES]
        for name, layer in offsets.items()
    }
    assert {name for name, check in notes.items() if "+ c" in check.note} == {"bias"}
    assert all(check.passed for check in notes.values())


@pytest.mark.parametrize(
    ("component", "x"),
    [
        pytest.param(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (9, 3), id="mlp"),
        pytest.param(nn.Conv1d(4, 6, 2, groups=2), (5, 4, 4), id="groups"),
    ],
)
def test_the_metric_transforms_as_the_oracle_says(component, x, seeded):
    """With T as a matrix, `G = Tᵀ G′ T` entry by entry, by Jacobians."""
    component, x = component.double(), numbers(*x)
    with observed(component) as uses:
        component(x)
    change = input_changed(
        component, uses[:1], lambda *s: torch.randn(s, generator=seeded, dtype=torch.float64)
    )
    parameters = {name: p.detach() for name, p in component.named_parameters()}
    other = with_parameters(component, change.parameters(parameters))
    torch.testing.assert_close(other(change.data(x)), component(x), rtol=0, atol=1e-12)

    layout = nm.fisher(component, nm.Gaussian(), x, nm.Diagonal()).layout
    eye = torch.eye(layout.num_parameters, dtype=torch.float64)
    T = torch.stack([layout.flatten(change.parameters(layout.unflatten(e))) for e in eye], dim=1)
    G = reference.dense_fisher(component, nm.Gaussian(), x)
    changed = reference.dense_fisher(other, nm.Gaussian(), change.data(x))
    torch.testing.assert_close(T.T @ changed @ T, G, rtol=0, atol=1e-12 * float(G.norm()))
    assert (changed - G).norm() > 0.1 * G.norm()


@dataclass(frozen=True, eq=False)
class Drifting(nm.likelihoods.Likelihood):
    """Has a little more information each time it is asked: no metric of anything."""

    variance: float = 1.0
    asked: list[None] = field(default_factory=list)

    def distribution(self, outputs):
        return Independent(Normal(outputs, self.variance**0.5), outputs.ndim - 1)

    def fisher_columns(self, outputs):
        self.asked.append(None)
        more = 1 + 1e-9 * len(self.asked)
        for k in range(outputs.shape[1]):
            column = torch.zeros_like(outputs)
            column[:, k] = more / self.variance**0.5
            yield column


def test_a_metric_that_is_none_fails_every_check(seeded):
    component = nn.Sequential(nn.Linear(6, 4), nn.Tanh()).double()
    found = check_invariance(component, numbers(9, 6), Drifting(), generator=seeded)
    assert not found.passed
    assert [found[name].passed for name in (SURROUNDINGS, COORDINATES, UNIT)] == [False] * 3
    assert all(1e-10 < found[name].deviation < 1e-6 for name in (SURROUNDINGS, COORDINATES, UNIT))
    assert "FAILED" in str(found)


@dataclass(frozen=True, eq=False)
class WrongUnit(nm.likelihoods.Likelihood):
    """Takes its variance for a standard deviation."""

    variance: float = 1.0

    def distribution(self, outputs):
        return Independent(Normal(outputs, self.variance), outputs.ndim - 1)

    def fisher_columns(self, outputs):
        for k in range(outputs.shape[1]):
            column = torch.zeros_like(outputs)
            column[:, k] = 1 / self.variance
            yield column


def test_a_response_with_a_wrong_unit_is_found(seeded):
    found = check_invariance(nn.Linear(3, 2).double(), numbers(9, 3), WrongUnit(), generator=seeded)
    assert [check.name for check in found.checks if check.passed is False] == [UNIT]
    assert found[UNIT].deviation == pytest.approx(1 - 2.54**-2)


def test_outputs_that_the_response_tells_apart_keep_their_order(seeded):
    response = nm.Gaussian(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    found = check_invariance(nn.Linear(6, 3).double(), numbers(9, 6), response, generator=seeded)
    assert found.passed
    assert found[ORDER].passed is None
    assert "tells its outputs apart" in found[ORDER].note


def test_pure_numbers_have_no_unit_and_embeddings_no_coordinates(seeded):
    component = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)).double()
    data = [
        (torch.randint(7, (5, 6)), torch.full((5, 6), -100).index_fill_(1, torch.arange(3), 1)),
        (torch.randint(7, (4, 2)), torch.ones(4, 2, dtype=torch.int64)),
    ]
    found = check_invariance(component, data, nm.Categorical(), generator=seeded)
    assert found.passed
    assert {c.name for c in found.checks if c.passed is None} == {COORDINATES, UNIT}


def test_inputs_by_name_and_mappings_as_outputs(seeded):
    data = {"mask": torch.ones(9, dtype=torch.float64), "features": numbers(9, 6)}
    found = check_invariance(Tagged().double(), data, nm.Gaussian(), generator=seeded)
    assert found.passed
    assert found[COORDINATES].passed


def test_binary_responses_have_units_too(seeded):
    component = nn.Sequential(nn.Linear(6, 3), nn.Tanh()).double()
    found = check_invariance(component, numbers(9, 6), Binary((-1.0, 1.0)), generator=seeded)
    assert found.passed, str(found)
    assert all(check.deviation <= 1e-12 for check in found.checks)
    assert "2.54" in found[UNIT].note


def test_tolerances_are_those_of_the_precision(seeded):
    component = nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3))
    found = check_invariance(component, numbers(9, 6).float(), nm.Gaussian(), generator=seeded)
    assert found.passed, str(found)
    assert 1e-5 < found[COORDINATES].tolerance < 1e-3
    assert found[COORDINATES].deviation > 1e-12


def test_the_same_seed_gives_the_same_answer():
    component, x = nn.Linear(3, 2).double(), numbers(9, 3)
    one, other = (
        check_invariance(
            component, x, nm.Gaussian(), generator=torch.Generator().manual_seed(3)
        ).to_dict()
        for _ in range(2)
    )
    assert one == other
    assert json.loads(json.dumps(one))["checks"][1]["passed"] is True


def test_frozen_parameters_stay_out_of_it(seeded):
    component = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    component[0].weight.requires_grad_(False)
    found = check_invariance(component, numbers(9, 6), nm.Gaussian(), generator=seeded)
    assert found.passed, str(found)


def test_what_has_no_metric_is_refused():
    x = numbers(9, 6)
    noisy = nn.Sequential(nn.Linear(6, 4), nn.Dropout()).double()
    with pytest.raises(UnsupportedError, match=r"component\.eval\(\)"):
        check_invariance(noisy, x, nm.Gaussian())
    dead = nn.Sequential(nn.Linear(6, 4), nn.ReLU()).double()
    nn.init.constant_(dead[0].bias, -100)
    with pytest.raises(UnsupportedError, match="dead activations"):
        check_invariance(dead, x, nm.Gaussian())
    with pytest.raises(TypeError, match="component is"):
        check_invariance(torch.tanh, x, nm.Gaussian())
    with pytest.raises(KeyError, match="surroundings"):
        check_invariance(nn.Linear(6, 2).double(), x, nm.Gaussian())["surrounding"]
