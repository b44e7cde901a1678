"""Bad input is refused at the door, with a sentence that says what to do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as td

from neuromanifold.errors import NonFiniteError, UnsupportedError
from neuromanifold.likelihoods import (
    Bernoulli,
    Categorical,
    FromDistribution,
    Gaussian,
    GaussianMeanVariance,
    Poisson,
)

ZEROS = torch.zeros
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("likelihood", "outputs", "error", "message"),
    [
        (
            Categorical(),
            (ZEROS(2, 3), ZEROS(2, 3)),
            TypeError,
            "one output tensor.*tuple of 2.*forw",
        ),
        (Categorical(), {"logits": ZEROS(2, 3)}, TypeError, "one output tensor.*got dict.*forward"),
        (Categorical(), ZEROS(2, 3).long(), TypeError, "floating-point outputs, got torch.int64"),
        (Bernoulli(), ZEROS(()), ValueError, "without axes.*not their loss"),
        (Categorical(), ZEROS(2), ValueError, r"class axis after the sample axis.*\(2,\)"),
        (Categorical(class_axis=0), ZEROS(2, 3), ValueError, "class axis after the sample axis"),
        (Categorical(class_axis=2), ZEROS(2, 3), ValueError, "class axis after the sample axis"),
        (Categorical(), ZEROS(2, 1), ValueError, r"two classes or more.*Use Bernoulli\(\)"),
        (Categorical(0), ZEROS(2, 3), UnsupportedError, "also one of the 3 classes.*masked_fill"),
        (Gaussian(torch.ones(3)), ZEROS(2, 4), ValueError, r"\(3,\).*outputs of shape \('N', 3\)"),
        (GaussianMeanVariance(), ZEROS(4, 3), ValueError, r"\(N, 2, \*K\).*got shape \(4, 3\)"),
        (GaussianMeanVariance(), (ZEROS(4),), ValueError, "tuple of two tensors.*got 1 parts"),
        (GaussianMeanVariance(), (ZEROS(4), ZEROS(4, 1)), ValueError, "mean and the log variance"),
        (GaussianMeanVariance(), (ZEROS(4), 1.0), ValueError, "tuple of two tensors"),
    ],
)
def test_outputs(likelihood, outputs, error, message) -> None:
    with pytest.raises(error, match=message):
        likelihood.canonical(outputs)


@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets", "error", "message"),
    [
        (Categorical(), ZEROS(2, 3), [0, 1], TypeError, "targets as a tensor, got list of 2"),
        (Categorical(), ZEROS(2, 3), None, TypeError, "targets as a tensor, got NoneType"),
        (Categorical(), ZEROS(2, 3), LABELS[:, None], ValueError, r"shape \(2,\).*got \(2, 1\)"),
        (Categorical(), ZEROS(2, 3, 2), LABELS, ValueError, r"shape \(2, 3\).*got \(2,\)"),
        (Categorical(), ZEROS(2, 3), ZEROS(2), TypeError, "integer class labels.*float32"),
        (Categorical(), ZEROS(2, 3), LABELS.bool(), TypeError, "integer class labels.*bool"),
        (Categorical(), ZEROS(2, 3), LABELS + 2, ValueError, "from 0 to 2.*from 2 to 3"),
        (Categorical(), ZEROS(2, 3), LABELS - 1, ValueError, r"or -100 for.*from -1 to 0"),
        (Bernoulli(), ZEROS(2), torch.tensor([0.0, 0.5]), ValueError, r"0 or 1.*in \[0, 0.5\]"),
        (Bernoulli(), ZEROS(2, 1), ZEROS(2), ValueError, r"\(2, 1\).*not broadcast"),
        (Gaussian(), ZEROS(2), torch.tensor([0.0, math.nan]), NonFiniteError, "NaN or infinite"),
        (Gaussian(), ZEROS(2), torch.tensor([0.0, math.inf]), NonFiniteError, "finite real"),
        (Gaussian(), ZEROS(2), ZEROS(2, device="meta"), ValueError, "on cpu .* on meta.*Move"),
        (GaussianMeanVariance(), ZEROS(3, 2), ZEROS(3, 2), ValueError, r"shape \(3,\)"),
        (GaussianMeanVariance(False), ZEROS(3, 2), ZEROS(3), ValueError, "> 0.*softplus"),
        (Poisson(), ZEROS(2), torch.tensor([1.0, 1.5]), ValueError, "counts 0, 1, 2"),
        (Poisson(), ZEROS(2), torch.tensor([1, -1]), ValueError, r"counts.*\[-1, 1\]"),
        (
            FromDistribution(lambda f: td.Gamma(f.exp(), 1.0)),
            ZEROS(2),
            torch.tensor([-1.0, 1.0]),
            ValueError,
            "support of the distribution",
        ),
        (
            FromDistribution(lambda f: td.Normal(f.mean(), 1.0)),
            ZEROS(2),
            ZEROS(2),
            ValueError,
            r"starts with the 2 samples, got batch shape \(\)",
        ),
        (FromDistribution(torch.exp), ZEROS(2), ZEROS(2), TypeError, "must return.*got Tensor"),
    ],
)
def test_targets(likelihood, outputs, targets, error, message) -> None:
    with pytest.raises(error, match=message):
        likelihood.check(outputs, targets)


@pytest.mark.parametrize("variance", [0.0, -1.0, math.inf, math.nan, torch.tensor([1.0, 0.0])])
def test_variance_must_be_positive(variance) -> None:
    with pytest.raises(ValueError, match="finite and > 0, got"):
        Gaussian(variance)


def test_variance_is_not_learned() -> None:
    with pytest.raises(ValueError, match=r"GaussianMeanVariance\(\) to learn it"):
        Gaussian(torch.ones(2, requires_grad=True))


@pytest.mark.parametrize(
    ("likelihood", "outputs"),
    [
        (FromDistribution(lambda f: td.Gamma(f.exp(), 1.0)), ZEROS(2)),
        (FromDistribution(lambda f: td.Independent(td.Laplace(f, 1.0), 1)), ZEROS(2, 2)),
    ],
)
def test_fourth_moment_without_a_closed_form_names_sampling(likelihood, outputs) -> None:
    with pytest.raises(UnsupportedError, match="sampling"):
        likelihood.score_fourth_moment(outputs, outputs)


@pytest.mark.parametrize(
    ("likelihood", "expected"),
    [
        (Categorical(), "Categorical(ignore_index=-100, class_axis=-1)"),
        (Bernoulli(), "Bernoulli()"),
        (Gaussian(0.5), "Gaussian(variance=0.5, per_event=False)"),
        (GaussianMeanVariance(), "GaussianMeanVariance(log_variance=True)"),
        (Poisson(), "Poisson()"),
    ],
)
def test_repr_is_the_constructor(likelihood, expected) -> None:
    assert repr(likelihood) == expected
