"""Inverses that follow moving averages, against dense inverses (papers.md §4.7, 2)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neuromanifold.linalg import psd
from neuromanifold.linalg.recursive import RecursiveInverse

G, K, R = 2, 12, 5
KEEP, DAMPING = 0.95, 0.1


def rows(seed: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(G, R, K, generator=generator, dtype=torch.float64)
    return (scale * x * ((1 - KEEP) / R) ** 0.5).to(dtype)


def start(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(G, 40, K, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    damping = torch.full((G,), DAMPING, dtype=torch.float64)
    return (x.mT @ x / 40).to(dtype), damping.to(dtype)


def test_without_damping_restored_it_is_the_dense_inverse_iterated() -> None:
    moment, damping = start()
    found = RecursiveInverse(moment, damping)
    eye = torch.eye(K, dtype=torch.float64)
    whole = moment + DAMPING * eye
    for step in range(50):
        x = rows(step)
        found.update(x, KEEP, restore=False)
        whole = KEEP * whole + x.mT @ x
        torch.testing.assert_close(found.matrix @ whole, eye.expand(G, K, K), rtol=0, atol=1e-12)
    assert torch.equal(found.matrix, found.matrix.mT)


def test_the_damping_stays_what_it_was_on_average() -> None:
    moment, damping = start()
    moment, found = moment.clone(), RecursiveInverse(moment, damping)
    leaked = []
    for step in range(60 * K):
        x = rows(step)
        found.update(x, KEEP)
        moment = KEEP * moment + x.mT @ x
        # By exact arithmetic, Q⁻¹ is the moment and a diagonal, the damping of each direction.
        added = torch.linalg.inv(found.matrix) - moment
        leaked.append(added.diagonal(dim1=1, dim2=2))
        assert (added - torch.diag_embed(found.added)).abs().max() < 1e-10
    over_turns = torch.stack(leaked[20 * K :]).mean(dim=(0, 2))
    torch.testing.assert_close(over_turns, damping, rtol=1e-3, atol=0)
    spread = torch.stack(leaked[20 * K :]) / DAMPING
    assert 0.66 < spread.min() < spread.max() < 1.34


def test_it_stays_right_over_20000_steps_in_float32() -> None:
    """Eigenvalues are about 1, from 0.5 to 2: no rounding grows.

    Beside the damping that was asked for, what is seen is the ripple of that of each direction.
    """
    k, damping, keep = 8, 0.002, 0.95
    generator = torch.Generator().manual_seed(0)
    moment, eye = torch.eye(k)[None], torch.eye(k, dtype=torch.float64)
    found = RecursiveInverse(moment, torch.full((1,), damping))
    worst = torch.zeros(2)
    for step in range(20_000):
        x = torch.randn(1, 16, k, generator=generator) * ((1 - keep) / 16) ** 0.5
        found.update(x, keep)
        moment = keep * moment + x.mT @ x
        if step % 500 == 499:
            whole = moment.double() + torch.stack([found.added[0].diag(), damping * eye])
            errors = (found.matrix.double() @ whole - eye).flatten(1).norm(dim=1) / k**0.5
            worst = torch.maximum(worst, errors)
    assert worst[0] <= 100 * torch.finfo(torch.float32).eps
    assert worst[1] <= 2e-3
    assert found.matrix.dtype == torch.float32


def test_a_residual_tells_a_wrong_inverse() -> None:
    moment, damping = start()
    found, generator = RecursiveInverse(moment, damping), torch.Generator().manual_seed(0)
    assert (found.residual(moment, generator) < 1e-12).all()
    # (M + λ)⁻¹ of a matrix half as large doubles every vector.
    found.matrix = 2 * found.matrix
    one = torch.ones(G, dtype=torch.float64)
    torch.testing.assert_close(found.residual(moment, generator), one)
    found.renew(moment)
    assert torch.equal(found.matrix, psd.inverse(moment, damping[:, None]))


def test_rounding_below_zero_is_damped() -> None:
    moment = torch.diag_embed(torch.tensor([[1.0, -1e-8, 0.0]]))
    found = RecursiveInverse(moment, torch.tensor([1e-9]))
    torch.testing.assert_close(found.matrix, torch.diag_embed(torch.tensor([[1.0, 1e9, 1e9]])))


def test_a_state_goes_on_where_it_stopped() -> None:
    found = RecursiveInverse(*start())
    for step in range(3):
        found.update(rows(step), KEEP)
    again = RecursiveInverse.from_state(found.state_dict(), torch.device("cpu"))
    for step in range(3, 6):
        for each in (found, again):
            each.update(rows(step), KEEP)
    assert torch.equal(found.matrix, again.matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_inverse_is_dense(dtype: torch.dtype) -> None:
    moment, damping = start(dtype)
    identity = RecursiveInverse(moment, damping).matrix @ (
        moment + DAMPING * torch.eye(K, dtype=dtype)
    )
    close = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        identity, torch.eye(K, dtype=dtype).expand(G, K, K), rtol=0, atol=close
    )
