"""Steps against references written by hand, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import neuromanifold as nm
from neuromanifold.structures.kronecker import KroneckerMatrix
from neuromanifold.testing.reference import dense_fisher

EVERY_STEP = nm.optim.Schedule(statistics=1, inverses=1)
TIGHT: dict[str, float] = {"rtol": 1e-9, "atol": 1e-12}

pytestmark = pytest.mark.usefixtures("float64")


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def flat(params: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in params.values()])


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(model(x), y)


# ---- one layer, by hand ------------------------------------------------------------------------


def joined(layer: nn.Linear, gradient: bool = False) -> Tensor:
    weight, bias = (p.grad if gradient else p.detach() for p in (layer.weight, layer.bias))
    assert weight is not None
    assert bias is not None
    return torch.cat([weight, bias[:, None]], dim=1).clone()


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


def output_fisher(layer: nn.Linear, x: Tensor) -> Tensor:
    """Of each sample, `(N, O, O)`."""
    p = layer(x).detach().softmax(dim=1)
    return p.diag_embed() - p[:, :, None] * p[:, None]


@dataclass
class Averages:
    """Exponential averages of the two factors of one layer with softmax outputs."""

    decay: float
    inputs: Any = 0.0
    outputs: Any = 0.0
    count: float = 0.0

    def add(self, layer: nn.Linear, x: Tensor) -> None:
        a = with_ones(x)
        self.inputs = self.decay * self.inputs + a.T @ a
        self.outputs = self.decay * self.outputs + output_fisher(layer, x).sum(dim=0)
        self.count = self.decay * self.count + len(x)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.inputs / self.count, self.outputs / self.count


def damped(inputs: Tensor, outputs: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Martens and Grosse, arXiv 1503.05671, §6.3."""
    pi = math.sqrt((inputs.trace() / len(inputs)) / (outputs.trace() / len(outputs)))
    root = math.sqrt(damping)
    return (
        inputs + pi * root * torch.eye(len(inputs)),
        outputs + root / pi * torch.eye(len(outputs)),
    )


SIZES = (9, 14, 5, 11, 20, 8)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("kl_max", [None, 1e-2])
def test_steps_of_kfac(momentum: float, weight_decay: float, kl_max: float | None) -> None:
    lr, damping, layer = 0.7, 0.05, nn.Linear(4, 3)
    opt = nm.optim.kfac(
        layer,
        nm.Categorical(),
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        kl_max=kl_max,
        damping=damping,
        decay=0.8,
        estimator=nm.Exact(),
        schedule=EVERY_STEP,
    )
    averages, weights = Averages(0.8), joined(layer)
    mean, weight, limited = torch.zeros_like(weights), 0.0, 0
    for size in SIZES:
        x, y = torch.randn(size, 4), torch.randint(3, (size,))
        averages.add(layer, x)
        opt.zero_grad()
        loss_of(layer, x, y).backward()
        g = joined(layer, gradient=True)
        a, b = damped(*averages.factors, damping)
        d = torch.linalg.solve(b, g) @ torch.linalg.inv(a)
        scale = 1.0 if kl_max is None else min(1.0, math.sqrt(2 * kl_max / float((g * d).sum())))
        limited += scale < 1
        mean = momentum * mean + (1 - momentum) * scale * d
        weight = momentum * weight + (1 - momentum)
        weights = (1 - lr * weight_decay) * weights - lr * mean / weight
        opt.step()
        torch.testing.assert_close(joined(layer), weights, **TIGHT)
    assert limited == (0 if kl_max is None else len(SIZES))


def test_averages_of_measurements_of_several_sizes() -> None:
    layer = nn.Linear(4, 3)
    pre = nm.optim.Preconditioner(layer, nm.Categorical(), decay=0.7, estimator=nm.Exact())
    averages = Averages(0.7)
    for size in SIZES:
        x = torch.randn(size, 4)
        pre.measure(x)
        averages.add(layer, x)
        nn.init.normal_(layer.weight)
        (matrix,) = pre.measured()
        assert isinstance(matrix, KroneckerMatrix)
        inputs, outputs = averages.factors
        torch.testing.assert_close(matrix.inputs[0], inputs, **TIGHT)
        torch.testing.assert_close(matrix.outputs[0], outputs, **TIGHT)


def test_moments_of_ekfac_turn_with_the_bases() -> None:
    layer, decay, damping = nn.Linear(4, 3), 0.6, 0.05
    pre = nm.optim.Preconditioner(
        layer,
        nm.Categorical(),
        nm.EigenKronecker(),
        decay=decay,
        damping=damping,
        estimator=nm.Exact(),
        schedule=EVERY_STEP,
    )
    g = {"weight": torch.randn(3, 4), "bias": torch.randn(3)}
    averages, bases, squares = Averages(decay), None, torch.zeros(3, 5)
    for size in SIZES:
        x = torch.randn(size, 4)
        pre.measure(x)
        averages.add(layer, x)
        inputs, outputs = averages.factors
        (of_inputs, q_in), (of_outputs, q_out) = (torch.linalg.eigh(f) for f in (inputs, outputs))
        if bases is None:
            moments = of_outputs[:, None] * of_inputs
        else:
            before_in, before_out = bases
            turned = before_out.T @ output_fisher(layer, x) @ before_out
            seen = turned.diagonal(dim1=1, dim2=2).T @ (with_ones(x) @ before_in).square()
            moments = (decay * squares + seen) / averages.count
            moments = (q_out.T @ before_out).square() @ moments @ (q_in.T @ before_in).square().T
        bases, squares = (q_in, q_out), moments * averages.count
        joint = torch.cat([g["weight"], g["bias"][:, None]], dim=1)
        expected = q_out @ (q_out.T @ joint @ q_in / (moments + damping)) @ q_in.T
        found = pre.precondition(g)
        torch.testing.assert_close(found["weight"], expected[:, :4], rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(found["bias"], expected[:, 4], rtol=1e-7, atol=1e-10)
        pre.advance()
        nn.init.normal_(layer.weight)


# ---- layers of all kinds -----------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 7)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(tokens)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 3)),
        nn.Conv1d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.Conv1d(4, 4, 2, groups=2),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def classified(model: nn.Module) -> tuple[Tensor, Tensor, int]:
    if isinstance(model, Tied):
        return torch.randint(7, (24, 4)), torch.randint(7, (24, 4)), 7
    return torch.randn(24, 6), torch.randint(3, (24,)), 3


def own_matrices(opt: nm.optim.NaturalGradient, damping: float) -> dict[str, Tensor]:
    """What each block is divided by, dense, in float64."""
    found = {}
    for matrix in opt.preconditioner.measured():
        if not isinstance(matrix, KroneckerMatrix):
            dense = matrix.dense().double()
            found[matrix.block.name] = dense + damping * torch.eye(len(dense))
            continue
        sides = [f.diag_embed() if f.ndim == 2 else f for f in (matrix.inputs, matrix.outputs)]
        parts = [damped(a.double(), b.double(), damping) for a, b in zip(*sides, strict=True)]
        found[matrix.block.name] = torch.block_diag(*(torch.kron(b, a) for a, b in parts))
    return found


@pytest.mark.parametrize("build", [mlp, convnet, Tied])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_a_step_of_kfac_is_a_solve_with_its_own_matrix(
    build: Callable[[], nn.Module], dtype: torch.dtype, rtol: float
) -> None:
    model, damping = build().to(dtype), 0.1
    x, y, classes = classified(model)
    opt = nm.optim.kfac(
        model,
        nm.Categorical(),
        weight_decay=0.0,
        lr=1.0,
        momentum=0.0,
        kl_max=None,
        damping=damping,
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    outputs = model(x if not x.is_floating_point() else x.to(dtype))
    functional.cross_entropy(outputs.reshape(-1, classes), y.flatten()).backward()
    gradients = gradients_of(model)
    matrices = own_matrices(opt, damping)
    opt.step()
    steps = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    for matrix in opt.preconditioner.measured():
        joint = matrix.block.join({n: g.double() for n, g in gradients.items()}).flatten()
        expected = torch.linalg.solve(matrices[matrix.block.name], joint)
        found = opt.preconditioner.precondition(gradients)
        direction = matrix.block.join({n: d.double() for n, d in found.items()}).flatten()
        assert (direction - expected).norm() <= rtol * expected.norm(), matrix.block.name
        # The difference of weights is rounded to their own precision.
        step = matrix.block.join({n: d.double() for n, d in steps.items()}).flatten()
        rounding = torch.finfo(dtype).eps * flat(before).double().norm()
        assert (step - expected).norm() <= rtol * expected.norm() + rounding, matrix.block.name


# ---- what the mean is over, and damping by block -----------------------------------------------


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).tanh())


def tagged(size: int, length: int) -> tuple[Tensor, Tensor]:
    """Sequences of several lengths, padded: from there on targets are ignored."""
    targets = torch.randint(3, (size, length))
    ends = torch.arange(size)[:, None] % length
    return torch.randint(7, (size, length)), targets.masked_fill(torch.arange(length) > ends, -100)


def only_blocks(dense: Tensor, model: nn.Module) -> Tensor:
    """Zero between layers."""
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model.children()]
    return dense * torch.block_diag(*(torch.ones(size, size) for size in sizes))


@pytest.mark.parametrize("per", ["position", "sample"])
def test_uneven_batches_with_ignored_positions_are_the_dense_mean(per: Any) -> None:
    model, decay, damping = Tagger(), 0.6, 0.05
    pre = nm.optim.Preconditioner(
        model,
        nm.Categorical(),
        nm.BlockDiagonal(),
        per=per,
        decay=decay,
        damping=damping,
        estimator=nm.Exact(),
        schedule=EVERY_STEP,
        observe="explicit",
    )
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    total, count = torch.zeros(()), 0.0
    for shape in ((9, 5), (4, 7), (6, 2)):
        x, y = tagged(*shape)
        num = float((y != -100).sum()) if per == "position" else len(x)
        total = decay * total + num * dense_fisher(model, nm.Categorical(), (x, y), per=per)
        count = decay * count + num
        pre.observe(model(x), y)
        matrix = only_blocks(total / count, model)
        expected = torch.linalg.solve(matrix + damping * torch.eye(len(matrix)), flat(gradients))
        torch.testing.assert_close(flat(pre.precondition(gradients)), expected, **TIGHT)
        pre.advance()


def test_the_line_counts_the_positions_that_were_observed() -> None:
    model, (x, y) = Tagger(), tagged(9, 5)
    pre = nm.optim.Preconditioner(model, nm.Categorical(), observe="explicit")
    for _ in range(2):  # with and without a measurement that is due
        pre.observe(model(x), y)
        d = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        dense = dense_fisher(model, nm.Categorical(), (x, y), per="position")
        expected = (flat(d) @ dense @ flat(d)).reshape(1, 1)
        torch.testing.assert_close(pre.fisher_products([d]), expected, **TIGHT)


def test_a_batch_without_observed_positions_is_left_out() -> None:
    model, (x, y) = Tagger(), tagged(9, 5)
    pre = nm.optim.Preconditioner(
        model, nm.Categorical(), schedule=EVERY_STEP, observe="explicit", estimator=nm.Exact()
    )
    pre.observe(model(x), y)
    before = [matrix.dense() for matrix in pre.measured()]
    pre.advance()
    with pytest.warns(UserWarning, match="All targets are ignored"):
        pre.observe(model(x), torch.full_like(y, -100))
    assert pre.failed == 1
    for matrix, expected in zip(pre.measured(), before, strict=True):
        assert torch.equal(matrix.dense(), expected)


@pytest.mark.parametrize(
    "structure",
    [nm.Kronecker(), nm.EigenKronecker(), nm.UnitWise(), nm.QuasiDiagonal(), nm.Diagonal()],
    ids=repr,
)
def test_relative_damping_follows_the_mean_eigenvalue_of_each_block(structure: Any) -> None:
    def make() -> nm.optim.Preconditioner:
        return nm.optim.Preconditioner(
            model,
            nm.Categorical(),
            structure,
            damping=lambda step: 0.02 + step,
            relative=lambda step: 0.5 + step,
            split=False,
            estimator=nm.Exact(),
        )

    model = mlp()
    pre = make()
    pre.measure(torch.randn(24, 6))
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    found = pre.precondition(gradients)
    for matrix in pre.measured():
        dense, names = matrix.dense(), matrix.block.parameters
        added = 0.02 + 0.5 * float(torch.linalg.eigvalsh(dense).mean())
        assert [pre.damped[name] for name in names] == pytest.approx([added] * len(names))
        if not isinstance(structure, nm.EigenKronecker):  # here those of the Kronecker factors
            joint = matrix.block.join(gradients).flatten()
            expected = torch.linalg.solve(dense + added * torch.eye(len(dense)), joint)
            torch.testing.assert_close(matrix.block.join(found).flatten(), expected, **TIGHT)
    resumed = make()
    resumed.load_state_dict(copy.deepcopy(pre.state_dict()))
    assert resumed.damped == pre.damped
    for name, value in resumed.precondition(gradients).items():
        assert torch.equal(value, found[name])


# ---- the quadratic model -----------------------------------------------------------------------


@pytest.mark.parametrize("make", [nm.optim.kfac, nm.optim.ekfac, nm.optim.unitwise])
@pytest.mark.parametrize("line", [False, True])
def test_one_step_solves_linear_least_squares(make: Any, line: bool) -> None:
    layer, x, y = nn.Linear(4, 2), torch.randn(30, 4), torch.randn(30, 2)
    opt = make(
        layer,
        nm.Gaussian(),
        lr=1.0,
        momentum=0.0,
        weight_decay=0.0,
        kl_max=None,
        damping=1e-12,
        split=False,
        line=line,
        estimator=nm.Exact(),
    )
    nm.Gaussian().loss(layer(x), y).backward()
    opt.step()
    optimum = torch.linalg.lstsq(with_ones(x), y).solution.T
    torch.testing.assert_close(joined(layer), optimum, rtol=1e-8, atol=1e-8)


def test_a_limit_on_the_kl_is_kept_to_rounding_where_the_kl_is_quadratic() -> None:
    layer, x, y = nn.Linear(4, 2), torch.randn(30, 4), torch.randn(30, 2)
    opt = nm.optim.kfac(
        layer,
        nm.Gaussian(),
        lr=1.0,
        momentum=0.0,
        kl_max=1e-3,
        weight_decay=0.0,
        damping=1e-12,
        split=False,
        estimator=nm.Exact(),
    )
    before = layer(x)
    nm.Gaussian().loss(before, y).backward()
    opt.step()
    kl = 0.5 * (layer(x) - before).square().sum(dim=1).mean()
    torch.testing.assert_close(kl, torch.tensor(1e-3), rtol=1e-8, atol=0)


def test_the_line_is_that_of_the_dense_matrix() -> None:
    model, damping = mlp(), 0.05
    opt = nm.optim.kfac(
        model,
        nm.Categorical(),
        weight_decay=0.0,
        line=True,
        damping=damping,
        kl_max=None,
        schedule=EVERY_STEP,
    )
    last = None
    for _ in range(4):
        x, y = torch.randn(20, 6), torch.randint(3, (20,))
        opt.zero_grad()
        loss_of(model, x, y).backward()
        gradients = gradients_of(model)
        found = opt.preconditioner.precondition(gradients)
        directions = [flat({name: found[name] for name in gradients})]
        if last is not None:
            directions.append(last)
        span, g = torch.stack(directions, dim=1), flat(gradients)
        matrix = dense_fisher(model, nm.Categorical(), (x, y)) + damping * torch.eye(len(g))
        last = -span @ torch.linalg.solve(span.T @ matrix @ span, span.T @ g)
        before = flat({name: p.detach() for name, p in model.named_parameters()})
        opt.step()
        after = flat({name: p.detach() for name, p in model.named_parameters()})
        torch.testing.assert_close(after - before, last, rtol=1e-7, atol=1e-10)


def test_damping_follows_the_ratio_of_reductions() -> None:
    model = mlp()
    damping = nm.optim.LevenbergMarquardt(0.5, period=2, factor=0.9)
    opt = nm.optim.kfac(
        model,
        nm.Categorical(),
        weight_decay=0.0,
        lr=0.5,
        momentum=0.0,
        damping=damping,
        kl_max=None,
    )
    values = []
    for i in range(6):
        x, y = torch.randn(20, 6), torch.randint(3, (20,))

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            opt.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            return loss

        before, start = damping.value, copy.deepcopy(model)
        loss_of(start, x, y).backward()
        loss = opt.step(closure)
        delta = flat({n: p.detach() for n, p in model.named_parameters()}) - flat(
            {n: p.detach() for n, p in start.named_parameters()}
        )
        if i % 2:
            matrix = dense_fisher(start, nm.Categorical(), (x, y)) + before * torch.eye(len(delta))
            predicted = flat(gradients_of(start)) @ delta + 0.5 * delta @ matrix @ delta
            ratio = float((loss.detach() - loss_of(model, x, y).detach()) / -predicted)
            assert damping.ratio == pytest.approx(ratio, rel=1e-7)
            change = 0.9**2 if ratio > 0.75 else 1 / 0.9**2 if ratio < 0.25 else 1.0
            assert damping.value == pytest.approx(before * change)
        else:
            assert damping.value == before
        assert opt.preconditioner.damped["0.weight"] == pytest.approx(damping.value)
        values.append(damping.value)
    assert len(set(values)) > 1


@pytest.mark.parametrize("how", ["line", "adapted damping"])
def test_a_batch_with_nan_has_no_quadratic_model_and_no_step(how: str) -> None:
    model, x, y = mlp(), torch.randn(20, 6), torch.randint(3, (20,))
    damping: Any = nm.optim.LevenbergMarquardt(0.5, period=1) if how != "line" else 0.5
    opt = nm.optim.kfac(
        model, nm.Categorical(), weight_decay=0.0, line=how == "line", damping=damping
    )

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    opt.step(closure)
    before, value = flat(dict(model.named_parameters())).clone(), dict(opt.preconditioner.damped)
    x[0, 0] = math.nan
    with pytest.warns(UserWarning, match="left out"):
        opt.step(closure)
    assert torch.equal(flat(dict(model.named_parameters())), before)
    assert opt.skipped == 1
    assert opt.preconditioner.damped == value
    x[0, 0] = 0.0
    opt.step(closure)
    after = flat(dict(model.named_parameters()))
    assert after.isfinite().all()
    assert not torch.equal(after, before)


def test_damping_that_adapts_needs_a_closure() -> None:
    model, x, y = mlp(), torch.randn(20, 6), torch.randint(3, (20,))
    damping = nm.optim.LevenbergMarquardt(0.5, period=1)
    opt = nm.optim.kfac(model, nm.Categorical(), weight_decay=0.0, damping=damping)
    loss_of(model, x, y).backward()
    with pytest.raises(ValueError, match=r"optimizer\.step\(closure\)"):
        opt.step()


def test_adapted_damping_is_resumed() -> None:
    model = mlp()

    def make(model: nn.Module) -> nm.optim.NaturalGradient:
        damping = nm.optim.LevenbergMarquardt(0.5, period=1)
        generator = torch.Generator().manual_seed(0)
        return nm.optim.kfac(
            model, nm.Categorical(), weight_decay=0.0, damping=damping, generator=generator
        )

    batches = [(torch.randn(20, 6), torch.randint(3, (20,))) for _ in range(6)]

    def run(model: nn.Module, opt: nm.optim.NaturalGradient, data: list[Any]) -> None:
        for x, y in data:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                opt.zero_grad()
                loss = loss_of(model, x, y)
                loss.backward()
                return loss

            opt.step(closure)

    opt = make(model)
    run(model, opt, batches[:3])
    other = copy.deepcopy(model)
    resumed = make(other)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    run(model, opt, batches[3:])
    run(other, resumed, batches[3:])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- schedules ---------------------------------------------------------------------------------


def test_measurements_and_inversions_have_periods_of_their_own() -> None:
    model = mlp()
    schedule = nm.optim.Schedule(statistics=2, inverses=lambda step: 2 if step < 4 else 4)
    opt = nm.optim.kfac(
        model,
        nm.Categorical(),
        weight_decay=0.0,
        schedule=schedule,
        damping=lambda step: 0.1 / (1 + step),
    )
    seen = []
    for _ in range(9):
        opt.zero_grad()
        loss_of(model, torch.randn(20, 6), torch.randint(3, (20,))).backward()
        seen.append(opt.preconditioner.damped["0.weight"])
        opt.step()
    inverted_at = [0, 0, 2, 2, 2, 2, 6, 6, 6]
    assert seen == pytest.approx([0.1 / (1 + step) for step in inverted_at])


def test_a_fraction_of_the_batch_is_measured() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(10, 4)
    part, whole = (
        nm.optim.Preconditioner(
            layer, nm.Categorical(), fraction=fraction, estimator=nm.Exact(), observe="explicit"
        )
        for fraction in (0.35, 1.0)
    )
    part.measure(x)
    whole.measure(x[:4])
    (a,), (b,) = part.measured(), whole.measured()
    torch.testing.assert_close(a.dense(), b.dense(), **TIGHT)


def test_the_wide_side_of_a_layer_is_kept_by_its_half() -> None:
    """Averages, and inverses with over twice the numbers of the layer, are symmetric."""

    def run(model: nn.Module, opt: nm.optim.NaturalGradient, steps: int) -> None:
        rng = torch.Generator().manual_seed(steps)
        for _ in range(steps):
            opt.zero_grad()
            x = torch.randn(20, 127, generator=rng)
            loss_of(model, x, torch.randint(3, (20,), generator=rng)).backward()
            opt.step()

    def make(model: nn.Module) -> nm.optim.NaturalGradient:
        return nm.optim.kfac(
            model,
            nm.Categorical(),
            weight_decay=0.0,
            momentum=0.0,
            lr=1.0,
            kl_max=None,
            damping=0.01,
            generator=torch.Generator().manual_seed(0),
        )

    layer = nn.Linear(127, 3)  # inputs (128, 128), a weight of 381
    opt = make(layer)
    run(layer, opt, 3)
    resumed = copy.deepcopy(layer)
    other = make(resumed)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    entry = opt.state_dict()["preconditioner"]["preconditioner"]["inverses"][0]
    assert entry["halved"] == [True, False]
    assert entry["tensors"]["inputs"].shape == (1, 8256)  # of 16,384
    (block,) = opt.preconditioner.measured()
    gradients = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
    found = opt.preconditioner.precondition(gradients)
    a, b = damped(block.tensors()["inputs"][0], block.tensors()["outputs"][0], 0.01)
    joined_gradient = torch.cat([gradients["weight"], gradients["bias"][:, None]], dim=1)
    exact = torch.linalg.solve(b, joined_gradient) @ torch.linalg.inv(a)
    torch.testing.assert_close(found["weight"], exact[:, :-1])
    torch.testing.assert_close(found["bias"], exact[:, -1])
    run(layer, opt, 5)
    run(resumed, other, 5)
    assert torch.equal(layer.weight, resumed.weight)
