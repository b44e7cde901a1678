from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from neuromanifold.belief import SigmoidBeliefNetwork
from neuromanifold.belief.enumeration import state_chunks


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def network() -> Callable[..., SigmoidBeliefNetwork]:
    """Networks in which all parameters are of order one, biases too."""

    def build(sizes, coding=(0, 1), skips=(), leaves="bernoulli"):
        generator = torch.Generator().manual_seed(1)
        net = SigmoidBeliefNetwork(
            sizes, coding, skips, leaves, generator=generator, dtype=torch.float64
        )
        with torch.no_grad():
            for parameter in net.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise)
        return net

    return build


@pytest.fixture
def every_state() -> Callable[[SigmoidBeliefNetwork], list[Tensor]]:
    """All joint values of all layers."""

    def build(net):
        return [torch.cat(parts) for parts in zip(*state_chunks(net, net.modelled), strict=True)]

    return build


@pytest.fixture
def scores() -> Callable[..., Tensor]:
    """The oracle: per-sample gradients of `log_joint` by autograd, `(N, P)`."""

    def build(net, layers):
        params = dict(net.named_parameters())

        def log_joint(params):
            return _Joint.call(net, params, layers)

        jacobian = torch.func.jacrev(log_joint)(params)
        return torch.cat([jacobian[name].flatten(1) for name in net.layout.names], dim=1)

    return build


class _Joint(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, layers):
        return self.net.log_joint(layers)

    @classmethod
    def call(cls, net, params, layers):
        named = {f"net.{name}": value for name, value in params.items()}
        return torch.func.functional_call(cls(net), named, (layers,))
