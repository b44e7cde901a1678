from __future__ import annotations

import pytest
import torch

from neuromanifold.belief import SigmoidBeliefNetwork


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def network(sizes, coding=(0, 1), skips=(), **options) -> SigmoidBeliefNetwork:
    """A network with all parameters of order one, biases too."""
    generator = torch.Generator().manual_seed(1)
    net = SigmoidBeliefNetwork(
        sizes, coding, skips, generator=generator, dtype=torch.float64, **options
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).double())
    return net
