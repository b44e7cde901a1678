"""The contest is fair and its reference implementation right; who wins is not tested."""

import math

import pytest
import torch
from benchmarks.training.contest import Mode, Outcome, Point, contest, heat, reached
from benchmarks.training.contestants import CONTESTANTS
from benchmarks.training.problems import PROBLEMS
from benchmarks.training.soap import SOAP

DIGITS = PROBLEMS["digits-mlp"]


def rotation(n):
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]


def descend(matrix, left, right, steps):
    """SOAP on a quartic in `leftᵀ matrix right`."""
    weight = matrix.clone().requires_grad_()
    optimizer = SOAP([weight], lr=0.01, period=1)
    for _ in range(steps):
        optimizer.zero_grad()
        seen = left.T @ weight @ right
        ((seen**4).sum() + (seen.cumsum(0) ** 2).sum()).backward()
        optimizer.step()
    return weight.detach()


def test_soap_does_not_see_rotations_of_a_weight():
    torch.manual_seed(0)
    # Square, so that no factor is singular: any basis would do for its null space.
    start = torch.randn(4, 4, dtype=torch.float64)
    left, right = rotation(4), rotation(4)
    same = torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    plain = descend(start, *same, steps=5)
    rotated = descend(left @ start @ right.T, left, right, steps=5)
    assert not torch.allclose(plain, start)
    torch.testing.assert_close(left.T @ rotated @ right, plain, rtol=1e-6, atol=1e-8)


def test_soap_is_adam_for_vectors_after_its_first_measurement():
    torch.manual_seed(0)
    target, start = torch.randn(2, 4, dtype=torch.float64)
    weights = [start.clone().requires_grad_() for _ in range(2)]
    soap = SOAP([weights[0]], lr=0.1)
    adam = torch.optim.Adam([weights[1]], lr=0.1, betas=(0.95, 0.95))
    for _ in range(6):
        for weight, optimizer in zip(weights, (soap, adam), strict=True):
            optimizer.zero_grad()
            ((weight - target) ** 4).sum().backward()
            optimizer.step()
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("name", ["digits-mlp", "digits-conv"])
def test_everyone_starts_alike_and_trains(name):
    problem = PROBLEMS[name]
    curves = heat(problem, {"AdamW": 1e-3, "kfac": 0.1}, seed=0, scale=0.01)
    assert curves["AdamW"][0].found == curves["kfac"][0].found
    for curve in curves.values():
        assert curve[-1].found["train"] < curve[0].found["train"]
        assert [p.seconds for p in curve] == sorted(p.seconds for p in curve)


def test_a_run_that_diverges_ends_and_is_not_chosen(monkeypatch):
    monkeypatch.setattr("benchmarks.training.contest.GRID", (1e20, 1.0))
    found = contest(DIGITS, ["SGD"], Mode(scale=0.05, rates=2, seeds=2))["SGD"]
    assert math.isnan(found.searched[1e20 * CONTESTANTS["SGD"].lr])
    assert found.lr == CONTESTANTS["SGD"].lr
    assert len(found.curves) == 2


def test_reached_compares_seed_by_seed():
    def curve(*values):
        return [Point(k, 2.0 * k, {"accuracy": v}) for k, v in enumerate((0.1, *values))]

    reference = Outcome(curves=[curve(0.5, 0.6, 0.9, 0.8), curve(0.2, 0.3, 0.4, 0.4)])
    other = Outcome(curves=[curve(0.7, 0.8), curve(0.3, 0.4)])
    assert reached(DIGITS, other, reference) == (0.5, 0.5)
    worse = Outcome(curves=[curve(0.7, math.nan), curve(0.3, 0.3)])
    assert reached(DIGITS, worse, reference) == (math.inf, math.inf)
