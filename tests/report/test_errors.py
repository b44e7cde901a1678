"""The error bars that an analysis states, against samples left out."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import neuromanifold as nm
from neuromanifold.report import collect
from neuromanifold.report.estimator_errors import estimator_errors

N = 48
GROUPS = 12
"""With 48 samples in one batch, sample i is in group i modulo 12."""

KINDS = ("Diagonal", "UnitWise", "Kronecker")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()


def inputs(num: int = N) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num, 3, generator=generator, dtype=torch.float64)


def analysis_of(x: Any, **options: Any) -> dict[str, Any]:
    return collect(network(), nm.Categorical(), x, name="network", **options)


def measured(x: Tensor, dampings: Tensor) -> dict[str, float]:
    """Numbers of an analysis, one by one, from matrices as they are written down."""
    model, found = network(), {}

    def dense(structure: nm.Structure) -> nm.FisherOperator:
        return nm.fisher(model, nm.Categorical(), x, structure, estimator=nm.Exact())

    F = dense(nm.Dense())
    matrix = F.to_dense()
    values = torch.linalg.eigvalsh(matrix).flip(0)
    found["trace"] = matrix.trace()
    found["frobenius"] = matrix.norm()
    found["largest_eigenvalue"] = values[0]
    found["max_learning_rate"] = 2 / values[0]
    found["stable_rank"] = matrix.trace() / values[0]
    found["participation_ratio"] = matrix.trace() ** 2 / matrix.square().sum()
    found |= {f"leading {i}": value for i, value in enumerate(values[:4])}
    found |= {
        f"dimension {i}": (values / (values + d)).sum() for i, d in enumerate(dampings.tolist())
    }
    for block in ("0", "2"):
        part = F.block(block).to_dense()
        found[f"{block} trace"] = part.trace()
        found[f"{block} share"] = part.trace() / matrix.trace()
        found[f"{block} trace_per_parameter"] = part.trace() / len(part)
        found[f"{block} largest_eigenvalue"] = torch.linalg.eigvalsh(part)[-1]
    for name, entries in F.diagonal().items():
        found[f"{name} mean"] = entries.mean()
        entries = entries.flatten().sort().values
        for q in ("0.05", "0.5", "0.95"):
            found[f"{name} {q}"] = entries[int(float(q) * len(entries))]
    for kind in (*KINDS, "BlockDiagonal"):
        S = dense(getattr(nm, kind)())
        found[f"{kind} whole"] = (matrix - S.to_dense()).norm() / matrix.norm()
        for block in ("0", "2"):
            full, part = F.block(block).to_dense(), S.block(block).to_dense()
            found[f"{kind} {block}"] = (full - part).norm() / full.norm()
    return {name: float(value) for name, value in found.items()}


def stated(analysis: dict[str, Any]) -> Iterator[tuple[str, float | None]]:
    """The standard errors of an analysis, under the same names."""
    for name, error in analysis["stderr"].items():
        if name not in ("whole_errors", "effective_dimension"):
            yield name, error
    for kind, error in analysis["stderr"]["whole_errors"].items():
        yield f"{kind} whole", error
    for i, error in enumerate(analysis["spectrum"]["stderr"]["leading"][:4]):
        yield f"leading {i}", error
    for i, point in enumerate(analysis["effective_dimension"]):
        yield f"dimension {i}", point["stderr"]
    for layer in analysis["layers"]:
        for key, error in layer["stderr"].items():
            structure = next((kind for kind in KINDS if key == f"{kind.lower()}_error"), None)
            block = layer["name"]
            yield (f"{structure} {block}" if structure else f"{block} {key}"), error
    for group in analysis["diagonal"]:
        yield f"{group['parameter']} mean", group["stderr"]["mean"]
        for q in ("0.05", "0.5", "0.95"):
            yield f"{group['parameter']} {q}", group["stderr"]["quantiles"][q]


def jackknife(x: Tensor, groups: Tensor, dampings: Tensor) -> dict[str, float]:
    """Standard errors from what is measured without each group."""
    count = int(groups.max()) + 1
    left_out = [measured(x[groups != group], dampings) for group in range(count)]
    numbers = {
        name: torch.tensor([found[name] for found in left_out], dtype=torch.float64)
        for name in left_out[0]
    }
    return {
        name: float(of.std(correction=0)) * math.sqrt(count - 1) for name, of in numbers.items()
    }


@pytest.fixture(scope="module")
def analysis() -> dict[str, Any]:
    return analysis_of(inputs())


@pytest.fixture(scope="module")
def dampings(analysis: dict[str, Any]) -> Tensor:
    points = analysis["effective_dimension"]
    return torch.tensor([point["damping"] for point in points], dtype=torch.float64)


def test_standard_errors_are_those_of_leaving_each_sample_out(
    analysis: dict[str, Any], dampings: Tensor
) -> None:
    """Exact for means and for the effective dimension, elsewhere to first order in 1/√N."""
    expected = jackknife(inputs(), torch.arange(N), dampings)
    exact = ("trace", "trace_per_parameter", "mean", "dimension")
    compared = 0
    for name, error in stated(analysis):
        if name.startswith("Kronecker"):
            continue
        assert error is not None, name
        first_order = not any(word in exact for word in name.split())
        tolerance = 2.5 / N**0.5 if first_order else 1e-6
        assert error == pytest.approx(expected[name], rel=tolerance), name
        compared += 1
    assert compared > 60


def test_the_errors_of_kronecker_are_those_of_leaving_groups_out(
    analysis: dict[str, Any], dampings: Tensor
) -> None:
    expected = jackknife(inputs(), torch.arange(N) % GROUPS, dampings)
    errors = dict(stated(analysis))
    for name in ("Kronecker whole", "Kronecker 0", "Kronecker 2"):
        assert errors[name] == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batches_change_nothing(analysis: dict[str, Any], batch_size: int) -> None:
    """But for who is left out together: batches of seven have other groups."""
    loader = DataLoader(TensorDataset(inputs()), batch_size=batch_size)
    errors = dict(stated(analysis_of(loader)))
    for name, error in stated(analysis):
        if batch_size == 1 or not name.startswith("Kronecker"):
            assert errors[name] == pytest.approx(error, rel=1e-6), name


def test_sampled_labels_have_the_larger_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = dict(stated(analysis_of(inputs(300))))
    monkeypatch.setattr(sys.modules[collect.__module__], "MAX_EXACT_ROWS", 10)
    sampled = analysis_of(inputs(300), generator=torch.Generator().manual_seed(0))
    assert sampled["estimator"] == "MonteCarlo(samples=1)"
    errors = dict(stated(sampled))
    for name in ("trace", "frobenius", "0 trace", "2 trace", "0.weight mean", "2.bias mean"):
        assert errors[name] > exact[name]


def test_single_entries_are_as_sure_as_the_closed_form_says(analysis: dict[str, Any]) -> None:
    diagonal = nm.variance.diagonal(
        network(), nm.Categorical(), inputs(), estimator=nm.Exact()
    ).relative
    for group in analysis["diagonal"]:
        entries = diagonal[group["parameter"]].flatten().sort().values
        assert group["median_relative_error"] == pytest.approx(
            float(entries[(len(entries) - 1) // 2]), rel=1e-6
        )


def test_one_sample_says_nothing_of_others() -> None:
    alone = analysis_of(inputs(1))
    assert {error for _, error in stated(alone)} == {None}
    assert {row["relative_error"] for row in alone["estimators"]["rows"]} == {None}
    assert {group["median_relative_error"] for group in alone["diagonal"]} == {None}


def test_large_blocks_are_measured_by_their_rows(
    analysis: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[collect.__module__], "LARGEST_DENSE", 0)
    errors = dict(stated(analysis_of(inputs())))
    for name, error in stated(analysis):
        assert errors[name] == pytest.approx(error, rel=1e-6), name


def test_what_takes_too_long_has_no_error_bar_and_says_so(
    analysis: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[collect.__module__], "LARGEST_GRADIENTS", 0)
    monkeypatch.setattr(sys.modules[estimator_errors.__module__], "MOST_ROWS", 10)
    quick = analysis_of(inputs())
    assert quick["whole_errors"] == pytest.approx(analysis["whole_errors"])
    assert quick["stderr"]["whole_errors"]["Kronecker"] is None
    assert quick["estimators"] is None
    kronecker, estimators = quick["notes"]
    assert kronecker.startswith("The errors of Kronecker have no error bars")
    assert estimators.startswith("Estimators were not compared: that takes 144 gradients")


def test_estimators_are_those_of_the_comparison(analysis: dict[str, Any]) -> None:
    comparison = nm.variance.compare(network(), nm.Categorical(), inputs())
    rows = [row for row in comparison.rows if row.kind != "parameter"]
    assert len(analysis["estimators"]["rows"]) == len(rows) == 9
    for stated_row, row in zip(analysis["estimators"]["rows"], rows, strict=True):
        assert stated_row["estimator"] == row.estimator
        assert stated_row["relative_error"] == pytest.approx(row.stderr.median)
    advice = analysis["estimators"]["advice"]
    assert [each["reason"] for each in advice] == [each.reason for each in comparison.advice]


@pytest.mark.parametrize(("logit", "dtype"), [(95.0, torch.float32), (500.0, torch.float64)])
def test_very_little_information_is_measured_like_any(logit: float, dtype: torch.dtype) -> None:
    """Squares of its eigenvalues, and dampings far below them, are zero in these precisions."""
    model = network()
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([logit, 0.0, 0.0]))
    analysis = collect(model.to(dtype), nm.Categorical(), inputs().to(dtype), name="sure")
    json.dumps(analysis, allow_nan=False)
    assert analysis["trace"] > 0
    if dtype == torch.float32:  # the square of the other is no number in double precision
        assert analysis["stderr"]["max_learning_rate"] > 0
    assert all(group["median_relative_error"] > 0.01 for group in analysis["diagonal"])
    first, last = (analysis["effective_dimension"][i]["value"] for i in (0, -1))
    assert 1 < first < N * 3
    assert 0 < last < 1


def test_a_distribution_without_an_exact_fisher_is_measured_from_labels() -> None:
    laplace = nm.FromDistribution(
        lambda f: torch.distributions.Independent(torch.distributions.Laplace(f, 1.0), 1)
    )
    analysis = collect(network(), laplace, inputs(), name="laplace")
    assert analysis["estimator"].startswith("MonteCarlo")
    assert analysis["stderr"]["trace"] > 0
    assert any(
        "has no exact form" in note and "by 10 for each" in note for note in analysis["notes"]
    )


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="The batch has no samples"):
        analysis_of(inputs(0))
