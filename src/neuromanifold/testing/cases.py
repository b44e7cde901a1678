"""Small problems as data: every likelihood on every kind of network, in float64.

`CASES` is meant for `pytest.mark.parametrize("case", cases.CASES, ids=str)`. Seven samples leave an
uneven last batch however they are split, and the parameters are few enough for the oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Distribution, Independent, Normal

from neuromanifold.likelihoods import (
    Bernoulli,
    Categorical,
    FromDistribution,
    Gaussian,
    GaussianMeanVariance,
    Likelihood,
    Poisson,
)

__all__ = ["CASES", "Case"]

NUM_SAMPLES = 7


@dataclass(frozen=True)
class Case:
    """A model, what its outputs mean, and one batch of data.

    Attributes:
        name: network and family, unique.
        model: makes the model, with the same parameters each time.
        likelihood: what the outputs mean.
        data: makes one batch `(x, y)` of seven samples, the same each time.
    """

    name: str
    model: Callable[[], nn.Module]
    likelihood: Likelihood
    data: Callable[[], tuple[Tensor, Tensor]]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class _Network:
    """A body that ends in `features` per sample or position, and its input."""

    name: str
    body: Callable[[int], nn.Module]
    input_shape: tuple[int, ...]
    has_positions: bool = False


@dataclass(frozen=True)
class _Family:
    """A likelihood, and how features `(N, *T, features)` become its outputs.

    `positions` says whether it makes sense only with or only without positions; None: both.
    """

    name: str
    likelihood: Likelihood
    features: int
    arrange: Callable[[Tensor], Tensor] = lambda features: features
    positions: bool | None = None


class _Model(nn.Module):
    """Features of the body, arranged as the likelihood wants its outputs."""

    def __init__(self, body: nn.Module, arrange: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body
        self.arrange = arrange

    def forward(self, x: Tensor) -> Tensor:
        return self.arrange(self.body(x))


class _ChannelsLast(nn.Module):
    """`(N, C, *T)` to `(N, *T, C)`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1)


class _MeanPool(nn.Module):
    """Mean over positions, `(N, T, I)` to `(N, I)`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


class _Twice(nn.Module):
    """One linear layer used twice, with tanh between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.linear(x).tanh())


def _mlp(features: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, features)
    )


def _conv1d(features: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=2, groups=2),
        nn.Tanh(),
        nn.Conv1d(4, 2, 3, padding="same", dilation=2, padding_mode="reflect"),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(10, features),
    )


def _conv2d(features: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 2, 2, dilation=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(18, features),
    )


def _conv2d_circular(features: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, (3, 2), padding=(1, 0), padding_mode="circular", bias=False),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(36, features),
    )


def _conv3d(features: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 4, 2, stride=(1, 2, 1), padding=(0, 1, 0), groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(32, features),
    )


def _conv2d_positions(features: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Conv2d(3, features, 1), _ChannelsLast())


def _sequence_pooled(features: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), _MeanPool(), nn.Linear(4, features))


def _sequence_positions(features: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, features))


def _reused(features: int) -> nn.Module:
    return nn.Sequential(_Twice(4), nn.Tanh(), nn.Linear(4, features))


_NETWORKS = (
    _Network("mlp", _mlp, (4,)),
    _Network("conv1d", _conv1d, (2, 11)),
    _Network("conv2d", _conv2d, (2, 6, 6)),
    _Network("conv2d_circular", _conv2d_circular, (2, 4, 4)),
    _Network("conv2d_positions", _conv2d_positions, (1, 3, 4), has_positions=True),
    _Network("conv3d", _conv3d, (2, 3, 2, 3)),
    _Network("sequence_pooled", _sequence_pooled, (16, 3)),
    _Network("sequence_positions", _sequence_positions, (5, 3), has_positions=True),
    _Network("reused", _reused, (4,)),
)


def _mean_and_variance(features: Tensor) -> Tensor:
    """`(N, *T, 2K)` to `(N, 2, *T, K)`."""
    return torch.stack(features.chunk(2, dim=-1), dim=1)


def _positions_last(features: Tensor) -> Tensor:
    """`(N, *T, C)` to `(N, C, *T)`."""
    return features.movedim(-1, 1)


def _categories(outputs: Tensor) -> Distribution:
    return Independent(TorchCategorical(logits=outputs), outputs.ndim - 2)


def _learned_scale(outputs: Tensor) -> Distribution:
    mean, raw_scale = outputs.unbind(-1)
    return Independent(Normal(mean, F.softplus(raw_scale) + 0.1), outputs.ndim - 2)


_FAMILIES = (
    _Family("categorical", Categorical(), 3),
    _Family("categorical_axis1", Categorical(class_axis=1), 3, _positions_last, positions=True),
    _Family("bernoulli", Bernoulli(), 3),
    _Family("gaussian", Gaussian(variance=0.5), 2),
    _Family("gaussian_per_entry", Gaussian(torch.tensor([0.5, 2.0])), 2, positions=False),
    _Family("gaussian_mean_variance", GaussianMeanVariance(), 4, _mean_and_variance),
    _Family("poisson", Poisson(), 2),
    _Family("distribution_categorical", FromDistribution(_categories), 3),
    _Family("distribution_normal", FromDistribution(_learned_scale), 2),
)


def _case(network: _Network, family: _Family) -> Case:
    def model() -> nn.Module:
        # Modules draw from the global generator: lend it, and put its state back.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return _Model(network.body(family.features), family.arrange).double()

    def data() -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(NUM_SAMPLES, *network.input_shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            y = family.likelihood.sample(model()(x), 1, generator=generator)[0]
        if network.has_positions and isinstance(family.likelihood, Categorical):
            y[0, 1:] = y[1, 0] = y[-1, -2:] = family.likelihood.ignore_index
        return x, y

    return Case(f"{network.name}-{family.name}", model, family.likelihood, data)


CASES: tuple[Case, ...] = tuple(
    _case(network, family)
    for network in _NETWORKS
    for family in _FAMILIES
    if family.positions in (None, network.has_positions)
)
"""Every network with every family; see the names."""
