"""All joint values of some layers, in chunks of bounded size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from neuromanifold.errors import TooLargeError, UnsupportedError
from neuromanifold.linalg import memory

if TYPE_CHECKING:
    from neuromanifold.belief.networks import LayeredNetwork

__all__ = ["MOST_STATES", "count_states", "require_countable", "state_chunks"]

MOST_STATES = 2**24
"""More than this many are not enumerated: it would take minutes."""
CHUNK_NUMEL = 2**22
"""Numbers of the largest tensor of a chunk."""


def count_states(net: LayeredNetwork, over: Sequence[int]) -> int:
    """Number of joint values of some layers.

    Raises:
        UnsupportedError: If one of them is a continuum.
    """
    counts = [net.units[layer].states(net.sizes[layer]) for layer in over]
    if None in counts:
        raise UnsupportedError(
            f"Values of {net.units[over[counts.index(None)]]!r} are a continuum and cannot be "
            f"enumerated. Give a number of samples instead."
        )
    return math.prod(count for count in counts if count is not None)


def require_countable(net: LayeredNetwork, over: Sequence[int]) -> int:
    """Number of joint values of some layers, if it is not too large.

    Raises:
        TooLargeError: If there are more than `MOST_STATES`.
        UnsupportedError: If one of the layers is a continuum.
    """
    total = count_states(net, over)
    width = sum(net.sizes[layer] for layer in over)
    if total > MOST_STATES:
        raise TooLargeError(
            f"Layers {list(over)} have {width} units and about 10^{math.log10(total):.0f} joint "
            f"states, of which at most {MOST_STATES:,} are enumerated. Give a number of samples "
            f"instead; the likelihood is estimated by HelmholtzMachine.log_likelihood.",
            bytes_needed=total * width * net.dtype.itemsize,
            bytes_available=memory.available(net.device),
        )
    return total


def state_chunks(
    net: LayeredNetwork, over: Sequence[int], *, rows: int = 1
) -> Iterator[list[Tensor]]:
    """All joint values of some layers, each combination once.

    Args:
        net: whose layers they are.
        over: numbers of the layers, ascending.
        rows: how many numbers the caller keeps per state and unit; chunks are smaller for more.

    Yields:
        Values of these layers, each `(S, n_l)`.

    Raises:
        TooLargeError: If there are more than `MOST_STATES`.
        UnsupportedError: If one of the layers is a continuum.

    Example:
        >>> from neuromanifold.belief import SigmoidBeliefNetwork
        >>> [(hidden,)] = state_chunks(SigmoidBeliefNetwork([2, 3]), [0])
        >>> hidden.tolist()
        [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    total = require_countable(net, over)
    chunk = max(CHUNK_NUMEL // max(rows, sum(net.sizes)), 1)
    for start in range(0, total, chunk):
        index = torch.arange(start, min(start + chunk, total), device=net.device)
        values = []
        for layer in reversed(over):
            states = net.units[layer].states(net.sizes[layer])
            assert states is not None
            values.append(net.units[layer].decode(index % states, net.sizes[layer], net.dtype))
            index = index // states
        yield values[::-1]
