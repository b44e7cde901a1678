"""Spectra of networks, whole and by layer, against the dense oracle in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neuromanifold as nm
from neuromanifold.testing.reference import dense_fisher


class Attention(nn.Module):
    """One pre-norm transformer layer over tokens, and a head at each position."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 8)
        self.layer = nn.TransformerEncoderLayer(
            8, 2, 8, dropout=0.0, batch_first=True, norm_first=True
        )
        self.head = nn.Linear(8, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.tokens(x)))


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    if name == "mlp":
        model = nn.Sequential(
            nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3)
        )
        return model, torch.randn(12, 6)
    if name == "conv":
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 6, 3, stride=2), nn.Tanh(),
            nn.Flatten(), nn.Linear(54, 5),
        )  # fmt: skip
        return model, torch.randn(10, 1, 8, 8)
    return Attention(), torch.randint(7, (4, 3))


NAMES = ("mlp", "conv", "transformer")


@pytest.mark.parametrize("name", NAMES)
def test_the_exact_path_equals_the_dense_matrix(float64, name):
    model, x = build(name)
    F = nm.spectral.operator(model, nm.Categorical(), x)
    assert F.origin.structure == "Gram()"
    assert "exact in sample space" in F.origin.notes[-1]
    dense = dense_fisher(model, nm.Categorical(), x)
    values = torch.linalg.eigvalsh(dense).flip(0)
    scale = values[0]
    density = nm.spectral.density(F)
    assert density.exact
    found = density.nodes[0].flip(0)[: len(F.eigenvalues())]
    assert ((found - values[: len(found)]).abs() <= 1e-8 * scale).all()
    top = nm.spectral.extremes(F, 10, tol=1e-10)
    assert ((top.values - values[:10]).abs() <= 1e-8 * scale).all()
    damping = 1e-3 * float(scale)
    expected = torch.linalg.slogdet(dense + damping * torch.eye(len(dense)))[1]
    assert torch.allclose(nm.spectral.logdet(F, damping=damping).value, expected, rtol=1e-8)
    assert torch.allclose(nm.spectral.trace(F).value, dense.trace(), rtol=1e-8)
    diagonal = F.layout.flatten(nm.spectral.diagonal(F).value)
    assert torch.allclose(diagonal, dense.diagonal(), rtol=1e-8, atol=1e-12)
    summary = nm.spectral.summary(F, damping=damping, per_layer=True)
    assert torch.allclose(summary.largest_eigenvalue.value, scale, rtol=1e-8)
    assert torch.allclose(
        summary.effective_dimension.value, (values / (values + damping)).sum(), rtol=1e-8
    )
    blocks = dict.fromkeys(entry.block for entry in F.coverage)
    assert list(summary.layers) == list(blocks)
    for block, layer in summary.layers.items():
        positions = torch.arange(len(dense))
        index = torch.cat([positions[F.layout.slices[n]] for n in F.block(block).layout.names])
        own = torch.linalg.eigvalsh(dense[index][:, index])
        assert torch.allclose(layer.largest_eigenvalue.value, own[-1], rtol=1e-8, atol=1e-12)
        assert torch.allclose(layer.norm.value, own.norm(), rtol=1e-8, atol=1e-12)
        assert block in str(summary)


@pytest.mark.parametrize("name", NAMES)
def test_products_lie_within_their_errors(float64, name):
    model, x = build(name)
    F = nm.spectral.operator(model, nm.Categorical(), x, max_bytes=1000)
    assert F.origin.structure == "Implicit()"
    assert "more than the 1000.0 B allowed" in F.origin.notes[-1]
    assert F.num_parameters > 512  # not so few that the whole matrix is formed
    dense = dense_fisher(model, nm.Categorical(), x)
    values = torch.linalg.eigvalsh(dense).flip(0)
    random = torch.Generator().manual_seed(0)
    top = nm.spectral.extremes(F, 5, tol=1e-4, generator=random)
    assert top.method == "block Lanczos, 7 vectors"
    assert (values[:5] - top.values <= top.bounds).all()
    damping = 1e-3 * float(values[0])
    truth = (values.clamp(min=0) + damping).log().sum()
    found = nm.spectral.logdet(F, damping=damping, generator=random)
    assert (found.value - truth).abs() < 4 * found.stderr
    found = nm.spectral.trace(F, "xtrace", generator=random)
    assert (found.value - dense.trace()).abs() < 4 * found.stderr
    exact = nm.spectral.trace(F)  # one pass over the data has the diagonal
    assert exact.draws == 0
    assert torch.allclose(exact.value, dense.trace(), rtol=1e-10)


def test_the_choice_leaves_the_generator_alone(float64):
    model, x = build("mlp")
    found = [
        make(
            model,
            nm.Categorical(),
            x,
            estimator=nm.MonteCarlo(2),
            generator=torch.Generator().manual_seed(3),
        )
        for make in (
            nm.spectral.operator,
            lambda *args, **options: nm.fisher(*args, nm.Gram(), **options),
        )
    ]
    assert torch.equal(found[0].eigenvalues(), found[1].eigenvalues())
    assert "24 rows" in found[0].origin.notes[-1]


def test_few_parameters_are_exact_without_gram(float64):
    model, x = nn.Linear(6, 3), torch.randn(20, 6)
    F = nm.fisher(model, nm.Categorical(), x, nm.Implicit(), estimator=nm.Exact())
    values = torch.linalg.eigvalsh(dense_fisher(model, nm.Categorical(), x)).flip(0)
    assert torch.allclose(nm.spectral.extremes(F, 3).values, values[:3], rtol=1e-10)
    summary = nm.spectral.summary(F, damping=0.1)
    assert summary.method == "all eigenvalues"
    assert torch.allclose(summary.trace.value, values.sum())
