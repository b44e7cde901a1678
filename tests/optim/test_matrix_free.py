"""The natural gradient of a batch by conjugate gradients."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import neuromanifold as nm
from neuromanifold.linalg import Layout
from neuromanifold.optim import implicit
from neuromanifold.testing import reference

F64 = torch.float64


def network(dtype=F64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)


def batch(num=24, seed=3, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 3, generator=generator, dtype=F64).to(dtype)
    return x, torch.randint(4, (num,), generator=generator)


def train(model, opt, batches):
    losses = []
    for x, y in batches:
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    return losses


def flat(model):
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    layout = Layout({name: tuple(p.shape) for name, p in params.items()})
    return layout.flatten(params).detach(), layout


def seeded(model, **options):
    return implicit(model, nm.Categorical(), generator=torch.Generator().manual_seed(5), **options)


@pytest.mark.parametrize("kl_max", [None, 1e-3])
def test_as_many_steps_as_parameters_are_the_dense_solve(kl_max):
    model = network()  # 44 parameters
    opt = seeded(model, lr=0.5, momentum=0.8, damping=1e-2, steps=60, kl_max=kl_max)
    start, layout = flat(model)
    last = torch.zeros_like(start)
    for seed in range(3):
        x, y = batch(seed=seed)
        start = flat(model)[0]
        fisher = reference.dense_fisher(model, nm.Categorical(), x)
        train(model, opt, [(x, y)])
        g = layout.flatten({name: p.grad for name, p in model.named_parameters()})
        damped = fisher + 1e-2 * torch.eye(len(g), dtype=F64)
        last = 0.8 * last - torch.linalg.solve(damped, g + 0.8 * fisher @ last)
        kl = float(last @ fisher @ last) / 2
        scale = 0.5 * (1.0 if kl_max is None else min(1.0, math.sqrt(kl_max / kl)))
        assert (flat(model)[0] - start - scale * last).abs().max() <= 1e-8 * last.abs().max()
        assert opt.kl == pytest.approx(kl * scale**2, rel=1e-7)


def test_fewer_steps_are_preconditioned_by_a_moving_average_of_squares():
    model, generator = network(), torch.Generator().manual_seed(5)
    opt = seeded(model, lr=1.0, momentum=0.0, damping=1e-2, steps=1, decay=0.9, kl_max=None)
    layout, average = flat(model)[1], None
    for seed in range(3):
        x, y = batch(seed=seed)
        squares = nm.fisher(
            model, nm.Categorical(), x, nm.Diagonal(), per="position", generator=generator
        ).diagonal()
        squares = layout.flatten(squares)
        average = squares if average is None else 0.9 * average + 0.1 * squares
        fisher, before = reference.dense_fisher(model, nm.Categorical(), x), flat(model)[0]
        train(model, opt, [(x, y)])
        g = layout.flatten({name: p.grad for name, p in model.named_parameters()})
        direction = g / (average + 1e-2) ** 0.75
        damped = fisher @ direction + 1e-2 * direction
        expected = -(g @ direction) / (direction @ damped) * direction
        assert (flat(model)[0] - before - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("steps", [1, 5])
def test_a_step_decreases_a_quadratic_and_more_steps_decrease_it_more(steps):
    model, x = nn.Linear(6, 3).double(), torch.randn(40, 6, dtype=F64)
    x, y = x * torch.logspace(-1, 1, 6, dtype=F64), torch.randn(40, 3, dtype=F64)
    likelihood, losses = nm.Gaussian(), []
    for count in (steps, 4 * steps):
        fresh = copy.deepcopy(model)
        opt = implicit(fresh, likelihood, lr=1.0, damping=1e-6, kl_max=None, steps=count)
        before = likelihood.loss(fresh(x), y)
        before.backward()
        opt.step()
        losses.append(float(likelihood.loss(fresh(x), y).detach()))
    assert losses[1] < losses[0] < float(before.detach())


def test_cross_entropy_falls():
    model = network(torch.float32)
    losses = train(model, implicit(model, nm.Categorical()), [batch(dtype=torch.float32)] * 20)
    assert losses[-1] < 0.7 * losses[0]


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path):
    model = network()
    opt = seeded(model)
    train(model, opt, [batch(seed=seed) for seed in range(3)])
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "saved.pt")
    resumed = network(seed=1)
    again = implicit(resumed, nm.Categorical())
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["opt"])
    rest = [batch(seed=seed) for seed in range(3, 6)]
    train(model, opt, rest)
    train(resumed, again, rest)
    assert torch.equal(flat(model)[0], flat(resumed)[0])
    assert repr(opt.state_dict()) == repr(again.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_alone(copied):
    model = network()
    opt = seeded(model, steps=3)
    train(model, opt, [batch()])
    twin, other = copied((model, opt))
    before = flat(model)[0]
    train(twin, other, [batch(seed=1)])
    assert torch.equal(flat(model)[0], before)
    train(model, opt, [batch(seed=1)])
    assert torch.equal(flat(model)[0], flat(twin)[0])


def test_what_is_not_finite_is_skipped():
    model, (x, y) = network(), batch()
    opt = seeded(model)
    train(model, opt, [(x, y)])
    before = flat(model)[0]
    nn.functional.cross_entropy(model(x), y).backward()
    model[0].weight.grad[0, 0] = math.nan
    opt.step()
    train(model, opt, [(x * math.nan, y), (x * 1e200, y)])  # whose squared gradients overflow
    assert opt.skipped == 3
    assert torch.equal(flat(model)[0], before)
    train(model, opt, [(x, y)])
    assert opt.skipped == 3
    assert flat(model)[0].isfinite().all()
    assert not torch.equal(flat(model)[0], before)


def test_dropout_and_normalisation_are_measured_in_evaluation_mode_and_left_as_they_are():
    def make():
        torch.manual_seed(0)
        layers = (nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 4))
        return nn.Sequential(*layers).double()

    model, twin, (x, y) = make(), make(), batch()
    model[1].eval()
    twin[1].eval()
    torch.manual_seed(1)
    opt = implicit(model, nm.Categorical(), lr=1.0, damping=0.1, kl_max=None, steps=100)
    torch.manual_seed(2)
    train(model, opt, [(x, y)])
    torch.manual_seed(2)
    nn.functional.cross_entropy(twin(x), y).backward()
    before, layout = flat(twin)
    g = layout.flatten({name: p.grad for name, p in twin.named_parameters()})
    assert torch.equal(g, layout.flatten({name: p.grad for name, p in model.named_parameters()}))
    fisher = reference.dense_fisher(twin.eval(), nm.Categorical(), x)
    expected = -torch.linalg.solve(fisher + 0.1 * torch.eye(len(g), dtype=F64), g)
    assert (flat(model)[0] - before - expected).abs().max() <= 1e-8 * expected.abs().max()
    assert [module.training for module in model] == [True, False, True, True]


def test_layers_that_no_rule_reads_and_frozen_ones():
    model = nn.Sequential(nn.Linear(3, 6), nn.PReLU(), nn.Linear(6, 4)).double()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(dict(model.named_parameters()))
    opt = seeded(model)
    train(model, opt, [batch()])
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name == "0.weight")
    model[0].weight.requires_grad_(True)
    train(model, opt, [batch()])
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_what_is_refused():
    model = network()
    for options, message in (
        ({"steps": 0}, "at least 1, got 0"),
        ({"steps": 2.5}, "got 2.5"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\)"),
        ({"damping": 0.0}, "damping is a positive"),
        ({"lr": -1.0}, "lr must be"),
    ):
        with pytest.raises(ValueError, match=message):
            implicit(model, nm.Categorical(), **options)
