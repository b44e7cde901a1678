from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from neuromanifold.linalg.krylov import conjugate_gradients


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def positive(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = randn(2 * n, n)
    return (x.T @ x / n + 0.1 * torch.eye(n, dtype=x.dtype)).to(dtype)


def assert_solved(a: Tensor, v: Tensor, x: Tensor) -> None:
    """To rounding."""
    residual = (a @ x - v).norm()
    assert x.dtype == v.dtype
    condition = float(torch.linalg.cond(a))
    assert residual <= 10 * condition * torch.finfo(v.dtype).eps * v.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 20])
def test_as_many_steps_as_unknowns_solve(n: int, dtype: torch.dtype) -> None:
    a, v = positive(n, dtype), randn(n, dtype=dtype)
    x = conjugate_gradients(lambda x: a @ x, v, steps=n)
    # Directions lose their conjugacy by the root of rounding before others restore the digits.
    assert (a @ x - v).norm() <= torch.finfo(dtype).eps ** 0.5 * v.norm()
    assert_solved(a, v, conjugate_gradients(lambda x: a @ x, v, steps=2 * n))


def test_steps_beyond_the_solution_change_nothing() -> None:
    a, v = torch.diag(torch.tensor([2.0, 4.0])), torch.tensor([1.0, 0.0])
    for steps in (1, 2, 40):
        x = conjugate_gradients(lambda x: a @ x, v, steps=steps)
        assert torch.equal(x, torch.tensor([0.5, 0.0]))
    a, v = positive(20), randn(20)
    assert_solved(a, v, conjugate_gradients(lambda x: a @ x, v, steps=1000))


def test_few_distinct_eigenvalues_take_as_many_steps() -> None:
    basis = torch.linalg.qr(randn(30, 30))[0]
    a = basis * torch.tensor([0.1, 1.0, 5.0], dtype=basis.dtype).repeat(10) @ basis.T
    v = randn(30)
    assert_solved(a, v, conjugate_gradients(lambda x: a @ x, v, steps=3))
    two = conjugate_gradients(lambda x: a @ x, v, steps=2)
    assert (a @ two - v).norm() > 1e-3 * v.norm()


@pytest.mark.parametrize("preconditioned", [False, True])
def test_each_step_minimises_over_the_krylov_space(preconditioned: bool) -> None:
    a, v = positive(12), randn(12)
    m = torch.diag(a.diagonal() ** -0.75) if preconditioned else torch.eye(12, dtype=a.dtype)
    for steps in range(6):
        x = conjugate_gradients(lambda x: a @ x, v, steps=steps, precondition=lambda x: m @ x)
        space = [m @ v]
        for _ in range(steps - 1):
            space.append(m @ a @ space[-1])
        basis = torch.linalg.qr(torch.stack(space[:steps], dim=1) if steps else v[:, None][:, :0])[
            0
        ]
        best = basis @ torch.linalg.solve(basis.T @ a @ basis, basis.T @ v)
        assert (x - best).norm() <= 1e-10 * v.norm()


def test_the_inverse_as_preconditioner_takes_one_step() -> None:
    a, v = positive(20), randn(20)
    inverse = torch.linalg.inv(a)
    x = conjugate_gradients(lambda x: a @ x, v, steps=1, precondition=lambda x: inverse @ x)
    assert_solved(a, v, x)


def test_a_preconditioner_helps_where_scales_differ() -> None:
    scales = torch.logspace(-2, 2, 20, dtype=torch.float64)
    a, v = scales[:, None] * positive(20) * scales, randn(20)
    errors = {}
    for power in (0.0, 1.0):
        m = a.diagonal() ** -power
        x = conjugate_gradients(lambda x: a @ x, v, steps=10, precondition=lambda x, m=m: m * x)
        errors[power] = float((x @ a @ x) / 2 - x @ v)
    assert errors[1.0] < errors[0.0]


def test_nothing_is_the_solution_of_nothing() -> None:
    a = positive(5)
    assert torch.equal(
        conjugate_gradients(lambda x: a @ x, torch.zeros(5, dtype=a.dtype), steps=3),
        torch.zeros(5, dtype=a.dtype),
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    a, v = positive(5), randn(5)
    v[2] = bad
    assert not conjugate_gradients(lambda x: a @ x, v, steps=3).isfinite().all()
    a[1, 1] = bad
    assert not conjugate_gradients(lambda x: a @ x, randn(5), steps=3).isfinite().all()
