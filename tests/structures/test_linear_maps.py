"""Layers whose derivatives products of `Implicit()` keep: the same numbers as from one pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.errors import CaptureError
from neuromanifold.testing.cases import Case
from neuromanifold.testing.layer_cases import LAYERS

N = 4
RTOL = 1e-10
"""Of float64: sums of some hundred terms in another order, through three layers."""

pytestmark = pytest.mark.usefixtures("float64")

IMAGE, SERIES, VOLUME, ROWS, TOKENS = (4, 9, 8), (4, 11), (4, 6, 5, 4), (5, 6), (5, 8)


class Attention(nn.Module):
    """Of four heads, whose queries, keys and values are learned."""

    def __init__(self, is_causal: bool, scale: float | None = None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.options = {"is_causal": is_causal, "scale": scale}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (4, 2)).transpose(-2, -3) for part in self.parts)
        return nn.functional.scaled_dot_product_attention(q, k, v, **self.options)


MODULES: dict[str, tuple[tuple[int, ...], nn.Module]] = {
    "linear": (ROWS, nn.Linear(6, 3)),
    "linear without bias": (ROWS, nn.Linear(6, 3, bias=False)),
    "conv1d": (SERIES, nn.Conv1d(4, 6, 3, stride=2, padding=1)),
    "conv2d": (IMAGE, nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), dilation=2)),
    "conv2d, groups": (IMAGE, nn.Conv2d(4, 6, 3, groups=2, bias=False)),
    "conv2d, same": (IMAGE, nn.Conv2d(4, 6, 3, padding="same")),
    "conv2d, reflect": (IMAGE, nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")),
    "conv3d": (VOLUME, nn.Conv3d(4, 2, 2)),
    "transposed conv1d": (SERIES, nn.ConvTranspose1d(4, 3, 3, stride=2, output_padding=1)),
    "transposed conv2d": (IMAGE, nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2)),
    "transposed conv3d": (VOLUME, nn.ConvTranspose3d(4, 2, 2)),
    "attention": (TOKENS, Attention(is_causal=False, scale=0.7)),
    "causal attention": (TOKENS, Attention(is_causal=True)),
    "attention of a module": (TOKENS, nn.TransformerEncoderLayer(8, 2, 6, batch_first=True)),
    "layer norm": (ROWS, nn.LayerNorm(6)),
    "layer norm of two axes": (ROWS, nn.LayerNorm((5, 6), bias=False)),
    "layer norm without weights": (ROWS, nn.LayerNorm(6, elementwise_affine=False)),
    "batch norm": (IMAGE, nn.BatchNorm2d(4)),
    "batch norm without weights": (IMAGE, nn.BatchNorm2d(4, affine=False)),
    "gelu": (ROWS, nn.GELU()),
    "gelu by tanh": (ROWS, nn.GELU(approximate="tanh")),
    "silu": (ROWS, nn.SiLU()),
    "silu in place": (ROWS, nn.SiLU(inplace=True)),
}


def network(shape: tuple[int, ...], module: nn.Module) -> tuple[nn.Module, Tensor]:
    """The module with something to learn before and behind it, and inputs."""
    torch.manual_seed(0)
    module = module.double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    if isinstance(module, nn.BatchNorm2d):
        assert module.running_var is not None
        nn.init.uniform_(module.running_var, 0.5, 2)
    before = nn.Linear(shape[-1], shape[-1])
    x = torch.randn(N, *shape)
    width = module(before(x)).flatten(1).shape[1]
    model = nn.Sequential(before, module, nn.Flatten(), nn.Linear(width, 3))
    return model.eval(), x


def measured(
    model: nn.Module,
    data: object,
    structure: nm.structures.Structure,
    likelihood: nm.Likelihood | None = None,
    params: list[str] | None = None,
) -> nm.FisherOperator:
    return nm.fisher(
        model,
        nm.Categorical() if likelihood is None else likelihood,
        data,
        structure,
        params=params,
        generator=torch.Generator().manual_seed(0),
    )


def assert_repeated_products_are_those_of(
    expected: nm.FisherOperator, F: nm.FisherOperator
) -> None:
    """The second product keeps what the third uses."""
    for seed in range(3):
        v = torch.randn(F.num_parameters, generator=torch.Generator().manual_seed(seed))
        right = expected @ v
        assert (F @ v - right).norm() <= RTOL * right.norm()


@pytest.mark.parametrize("name", MODULES)
def test_kept_maps_are_the_derivatives(name: str) -> None:
    model, x = network(*MODULES[name])
    assert_repeated_products_are_those_of(
        measured(model, x, nm.Gram()), measured(model, x, nm.Implicit())
    )


@pytest.mark.parametrize("part", ["weight", "bias", "0.bias"])
@pytest.mark.parametrize(
    "name", ["linear", "conv2d", "transposed conv2d", "layer norm", "batch norm"]
)
def test_kept_maps_of_some_parameters(name: str, part: str) -> None:
    model, x = network(*MODULES[name])
    params = [part] if part in dict(model.named_parameters()) else [f"1.{part}"]
    assert_repeated_products_are_those_of(
        measured(model, x, nm.Gram(), params=params),
        measured(model, x, nm.Implicit(), params=params),
    )


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_repeated_products_of_every_layer(case: Case) -> None:
    model = case.model()
    F, once = (
        measured(model, case.data(), nm.Implicit(keep=keep), case.likelihood)
        for keep in (True, False)
    )
    assert_repeated_products_are_those_of(once, F)


class Overwriting(nn.Module):
    """May change the input of a layer that has used it."""

    overwriting = False

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        y: Tensor = self.outer(hidden)
        if self.overwriting:
            hidden.mul_(2)
        return y


def test_overwritten_inputs_are_refused_by_every_product() -> None:
    model = Overwriting()
    F = measured(model, torch.randn(5, 3), nm.Implicit())
    v = torch.ones(F.num_parameters)
    model.overwriting = True
    for _ in range(3):
        with pytest.raises(CaptureError, match="changed in place"):
            F @ v


def test_products_under_autocast_are_those_of_its_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), Attention(is_causal=True)),
        *(nn.Conv2d(4, 4, 2), nn.BatchNorm2d(4), nn.SiLU()),
        *(nn.Flatten(), nn.Linear(28, 3)),
    )
    model.eval().float()
    x = torch.randn(20, 8, 8, dtype=torch.float32)
    likelihood, exact = nm.Categorical(), nm.Exact()
    whole = nm.fisher(model, likelihood, x, nm.Gram(), estimator=exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        F = nm.fisher(model, likelihood, x, nm.Implicit(), estimator=exact)
    v = torch.randn(F.num_parameters, dtype=torch.float32)
    right = whole @ v
    for _ in range(3):
        error = (F @ v - right).norm() / right.norm()
        assert error <= 0.05  # some ten roundings of 2⁻⁹ each
