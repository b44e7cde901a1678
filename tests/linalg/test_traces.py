from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from neuromanifold.linalg import traces

SIZE = 120
SPECTRA = {
    "flat": torch.linspace(0.5, 1, SIZE),
    "harmonic": 1 / torch.arange(1, SIZE + 1),
    "squares": 1 / torch.arange(1, SIZE + 1).square(),
    "exponential": 0.8 ** torch.arange(SIZE),
}
PRODUCTS, RUNS = 60, 800


def rotated(values: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(noise)[0]
    return basis * values.double() @ basis.T


def estimate(method: str, a: Tensor, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    def product(rows: Tensor) -> Tensor:
        return rows @ a

    def signs(num: int) -> Tensor:
        bits = torch.randint(2, (num, len(a)), generator=generator)
        return bits.to(a) * 2 - 1

    if method == "hutchinson":
        return traces.hutchinson(product, signs(num))
    if method == "hutchpp":
        return traces.hutchpp(product, signs(num // 3), signs(num // 3))
    tests = torch.randn(num // 2, len(a), generator=generator, dtype=a.dtype)
    return traces.xtrace(product, tests)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("method", ["hutchinson", "hutchpp", "xtrace"])
def test_intervals_hold_as_often_as_they_say(method: str, spectrum: str) -> None:
    a = rotated(SPECTRA[spectrum])
    generator = torch.Generator().manual_seed(1)
    runs = [estimate(method, a, PRODUCTS, generator) for _ in range(RUNS)]
    errors = torch.stack([value for value, _ in runs]) - a.trace()
    stderrs = torch.stack([variance for _, variance in runs]).sqrt()
    assert errors.mean().abs() < 4 * errors.std() / math.sqrt(RUNS)  # unbiased
    coverage = float((errors.abs() <= 1.96 * stderrs).double().mean())
    assert 0.92 <= coverage <= 0.98


@pytest.mark.parametrize("method", ["hutchpp", "xtrace"])
@pytest.mark.parametrize("rank", [0, 1, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_rank_is_exact(method: str, rank: int, dtype: torch.dtype) -> None:
    a = rotated(torch.cat([torch.ones(rank), torch.zeros(SIZE - rank)])).to(dtype)
    value, variance = estimate(method, a, 36, torch.Generator().manual_seed(0))
    assert abs(float(value) - rank) <= 1e4 * torch.finfo(dtype).eps
    assert float(variance.sqrt()) <= 1e4 * torch.finfo(dtype).eps


def test_each_method_has_its_place() -> None:
    """Sketches pay where the spectrum decays, and cost a little where it does not."""

    def error(method: str, spectrum: str) -> float:
        a = rotated(SPECTRA[spectrum])
        generator = torch.Generator().manual_seed(2)
        runs = [estimate(method, a, PRODUCTS, generator)[0] - a.trace() for _ in range(100)]
        return float(torch.stack(runs).square().mean().sqrt())

    decaying = [error(method, "squares") for method in ("xtrace", "hutchpp", "hutchinson")]
    assert decaying[0] < decaying[1] < decaying[2] / 10
    assert error("hutchinson", "flat") < error("xtrace", "flat") < error("hutchpp", "flat")


def test_a_single_draw_has_no_error_to_tell() -> None:
    value, variance = traces.mean(torch.tensor([3.0]))
    assert value == 3
    assert variance == torch.inf


def test_answers_without_two_vectors_are_those_of_smaller_sketches() -> None:
    """What the variance of XTrace is made of, against the definition."""
    size, k = 30, 6
    a = rotated(1 / torch.arange(1, size + 1))
    tests = torch.randn(k, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def answer(probe: int, others: list[int]) -> Tensor:
        basis = torch.linalg.qr(a @ tests[others].T)[0]
        rest = tests[probe] - basis @ (basis.T @ tests[probe])
        inside = (basis.T @ a @ basis).trace()
        return inside + (size - len(others)) * (rest @ a @ rest) / rest.square().sum()

    def definition(indices: list[int]) -> Tensor:
        return torch.stack([answer(i, [j for j in indices if j != i]) for i in indices])

    everything = list(range(k))
    single = definition(everything)
    without = [definition([i for i in everything if i != j]).mean() for j in everything]
    inflated = (k - 1) / (k - 3)
    spread = single.var() / k * inflated
    jackknife = torch.stack(without).var(correction=0) * (k - 1) * inflated
    value, variance = traces.xtrace(lambda rows: rows @ a, tests)
    assert torch.allclose(value, single.mean(), rtol=1e-12)
    assert torch.allclose(variance, torch.minimum((2 * spread + jackknife) / 3, 2 * spread))
