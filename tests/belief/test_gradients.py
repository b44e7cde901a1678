import pytest
import torch

from neuromanifold.belief.datasets import Patterns, bars_and_stripes
from neuromanifold.belief.gradients import compare_gradients, compare_natural_gradients
from neuromanifold.belief.networks import SigmoidBeliefNetwork


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def matrices(log_table, theta):
    """G, G_V and a gradient of a function of the visible distribution of a table (V, H)."""
    table = log_table(theta).exp()
    scores = torch.autograd.functional.jacobian(log_table, theta)  # (V, H, P)
    full = torch.einsum("vh,vhp,vhq->pq", table, scores, scores)
    visible_scores = torch.einsum("vh,vhp->vp", table / table.sum(1, keepdim=True), scores)
    visible = torch.einsum("v,vp,vq->pq", table.sum(1), visible_scores, visible_scores)
    target = draw(len(table), seed=9).softmax(0)
    return full, visible, target @ visible_scores


def cylindrical(theta):
    """p(v; α) p(h | v; β), 4 × 3 states; β is restricted, α is not."""
    visible = torch.cat([theta[:3], theta.new_zeros(1)]).log_softmax(0)
    hidden = (draw(4, 3, 2, seed=5) @ theta[3:]).log_softmax(1)
    return visible[:, None] + hidden


def simplex(theta):
    return torch.cat([theta, theta.new_zeros(1)]).log_softmax(0).view(4, 3)


def tied(theta):
    """An exponential family of joint states, neither cylindrical nor complete."""
    return (draw(4, 3, 5, seed=6) @ theta).flatten().log_softmax(0).view(4, 3)


@pytest.mark.parametrize(("model", "num"), [(cylindrical, 5), (simplex, 11)])
def test_they_agree_where_lifts_are_horizontal(model, num):
    full, visible, gradient = matrices(model, draw(num, seed=1))
    found = compare_natural_gradients(full, visible, gradient)
    assert found.agree
    assert found.distance < 1e-12
    assert found.missing < 1e-12
    torch.testing.assert_close(visible @ found.full, visible @ found.visible, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.full_rate, found.visible_rate, rtol=1e-12, atol=0)


def test_they_differ_in_a_family_without_horizontal_lifts():
    full, visible, gradient = matrices(tied, draw(5, seed=1))
    found = compare_natural_gradients(full, visible, gradient)
    assert not found.agree
    assert found.distance > 1e-2


@pytest.mark.parametrize("coding", [(0, 1), (-1, 1)])
def test_they_differ_in_a_generic_network(coding):
    generator = torch.Generator().manual_seed(0)
    net = SigmoidBeliefNetwork([2, 2, 3], coding, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    data = net.sample(50, generator)[-1]
    found = compare_gradients(net, data)
    assert not found.agree
    assert found.distance > 1e-2
    assert found.full_rate < found.visible_rate
    # The gradient of all units is the orthogonal projection of the visible one (papers.md §5.2),
    # so it gains at least what the best lift does.
    assert found.full_rate >= found.visible_rate / (1 + found.missing) - 1e-9
    assert "differ" in str(found)


def test_they_agree_in_a_network_without_hidden_influence():
    net = SigmoidBeliefNetwork([1, 3], dtype=torch.float64)
    with torch.no_grad():
        net.weights["1_0"].zero_()
        net.biases["1"].copy_(draw(3, seed=2))
    assert compare_gradients(net, net.sample(20, torch.Generator().manual_seed(0))[-1]).agree


def test_the_visible_direction_is_the_steepest():
    """Of steps as long as it in the visible metric, none gains more."""
    full, visible, gradient = matrices(tied, draw(5, seed=1))
    found = compare_natural_gradients(full, visible, gradient)
    others = draw(1000, 5, seed=3)
    lengths = torch.einsum("np,pq,nq->n", others, visible, others).sqrt()
    assert ((others @ gradient) / lengths <= found.visible_rate.sqrt() + 1e-12).all()


def test_patterns_count_by_their_probability():
    generator = torch.Generator().manual_seed(0)
    net = SigmoidBeliefNetwork([2, 4], generator=generator, dtype=torch.float64)
    data = bars_and_stripes(2, dtype=torch.float64)
    counts = (data.probabilities * 8).round().long()
    rows = data.states.repeat_interleave(counts, dim=0)
    by_rows, by_patterns = compare_gradients(net, rows), compare_gradients(net, data)
    torch.testing.assert_close(by_rows.full, by_patterns.full)
    assert isinstance(data, Patterns)
