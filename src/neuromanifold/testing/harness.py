"""Tests over several processes: forked ranks that talk through gloo on the CPU of one machine."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["run_ranks"]

GRACE = 1.0
"""Seconds that the other ranks get to fail too, and so to report, once one has failed."""


def run_ranks(fn: Callable[..., Any], nprocs: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Run `fn(*args)` in `nprocs` processes that form the default process group.

    The processes are forked, so `fn` may be a local function, and each uses one thread.

    Args:
        fn: what every rank runs; it learns its rank from `torch.distributed.get_rank()`.
        nprocs: number of ranks.
        *args: passed to `fn`.
        timeout: seconds until ranks that still run are killed; also the limit of a collective.

    Returns:
        What `fn` returned, by rank; it travels by pickle.

    Raises:
        RuntimeError: If a rank raised or died: names the first one and shows its traceback; the
            others usually only lost their peer.
        TimeoutError: If ranks are still running after `timeout` seconds; names them.

    Example:
        >>> def total(value):
        ...     x = torch.tensor(value + dist.get_rank())
        ...     dist.all_reduce(x)
        ...     return x.item()
        >>> run_ranks(total, 2, 10)
        [21, 21]
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(target=_rank, args=(rank, nprocs, folder, timeout, fn, args))
            for rank in range(nprocs)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, timeout)
            exit_codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()
        _raise_first_failure(folder, exit_codes)
        if hanging := [rank for rank, code in enumerate(exit_codes) if code is None]:
            raise TimeoutError(f"Ranks {hanging} of {nprocs} still ran after {timeout} s.")
        return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(nprocs)]


def _rank(
    rank: int, nprocs: int, folder: Path, timeout: float, fn: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'rendezvous'}",
            rank=rank,
            world_size=nprocs,
            timeout=timedelta(seconds=timeout),
        )
        # A rank with nothing to say to the others could leave while they still connect to it.
        dist.barrier()
        result = pickle.dumps(fn(*args))
        dist.destroy_process_group()
        (folder / f"result{rank}").write_bytes(result)
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        raise SystemExit(1) from None


def _wait(processes: list[Any], timeout: float) -> None:
    """Until all processes ended, or one failed and the grace is over, or the time is up."""
    deadline = time.monotonic() + timeout
    running = list(processes)
    while running and (left := deadline - time.monotonic()) > 0:
        wait([process.sentinel for process in running], left)
        ended = [process for process in running if not process.is_alive()]
        running = [process for process in running if process not in ended]
        if any(process.exitcode for process in ended):
            deadline = min(deadline, time.monotonic() + GRACE)


def _raise_first_failure(folder: Path, exit_codes: list[int | None]) -> None:
    # A rank that was killed leaves no report, but its peers report that they lost it.
    for rank, code in enumerate(exit_codes):
        if code and not (folder / f"error{rank}").exists():
            raise RuntimeError(
                f"Rank {rank} of {len(exit_codes)} ended with exit code {code} and no report."
            )
    if reports := list(folder.glob("error*")):
        first = min(reports, key=lambda path: path.stat().st_mtime_ns)
        name = first.name.removeprefix("error")
        raise RuntimeError(f"Rank {name} of {len(exit_codes)} failed:\n{first.read_text()}")
