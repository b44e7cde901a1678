"""Networks and their distributions: sums over all states, autograd and torch as references."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from neuromanifold import belief
from neuromanifold.belief import SigmoidBeliefNetwork, enumeration
from neuromanifold.belief.units import GaussianUnits
from neuromanifold.errors import TooLargeError, UnsupportedError

CASES = [
    pytest.param({"coding": (0, 1)}, id="0/1"),
    pytest.param({"coding": (-1, 1), "skips": [(0, 2)]}, id="-1/1 with a skip"),
    pytest.param({"leaves": "categorical"}, id="categorical"),
    pytest.param({"leaves": belief.CategoricalUnits(2)}, id="two variables"),
]


@pytest.mark.parametrize("options", CASES)
def test_probabilities_of_all_states_sum_to_one(network, every_state, options):
    net = network((2, 2, 4), **options)
    layers = every_state(net)
    joint = net.log_joint(layers).exp()
    assert_close(joint.sum(), torch.ones((), dtype=torch.float64), rtol=1e-12, atol=0)
    assert len(torch.cat(layers, dim=-1).unique(dim=0)) == len(joint)


@pytest.mark.parametrize("options", CASES)
def test_exact_log_likelihood_sums_the_hidden_states(network, every_state, options):
    net = network((2, 2, 4), **options)
    layers = every_state(net)
    v, which = layers[-1].unique(dim=0, return_inverse=True)
    marginal = torch.zeros(len(v)).double().index_add_(0, which, net.log_joint(layers).exp())
    assert_close(net.exact_log_likelihood(v).exp(), marginal, rtol=1e-12, atol=1e-15)


def test_chunks_do_not_matter(network, monkeypatch):
    net = network((3, 2, 4))
    v = net.sample(7)[-1]
    whole = net.exact_log_likelihood(v)
    monkeypatch.setattr(enumeration, "CHUNK_NUMEL", 45)
    assert_close(net.exact_log_likelihood(v), whole, rtol=1e-13, atol=0)


def test_log_joint_is_that_of_the_conditionals_in_torch(network, generator):
    net = network((2, 3, 4), (-1, 1), [(0, 2)])
    x = net.sample(6, generator)
    logits = [
        net.biases["0"].expand(6, 2),
        x[0] @ net.weights["1_0"].T + net.biases["1"],
        x[1] @ net.weights["2_1"].T + x[0] @ net.weights["2_0"].T + net.biases["2"],
    ]
    parts = [
        torch.distributions.Bernoulli(logits=a).log_prob((b + 1) / 2).sum(-1)
        for a, b in zip(logits, x, strict=True)
    ]
    assert_close(net.log_joint(x), sum(parts), rtol=1e-12, atol=1e-13)
    for found, expected in zip(net.log_conditionals(x), parts, strict=True):
        assert_close(found, expected, rtol=1e-12, atol=1e-13)
    for layer, expected in enumerate(logits):
        product = net.inputs(x, layer) @ net.weight_matrix(layer).T
        assert_close(product, expected, rtol=1e-12, atol=1e-13)
        assert_close(net.probabilities(x, layer).expand(6, -1), expected.sigmoid())


def test_gaussian_leaves(network, generator):
    net = network((2, 3), leaves=belief.GaussianUnits(0.25))
    layers = net.sample(20_000, generator)
    mean = net.probabilities(layers, 1)
    normal = torch.distributions.Normal(mean, 0.5)
    expected = normal.log_prob(layers[1]).sum(-1)
    assert_close(net.log_conditional(layers, 1), expected, rtol=1e-12, atol=1e-12)
    z = (layers[1] - mean) / 0.5
    assert z.mean(0).abs().max() < 5 / 20_000**0.5
    assert (z.square().mean(0) - 1).abs().max() < 5 * (2 / 20_000) ** 0.5
    # Two roots: the marginal is a mixture of four.
    states = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).double()
    joint = net.log_joint([states.expand(5, 4, 2), layers[1][:5, None].expand(5, 4, 3)])
    assert_close(net.exact_log_likelihood(layers[1][:5]), joint.logsumexp(-1))


@pytest.mark.parametrize("options", CASES)
def test_samples_have_the_probabilities_of_states(network, every_state, generator, options):
    net = network((1, 2, 4), **options)
    states = every_state(net)
    p = net.log_joint(states).exp().detach()
    num = 40_000
    drawn = torch.cat(net.sample(num, generator), dim=-1)
    hits = (drawn[:, None] == torch.cat(states, dim=-1)).all(-1).double().mean(0)
    assert ((hits - p).abs() <= 5.5 * (p * (1 - p) / num).sqrt() + 5 / num).all()


@pytest.mark.parametrize("options", CASES)
def test_score_and_inputs_make_the_gradient(network, generator, options):
    net = network((2, 3, 4), **options)
    layers = net.sample(5, generator)
    net.log_joint(layers).sum().backward()
    for layer in net.modelled:
        gradient = net.score(layers, layer).mT @ net.inputs(layers, layer)
        for name, part in net.split(layer, gradient).items():
            assert_close(part, net.get_parameter(name).grad, rtol=1e-11, atol=1e-12)


def test_initial_weights_are_uniform_and_seeded():
    nets = [
        SigmoidBeliefNetwork([30, 50], bias=-1, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    ]
    weight = nets[0].weights["1_0"]
    assert torch.equal(weight, nets[1].weights["1_0"])
    bound = (6 / 80) ** 0.5
    assert weight.abs().max() <= bound
    # The variance of the square of a uniform number is 4/45 bound⁴.
    assert abs(weight.square().mean() - bound**2 / 3) < 5 * bound**2 * (4 / 45 / 1500) ** 0.5
    assert (nets[0].biases["1"] == -1).all()
    assert set(dict(nets[0].named_parameters())) == {"biases.0", "biases.1", "weights.1_0"}


def test_a_sample_depends_on_the_generator_alone(network):
    net = network((2, 3, 4))
    one, other = (net.sample(9, torch.Generator().manual_seed(4)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_too_many_states_are_refused(network):
    net = network((20, 20, 4))
    with pytest.raises(TooLargeError, match=r"40 units and about 10\^12 joint states"):
        net.exact_log_likelihood(torch.zeros(2, 4).double())
    with pytest.raises(TooLargeError, match="Give a number of samples"):
        net.fisher()
    with pytest.raises(UnsupportedError, match="continuum"):
        network((2, 3), leaves="gaussian").visible_fisher()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((3,),), "at least two layers"),
        (((3, 0),), "at least two layers"),
        (((3, 2), (1, 1)), "two different values"),
        (((3, 2, 2), (0, 1), [(0, 1)]), "Neighbours are connected anyway"),
        (((3, 2, 2), (0, 1), [(0, 3)]), "out of 0 to 2"),
        (((3, 2, 2), (0, 1), [(0, 2), (0, 2)]), "twice"),
        (((3, 2), (0, 1), (), "poisson"), "leaves is"),
        (((3, 5), (0, 1), (), belief.CategoricalUnits(2)), "whole variables"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SigmoidBeliefNetwork(*arguments)


def test_values_of_other_widths_are_refused(network):
    net = network((2, 3))
    with pytest.raises(ValueError, match=r"got values of widths \(2, 4\)"):
        net.log_joint([torch.zeros(1, 2), torch.zeros(1, 4)])
    with pytest.raises(ValueError, match=r"shape \(N, 3\)"):
        net.exact_log_likelihood(torch.zeros(1, 4))


def test_a_continuum_has_no_list_of_values() -> None:
    with pytest.raises(UnsupportedError, match="cannot be listed"):
        GaussianUnits().decode(torch.arange(2), 1, torch.float64)
