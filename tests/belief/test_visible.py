"""The visible geometry and the missing information (papers.md §5.4 item 2)."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from neuromanifold import belief
from neuromanifold.belief import visible

CASES = [
    pytest.param({"coding": coding, "skips": skips}, id=f"{coding} {skips}")
    for coding in ((0, 1), (-1, 1))
    for skips in ((), ((0, 2),))
] + [pytest.param({"leaves": "categorical"}, id="categorical")]


@pytest.mark.parametrize("options", CASES)
def test_louis_identity(network, every_state, scores, options):
    net = network((2, 2, 3), **options)
    layers = every_state(net)
    joint = net.log_joint(layers).exp().detach()
    rows = scores(net, layers).detach()
    v, which = layers[-1].unique(dim=0, return_inverse=True)
    covariance = torch.zeros(rows.shape[1], rows.shape[1]).double()
    for index in range(len(v)):
        mine = rows[which == index]
        weights = joint[which == index]
        centred = mine - (weights @ mine) / weights.sum()
        covariance += centred.mT @ (weights[:, None] * centred)
    missing = net.fisher().to_dense() - net.visible_fisher().to_dense()
    assert_close(missing, covariance, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(missing)[0] >= -1e-12


@pytest.mark.parametrize("options", CASES)
def test_the_visible_score_is_the_posterior_mean_score(network, options):
    net = network((2, 2, 3), **options)
    means, p, visibles = [], [], []
    for posterior in visible.posteriors(net, None):
        means.append(visible.mean_scores(net, posterior)[0])
        p.append(posterior.mass)
        visibles.append(posterior.layers[-1][:, 0])
    likelihood = net.exact_log_likelihood(torch.cat(visibles))
    assert_close(torch.cat(p), likelihood.exp().detach(), rtol=1e-12, atol=0)
    parameters = [net.get_parameter(name) for name in net.layout.names]
    for value, found in zip(likelihood, torch.cat(means), strict=True):
        gradients = torch.autograd.grad(value, parameters, retain_graph=True)
        expected = torch.cat([gradient.flatten() for gradient in gradients])
        assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("summed", [True, False], ids=["hidden summed", "hidden sampled"])
def test_a_sampled_matrix_is_within_its_errors(network, generator, monkeypatch, summed):
    if not summed:
        monkeypatch.setattr(visible, "MOST_SUMMED", 0)
    net = network((2, 2, 3), (-1, 1))
    exact = net.visible_fisher().to_dense()
    found = belief.visible_matrix(net, 2000, draws=32, generator=generator)
    # Errors from 64 batches: Student's t with 63 degrees of freedom.
    z = (found.value - exact) / (found.stderr + 1e-12)
    assert z.abs().max() < 6
    assert 0.5 < z.square().mean().sqrt() < 2
    assert found.stderr.diagonal().max() < exact.diagonal().max() / 5


@pytest.mark.parametrize("summed", [True, False], ids=["hidden summed", "hidden sampled"])
def test_sampled_missing_information_is_within_its_errors(network, generator, monkeypatch, summed):
    net = network((2, 2, 3))
    exact = net.missing_information()
    if not summed:
        monkeypatch.setattr(visible, "MOST_SUMMED", 0)
    found = net.missing_information(2000, draws=32, generator=generator)
    for name in ("missing", "full", "unit_shares", "layer_shares"):
        one, other = getattr(found, name), getattr(exact, name)
        for layer in one.value:
            bound = 5 * one.stderr[layer] + 1e-12
            assert ((one.value[layer] - other.value[layer]).abs() <= bound).all(), (name, layer)
    assert (found.share.value - exact.share.value).abs() <= 5 * found.share.stderr


def test_missing_information_is_the_trace_of_the_difference(network):
    net = network((2, 3, 2), (-1, 1), [(0, 2)])
    found = net.missing_information()
    full, seen = net.fisher(), net.visible_fisher()
    for name, missing in found.missing.value.items():
        trace = full.block(name).trace() - seen.block(name).trace()
        assert_close(missing.sum(), trace, rtol=1e-11, atol=1e-12)
        assert_close(found.full.value[name].sum(), full.block(name).trace())
        share = found.layer_shares.value[name]
        assert_close(share, trace / full.block(name).trace(), rtol=1e-11, atol=1e-12)
        assert not found.missing.stderr[name].any()
    assert_close(found.share.value, 1 - seen.trace() / full.trace())
    assert str(found).startswith("layers.0: ")


def test_nothing_is_missing_of_leaves_without_hidden_influence(network):
    net = network((2, 3))
    with torch.no_grad():
        net.weights["1_0"].zero_()
    found = net.missing_information()
    # The leaves say nothing about the roots; the biases of the leaves are known, weights are not.
    assert_close(found.unit_shares.value["layers.0"], torch.ones(2).double())
    p = net.biases["0"].sigmoid().detach()
    # Var over E of the input for a weight, nothing for the bias.
    expected = (p * (1 - p)).sum() / (1 + p.sum())
    assert_close(found.unit_shares.value["layers.1"], expected.expand(3))


def test_a_recognition_network_serves_as_proposal(network, generator, monkeypatch):
    monkeypatch.setattr(visible, "MOST_SUMMED", 0)
    net = network((2, 2, 3))
    exact = net.missing_information()
    q = belief.RecognitionNetwork([2, 2, 3], dtype=torch.float64, generator=generator)
    found = net.missing_information(2000, draws=32, proposal=q, generator=generator)
    for layer, share in found.layer_shares.value.items():
        error = (share - exact.layer_shares.value[layer]).abs()
        assert error <= 5 * found.layer_shares.stderr[layer], layer


def test_gaussian_leaves_are_sampled(network, generator):
    net = network((1, 1), leaves="gaussian")
    found = belief.visible_matrix(net, 4000, generator=generator)
    # Two-component mixture: its Fisher matrix by quadrature over v.
    v = torch.linspace(-12, 12, 401).double()[:, None]
    likelihood = net.exact_log_likelihood(v)
    gradients = torch.autograd.grad(
        likelihood,
        [net.get_parameter(name) for name in net.layout.names],
        torch.eye(len(v)).double(),
        is_grads_batched=True,
    )
    rows = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
    exact = rows.mT @ (likelihood.exp()[:, None].detach() * rows) * (v[1] - v[0])
    assert ((found.value - exact).abs() <= 5 * found.stderr + 1e-9).all()


def test_too_few_samples_or_draws_are_refused(network):
    net = network((2, 3))
    with pytest.raises(ValueError, match="samples is at least 2"):
        net.visible_fisher(1)
    with pytest.raises(ValueError, match="draws is at least 2"):
        net.missing_information(10, draws=1)


def test_chains_that_are_stuck_are_told(network, generator, monkeypatch):
    monkeypatch.setattr(visible, "MOST_SUMMED", 0)
    net = network((8, 8), (-1, 1))
    with torch.no_grad():
        net.weights["1_0"].mul_(4)
    with pytest.warns(UserWarning, match="% of the chains left the hidden state"):
        found = net.missing_information(200, draws=2, generator=generator)
    assert 0 < found.moved < 0.9
    with pytest.warns(UserWarning, match="a better proposal"):
        net.visible_fisher(200, draws=2, generator=generator)
    assert network((2, 2, 3)).missing_information(50, generator=generator).moved > 0.99
