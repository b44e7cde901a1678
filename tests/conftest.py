"""What tests of several folders need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def float64() -> Iterator[None]:
    """Numbers are float64 where nothing else is said, and random ones the same in every run."""
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield
    torch.set_default_dtype(torch.float32)
