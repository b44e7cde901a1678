"""The only place that talks to torch.distributed."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

__all__ = ["sum_over_ranks"]


def sum_over_ranks(tensors: list[Tensor]) -> None:
    """Sum tensors over all ranks, in place: the `reducer` of `nm.fisher` for data-parallel runs.

    Each rank measures its own part of the data; afterwards every rank has the Fisher information of
    all of them, also where the parts differ in size.

    Raises:
        RuntimeError: If no process group was initialised.

    Example:
        >>> import neuromanifold as nm
        >>> measure = lambda model, shard: nm.fisher(
        ...     model, nm.Categorical(), shard, reducer=nm.distributed.sum_over_ranks
        ... )
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "sum_over_ranks needs a process group: call torch.distributed.init_process_group "
            "first, or leave out reducer=... in a single process."
        )
    for tensor in tensors:
        dist.all_reduce(tensor)
