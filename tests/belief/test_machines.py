"""Recognition networks and importance-weighted log-likelihoods."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from neuromanifold.belief import HelmholtzMachine, machines
from neuromanifold.belief.enumeration import state_chunks


@pytest.fixture
def machine(generator):
    return HelmholtzMachine(
        [2, 3, 4], (-1, 1), [(0, 2)], generator=generator, bias=0.3, dtype=torch.float64
    )


def test_both_networks_have_the_same_layers(machine):
    p, q = machine.generative, machine.recognition
    assert p.sizes == q.sizes
    assert q.parents == {1: (2,), 0: (1, 2)}
    assert p.parents == {0: (), 1: (0,), 2: (1, 0)}
    assert set(dict(q.named_parameters())) == {
        *("biases.0", "biases.1", "weights.0_1", "weights.0_2", "weights.1_2")
    }


def test_recognition_is_a_distribution_over_hidden_states(machine, generator):
    q = machine.recognition
    v = machine.generative.sample(1, generator)[-1]
    (states,) = state_chunks(q, [0, 1])
    layers = [*states, v.expand(len(states[0]), -1)]
    p = q.log_prob(layers).exp().detach()
    assert_close(p.sum(), torch.ones((), dtype=torch.float64))
    num = 40_000
    drawn = torch.cat(q.sample(v.expand(num, -1), generator)[:-1], dim=-1)
    hits = (drawn[:, None] == torch.cat(states, dim=-1)).all(-1).double().mean(0)
    assert ((hits - p).abs() <= 5.5 * (p * (1 - p) / num).sqrt() + 5 / num).all()


def test_log_likelihood_is_within_its_errors(machine, generator):
    v = machine.generative.sample(60, generator)[-1]
    exact = machine.generative.exact_log_likelihood(v).detach()
    rows = machine.log_likelihood(v, 2000, generator, per_row=True)
    z = (rows.value - exact) / rows.stderr
    assert z.abs().max() < 5
    assert 0.6 < z.square().mean().sqrt() < 1.5
    mean = machine.log_likelihood(v, 2000, generator)
    assert abs(mean.value - exact.mean()) < 5 * mean.error("draws")
    # The spread of rows is known up to twice its covariance with the errors of the draws.
    drawn = rows.stderr.square().mean().sqrt()
    bound = 5 * drawn * (2 * exact.std() / 60**0.5 + drawn / 30**0.5)
    assert abs(60 * mean.error("data") ** 2 - exact.var()) < bound
    assert bound < exact.var()
    assert mean.num_samples == 60


def test_it_is_a_lower_bound_on_average(machine, generator):
    v = machine.generative.sample(2000, generator)[-1]
    exact = machine.generative.exact_log_likelihood(v).detach()
    gaps = [
        exact - machine.log_likelihood(v, samples, generator, per_row=True).value
        for samples in (2, 16)
    ]
    assert gaps[0].mean() > 5 * gaps[0].std() / 2000**0.5
    assert gaps[0].mean() > gaps[1].mean()


def test_a_perfect_recognition_network_makes_no_error(machine, generator):
    with torch.no_grad():  # hidden units that nothing depends on: the posterior is the prior
        for net in (machine.generative, machine.recognition):
            for weight in net.weights.values():
                weight.zero_()
    v = machine.generative.sample(5, generator)[-1]
    found = machine.log_likelihood(v, 3, generator, per_row=True)
    assert_close(found.value, machine.generative.exact_log_likelihood(v).detach())
    assert found.stderr.max() < 1e-7


def test_chunks_of_samples_are_put_together(machine, generator, monkeypatch):
    v = machine.generative.sample(10, generator)[-1]
    exact = machine.generative.exact_log_likelihood(v).detach()
    monkeypatch.setattr(machines, "CHUNK_NUMEL", 700)
    found = machine.log_likelihood(v, 1001, generator, per_row=True)
    assert ((found.value - exact) / found.stderr).abs().max() < 5
    assert found.draws == 1001


def test_bad_arguments_are_refused(machine):
    with pytest.raises(ValueError, match="at least 2 samples"):
        machine.log_likelihood(torch.zeros(1, 4).double(), 1)
    with pytest.raises(ValueError, match=r"shape \(..., 4\)"):
        machine.log_likelihood(torch.zeros(1, 3).double(), 10)
