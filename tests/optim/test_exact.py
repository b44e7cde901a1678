"""The exact natural gradient of a batch, and of residuals."""

import copy
import math
import pickle
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn

import neuromanifold as nm
from neuromanifold.linalg import Layout
from neuromanifold.optim.exact import ExactNaturalGradient, gram
from neuromanifold.optim.jacobian import MixedRowsError, jacobian_by_passes, jacobian_by_rows
from neuromanifold.optim.residuals import GaussNewton
from neuromanifold.testing import reference

F64 = torch.float64


def network(*widths, seed=0):
    torch.manual_seed(seed)
    layers = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def points(num, dim=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num, dim, generator=generator, dtype=F64)


def laplacian(model, x):
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    rows = [
        torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i]
        for i in range(x.shape[1])
    ]
    return torch.stack(rows).sum(dim=0)


def poisson(model, num=20):
    inside, edge = points(num), points(num // 2, seed=2)
    edge[::2, 0], edge[1::2, 1] = edge[::2, 0].round(), edge[1::2, 1].round()
    return lambda: torch.cat([laplacian(model, inside) + 1, 3 * model(edge)[:, 0]])


def both(closure, params):
    layout = Layout({name: tuple(p.shape) for name, p in params.items()})
    return jacobian_by_rows(closure, params, layout), jacobian_by_passes(closure, params, layout)


def assert_same(closure, params, tolerance=1e-10):
    rows, passes = both(closure, params)
    assert torch.equal(rows.residuals, passes.residuals)
    scale = passes.matrix.abs().max()
    assert scale > 0
    assert (rows.matrix - passes.matrix).abs().max() <= tolerance * scale
    assert not rows.matrix.requires_grad


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---- the Jacobian ------------------------------------------------------------------------


def test_values_and_second_derivatives():
    model = network(2, 7, 5, 1)
    assert_same(poisson(model), trainable(model))


def test_several_rows_in_one_residual():
    model, x = network(2, 6, 3), points(24)
    assert_same(lambda: model(x.view(4, 6, 2)).square().mean(dim=(1, 2)), trainable(model))


def test_residuals_in_another_order_than_rows():
    model, x = network(2, 6, 1), points(10)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    assert_same(lambda: torch.cat([model(x)[order, 0] ** 2, model(x[:3])[:, 0]]), trainable(model))


def test_unknown_coefficients_of_an_equation():
    model, x = network(2, 6, 1), points(10)
    unknown = nn.Parameter(torch.tensor([0.5, 2.0], dtype=F64))

    def closure():
        return unknown[0] * laplacian(model, x) + unknown[1] ** 2 * model(x)[:, 0]

    assert_same(closure, {**trainable(model), "unknown": unknown})


def test_a_weight_that_is_used_in_other_ways_too():
    model, x = network(2, 6, 1), points(10)

    def closure():
        return model(x)[:, 0] * (1 + model[0].weight.square().sum())

    assert_same(closure, trainable(model))


def test_frozen_weights_and_layers_without_bias():
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh())
    model.append(nn.Linear(4, 1)).double()
    model[0].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    assert_same(poisson(model), trainable(model))


def test_a_layer_called_twice_and_functional_calls():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double(), points(8, 3)
    params = trainable(model)

    def closure():
        return model(torch.func.functional_call(model, params, (x,))).sum(dim=1)

    assert_same(closure, params)


def test_a_closure_that_asks_for_gradients_of_weights():
    model, x = network(2, 6, 1), points(10)

    def closure():
        residuals = model(x)[:, 0]
        (slope,) = torch.autograd.grad(residuals.sum(), model[0].weight, retain_graph=True)
        return residuals * slope.norm()

    found = both(closure, trainable(model))
    assert torch.allclose(found[0].matrix, found[1].matrix, rtol=1e-10, atol=1e-12)
    assert torch.equal(found[0].residuals, found[1].residuals)


def test_calls_without_rows_and_rows_without_effect():
    model, x = network(2, 6, 1), points(10)

    def closure():
        flat = torch.relu(model(x)[:, 0] * 1e3)  # zero, and its gradient, for some
        return torch.cat([flat, model(x[:0])[:, 0], model(x)[:, 0] * 1e-30])

    assert_same(closure, trainable(model))


def test_single_precision():
    model = network(2, 7, 1).float()
    x = points(300).float()
    assert_same(lambda: model(x)[:, 0] - 1, trainable(model), tolerance=1e-5)


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_rows_that_enter_two_residuals_are_noticed(share):
    model, x = network(2, 6, 1), points(12)

    def closure():
        u = model(x)[:, 0]
        return torch.cat([u[1:], share * u[:1] + (1 - share) * u[1:2]])

    params = trainable(model)
    layout = Layout({name: tuple(p.shape) for name, p in params.items()})
    with pytest.raises(MixedRowsError):
        jacobian_by_rows(closure, params, layout)


class Periodic(nn.Module):
    """Frequencies are a parameter that no linear layer holds."""

    def __init__(self):
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(2, 80, dtype=F64))
        self.out = nn.Linear(80, 1).double()

    def forward(self, x):
        return self.out(torch.sin(x @ self.frequencies))


def by_func(model, x):
    return torch.func.vmap(torch.func.grad(lambda point: model(point)[0]))(x).sum(dim=1)


@pytest.mark.parametrize(
    ("model", "of"),
    [
        (Periodic(), lambda model, x: model(x)[:, 0]),
        (network(2, 30, 1), by_func),
        (network(2, 5, 1), lambda model, x: model(x)[:, 0] - model(x).mean()),
    ],
    ids=["parameter", "torch.func", "mean"],
)
def test_other_models_take_one_pass_per_residual_and_say_so(model, of):
    x, params = points(9), trainable(model)

    def closure():
        return of(model, x)

    layout = Layout({name: tuple(p.shape) for name, p in params.items()})
    exact = jacobian_by_passes(closure, params, layout)
    leaves = list(params.values())
    expected = [
        torch.autograd.grad(r, leaves, retain_graph=True, allow_unused=True) for r in closure()
    ]
    for row, gradients in zip(exact.matrix, expected, strict=True):
        whole = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(params.values(), gradients, strict=True)
        ]
        flat = torch.cat([g.flatten() for g in whole])
        assert (row - flat).abs().max() <= 1e-12 * flat.abs().max()
    opt = GaussNewton(model.parameters())
    with pytest.warns(UserWarning, match="one backward pass for each residual") as told:
        loss = opt.step(closure)
    assert told[0].filename == __file__
    assert opt.loss < loss
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        opt.step(closure)


# ---- residuals ---------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "dim"), [(30, 4), (4, 30)], ids=["overdetermined", "under"])
def test_one_undamped_step_solves_linear_least_squares(num, dim):
    model, x, y = network(dim, 1), points(num, dim), points(num, 1)
    opt = gram(model, damping=1e-13, tries=0)
    opt.step(lambda: (model(x) - y)[:, 0])
    with_ones = torch.cat([x, torch.ones(num, 1, dtype=F64)], dim=1)
    best = torch.linalg.lstsq(with_ones, y, driver="gelsd").solution
    expected = with_ones @ best
    assert (model(x) - expected).abs().max() <= 1e-8 * expected.abs().max()


def reference_step(jacobian, last, momentum, damping):
    """SPRING by dense P × P matrices."""
    residuals, matrix = jacobian.residuals, jacobian.matrix
    fisher = matrix.T @ matrix / len(residuals)
    slope = matrix.T @ residuals / len(residuals) + momentum * fisher @ last
    damped = fisher + damping * torch.eye(len(last), dtype=F64)
    return momentum * last - torch.linalg.solve(damped, slope)


@pytest.mark.parametrize("num", [10, 60], ids=["samples", "parameters"])
def test_steps_are_those_of_a_hand_written_reference(num):
    model = network(2, 5, 1)  # 21 parameters: fewer than 60 residuals, more than 10
    params = trainable(model)
    layout = Layout({name: tuple(p.shape) for name, p in params.items()})
    closure = poisson(model, num)
    opt = gram(model, lr=0.1, momentum=0.8, damping=lambda step: 1e-2 / (1 + step), tries=0)
    last = torch.zeros(layout.num_parameters, dtype=F64)
    for step in range(4):
        jacobian = jacobian_by_passes(closure, params, layout)
        last = reference_step(jacobian, last, 0.8, 1e-2 / (1 + step))
        expected = layout.flatten(params).detach() + 0.1 * last
        opt.step(closure)
        assert (layout.flatten(params) - expected).abs().max() <= 1e-10


def test_the_loss_never_rises_and_the_poisson_equation_is_solved():
    model = network(2, 12, 12, 1)
    closure, opt = poisson(model, 20), gram(model)  # 30 equations, 205 unknowns
    losses = [float(opt.step(closure)) for _ in range(40)]
    assert all(after <= before for before, after in pairwise(losses))
    assert opt.loss == pytest.approx(float(closure().detach().square().mean() / 2), rel=1e-12)
    assert opt.loss < 1e-6 * losses[0]


def test_momentum_keeps_what_was_learned_of_other_points():
    model = network(2, 12, 1)
    wanted, errors = points(200, seed=9), {}
    for momentum in (0.0, 0.9):
        fresh = copy.deepcopy(model)
        opt = gram(fresh, momentum=momentum, damping=1e-3, tries=0)
        for seed in range(60):
            x = points(10, seed=100 + seed)
            opt.step(lambda m=fresh, x=x: m(x)[:, 0] - torch.sin(5 * x[:, 0]) * x[:, 1])
        truth = torch.sin(5 * wanted[:, 0]) * wanted[:, 1]
        errors[momentum] = float((fresh(wanted)[:, 0] - truth).detach().square().mean())
    assert errors[0.9] < errors[0.0]


def test_residuals_that_are_not_finite_are_skipped():
    model, x = network(2, 4, 1), points(6)
    opt, before = gram(model), copy.deepcopy(model.state_dict())
    for bad in (math.nan, math.inf):
        loss = opt.step(lambda bad=bad: model(x)[:, 0] + bad)
        assert not loss.isfinite()
    opt.step(lambda: (0 * model(x)[:, 0]).sqrt())  # whose derivative is not finite
    assert opt.skipped == 3
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    opt.step(lambda: model(x)[:, 0])
    assert opt.skipped == 3
    assert opt.loss < 1


def test_lengths_at_which_residuals_are_not_finite_are_not_taken():
    scale = nn.Parameter(torch.tensor([0.5], dtype=F64))
    opt = GaussNewton([scale], damping=1e-9)
    # The step to the root at −7 leads beyond the domain of the logarithm.
    opt.step(lambda: torch.log(scale) * 0.1 + 1)
    assert scale > 0
    assert math.isfinite(opt.loss)
    assert opt.length < 1


def test_an_uphill_step_is_not_taken():
    model, x = network(2, 4, 1), points(6)
    opt, before = gram(model), copy.deepcopy(model.state_dict())
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        return (1 if calls == 1 else 100) * (model(x)[:, 0] + 10)

    opt.step(closure)
    assert opt.length == 0
    assert calls == 1 + opt.tries
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_a_closure_that_fails_on_the_way_leaves_the_weights():
    model, x = network(2, 4, 1), points(6)
    opt, before = gram(model), copy.deepcopy(model.state_dict())
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return model(x)[:, 0]

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_at_the_solution_nothing_happens():
    model, x = network(2, 4, 1), points(6)
    opt, target = gram(model), model(points(6))[:, 0].detach()
    before = copy.deepcopy(model.state_dict())
    for _ in range(5):
        opt.step(lambda: model(x)[:, 0] - target)
    assert opt.loss == 0
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


@pytest.mark.parametrize(
    ("closure", "error", "message"),
    [
        (lambda model, x: model(x), ValueError, "one number for each equation"),
        (lambda model, x: model(x).mean(), ValueError, "Do not average"),
        (lambda model, x: model(x)[:, 0].detach(), ValueError, "have no graph"),
        (lambda *_: 0.0, TypeError, "got float"),
    ],
)
def test_closures_that_return_something_else(closure, error, message):
    model, x = network(2, 4, 1), points(6)
    with pytest.raises(error, match=message):
        gram(model).step(lambda: closure(model, x))


# ---- the batch ---------------------------------------------------------------------------


def batch(num=24, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 3, generator=generator, dtype=F64)
    return x, torch.randint(4, (num,), generator=generator)


def train(model, opt, batches):
    for x, y in batches:
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()


def test_one_undamped_step_solves_linear_regression():
    model, x, y = network(4, 2), points(30, 4), points(30, 2)
    opt = gram(
        model,
        nm.Gaussian(),
        lr=1.0,
        momentum=0.0,
        damping=1e-12,
        kl_max=None,
        estimator=nm.Exact(),
    )
    nm.Gaussian().loss(model(x), y).backward()
    opt.step()
    with_ones = torch.cat([x, torch.ones(30, 1, dtype=F64)], dim=1)
    expected = with_ones @ torch.linalg.lstsq(with_ones, y).solution
    assert (model(x) - expected).abs().max() <= 1e-8 * expected.abs().max()


@pytest.mark.parametrize("per", ["position", "sample"])
def test_the_matrix_is_a_mean_over_what_the_loss_is(per):
    model, x, y = network(3, 4), points(30, 3).reshape(6, 5, 3), torch.randint(4, (6, 5))
    opt = gram(
        model,
        nm.Categorical(),
        lr=1.0,
        momentum=0.0,
        damping=0.1,
        kl_max=None,
        estimator=nm.Exact(),
        per=per,
    )
    layout = Layout({name: tuple(p.shape) for name, p in model.named_parameters()})
    fisher = reference.dense_fisher(model, nm.Categorical(), x, per=per)
    nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    g = layout.flatten({name: p.grad for name, p in model.named_parameters()})
    start = layout.flatten(dict(model.named_parameters())).detach()
    opt.step()
    moved = layout.flatten(dict(model.named_parameters())).detach() - start
    expected = -torch.linalg.solve(fisher + 0.1 * torch.eye(len(g), dtype=F64), g)
    assert (moved - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_measurements_of_others_are_not_part_of_the_batch():
    model, (x, y) = network(3, 5, 4), batch(seed=0)
    alone = copy.deepcopy(model)
    for net in (alone, model):
        opt = gram(net, nm.Categorical(), estimator=nm.Exact())
        if net is model:
            nm.fisher(net, nm.Categorical(), 3 * x, nm.Diagonal())
        nn.functional.cross_entropy(net(x), y).backward()
        opt.step()
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kl_max", [None, 1e-3])
def test_steps_of_a_batch_are_those_of_a_dense_reference(kl_max):
    model = network(3, 5, 4)
    options = {"lr": 0.5, "momentum": 0.8, "damping": 1e-2, "weight_decay": 0.01}
    opt = gram(model, nm.Categorical(), kl_max=kl_max, estimator=nm.Exact(), **options)
    layout = Layout({name: tuple(p.shape) for name, p in model.named_parameters()})
    last = torch.zeros(layout.num_parameters, dtype=F64)
    for seed in range(3):
        x, y = batch(seed=seed)
        fisher = reference.dense_fisher(model, nm.Categorical(), x)
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        g = layout.flatten({name: p.grad for name, p in model.named_parameters()})
        damped = fisher + 1e-2 * torch.eye(len(g), dtype=F64)
        last = 0.8 * last - torch.linalg.solve(damped, g + 0.8 * fisher @ last)
        kl = float(last @ fisher @ last) / 2
        scale = 0.5 * (1.0 if kl_max is None else min(1.0, math.sqrt(kl_max / kl)))
        start = layout.flatten(dict(model.named_parameters())).detach()
        expected = (1 - 0.5 * 0.01) * start + scale * last
        opt.step()
        found = layout.flatten(dict(model.named_parameters()))
        assert (found - expected).abs().max() <= 1e-9 * last.abs().max()
        assert opt.kl == pytest.approx(kl * scale**2, rel=1e-8)


def test_accumulated_batches_are_one_batch():
    whole, parts = network(3, 5, 4), network(3, 5, 4)
    x, y = batch()
    options = {"estimator": nm.Exact(), "momentum": 0.0}
    ours, theirs = (gram(model, nm.Categorical(), **options) for model in (whole, parts))
    train(whole, ours, [(x, y)])
    for some in (slice(0, 12), slice(12, 24)):
        (nn.functional.cross_entropy(parts(x[some]), y[some]) / 2).backward()
    theirs.step()
    for left, right in zip(whole.parameters(), parts.parameters(), strict=True):
        assert (left - right).abs().max() <= 1e-10


def test_a_closure_and_a_scheduler():
    model, (x, y) = network(3, 5, 4), batch()
    opt = gram(model, nm.Categorical())
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)

    def closure():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = []
    for _ in range(5):
        losses.append(float(opt.step(closure).detach()))
        schedule.step()
    assert losses[-1] < losses[0]
    assert opt.param_groups[0]["lr"] == 0.5**6


def test_layers_that_no_rule_reads_and_frozen_ones():
    model = nn.Sequential(nn.Linear(3, 6), nn.PReLU(), nn.Linear(6, 4)).double()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(dict(model.named_parameters()))
    opt = gram(model, nm.Categorical())
    train(model, opt, [batch()])
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name == "0.weight")
    model[0].weight.requires_grad_(True)
    train(model, opt, [batch()])
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_batch_normalisation_is_left_as_it_is():
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)).double()
    twin = copy.deepcopy(model)
    train(model, gram(model, nm.Categorical()), [batch()])
    twin(batch()[0])
    for left, right in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(left, right)
    assert model[1].training


def test_gradients_that_are_not_finite_are_skipped():
    model = network(3, 5, 4)
    opt = gram(model, nm.Categorical())
    train(model, opt, [batch()])
    before = copy.deepcopy(model.state_dict())
    x, y = batch()
    opt.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    model[0].weight.grad[0, 0] = math.nan
    opt.step()
    train(model, opt, [(x * math.nan, y)])
    assert opt.skipped == 2
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    train(model, opt, [batch()])
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert opt.skipped == 2


def test_gradients_without_a_batch():
    model, (x, y) = network(3, 5, 4), batch()
    opt = gram(model, nm.Categorical())
    opt.step()  # nothing to do
    model.eval()
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(nm.errors.CaptureError, match="training mode"):
        opt.step()


# ---- the contract of both ----------------------------------------------------------------


def of_batch(model):
    opt = gram(model, nm.Categorical(), generator=torch.Generator().manual_seed(5))
    return opt, lambda opt, model, step: train(model, opt, [batch(seed=step)])


def of_residuals(model):
    opt = gram(model, momentum=0.5)
    x = batch()[0]
    return opt, lambda opt, model, step: opt.step(lambda: model(x * (1 + step))[:, 0] - 1)


@pytest.mark.parametrize("kind", [of_batch, of_residuals])
def test_a_resumed_run_is_the_same_to_the_bit(kind, tmp_path):
    model = network(3, 5, 4)
    opt, step = kind(model)
    for number in range(3):
        step(opt, model, number)
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "saved.pt")
    resumed = network(3, 5, 4, seed=1)
    again, _ = kind(resumed)
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["opt"])
    for number in range(3, 6):
        step(opt, model, number)
        step(again, resumed, number)
    for left, right in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)
    assert repr(opt.state_dict()) == repr(again.state_dict())


@pytest.mark.parametrize("kind", [of_batch, of_residuals])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_alone(kind, copied):
    model = network(3, 5, 4)
    opt, step = kind(model)
    step(opt, model, 0)
    twin, other = copied((model, opt))
    before = copy.deepcopy(model.state_dict())
    step(other, twin, 1)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    step(opt, model, 1)
    for left, right in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("kind", [of_batch, of_residuals])
def test_what_is_refused(kind):
    model = network(3, 5, 4)
    opt, _ = kind(model)
    with pytest.raises(ValueError, match="one group"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    likelihood = nm.Categorical() if isinstance(opt, ExactNaturalGradient) else None
    for options, message in (
        ({"maximize": True}, "Minimise the negative"),
        ({"differentiable": True}, "Leave it out"),
        ({"lr": -1.0}, "lr must be"),
        ({"momentum": 1.0}, "momentum must be"),
        ({"damping": 0.0}, "damping is a positive"),
    ):
        with pytest.raises(ValueError, match=message):
            gram(model, likelihood, **options)


def test_what_is_refused_of_residuals():
    model = network(3, 5, 1)
    with pytest.raises(ValueError, match="no damping is given"):
        gram(model, tries=0)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        gram(model).step(lambda: model(points(3, 3))[:, 0])
