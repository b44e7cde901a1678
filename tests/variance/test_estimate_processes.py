"""`nm.estimate` over two processes: one answer, that of all the data, at the same time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.testing.harness import run_ranks

SIZES = (40, 20)
"""Inputs of each process."""
QUANTITIES = ("trace", "diagonal", "entries", "eigenvalue")
ROUNDING = 1e-12


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sum(SIZES), 3, generator=generator, dtype=torch.float64)


def run(quantity: Any, **asked: Any) -> nm.Estimated:
    """What a process does, with its part of the inputs and a seed of its own."""
    rank = dist.get_rank()
    return nm.estimate(
        network(),
        nm.Categorical(),
        inputs().split(SIZES)[rank],
        quantity,
        reducer=nm.distributed.sum_over_ranks,
        generator=torch.Generator().manual_seed(rank),
        **asked,
    )


def numbers(estimate: nm.Estimated) -> Tensor:
    parts = [estimate.value, *estimate.variances.values()]
    leaves = [
        leaf for part in parts for leaf in ([part] if isinstance(part, Tensor) else part.values())
    ]
    return torch.cat([leaf.double().flatten() for leaf in leaves])


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_without_draws_it_is_what_one_process_finds(quantity: Any) -> None:
    def exact() -> nm.Estimated:
        return run(quantity, estimator=nm.Exact(), rtol=0.5)

    one, other = run_ranks(exact, 2)
    whole = nm.estimate(
        network(), nm.Categorical(), inputs(), quantity, rtol=0.5, estimator=nm.Exact()
    )
    assert torch.equal(numbers(one), numbers(other))
    # The eigenvector is known to half of the digits, so the noise along it is too.
    tolerance = 1e-6 if quantity == "eigenvalue" else ROUNDING
    got, expected = numbers(one), numbers(whole)
    assert (got - expected).norm() <= tolerance * expected.norm()
    assert (one.num_samples, one.reached, one.note) == (sum(SIZES), whole.reached, whole.note)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_all_stop_at_the_same_time_with_the_same_answer(quantity: Any) -> None:
    one, other = run_ranks(lambda: run(quantity, rtol=0.01, max_draws=12), 2)
    assert torch.equal(numbers(one), numbers(other))
    assert (one.draws, one.note) == (other.draws, other.note)
    assert one.draws > 2
    exact = nm.estimate(
        network(), nm.Categorical(), inputs(), quantity, rtol=0.5, estimator=nm.Exact()
    )
    for name, value in _by_name(exact.value).items():
        off = (_by_name(one.value)[name] - value).abs()
        assert (off <= 5 * _by_name(one.error("labels"))[name]).all()


def _by_name(quantity: Any) -> dict[str, Tensor]:
    return {"": quantity} if isinstance(quantity, Tensor) else quantity


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    def stopped() -> nm.Estimated:
        def progress(done: int, _: int | None) -> None:
            if done == 2:
                raise KeyboardInterrupt

        path = tmp_path / str(dist.get_rank())
        with pytest.raises(KeyboardInterrupt):
            run("trace", rtol=0.01, max_draws=8, path=path, progress=progress)
        return run("trace", rtol=0.01, max_draws=8, path=path)

    one, other = run_ranks(stopped, 2)
    (once, _) = run_ranks(lambda: run("trace", rtol=0.01, max_draws=8), 2)
    assert torch.equal(numbers(one), numbers(once))
    assert torch.equal(numbers(one), numbers(other))
    assert one.draws == once.draws


def test_files_of_different_rounds_are_refused(tmp_path: Path) -> None:
    def rounds() -> str:
        rank = dist.get_rank()
        path = tmp_path / str(rank)
        run("trace", rtol=1e-3, max_draws=4, path=path)
        if rank == 1:
            path.unlink()
        with pytest.raises(nm.errors.StorageError, match="different numbers of rounds"):
            run("trace", rtol=1e-3, max_draws=8, path=path)
        return "refused"

    assert run_ranks(rounds, 2) == ["refused", "refused"]
