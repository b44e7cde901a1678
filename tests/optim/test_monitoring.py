"""What a natural-gradient optimizer reports of itself."""

from __future__ import annotations

import sys
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.nn import functional

import neuromanifold as nm


@pytest.fixture
def problem(float64):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, torch.randn(64, 6), torch.randint(3, (64,))


def take_steps(model, optimizer, x, y, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()


STRUCTURES = {
    "kfac": nm.Kronecker(),
    "unitwise": nm.UnitWise(),
    "quasidiagonal": nm.QuasiDiagonal(),
    "diagonal": nm.Diagonal(),
}
EXACT = {"estimator": nm.Exact(), "decay": 0.0, "schedule": nm.optim.Schedule(1, 1)}


def matrices(model, x, structure):
    F = nm.fisher(model, nm.Categorical(), x, structure, estimator=nm.Exact())
    return {layer: F.block(layer).to_dense() for layer in ("0", "2")}


@pytest.mark.parametrize("preset", STRUCTURES)
def test_traces_and_eigenvalues_are_those_of_the_matrix(problem, preset):
    model, x, y = problem
    optimizer = getattr(nm.optim, preset)(model, nm.Categorical(), lr=0.05, **EXACT)
    take_steps(model, optimizer, x, y, 1)
    # The matrix was measured before the step: measure once more, where the model is now.
    optimizer.preconditioner.measure(x)
    found = nm.optim.scalars(optimizer)
    for layer, matrix in matrices(model, x, STRUCTURES[preset]).items():
        torch.testing.assert_close(found[f"trace/{layer}"], float(matrix.trace()))
        top = float(torch.linalg.eigvalsh(matrix)[-1])
        # From below; after 12 power iterations, by 5% at most for these spectra.
        assert 0.95 * top <= found[f"top_eigenvalue/{layer}"] <= top * (1 + 1e-12)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_eigenvalue_of_symmetric_logits_is_found(float64, classes):
    """Rows of their Fisher matrix add up to zero: the plain diagonal would be orthogonal to it."""
    model, x = nn.Linear(1, classes, bias=False), torch.ones(4, 1)
    nn.init.zeros_(model.weight)
    optimizer = nm.optim.kfac(model, nm.Categorical(), **EXACT)
    optimizer.preconditioner.measure(x)
    found = nm.optim.scalars(optimizer)
    torch.testing.assert_close(found["top_eigenvalue/(root)"], 1 / classes)
    torch.testing.assert_close(found["trace/(root)"], (classes - 1) / classes)


def test_kl_is_that_of_the_step_that_was_made(problem):
    model, x, y = problem
    seen = {}
    optimizer = nm.optim.kfac(
        model, nm.Categorical(), lr=0.3, weight_decay=0.1, damping=0.1, **EXACT
    )
    nm.optim.Monitor(optimizer, seen.__setitem__, every=1)
    for step in range(1, 4):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        F = nm.fisher(model, nm.Categorical(), x, nm.Kronecker(), estimator=nm.Exact())
        take_steps(model, optimizer, x, y, 1)
        moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
        torch.testing.assert_close(seen[step]["kl"], float(F.inner(moved, moved)) / 2)


def test_kl_is_by_sample_and_position(float64):
    model, x = nn.Linear(3, 4), torch.randn(5, 7, 3)
    y = torch.randint(4, (5, 7))
    seen = {}
    optimizer = nm.optim.kfac(model, nm.Categorical(), lr=0.1, **EXACT)
    nm.optim.Monitor(optimizer, seen.__setitem__)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    likelihood = nm.Categorical()
    F = nm.fisher(model, likelihood, x, nm.Kronecker(), estimator=nm.Exact(), per="position")
    likelihood.loss(model(x), y).backward()
    optimizer.step()
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    torch.testing.assert_close(seen[1]["kl"], float(F.inner(moved, moved)) / 2)


def test_the_exact_natural_gradient(problem):
    model, x, y = problem
    seen = {}
    optimizer = nm.optim.gram(
        model, nm.Categorical(), lr=0.3, kl_max=None, momentum=0.0, estimator=nm.Exact()
    )
    nm.optim.Monitor(optimizer, seen.__setitem__, every=2)
    take_steps(model, optimizer, x, y, 1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    F = nm.fisher(model, nm.Categorical(), x, nm.Dense(), estimator=nm.Exact())
    take_steps(model, optimizer, x, y, 1)
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    assert seen[2].keys() == {"lr", "damping", "skipped", "kl"}
    torch.testing.assert_close(seen[2]["kl"], float(F.inner(moved, moved)) / 2)


def test_ekfac_is_watched_without_being_changed(problem):
    _, x, y = problem
    weights = {}
    for watched in (False, True):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = nm.optim.ekfac(
            net, nm.Categorical(), generator=torch.Generator().manual_seed(0)
        )
        if watched:
            nm.optim.Monitor(optimizer, lambda *_: None, every=1)
        take_steps(net, optimizer, x, y, 12)
        weights[watched] = nn.utils.parameters_to_vector(net.parameters())
    assert torch.equal(weights[False], weights[True])


def test_the_ratio_is_there_once_losses_were_compared(problem):
    model, x, y = problem
    damping = nm.optim.LevenbergMarquardt(1.0, period=2)
    optimizer = nm.optim.kfac(model, nm.Categorical(), damping=damping)

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert "reduction_ratio" not in nm.optim.scalars(optimizer)
    optimizer.step(closure)
    found = nm.optim.scalars(optimizer)
    assert found["reduction_ratio"] == damping.ratio
    assert found["damping"] == damping.value


def test_what_was_left_out_is_counted(problem):
    model, x, y = problem
    optimizer = nm.optim.kfac(model, nm.Categorical())
    take_steps(model, optimizer, x, y, 1)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    with pytest.warns(UserWarning, match="left out"):
        optimizer.preconditioner.measure(x / 0)
    found = nm.optim.scalars(optimizer)
    assert (found["skipped"], found["failed"]) == (1, 1)


def test_before_the_first_measurement(problem):
    found = nm.optim.scalars(nm.optim.kfac(problem[0], nm.Categorical(), damping=0.2))
    assert found == {"damping": 0.2, "skipped": 0, "failed": 0, "curvature_seconds": 0}


def test_every_so_many_steps_and_not_after_it_was_closed(problem):
    model, x, y = problem
    seen = []
    optimizer = nm.optim.kfac(model, nm.Categorical())
    monitor = nm.optim.Monitor(optimizer, lambda step, _: seen.append(step), every=3)
    take_steps(model, optimizer, x, y, 7)
    monitor.close()
    take_steps(model, optimizer, x, y, 5)
    assert seen == [1, 3, 6]


def test_the_share_of_time(problem):
    model, x, y = problem
    seen = []
    optimizer = nm.optim.kfac(model, nm.Categorical(), schedule=nm.optim.Schedule(1, 1))
    monitor = nm.optim.Monitor(optimizer, lambda _, found: seen.append(found), every=2)
    take_steps(model, optimizer, x, y, 6)
    assert all(0 < found["curvature_share"] < 1 for found in seen)
    assert monitor.seconds > 0


class Writer:
    """Takes numbers as TensorBoard's writer does."""

    def __init__(self):
        self.rows = defaultdict(dict)

    def add_scalar(self, tag, value, step):
        self.rows[step][tag] = value


def test_tensorboard(problem):
    model, x, y = problem
    writer, optimizer = Writer(), nm.optim.kfac(model, nm.Categorical())
    nm.optim.Monitor(optimizer, writer, prefix="run/")
    take_steps(model, optimizer, x, y, 1)
    assert {"run/kl", "run/lr", "run/trace/0", "run/damping"} <= writer.rows[1].keys()


def test_tensorboard_that_is_not_installed(problem, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    optimizer = nm.optim.kfac(problem[0], nm.Categorical())
    with pytest.raises(nm.errors.UnsupportedError, match="pip install tensorboard"):
        nm.optim.Monitor(optimizer, tmp_path)


def test_what_cannot_be_watched(problem):
    adamw = torch.optim.AdamW(problem[0].parameters())
    with pytest.raises(TypeError, match=r"natural-gradient optimizer.*got AdamW"):
        nm.optim.scalars(adamw)
    optimizer = nm.optim.kfac(problem[0], nm.Categorical())
    with pytest.raises(TypeError, match="got int"):
        nm.optim.Monitor(optimizer, 3)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        nm.optim.Monitor(optimizer, print, every=0)
