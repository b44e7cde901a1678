"""Skewness and kurtosis of pre-activations, against numbers that are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.errors import UnsupportedError

N = 40_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def identity(width: int) -> nn.Linear:
    layer = nn.Linear(width, width).double()
    layer.weight.data = torch.eye(width, dtype=torch.float64)
    return layer


@pytest.mark.parametrize(
    ("draw", "skewness", "excess", "far"),
    [
        (lambda shape: torch.randn(shape, generator=generator()), 0.0, 0.0, False),
        (lambda shape: torch.rand(shape, generator=generator()), 0.0, -1.2, True),
        (lambda shape: -torch.rand(shape, generator=generator()).log(), 2.0, 6.0, True),
    ],
    ids=["normal", "uniform", "exponential"],
)
def test_known_distributions(draw: object, skewness: float, excess: float, far: bool) -> None:
    x = draw((N, 3)).double()
    (layer,) = nm.meanfield.gaussianity(identity(3), x).layers
    # Five standard errors; those of an exponential's moments are large.
    scale = 1 if excess <= 0 else 15
    torch.testing.assert_close(
        layer.skewness, torch.full((3,), skewness).double(), rtol=0, atol=5 * scale * (6 / N) ** 0.5
    )
    torch.testing.assert_close(
        layer.excess, torch.full((3,), excess).double(), rtol=0, atol=5 * scale * (24 / N) ** 0.5
    )
    assert layer.is_far is far


def reference(u: Tensor) -> tuple[Tensor, Tensor]:
    v = (u - u.mean(0)) / u.std(0, correction=0)
    return (v**3).mean(0), (v**4).mean(0) - 3


def test_layers_and_positions() -> None:
    """Batches of any size; positions count as samples."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)
    ).double()
    x = torch.randn(30, 2, 4, 4, dtype=torch.float64)
    found = nm.meanfield.gaussianity(model, [(x[:20], None), (x[20:], None)])
    assert [layer.name for layer in found.layers] == ["0", "3"]
    assert found.num_samples == 30
    outputs = (model[0](x).movedim(1, -1).flatten(0, -2), model(x))
    for layer, u in zip(found.layers, outputs, strict=True):
        skewness, excess = reference(u.detach())
        torch.testing.assert_close(layer.skewness, skewness)
        torch.testing.assert_close(layer.excess, excess)


def test_what_is_far_is_named() -> None:
    """One large sparse input makes pre-activations far from Gaussian."""
    x = torch.randn(4000, 50, generator=generator())
    x[:, 0] = 100 * (torch.rand(4000, generator=generator(1)) < 0.01)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 20), nn.Tanh(), nn.Linear(20, 3))
    found = nm.meanfield.gaussianity(model, x)
    assert found.far[0] == "0"
    assert "far" in str(found).splitlines()[3]
    assert found.to_dict()["layers"][0]["far"] is True


def test_a_constant_unit_is_left_out_of_the_medians() -> None:
    layer = identity(3)
    layer.weight.data[1] = 0
    found = nm.meanfield.gaussianity(layer, torch.randn(100, 3, dtype=torch.float64)).layers[0]
    assert found.excess.isnan().tolist() == [False, True, False]
    assert found.median_excess == found.excess.abs().nanmedian()


def test_models_without_such_layers_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"no nn\.Linear"):
        nm.meanfield.gaussianity(nn.Sequential(nn.ReLU()), torch.randn(3, 2))
