"""Loss and accuracy of a model on data."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent

from neuromanifold.capture import call_model, logits_of
from neuromanifold.likelihoods import Likelihood
from neuromanifold.training.batches import Minibatches

__all__ = ["evaluate", "finite"]

AT_ONCE = 1024
"""Samples that go through the model together."""


@torch.no_grad()
def evaluate(
    model: nn.Module, likelihood: Likelihood, data: Minibatches
) -> tuple[float, float | None]:
    """Mean loss in nats per sample, and the share of right predictions, in evaluation mode.

    Returns:
        The loss, NaN or infinite as it comes out; and the share in [0, 1], None where targets are
        not one of finitely many values.
    """
    training = model.training
    model.eval()
    total, right, counted, samples = 0.0, 0, 0, 0
    known = True
    try:
        for inputs, targets, num in data.in_order(AT_ONCE):
            outputs = likelihood.canonical(logits_of(call_model(model, inputs)))
            total += float(likelihood.loss(outputs, targets)) * num
            samples += num
            correct = _correct(likelihood, outputs, targets)
            known = known and correct is not None
            if correct is not None:
                right, counted = right + int(correct.sum()), counted + correct.numel()
    finally:
        model.train(training)
    return total / samples, right / counted if known and counted else None


def _correct(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor | None:
    """Whether the most probable value is the target, at the positions that count."""
    distribution: Distribution = likelihood.distribution(outputs)
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    if not distribution.has_enumerate_support:
        return None
    try:
        correct = distribution.mode == targets
    except NotImplementedError:
        return None
    observed = likelihood.observed(outputs, targets)
    return correct.flatten() if observed is None else correct[observed]


def finite(number: float | None) -> float | None:
    """A number as JSON has it: None if it is NaN or infinite."""
    return number if number is not None and math.isfinite(number) else None
