"""Kronecker factors beside the matrix itself, against dense matrices in float64."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import neuromanifold as nm
from neuromanifold.testing.reference import dense_fisher

NAMES = ("mlp", "conv", "transformer")
DAMPING = 1e-2


class Attention(nn.Module):
    """One pre-norm transformer layer over tokens, and a head at each position."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 6)
        self.layer = nn.TransformerEncoderLayer(
            6, 2, 6, dropout=0.0, batch_first=True, norm_first=True
        )
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.tokens(x)))


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    if name == "mlp":
        return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)), torch.randn(12, 6)
    if name == "conv":
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(),
            nn.Flatten(), nn.Linear(16, 3),
        )  # fmt: skip
        return model, torch.randn(10, 1, 7, 7)
    return Attention(), torch.randint(5, (4, 3))


def expected(matrix: torch.Tensor) -> dict[str, float]:
    values = torch.linalg.eigvalsh(matrix).clamp(min=0)
    return {
        "trace": float(matrix.trace()),
        "norm": float(matrix.norm()),
        "largest_eigenvalue": float(values[-1]),
        "effective_dimension": float((values / (values + DAMPING)).sum()),
        "logdet": float((values + DAMPING).log().sum()),
    }


def close(found: float, wanted: float) -> bool:
    return math.isclose(found, wanted, rel_tol=1e-8, abs_tol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_both_sides_equal_dense_matrices(float64, name):
    model, x = build(name)
    found = nm.spectral.surrogate(model, nm.Categorical(), x, damping=DAMPING)
    K = nm.fisher(model, nm.Categorical(), x, nm.Kronecker(), estimator=nm.Exact())
    F = nm.fisher(model, nm.Categorical(), x, nm.Gram(), estimator=nm.Exact())
    dense = dense_fisher(model, nm.Categorical(), x)
    assert list(found.layers) == list(dict.fromkeys(entry.block for entry in K.coverage))
    for layer, part in [*found.layers.items(), (None, found.whole)]:
        approximate, exact = K.to_dense(), dense
        if layer is not None:
            names = [entry.parameter for entry in F.coverage if entry.block == layer]
            index = torch.cat([torch.arange(dense.shape[0])[F.layout.slices[n]] for n in names])
            approximate = approximate[index[:, None], index]
            exact = exact[index[:, None], index]
        truth, wanted = expected(exact), expected(approximate)
        assert part.eigenvalues.shape == (len(exact),)
        assert torch.allclose(
            part.eigenvalues.flip(0), torch.linalg.eigvalsh(approximate), atol=1e-12
        )
        for quantity in truth:
            assert close(part.approximate[quantity], wanted[quantity])
            assert close(float(part.exact[quantity].value), truth[quantity])
            assert part.exact[quantity].draws == 0
            off = float(part.off[quantity].value)
            if quantity == "logdet":
                assert close(off, wanted[quantity] - truth[quantity])
            else:
                assert close(off * truth[quantity], wanted[quantity])


def test_eigenvalues_are_products_of_those_of_the_factors(float64):
    """papers.md §4.6: A is the mean over samples and positions, B sums over positions."""
    model, x = build("conv")
    found = nm.spectral.surrogate(model[:1], nm.Gaussian(), x, damping=DAMPING)
    patches = functional.unfold(x, 3).mT  # (N, T, I)
    ones = patches.new_ones(*patches.shape[:2], 1)
    a = torch.cat([patches, ones], dim=-1).flatten(0, 1)
    values = torch.linalg.eigvalsh(a.T @ a / len(a))
    # The Fisher matrix of a Gaussian with unit variance is the identity at each of 25 positions.
    products = (values[:, None] * torch.full((3,), 25.0)).flatten().sort(descending=True).values
    assert torch.allclose(found.layers["0"].eigenvalues, products, atol=1e-12)


def test_a_linear_layer_with_gaussian_outputs_is_right(float64):
    model, x = nn.Linear(5, 4), torch.randn(20, 5)
    found = nm.spectral.surrogate(model, nm.Gaussian(), x, damping=DAMPING)
    for part in (found.whole, *found.layers.values()):
        assert all(close(float(part.off[q].value), q != "logdet") for q in part.off)


def test_sampled_labels_are_the_same_on_both_sides(float64):
    """One sample with one label: the gradient is a product, and so is its square."""
    model, x = build("mlp")
    found = nm.spectral.surrogate(
        model,
        nm.Categorical(),
        x[:1],
        damping=DAMPING,
        estimator=nm.MonteCarlo(1),
        generator=torch.Generator().manual_seed(1),
    )
    for layer in found.layers.values():
        assert close(float(layer.off["trace"].value), 1)
        assert close(float(layer.off["largest_eigenvalue"].value), 1)


def test_what_is_too_large_is_an_estimate_with_its_error(float64):
    model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3))
    x = torch.randn(40, 30)
    exact = nm.spectral.surrogate(model, nm.Categorical(), x, damping=DAMPING)
    found = nm.spectral.surrogate(
        model,
        nm.Categorical(),
        x,
        damping=DAMPING,
        max_bytes="10 KiB",
        generator=torch.Generator().manual_seed(0),
    )
    assert "products only" in found.matrix
    assert found.layers["2"].method == "all eigenvalues"  # 63 parameters
    large = found.layers["0"]
    assert large.method.startswith("Lanczos quadrature")
    assert large.approximate.keys() == large.exact.keys()
    for name, off in large.off.items():
        distance = abs(float(off.value) - float(exact.layers["0"].off[name].value))
        assert distance <= 5 * float(off.stderr) + 1e-8
    assert float(large.off["norm"].stderr) > 0
    assert "±" in str(found)


def test_layers_without_information(float64):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    nn.init.zeros_(model[1].weight)
    found = nm.spectral.surrogate(model, nm.Categorical(), torch.randn(6, 4), damping=DAMPING)
    off = found.layers["0"].off
    assert float(off["trace"].value) == float(off["largest_eigenvalue"].value) == 1
    assert float(off["logdet"].value) == 0


def test_other_structures(float64):
    model, x = build("mlp")
    found = nm.spectral.surrogate(
        model, nm.Categorical(), x, damping=DAMPING, structure=nm.BlockDiagonal()
    )
    assert all(
        close(float(layer.off[q].value), q != "logdet")
        for layer in found.layers.values()
        for q in layer.off
    )
    assert float(found.whole.off["norm"].value) < 1  # what couples layers is left out
    with pytest.raises(nm.errors.UnsupportedError, match="eigenvalues"):
        nm.spectral.surrogate(model, nm.Categorical(), x, damping=DAMPING, structure=nm.Implicit())


def test_table_and_plain_data(float64):
    model, x = build("conv")
    found = nm.spectral.surrogate(model, nm.Categorical(), x, damping=DAMPING)
    lines = str(found).splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert [line.split()[0] for line in lines[1:5]] == ["0", "2", "5", "all"]
    assert "difference, in nats" in lines[5]
    assert "exact in sample space" in lines[6]
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["layers"]["0"]["off"]["trace"]["value"] == pytest.approx(
        float(found.layers["0"].off["trace"].value)
    )


@pytest.mark.parametrize("damping", [0, -1.0, math.nan])
def test_damping_is_positive(damping):
    with pytest.raises(ValueError, match="damping"):
        nm.spectral.surrogate(nn.Linear(2, 2), nm.Gaussian(), torch.ones(3, 2), damping=damping)
