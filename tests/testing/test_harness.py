from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from neuromanifold.testing import run_ranks


def test_results_come_back_by_rank() -> None:
    offset = torch.tensor([10.0, 20.0])

    def shifted(scale: float) -> torch.Tensor:
        return scale * offset + dist.get_rank()

    results = run_ranks(shifted, 2, 2.0)
    assert [result.tolist() for result in results] == [[20.0, 40.0], [21.0, 41.0]]


def test_ranks_form_a_process_group_and_use_one_thread() -> None:
    def gathered() -> tuple[int, int, list[int]]:
        ranks = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, torch.tensor(dist.get_rank()))
        return dist.get_world_size(), torch.get_num_threads(), [int(rank) for rank in ranks]

    assert run_ranks(gathered, 3) == [(3, 1, [0, 1, 2])] * 3


def test_the_parent_stays_without_a_process_group() -> None:
    run_ranks(dist.get_rank, 2)
    assert not dist.is_initialized()


def test_the_rank_that_failed_first_is_named() -> None:
    def fail_on_one() -> None:
        if dist.get_rank() == 1:
            raise KeyError("no such factor")
        dist.barrier()  # loses its peer and fails after it

    with pytest.raises(RuntimeError, match=r"(?s)Rank 1 of 2.*fail_on_one.*no such factor"):
        run_ranks(fail_on_one, 2)


def test_a_result_that_cannot_travel_is_reported() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)Rank 0 of 1.*pickle"):
        run_ranks(lambda: lambda: None, 1)


def test_a_killed_rank_is_named() -> None:
    def die_on_one() -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()  # loses its peer and reports so

    with pytest.raises(RuntimeError, match="Rank 1 of 2 ended with exit code -9"):
        run_ranks(die_on_one, 2)


def test_hanging_ranks_are_ended_and_named() -> None:
    def hang_on_one() -> int:
        if dist.get_rank() == 1:
            time.sleep(600)
        return os.getpid()

    with pytest.raises(TimeoutError, match=r"Ranks \[1\] of 2"):
        run_ranks(hang_on_one, 2, timeout=3.0)
