from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from torch import nn
from torch.func import jacrev, vmap
from torch.testing import assert_close

import neuromanifold as nm
from neuromanifold.relative.responses import Binary
from neuromanifold.relative.sensitivity import compare
from neuromanifold.testing import reference

LIKELIHOODS = {
    "categorical": (nm.Categorical(), lambda f: torch.diag(f.softmax(0)) - _outer(f.softmax(0))),
    "gaussian": (nm.Gaussian(0.5), lambda f: 2 * torch.eye(len(f), dtype=f.dtype)),
}
RESPONSES = {  # and ν by activation tanh, whose slope is 1 - y²
    "gaussian": (nm.Gaussian(2.0), lambda y: (1 - y**2) ** 2 / 2),
    "binary": (Binary((-1.0, 1.0)), lambda y: 1 - y**2),
}


def _outer(p):
    return p[:, None] * p


def close(got, expected, tolerance=1e-10):
    assert_close(got, expected, rtol=0, atol=tolerance)


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    layers = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)
    return nn.Sequential(*layers).double()


@pytest.fixture
def x():
    return torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def unit_blocks(model, likelihood, x, layer):
    """Diagonal blocks of the oracle's dense matrix, `(O, I + 1, I + 1)`."""
    F = reference.dense_fisher(model, likelihood, x)
    names = [name for name, _ in model.named_parameters()]
    ends = torch.tensor([p.numel() for p in model.parameters()]).cumsum(0).tolist()
    starts = dict(zip(names, [0, *ends[:-1]], strict=True))
    fan_out, fan_in = model[layer].weight.shape
    blocks = []
    for o in range(fan_out):
        first = starts[f"{layer}.weight"] + o * fan_in
        rows = [*range(first, first + fan_in), starts[f"{layer}.bias"] + o]
        blocks.append(F[rows][:, rows])
    return torch.stack(blocks)


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("layer", [0, 2])
def test_hidden_layers_are_as_jacobians_say(mlp, x, likelihood, response, layer):
    likelihood, output_fisher = LIKELIHOODS[likelihood]
    response, information = RESPONSES[response]
    below, above = mlp[: layer + 1], mlp[layer + 2 :]
    with torch.no_grad():
        inputs = torch.cat([mlp[:layer](x), torch.ones(9, 1, dtype=torch.float64)], dim=1)
        y = below(x).tanh()
        J = vmap(jacrev(above))(y)  # (N, K, O)
        S = torch.stack([output_fisher(f) for f in mlp(x)])
    nu = information(y)  # (N, O)
    # The information that the network above adds is that of the response's mean, J Σ J, in units
    # of the response's own: ε² ν is slope² (J Σ J).
    above_information = torch.einsum("nko,nkl,nlo->no", J, S, J) * (1 - y**2) ** 2
    sensitivity = above_information / nu
    R = torch.einsum("no,ni,nj->oij", nu, inputs, inputs) / 9
    E = unit_blocks(mlp, likelihood, x, layer)
    close(torch.einsum("no,ni,nj->oij", above_information, inputs, inputs) / 9, E, 1e-13)

    found = compare(mlp, likelihood, x, response)[str(layer)]

    close(found.factor, torch.einsum("oii->o", E) / torch.einsum("oii->o", R))
    close(found.cosine, (E * R).sum((1, 2)) / (E.norm(dim=(1, 2)) * R.norm(dim=(1, 2))))
    weights = nu / nu.sum(0)
    mean = (weights * sensitivity).sum(0)
    variance = (weights * (sensitivity - mean) ** 2).sum(0)
    close(found.variation, variance.sqrt() / mean)
    if layer == 0:  # the last one's is constant where the outputs are Gaussian
        assert found.variation.min() > 0.01


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_output_layer_is_seen_exactly(mlp, x, likelihood):
    found = compare(mlp, LIKELIHOODS[likelihood][0], x)["4"]
    one = torch.ones(3, dtype=torch.float64)
    close(found.factor, one, 1e-12)
    close(found.cosine, one, 1e-12)
    close(found.variation, 0 * one, 1e-12)


def test_a_sensitivity_that_does_not_depend_on_the_input(x):
    """One tanh layer under a linear one, Gaussian outputs: ε² is a constant of each unit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    found = compare(model, nm.Gaussian(), x)["0"]
    close(found.factor, model[2].weight.detach().square().sum(0), 1e-12)
    close(found.cosine, torch.ones(5, dtype=torch.float64), 1e-12)
    close(found.variation, torch.zeros(5, dtype=torch.float64), 1e-12)


def test_batches_do_not_matter(mlp, x):
    whole = compare(mlp, nm.Categorical(), x)
    parts = compare(mlp, nm.Categorical(), [(x[:2], None), (x[2:3], None), (x[3:], None)])
    assert parts.num_samples == whole.num_samples == 9
    for one, other in zip(whole.layers, parts.layers, strict=True):
        close(one.factor, other.factor, 1e-12)
        close(one.cosine, other.cosine, 1e-12)
        close(one.variation, other.variation, 1e-12)


def test_convolutions_are_as_the_two_measurements_say():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, stride=2, bias=False),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.LayerNorm(12),
        nn.Linear(12, 5),
    )
    model = model.double().eval()
    x = torch.randn(7, 2, 6, 6, dtype=torch.float64)
    found = compare(model, nm.Categorical(), x)
    assert [layer.name for layer in found.layers] == ["0", "3", "7"]
    assert found.left_out == dict.fromkeys(("1", "6"), "its units do not read a vector of inputs")
    exact = nm.fisher(model, nm.Categorical(), x, nm.UnitWise(), estimator=nm.Exact())
    relative = nm.fisher(model, nm.Categorical(), x, nm.structures.RelativeUnits())
    for layer in found.layers:
        E, R = (
            next(b for b in F.blocks if b.block.name == layer.name).matrices
            for F in (exact, relative)
        )
        close(layer.factor, torch.einsum("oii->o", E) / torch.einsum("oii->o", R))
        close(layer.cosine, (E * R).sum((1, 2)) / (E.norm(dim=(1, 2)) * R.norm(dim=(1, 2))))


def test_wide_layers_have_no_cosine(mlp, x, monkeypatch):
    narrow = compare(mlp, nm.Categorical(), x)
    monkeypatch.setattr(sys.modules[compare.__module__], "WIDEST", 150)
    found = compare(mlp, nm.Categorical(), x)
    assert [layer.cosine is None for layer in found.layers] == [False, True, False]
    close(found["2"].factor, narrow["2"].factor, 1e-12)
    close(found["2"].variation, narrow["2"].variation, 1e-12)
    assert set(found["2"].summary) == {"factor", "variation"}
    assert "too wide" in str(found)


def test_dead_units_have_no_numbers(x):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[0].bias[:2] = -100
    layer = compare(model, nm.Categorical(), x)["0"]
    assert layer.dead == 2
    for numbers in (layer.factor, layer.cosine, layer.variation):
        assert numbers.isnan().tolist() == [True, True, False, False, False]
    known = layer.factor[2:].sort().values
    assert layer.summary["factor"].median == pytest.approx(float(known[1]))
    assert layer.summary["factor"].lower == pytest.approx(float(known[:2].mean()))
    assert layer.to_dict()["factor"][:2] == [None, None]
    with torch.no_grad():
        model[0].bias[:] = -100
    assert math.isnan(compare(model, nm.Categorical(), x)["0"].summary["cosine"].median)


class Branched(nn.Module):
    """A bare sum, a tied weight, a raw parameter, and a unit with a response."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        h = self.embed(tokens) * self.scale
        return self.head(h + self.down(nn.functional.gelu(self.up(h))))


def test_layers_without_a_response_say_why():
    torch.manual_seed(0)
    model, tokens = Branched().double(), torch.randint(7, (5, 3))
    found = compare(model, nm.Categorical(), tokens)
    assert [layer.name for layer in found.layers] == ["up", "head.bias"]
    assert found.left_out == {
        "embed.weight": "its weight is used at several places",
        "scale": "no layer rule reads it (no rule for Branched)",
        "down": "no activation function of its own follows it",
    }
    assert "down was left out: no activation function" in str(found)
    with pytest.raises(KeyError, match="no activation function"):
        found["down"]
    with pytest.raises(KeyError, match="there are"):
        found["sideways"]


def test_ignored_positions_do_not_count(mlp, x):
    targets = torch.zeros(9, dtype=torch.int64)
    targets[6:] = -100
    masked = compare(mlp, nm.Categorical(), (x, targets))
    close(masked["4"].factor, torch.ones(3, dtype=torch.float64), 1e-12)
    F = nm.fisher(mlp, nm.Categorical(), (x, targets), nm.UnitWise(), estimator=nm.Exact())
    assert_close(F.trace(), compare_trace(masked, mlp, x, targets))


def compare_trace(found, model, x, targets):
    """The exact trace, from factors and the relative metrics."""
    relative = nm.fisher(
        model, nm.Categorical(), (x, targets), nm.structures.RelativeUnits()
    ).blocks
    return sum(
        (found[b.block.name].factor * torch.einsum("oii->o", b.matrices)).sum() for b in relative
    )


def test_what_it_prints_and_writes(mlp, x):
    found = compare(mlp, nm.Categorical(), x)
    lines = str(found).splitlines()
    assert "N = 9" in lines[0]
    assert lines[2].split() == ["layer", "units", "dead", "sensitivity", "cosine", "variation"]
    assert lines[3].split()[:3] == ["0", "5", "0"]
    written = json.loads(json.dumps(found.to_dict()))
    assert written["layers"][1]["summary"]["cosine"]["median"] == pytest.approx(
        float(found["2"].cosine.median()), rel=0.2
    )
    assert written["num_samples"] == 9


def test_the_model_is_left_as_it_is(mlp, x):
    before = [p.clone() for p in mlp.parameters()]
    compare(mlp, nm.Categorical(), x)
    assert all(torch.equal(a, b) for a, b in zip(before, mlp.parameters(), strict=True))
    assert all(p.grad is None for p in mlp.parameters())
    assert not mlp[0]._forward_hooks
    with pytest.raises(TypeError, match="entries are independent"):
        compare(mlp, nm.Categorical(), x, nm.Categorical())
