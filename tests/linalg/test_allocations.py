"""Counting the bytes that a piece of code allocates."""

from __future__ import annotations

import pytest
import torch

from neuromanifold.errors import UnsupportedError
from neuromanifold.linalg.allocations import watching

CPU = torch.device("cpu")


def test_peak_and_what_is_kept() -> None:
    with watching(CPU) as usage:
        kept = torch.ones(1000)
        _ = torch.ones(3000).neg()
    assert (usage.peak, usage.kept) == (28_000, 4000 + 12_000)
    del kept


def test_segments() -> None:
    with watching(CPU) as usage:
        kept = torch.ones(1000)
        usage.mark()
        torch.ones(500)
        usage.mark()
    assert usage.segments == [(0, 4000), (4000, 6000), (4000, 4000)]
    del kept


def test_one_inside_the_other() -> None:
    with watching(CPU) as outer:
        torch.ones(1000)
        with watching(CPU) as inner:
            torch.ones(2000)
        torch.ones(3000)
    assert inner.peak == 8000
    assert outer.peak == 12_000


def test_an_error_inside_stops_the_count() -> None:
    with pytest.raises(ZeroDivisionError), watching(CPU):
        _ = 1 / 0
    with watching(CPU) as usage:
        torch.ones(1000)
    assert usage.peak == 4000


def test_other_devices_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="not on meta"), watching(torch.device("meta")):
        pass
