"""Error bars of spectra, against the jackknife and against populations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold._estimate import Estimate

DAMPING = 0.05
QUANTITIES: dict[str, Callable[[nm.FisherOperator], Estimate]] = {
    "trace": nm.variance.trace,
    "largest": lambda F: nm.variance.eigenvalues(F, 2),
    "dimension": lambda F: nm.variance.effective_dimension(F, damping=DAMPING),
}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def inputs(n: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator, dtype=torch.float64)


def gram(model: nn.Module, data: object, **options: object) -> nm.FisherOperator:
    options = {"estimator": nm.Exact(), **options}
    return nm.fisher(model, nm.Categorical(), data, nm.Gram(), **options)


@pytest.mark.parametrize("name", QUANTITIES)
def test_standard_error_is_that_of_the_jackknife(name: str) -> None:
    """Leave one out: the same to first order, so the difference falls like 1/N."""
    model, n = network(), 120
    x = inputs(n)
    estimate = QUANTITIES[name](gram(model, x))
    left_out = torch.stack(
        [
            torch.as_tensor(QUANTITIES[name](gram(model, torch.cat([x[:i], x[i + 1 :]]))).value)
            for i in range(n)
        ]
    )
    jackknife = ((n - 1) / n * (left_out - left_out.mean(0)).square().sum(0)).sqrt()
    ratio = estimate.stderr / jackknife
    assert ((ratio - 1).abs() < 5 / n**0.5 / 5).all(), ratio


@pytest.mark.parametrize("name", QUANTITIES)
def test_values_are_those_of_the_matrix(name: str) -> None:
    F = gram(network(), inputs(20))
    values = F.eigenvalues()
    expected = {
        "trace": values.sum(),
        "largest": values[:2],
        "dimension": (values / (values + DAMPING)).sum(),
    }[name]
    torch.testing.assert_close(QUANTITIES[name](F).value, expected)


def test_batches_sweeps_and_files(tmp_path: Path) -> None:
    model, x = network(), inputs(20)
    whole = gram(model, x)
    parts = gram(model, [(x[:7], None), (x[7:], None)])
    parts.save(tmp_path / "fisher.nm")
    for F in (parts, nm.load(tmp_path / "fisher.nm")):
        for quantity in QUANTITIES.values():
            torch.testing.assert_close(quantity(F).stderr, quantity(whole).stderr)
    half = whole.restrict(["0.weight", "0.bias"])
    expected = gram(model, x, params=["0.*"])
    torch.testing.assert_close(nm.variance.trace(half).stderr, nm.variance.trace(expected).stderr)
    twice = nm.variance.trace(2 * whole)
    torch.testing.assert_close(twice.stderr, 2 * nm.variance.trace(whole).stderr)


def test_intervals_cover_the_truth() -> None:
    """300 samples of inputs and labels from a population: 95 % intervals of the trace."""
    model, population = network(), inputs(4000, seed=2)
    exact = nm.fisher(model, nm.Categorical(), population, nm.Diagonal(), estimator=nm.Exact())
    truth = float(exact.trace())
    covered = 0
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        some = population[torch.randint(len(population), (80,), generator=generator)]
        F = gram(model, some, estimator=nm.MonteCarlo(2), generator=generator)
        low, high = nm.variance.trace(F).interval(0.95)
        covered += float(low) <= truth <= float(high)
    assert 0.92 <= covered / 300 <= 0.98


def test_what_makes_no_sense_is_refused() -> None:
    F = gram(network(), inputs(5))
    with pytest.raises(nm.errors.UnsupportedError, match="a sum of several"):
        nm.variance.trace(F + F)
    with pytest.raises(nm.errors.UnsupportedError, match=r"keeps none: measure it by .*Gram"):
        nm.variance.trace(nm.fisher(network(), nm.Categorical(), inputs(5), nm.Dense()))
    with pytest.raises(ValueError, match=r"from 1 to 15.*got 16"):
        nm.variance.eigenvalues(F, 16)
    with pytest.raises(ValueError, match="damping must be > 0"):
        nm.variance.effective_dimension(F, damping=0.0)
    assert nm.variance.trace(gram(network(), inputs(1))).stderr.isinf()
