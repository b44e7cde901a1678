"""Trace, diagonal, log-determinant, density and summary against prescribed spectra."""

from __future__ import annotations

import math

import pytest
import torch

import neuromanifold as nm
from neuromanifold.errors import TooLargeError

SIZE = 600
HARMONIC = 1 / torch.arange(1, SIZE + 1).double()
RUNS = 200


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coverage(estimates: list[nm.Estimate], truth: torch.Tensor) -> float:
    """How often intervals of 95 % hold."""
    ends = [estimate.interval() for estimate in estimates]
    return float(
        torch.stack([(low <= truth) & (truth <= high) for low, high in ends]).double().mean()
    )


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_traces_and_their_errors(pair, method):
    F, exact = pair(HARMONIC)
    random = generator()
    found = [nm.spectral.trace(F, method, generator=random) for _ in range(RUNS)]
    assert F.products == RUNS * 64
    assert F.calls <= 2 * RUNS
    values = torch.stack([estimate.value for estimate in found])
    assert abs(values.mean() - exact.trace()) < 4 * values.std() / math.sqrt(RUNS)
    assert 0.92 <= coverage(found, exact.trace()) <= 0.98
    assert found[0].draws == 64


def test_the_diagonal_and_its_error(pair):
    F, exact = pair(HARMONIC)
    random = generator()
    found = [nm.spectral.diagonal(F, generator=random) for _ in range(RUNS)]
    for name, truth in exact.diagonal().items():
        values = torch.stack([estimate.value[name] for estimate in found])
        stderr = values.std(dim=0) / math.sqrt(RUNS)
        assert ((values.mean(dim=0) - truth).abs() < 5.5 * stderr).all()  # 600 entries
        low, high = zip(
            *(
                (
                    estimate.value[name] - 1.96 * estimate.stderr[name],
                    estimate.value[name] + 1.96 * estimate.stderr[name],
                )
                for estimate in found
            ),
            strict=True,
        )
        held = ((torch.stack(low) <= truth) & (truth <= torch.stack(high))).double().mean()
        assert 0.92 <= held <= 0.98


def test_the_log_determinant_and_its_errors(pair):
    F, exact = pair(HARMONIC)
    damping = 0.01
    truth, random = exact.logdet(damping=damping), generator()
    found = [
        nm.spectral.logdet(F, damping=damping, probes=12, steps=10, generator=random)
        for _ in range(RUNS)
    ]
    assert F.calls == RUNS * 10
    values = torch.stack([estimate.value for estimate in found])
    steps = found[0].error("steps")
    assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(RUNS) + steps
    assert 0.92 <= coverage(found, truth) <= 0.98


def test_few_steps_are_part_of_the_error(pair):
    F, exact = pair(HARMONIC)
    truth = exact.logdet(damping=1e-5)
    rough, fine = (
        nm.spectral.logdet(F, damping=1e-5, probes=8, steps=steps, generator=generator())
        for steps in (4, 64)
    )
    assert rough.error("steps") > 10 * fine.error("steps")
    assert (rough.value - truth).abs() < 2 * rough.stderr
    assert (fine.value - truth).abs() < 4 * fine.stderr


def test_a_density_sums_up_polynomials_exactly(pair):
    F, exact = pair(HARMONIC)
    found = nm.spectral.density(F, probes=4, steps=3, generator=generator())
    signs = torch.randint(2, (4, SIZE), generator=generator()).double() * 2 - 1
    matrix, power = exact.to_dense(), signs
    for degree in range(6):
        expected = (signs * power).sum(dim=1).mean()
        total = found.total(lambda values, degree=degree: values**degree).value
        assert torch.allclose(total, expected, rtol=1e-11)
        power = power @ matrix


def test_a_density_is_that_of_the_eigenvalues(pair):
    F, exact = pair(HARMONIC)
    found, truth = (
        nm.spectral.density(F, probes=32, steps=64, generator=generator()),
        nm.spectral.density(exact),
    )
    assert not found.exact
    assert truth.exact
    grid = torch.logspace(-3.5, 0.5, 81)
    for of in ("smoothed", "cumulative"):
        estimate, expected = getattr(found, of)(grid), getattr(truth, of)(grid)
        assert not expected.stderr.any()
        slack = 0.02 * expected.value.max()  # what 64 nodes cannot resolve of 600
        assert ((estimate.value - expected.value).abs() < 4 * estimate.stderr + slack).all()
    heights = truth.smoothed(grid, 0.1).value
    assert torch.allclose(
        torch.trapezoid(heights, grid.log10().double()), torch.ones(()).double(), atol=1e-3
    )
    linear = torch.linspace(-1, 2, 3001)
    heights = truth.smoothed(linear, 0.05, decades=False).value
    assert torch.allclose(
        torch.trapezoid(heights, linear.double()), torch.ones(()).double(), atol=1e-3
    )


SPECTRA = {
    "harmonic": HARMONIC,
    "outliers": torch.cat([torch.tensor([5.0, 5.0, 4.0]), 0.1 * torch.linspace(0, 1, SIZE - 3)]),
}


@pytest.mark.parametrize(("name", "probes"), [("harmonic", 48), ("outliers", 24)])
def test_a_summary_and_its_errors(pair, name, probes):
    F, exact = pair(SPECTRA[name])
    truth = nm.spectral.summary(exact, damping=0.01)
    assert truth.method == "all eigenvalues"
    assert all(number.draws == 0 and number.stderr == 0 for number in truth.numbers.values())
    random, held = generator(), dict.fromkeys(truth.numbers, 0)
    for _ in range(RUNS):
        found = nm.spectral.summary(F, damping=0.01, probes=probes, steps=6, generator=random)
        for quantity, number in found.numbers.items():
            low, high = number.interval()
            held[quantity] += bool(low <= truth.numbers[quantity].value <= high)
    for quantity, count in held.items():
        assert count >= 0.92 * RUNS, quantity


def test_numbers_of_a_summary(pair):
    _, exact = pair(HARMONIC)
    found = nm.spectral.summary(exact, damping=0.5)
    values = torch.linalg.eigvalsh(exact.to_dense())
    expected = {
        "trace": values.sum(),
        "norm": values.norm(),
        "effective_dimension": (values / (values + 0.5)).sum(),
        "participation_ratio": values.sum() ** 2 / values.square().sum(),
        "stable_rank": values.sum() / values[-1],
        "condition_number": (values[-1] + 0.5) / (values[0] + 0.5),
        "largest_eigenvalue": values[-1],
        "learning_rate_bound": 2 / values[-1],
    }
    assert found.numbers.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found.numbers[name].value, value, rtol=1e-10), name
    assert found.to_dict()["trace"]["value"] == pytest.approx(float(values.sum()))
    assert "learning rate bound" in str(found)


def test_what_makes_no_sense_is_refused(pair):
    F, _ = pair(HARMONIC)
    for call, message in (
        (lambda: nm.spectral.trace(F, "exact"), "method is"),
        (lambda: nm.spectral.trace(F, "xtrace", probes=4), ">= 6"),
        (lambda: nm.spectral.trace(F, "hutch++", probes=601), "more than the 600 parameters"),
        (lambda: nm.spectral.diagonal(F, probes=0), "probes is a whole number"),
        (lambda: nm.spectral.density(F, steps=0), "steps is a whole number"),
        (lambda: nm.spectral.logdet(F, damping=0.0), "damping"),
        (lambda: nm.spectral.summary(F, damping=math.nan), "damping"),
        (lambda: nm.spectral.extremes(F, 601), "There are 600"),
        (lambda: nm.spectral.extremes(F, tol=0), "tol"),
        (lambda: nm.spectral.density(F, 2, 4).smoothed(torch.zeros(3)), "decades"),
        (lambda: nm.spectral.density(F, 2, 4).smoothed(torch.ones(3), 0), "width"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TooLargeError, match="fewer probes"):
        nm.spectral.density(F, probes=20_000, steps=SIZE)
