"""The full-system Fisher matrix is block diagonal and local (papers.md §5.4 item 1)."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import neuromanifold as nm
from neuromanifold import belief
from neuromanifold.belief import fishers, solves

CASES = [
    pytest.param({"coding": coding, "skips": skips}, id=f"{coding} {skips}")
    for coding in ((0, 1), (-1, 1))
    for skips in ((), ((0, 2),))
] + [
    pytest.param({"leaves": "categorical"}, id="categorical"),
    pytest.param({"leaves": belief.CategoricalUnits(3)}, id="variables"),
]


@pytest.mark.parametrize("options", CASES)
def test_it_equals_the_enumerated_one(network, every_state, scores, options):
    net = network((2, 2, 3), **options)
    layers = every_state(net)
    rows = scores(net, layers)
    expected = rows.mT @ (net.log_joint(layers).exp()[:, None] * rows)
    assert_close(net.fisher().to_dense(), expected.detach(), rtol=0, atol=1e-12)
    assert_close(fishers.score_rows(net, layers), rows.detach(), rtol=0, atol=1e-12)


def test_roots_are_scalars_and_layers_are_blocks(network):
    net = network((2, 3, 4), skips=[(0, 2)])
    F = net.fisher()
    p = net.biases["0"].sigmoid()
    assert_close(F.diagonal()["biases.0"], (p * (1 - p)).detach())
    assert [tuple(block.matrices.shape) for block in F.blocks] == [(2, 1, 1), (3, 3, 3), (4, 6, 6)]
    assert F.block("layers.2").num_parameters == 24
    v = torch.randn(F.num_parameters, 2).double()
    expected = torch.linalg.solve(F.to_dense() + 0.1 * torch.eye(len(v)), v)
    assert_close(F.solve(v, damping=0.1), expected)


@pytest.mark.parametrize(
    ("leaves", "likelihood"),
    [
        ("bernoulli", nm.Bernoulli()),
        (belief.GaussianUnits(0.25), nm.Gaussian(0.25)),
        ("categorical", nm.Categorical()),
    ],
    ids=["bernoulli", "gaussian", "categorical"],
)
def test_a_layer_has_the_fisher_of_a_linear_layer(network, generator, leaves, likelihood):
    net = network((2, 3, 4), leaves=leaves)
    layers = net.sample(50, generator)
    linear = torch.nn.Linear(3, 4).double()
    linear.load_state_dict({"weight": net.weights["2_1"], "bias": net.biases["2"]})
    expected = nm.fisher(linear, likelihood, layers[1], nm.Dense(), estimator=nm.Exact())
    names = ["weights.2_1", "biases.2"]
    found = belief.unit_wise(net, layers).restrict(names)
    order = [*range(4, 16), *range(4)]  # biases come first in the network
    unit_wise = leaves != "categorical"
    dense = expected.to_dense()
    if unit_wise:
        fan = torch.arange(16)
        unit = torch.where(fan < 12, fan // 3, fan - 12)
        dense = dense * (unit[:, None] == unit)
    assert_close(found.to_dense()[order][:, order], dense)


def test_sampled_blocks_are_within_their_errors(network, generator):
    net = network((2, 3, 4), (-1, 1), [(0, 2)])
    exact = net.fisher()
    found = belief.unit_blocks(net, 4000, generator)
    for block in exact.blocks:
        name = block.block.name
        z = (found.value[name] - block.matrices).abs() - 5 * found.stderr[name]
        assert z.max() <= 1e-12, name
    assert found.stderr["layers.1"].max() > 0
    assert not found.stderr["layers.0"].any()


def test_errors_are_as_large_as_the_spread(network, generator):
    net = network((2, 3))
    runs = [belief.unit_blocks(net, 50, generator) for _ in range(400)]
    values = torch.stack([run.value["layers.1"] for run in runs])
    claimed = torch.stack([run.variances["draws"]["layers.1"] for run in runs]).mean(0)
    # The variance of 400 near-normal numbers is known to 7 %.
    assert_close(claimed, values.var(0), rtol=5 * (2 / 400) ** 0.5, atol=1e-9)


def test_the_operator_holds_the_sampled_blocks(network):
    net = network((2, 3, 4))
    F = net.fisher(30, torch.Generator().manual_seed(5))
    blocks = belief.unit_blocks(net, 30, torch.Generator().manual_seed(5)).value
    for block in F.blocks:
        assert torch.equal(block.matrices, blocks[block.block.name])
    assert F.num_samples == 30
    assert all(entry.exact for entry in F.coverage)


def test_chunks_do_not_matter(network, generator, monkeypatch):
    net = network((2, 3, 4))
    layers = net.sample(40, generator)
    whole = fishers.unit_moments(net, layers, 1)
    monkeypatch.setattr(solves, "_TEMPORARY_NUMEL", 200)  # one column at a time
    assert_close(fishers.unit_moments(net, layers, 1), whole)


def test_a_recognition_network_has_one_too(network, generator):
    machine = belief.HelmholtzMachine([2, 3, 4], dtype=torch.float64, generator=generator)
    q = machine.recognition
    layers = q.sample(machine.generative.sample(20, generator)[-1], generator)
    F = belief.unit_wise(q, layers)
    x = torch.cat([layers[2], torch.ones(20, 1).double()], dim=1)
    p = q.probabilities(layers, 1).detach()
    expected = torch.einsum("no,ni,nj->oij", p * (1 - p), x, x) / 20
    assert_close(F.blocks[1].matrices, expected)


def test_one_sample_is_refused(network):
    with pytest.raises(ValueError, match="at least 2 samples"):
        network((2, 3)).fisher(1)
