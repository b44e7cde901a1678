"""Scales that libraries get wrong: sampled labels, variances, positions, groups, reuse, batches.

Each test is a recipe on which at least one well-known library fails.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.testing import reference

KRONECKER = (nm.Kronecker("expand"), nm.Kronecker("reduce"))


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield
    torch.set_default_dtype(torch.float32)


def exact(model: nn.Module, likelihood, x: Tensor, structure) -> nm.FisherOperator:
    return nm.fisher(model, likelihood, x, structure, estimator=nm.Exact())


def dense(F: nm.FisherOperator, expected: Tensor) -> None:
    torch.testing.assert_close(F.to_dense(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", [nm.MonteCarlo, nm.RandomSigns])
@pytest.mark.parametrize("draws", [1, 4, 16])
def test_the_mean_over_labels_does_not_depend_on_their_number(estimator, draws) -> None:
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(256, 5)
    expected = exact(model, nm.Categorical(), x, nm.Diagonal()).trace()
    traces = torch.stack(
        [
            nm.fisher(
                model,
                nm.Categorical(),
                x,
                nm.Diagonal(),
                estimator=estimator(draws),
                generator=torch.Generator().manual_seed(seed),
            ).trace()
            for seed in range(20)
        ]
    )
    standard_error = traces.std() / len(traces) ** 0.5
    assert abs(traces.mean() - expected) <= 5 * standard_error
    assert standard_error <= 0.02 * expected  # so that a factor of the draws would show


@pytest.mark.parametrize("estimator", [nm.Exact(), nm.MonteCarlo(8), nm.RandomSigns(8)], ids=repr)
@pytest.mark.parametrize("structure", [nm.Diagonal(), nm.Kronecker(), nm.Gram()], ids=repr)
def test_gaussian_information_is_the_inverse_of_the_variance(structure, estimator) -> None:
    model, x = nn.Linear(3, 2), torch.randn(64, 3)

    def trace(variance: float) -> Tensor:
        rng = torch.Generator().manual_seed(0)
        likelihood = nm.Gaussian(variance)
        return nm.fisher(
            model, likelihood, x, structure, estimator=estimator, generator=rng
        ).trace()

    # The same random numbers, so the ratio is that of the variances.
    torch.testing.assert_close(trace(4.0), trace(1.0) / 4)


class Pooled(nn.Module):
    """One linear layer at every position, and the mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).mean(1)


@pytest.mark.parametrize("positions", [1, 4, 16])
def test_positions_that_are_pooled(positions) -> None:
    """Neither matrix grows with the number of positions.

    The cotangent `1/T` at every position depends on no input, so "reduce" is exact; "expand" takes
    positions for independent, and has the right trace where their inputs are orthogonal.
    """
    model, x = Pooled(), torch.linalg.qr(torch.randn(32, 16, 16)).Q[:, :positions]
    x = x * torch.rand(32, positions, 1)
    expected = reference.dense_fisher(model, nm.Gaussian(), x)
    dense(exact(model, nm.Gaussian(), x, nm.Dense()), expected)
    dense(exact(model, nm.Gaussian(), x, nm.Kronecker("reduce")), expected)
    expand = exact(model, nm.Gaussian(), x, nm.Kronecker("expand"))
    torch.testing.assert_close(expand.trace(), expected.trace())


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("structure", KRONECKER, ids=repr)
def test_grouped_convolution(groups, structure) -> None:
    """One position and a Gaussian output: the cotangents are constant and K-FAC is exact."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=groups), nn.Flatten(), nn.Linear(4, 3))
    x = torch.randn(32, 4, 1, 1)
    block = exact(model, nm.Gaussian(), x, nm.BlockDiagonal()).block("0")
    kronecker = exact(model, nm.Gaussian(), x, structure).block("0")
    torch.testing.assert_close(kronecker.trace(), block.trace())
    expected = block.to_dense()
    if groups > 1:  # one pair of factors per group: nothing is kept between groups
        owner = torch.arange(4).repeat_interleave(4 // groups)
        owner = torch.cat([owner, torch.arange(4)]) // (4 // groups)
        expected = expected * (owner[:, None] == owner)
    torch.testing.assert_close(kronecker.to_dense(), expected)


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.linear(x).tanh())


def test_layer_called_twice() -> None:
    model, x = Reused(), torch.randn(200, 4)
    likelihood = nm.from_loss(nn.MSELoss())
    expected = reference.dense_fisher(model, likelihood, x)
    dense(exact(model, likelihood, x, nm.Dense()), expected)
    torch.testing.assert_close(exact(model, likelihood, x, nm.Diagonal()).trace(), expected.trace())
    for structure in KRONECKER:
        kronecker = reference.kronecker(model, likelihood, x, structure.weight_sharing)
        dense(exact(model, likelihood, x, structure), kronecker)


@pytest.mark.parametrize("structure", [nm.Diagonal(), *KRONECKER, nm.UnitWise()], ids=repr)
def test_batch_size_is_no_part_of_the_scale(structure) -> None:
    """The same samples k times, in one batch or in many, have the same Fisher information."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x = torch.randn(32, 5)
    expected = exact(model, nm.Categorical(), x, structure).to_dense()
    for times in (2, 4, 8):
        repeated = x.repeat(times, 1)
        one_batch = exact(model, nm.Categorical(), repeated, structure).to_dense()
        torch.testing.assert_close(one_batch, expected)
        batches = [(part, None) for part in repeated.split(48)]
        several = nm.fisher(model, nm.Categorical(), batches, structure, estimator=nm.Exact())
        torch.testing.assert_close(several.to_dense(), expected)


@pytest.mark.parametrize("size", [1, 16, 64, 256])
def test_importances_are_squares_of_samples_and_not_of_batches(size) -> None:
    """The empirical diagonal is the mean of squared gradients, however the data are batched."""
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 5))
    x = torch.randn(256, 10)
    with torch.no_grad():
        y = torch.distributions.Categorical(logits=model(x)).sample()
    batches = list(zip(x.split(size), y.split(size), strict=True))
    measured = nm.fisher(
        model, nm.Categorical(), batches, nm.Diagonal(), estimator=nm.Empirical()
    ).diagonal()
    squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for sample, label in zip(x, y, strict=True):
        loss = nn.functional.cross_entropy(model(sample[None]), label[None])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for total, gradient in zip(squares.values(), gradients, strict=True):
            total += gradient.square() / len(x)
    torch.testing.assert_close(measured, squares)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inputs(x)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(self.norm(h).mean(1))


@pytest.mark.parametrize(
    "structure",
    [nm.Dense(), nm.BlockDiagonal(), nm.UnitWise(), nm.Diagonal(), nm.Gram(), nm.Implicit()],
    ids=repr,
)
def test_attention_is_measured_and_not_skipped(structure) -> None:
    model, x = Attention(), torch.randn(4, 3, 6)
    F = exact(model, nm.Categorical(), x, structure)
    assert F.layout.names == tuple(name for name, _ in model.named_parameters())
    expected = measured_by_samples(model, x)
    torch.testing.assert_close(F.trace(), expected.sum())
    torch.testing.assert_close(torch.cat([d.flatten() for d in F.diagonal().values()]), expected)


@pytest.mark.parametrize("structure", KRONECKER, ids=repr)
def test_attention_has_kronecker_factors(structure) -> None:
    model, x = Attention(), torch.randn(4, 3, 6)
    F = exact(model, nm.Categorical(), x, structure)
    kept = {entry.parameter: entry.structure for entry in F.coverage}
    assert kept["attention.in_proj_weight"] == kept["attention.out_proj.weight"] == "Kronecker"
    assert set(kept) == {name for name, _ in model.named_parameters()}
    # A norm has two parameters per unit: nothing is approximated.
    expected = F.layout.unflatten(measured_by_samples(model, x))
    for name in ("norm.weight", "norm.bias"):
        torch.testing.assert_close(F.diagonal()[name], expected[name])


def measured_by_samples(model: nn.Module, x: Tensor) -> Tensor:
    """The diagonal `(P,)`: squared gradients of log p for every sample and class, weighted by p."""
    total: Tensor | float = 0.0
    parameters = list(model.parameters())
    for sample in x:
        log_p = model(sample[None]).log_softmax(-1)[0]
        for value in log_p:
            gradient = torch.autograd.grad(value, parameters, retain_graph=True)
            flat = torch.cat([g.flatten() for g in gradient])
            total = total + value.detach().exp() * flat.square() / len(x)
    assert isinstance(total, Tensor)
    return total


@pytest.mark.parametrize(("draws", "median", "largest"), [(1, 0.125, 0.75), (10, 0.037, 0.21)])
def test_spread_of_single_entries(draws, median, largest) -> None:
    """One label per input leaves the trace precise and single entries noisy: 1/√draws of it."""
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10)).float()
    x = torch.randn(512, 20).float()
    diagonals, traces = [], []
    for seed in range(20):
        F = nm.fisher(
            model,
            nm.Categorical(),
            x,
            nm.Diagonal(),
            estimator=nm.MonteCarlo(draws),
            generator=torch.Generator().manual_seed(seed),
        )
        diagonals.append(torch.cat([d.flatten() for d in F.diagonal().values()]))
        traces.append(F.trace())
    values = torch.stack(diagonals)
    mean = values.mean(0)
    spread = (values.std(0) / mean)[mean > 0]
    # Roughly what a survey found for another network of this shape.
    assert median / 2 < spread.median() < median * 2
    assert largest / 3 < spread.max() < largest * 3
    assert torch.stack(traces).std() < 0.01 * torch.stack(traces).mean()
