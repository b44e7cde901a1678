"""K-FAC along some directions of each factor, and inverses that follow each measurement."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import neuromanifold as nm
from neuromanifold.linalg.projection import Projection
from neuromanifold.optim.inverses import Inverse
from neuromanifold.structures import factors
from neuromanifold.structures.projected import ProjectedKroneckerMatrix
from neuromanifold.testing import check_optimizer, run_ranks

WIDTH, CLASSES = 24, 5
ALWAYS, SELDOM = nm.optim.Schedule(1, 1), nm.optim.Schedule(1, 1000)
TIGHT: dict[str, float] = {"rtol": 1e-10, "atol": 1e-12}

pytestmark = pytest.mark.usefixtures("float64")


def small(model: nn.Module, likelihood: Any, rank: int = 2, **options: Any) -> Any:
    """Along few directions of narrow layers."""
    return nm.optim.projected_kfac(model, likelihood, rank=rank, narrowest=1, **options)


def recursive(model: nn.Module, likelihood: Any, **options: Any) -> Any:
    return small(model, likelihood, recursive=True, **options)


def preconditioner(model: nn.Module, kept: nm.Projected, **options: Any) -> Any:
    structure = nm.Kronecker(inputs=kept, outputs=kept)
    return nm.optim.Preconditioner(
        model, nm.Categorical(), structure, **{"schedule": ALWAYS, "damping": 0.1, **options}
    )


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, CLASSES))


def batch(size: int = 32, rank: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Inputs in a space of some dimensions."""
    x = torch.randn(size, rank) @ torch.eye(rank, WIDTH)
    return x, torch.randint(CLASSES, (size,))


def train(
    model: Callable[[Tensor], Tensor], opt: Any, data: list[tuple[Tensor, Tensor]], classes: int = 5
) -> list[float]:
    losses = []
    for x, y in data:
        opt.zero_grad()
        loss = functional.cross_entropy(model(x).reshape(-1, classes), y.flatten())
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


def inverses(opt: Any) -> list[Inverse]:
    return opt.preconditioner._inverses


def dense(inverse: Inverse) -> Tensor:
    """As a matrix, whatever it is made of."""
    block = inverse.block
    size = block.num_parameters
    return inverse.matmul(torch.eye(size).reshape(size, *block.shape)).reshape(size, size)


# ---- the contract ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small, recursive])
def test_the_contract_where_all_sides_are_projected(make: Any) -> None:
    torch.set_default_dtype(torch.float32)
    check_optimizer(make)


@pytest.mark.parametrize("make", [small, recursive])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resuming_is_not_stopping(make: Any, dtype: torch.dtype) -> None:
    data = [(x.to(dtype), y) for x, y in (batch() for _ in range(30))]
    first, second = mlp().to(dtype), mlp().to(dtype)
    options = {"schedule": nm.optim.Schedule(2, 7), "rank": 3}
    opt = make(first, nm.Categorical(), generator=torch.Generator().manual_seed(1), **options)
    train(first, opt, data[:16])
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = make(second, nm.Categorical(), **options)
    second.load_state_dict(saved["model"])
    again.load_state_dict(saved["opt"])
    assert train(first, opt, data[16:]) == train(second, again, data[16:])


# ---- limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [nm.Projected(WIDTH + 1), nm.RecursiveInverse(WIDTH + 1)])
def test_with_all_directions_it_is_kfac(kept: nm.Projected) -> None:
    model, (x, _) = mlp(), batch()
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    found = preconditioner(model, kept)
    whole = nm.optim.Preconditioner(model, nm.Categorical(), damping=0.1, schedule=ALWAYS)
    for each in (found, whole):
        each.generator.manual_seed(3)
        each.measure(x)
    for name, direction in whole.precondition(gradients).items():
        assert torch.equal(found.precondition(gradients)[name], direction)


@pytest.mark.parametrize("schedule", [ALWAYS, nm.optim.Schedule(1, 3)])
def test_where_data_have_low_rank_every_step_is_that_of_kfac(schedule: Any) -> None:
    torch.manual_seed(0)
    data = [batch(rank=4) for _ in range(12)]
    ours, theirs = (nn.Linear(WIDTH, CLASSES) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    options = {"lr": 0.3, "damping": 0.05, "estimator": nm.Exact(), "schedule": schedule}
    # The inputs have four dimensions and the bias; there are fewer outputs than twice the rank.
    found = train(ours, small(ours, nm.Categorical(), rank=6, **options), data)
    expected = train(theirs, nm.optim.kfac(theirs, nm.Categorical(), **options), data)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-6, atol=1e-8)


def test_one_direction_of_one_sample_is_the_formula_of_eva() -> None:
    """`(g gᵀ ⊗ a aᵀ + γ)⁻¹`, damped as a whole (papers.md §4.5)."""
    layer, damping = nn.Linear(WIDTH, 9, bias=False), 0.2
    pre = preconditioner(layer, nm.Projected(1, narrowest=1), split=False, damping=damping)
    x = torch.randn(1, WIDTH)
    pre.measure(x)
    (average,) = pre.measured()
    a, gradient = x[0], torch.randn(9, WIDTH)
    outputs = average.outputs.dense()[0]  # of one sampled label: g gᵀ
    values, vectors = torch.linalg.eigh(outputs)
    g = vectors[:, -1] * values[-1].sqrt()
    shared = (g @ gradient @ a) / (a.square().sum() * g.square().sum() + damping)
    expected = (gradient - shared * torch.outer(g, a)) / damping
    # With rounding of the images, as a shift of their eigenvalues.
    found = pre.precondition({"weight": gradient})["weight"]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


# ---- directions and damping --------------------------------------------------------------------


@pytest.mark.parametrize("make", [small, recursive])
def test_the_inverse_is_that_of_each_damped_factor(make: Any) -> None:
    model, damping = mlp(), 0.1
    opt = make(model, nm.Categorical(), damping=damping, schedule=ALWAYS)
    train(model, opt, [batch() for _ in range(3)])
    for average, inverse in zip(opt.preconditioner.measured(), inverses(opt), strict=True):
        assert isinstance(inverse, ProjectedKroneckerMatrix)
        a, b = average.inputs, average.outputs
        mean_a, mean_b = (factors.diagonal(f).mean(dim=1) for f in (a, b))
        pi, root = (mean_a / mean_b).sqrt(), damping**0.5
        expected = torch.kron(*(_inverse(*args)[0] for args in ((b, root / pi), (a, root * pi))))
        torch.testing.assert_close(dense(inverse), expected, **TIGHT)


def _inverse(factor: Tensor | Projection, damping: Tensor) -> Tensor:
    if isinstance(factor, Projection):
        return factor.damped_inverse(damping).dense()
    return torch.linalg.inv(factor + damping * torch.eye(factor.shape[-1]))


def test_the_directions_follow_the_largest_eigenvalues() -> None:
    rank, scales = 4, torch.tensor([0.7**i for i in range(WIDTH)])
    layer = nn.Linear(WIDTH, CLASSES, bias=False)
    pre = preconditioner(layer, nm.Projected(rank, narrowest=1), schedule=nm.optim.Schedule(1, 5))
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
    for _ in range(40):
        pre.measure(torch.randn(64, WIDTH) * scales @ basis.T)
        pre.advance()
    (average,) = pre.measured()
    attainable = scales.square()[:rank].sum()
    held = (basis.T @ average.inputs.vectors[0]).T  # rows: directions
    assert (held.square() * scales.square()).sum() > 0.97 * attainable


# ---- inverses that follow ----------------------------------------------------------------------


def iterated(opt: Any) -> list[tuple[Tensor, Tensor]]:
    """Each inverse of the inputs as it is, and from the averages along the same directions."""
    curvature = opt.preconditioner._curvature
    found = []
    for inverse in inverses(opt):
        (key,) = curvature._followed_as(inverse.block, "inputs")
        moment = curvature._along_directions(key)
        damping = curvature._following[key].damping
        eye = torch.eye(moment.shape[-1])
        found.append((inverse.inputs.values, torch.linalg.inv(moment + damping * eye)))
    return found


def others(opt: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What inverses of the inputs are in other directions, between what they are at least and most.

    The mean of the inverse is not below the inverse of the mean, and is below that of the damping.
    """
    curvature = opt.preconditioner._curvature
    found = []
    for inverse in inverses(opt):
        (key,) = curvature._followed_as(inverse.block, "inputs")
        moment, damping = curvature._along_directions(key), curvature._following[key].damping
        trace = curvature.averages.sums[key[0]][f"{key[1]}.trace"] / curvature._count(key)
        rank, width = len(moment[0]), inverse.inputs.width
        mean = (trace - moment.diagonal(dim1=1, dim2=2).sum(dim=1)) / (width - rank)
        found.append((1 / (mean + damping), inverse.inputs.rest, 1 / damping))
    return found


def test_the_inverse_follows_the_averages() -> None:
    model, data = mlp(), [batch(3) for _ in range(40)]
    options = {"rank": 6, "schedule": SELDOM, "lr": 0.01, "damping": 1e-5, "decay": 0.95}
    opt, fixed = (
        make(m, nm.Categorical(), generator=torch.Generator().manual_seed(0), **options)
        for make, m in ((recursive, model), (small, copy.deepcopy(model)))
    )
    train(model, opt, data)
    train(fixed.preconditioner.model, fixed, data)
    for found, exact in iterated(opt):
        assert (found - exact).norm() < 0.05 * exact.norm()
    for least, rest, most in others(opt):
        assert (1 - 1e-10) * least <= rest < most
    for followed, kept in zip(inverses(opt), inverses(fixed), strict=True):
        assert (dense(followed) - dense(kept)).norm() > 0.2 * dense(kept).norm()
    numbers = nm.optim.scalars(opt)
    assert numbers["renewed/processes"] == numbers["renewed/residual"] == 0
    # Three factors at the first measurements, while averages are short.
    assert 0 < numbers["renewed/rows"] <= 3 * 12
    assert not any(name.startswith("renewed") for name in nm.optim.scalars(fixed))


def test_more_rows_than_directions_renew_it() -> None:
    model = mlp()
    opt = recursive(model, nm.Categorical(), schedule=SELDOM, damping=1e-3)
    train(model, opt, [batch(32) for _ in range(4)])
    for found, exact in iterated(opt):
        torch.testing.assert_close(found, exact, **TIGHT)
    # Three measurements after the first, of two layers' inputs and outputs.
    assert nm.optim.scalars(opt)["renewed/rows"] == 3 * 4


def test_a_part_of_the_rows_stands_for_all() -> None:
    layer, (x, _) = nn.Linear(WIDTH, CLASSES), batch(1)
    kept = nm.RecursiveInverse(6, narrowest=1, rows=2, tolerance=1e9)
    pre = preconditioner(layer, kept, schedule=SELDOM, decay=0.95)
    x = x.expand(8, -1)  # all rows are the same, so that any part of them is
    for _ in range(20):
        pre.measure(x)
        pre.advance()
    # There are fewer outputs than twice the rank, so that only the inputs are followed.
    ((key, recursion),) = pre._curvature._following.items()
    moment = pre._curvature._along_directions(key)
    assert 0 < pre.events["renewed/rows"] < 10
    along = torch.linalg.eigh(moment[0])[1][:, -1:]  # the others are damped only
    image = recursion.matrix[0] @ (moment[0] + recursion.damping * torch.eye(6)) @ along
    torch.testing.assert_close(along.T @ image, torch.ones(1, 1), rtol=0.02, atol=0)


def test_a_wrong_inverse_is_made_anew() -> None:
    model = mlp()
    opt = recursive(model, nm.Categorical(), rank=6, schedule=SELDOM, decay=0.95)
    train(model, opt, [batch(2) for _ in range(12)])
    before = nm.optim.scalars(opt)
    for recursion in opt.preconditioner._curvature._following.values():
        recursion.matrix = 3 * recursion.matrix
    train(model, opt, [batch(2)])
    after = nm.optim.scalars(opt)
    followed = len(opt.preconditioner._curvature._following)
    assert after["renewed/residual"] - before["renewed/residual"] == followed == 3
    assert after["renewed/rows"] == before["renewed/rows"]
    for found, exact in iterated(opt):
        torch.testing.assert_close(found, exact, **TIGHT)


# ---- what happens in training ------------------------------------------------------------------


@pytest.mark.parametrize("make", [small, recursive])
def test_a_batch_that_is_not_finite_leaves_all_as_it_was(make: Any) -> None:
    model = mlp()
    opt = make(model, nm.Categorical(), rank=4, schedule=nm.optim.Schedule(1, 50))
    train(model, opt, [batch(3) for _ in range(3)])
    curvature = opt.preconditioner._curvature
    before = copy.deepcopy(curvature.state_dict())
    x, _ = batch(3)
    x[0, 0] = torch.nan
    with pytest.warns(UserWarning, match="left out"):
        opt.preconditioner.measure(x)
    after = curvature.state_dict()
    assert torch.equal(before.pop("generator"), after.pop("generator"))
    for old, new in zip(_leaves(before), _leaves(after), strict=True):
        assert torch.equal(torch.as_tensor(old), torch.as_tensor(new))
    assert all(loss < 10 for loss in train(model, opt, [batch(3) for _ in range(3)]))


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in _leaves(value)]
    return [tree]


@pytest.mark.parametrize("make", [small, recursive])
def test_layers_may_be_frozen_and_thawed(make: Any) -> None:
    model, schedule = mlp(), nm.optim.Schedule(1, 50)
    # A share of the width: thawing the bias changes the number of directions.
    opt = make(model, nm.Categorical(), rank=0.2, schedule=schedule)
    bias, last = model[0].bias, model[2]
    bias.requires_grad_(False)
    train(model, opt, [batch(3) for _ in range(3)])
    bias.requires_grad_(True)
    last.requires_grad_(False)
    train(model, opt, [batch(3) for _ in range(3)])
    directions = opt.state_dict()["preconditioner"]["preconditioner"]["curvature"]["directions"]
    assert {key.partition("/")[0] for key in directions} == {"0"}
    last.requires_grad_(True)
    train(model, opt, [batch(3) for _ in range(3)])
    assert opt.skipped == opt.preconditioner.failed == 0
    assert len(inverses(opt)) == 2


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(CLASSES, 6), nn.Linear(6, CLASSES)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))


class Attention(nn.Module):
    """A weight that three projections share row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 3, 8)
        return self.head(self.attention(x, x, x, need_weights=False)[0].sum(dim=1))


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (4, 6)), nn.Conv1d(4, 12, 2, groups=2), nn.Flatten(), nn.Linear(60, 5)
    )


@pytest.mark.parametrize("energy", [1.0, 0.7])
@pytest.mark.parametrize("make", [small, recursive])
@pytest.mark.parametrize("build", [Tied, Attention, grouped])
def test_layers_of_all_kinds(build: Any, make: Any, energy: float) -> None:
    model = build()
    tokens = torch.randint(CLASSES, (20, 4)), torch.randint(CLASSES, (20, 4))
    data = tokens if build is Tied else batch(20)
    schedule = nm.optim.Schedule(1, 3)
    opt = make(model, nm.Categorical(), energy=energy, schedule=schedule, lr=0.1)
    losses = train(model, opt, [data] * 25)
    assert losses[-1] < 0.8 * losses[0]
    assert any(isinstance(inverse, ProjectedKroneckerMatrix) for inverse in inverses(opt))


def test_the_parts_of_one_weight_are_followed_each() -> None:
    model, data = Attention(), [batch(2) for _ in range(4)]
    options = {"schedule": SELDOM, "damping": 1e-3}
    opt = recursive(model, nm.Categorical(), **options)
    train(model, opt, data)
    curvature = opt.preconditioner._curvature
    followed = [key for key in curvature._following if key[0] == "attention"]
    assert len([key for key in followed if key[1].endswith("inputs")]) == 3
    (whole,) = (inverse for inverse in inverses(opt) if inverse.block.name == "attention")
    assert isinstance(whole, ProjectedKroneckerMatrix)
    for side in ("inputs", "outputs"):
        keys = curvature._followed_as(whole.block, side)
        parts = torch.cat([curvature._following[key].matrix for key in keys])
        assert torch.equal(getattr(whole, side).values, parts)


# ---- a few processes ---------------------------------------------------------------------------


def _train_on_a_rank(is_recursive: bool) -> list[Tensor]:
    torch.set_default_dtype(torch.float64)
    torch.default_generator.manual_seed(0)
    model = mlp()
    x, y = batch(32)
    called = DistributedDataParallel(model)
    make = recursive if is_recursive else small
    opt = make(called, nm.Categorical(), estimator=nm.Exact(), rank=4)
    rows = slice(dist.get_rank(), None, dist.get_world_size())
    train(called, opt, [(x[rows], y[rows])] * 6)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("is_recursive", [False, True])
def test_a_few_processes_train_one_model(is_recursive: bool) -> None:
    first, second = run_ranks(_train_on_a_rank, 2, is_recursive)
    torch.default_generator.manual_seed(0)
    model = mlp()
    data = batch(32)
    make = recursive if is_recursive else small
    train(model, make(model, nm.Categorical(), estimator=nm.Exact(), rank=4), [data] * 6)
    for a, b, alone in zip(first, second, model.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, alone.detach(), rtol=1e-7, atol=1e-9)


def test_rows_that_are_elsewhere_renew_the_inverse() -> None:
    layer = nn.Linear(WIDTH, CLASSES)
    kept = nm.RecursiveInverse(6, narrowest=1)
    pre = preconditioner(layer, kept, schedule=SELDOM, reducer=lambda _: None)
    for _ in range(12):
        pre.measure(batch(1)[0])
        pre.advance()
    # At first, while the averages are short, the damping of all directions has to be restored.
    assert pre.events["renewed/rows"] + pre.events["renewed/processes"] == 11
    assert pre.events["renewed/processes"] >= 7
