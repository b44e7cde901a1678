"""A torch loss and its likelihood have the same gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from neuromanifold.errors import UnsupportedError
from neuromanifold.likelihoods import Likelihood, from_loss


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def difference(likelihood: Likelihood, outputs: list[Tensor], targets: Tensor) -> Tensor:
    """Loss at the first outputs less the loss at the second: constants cancel."""
    first, second = (likelihood.loss(f, targets) for f in outputs)
    return first - second


COUNTS = torch.tensor([[0, 2, 1], [3, 0, 1]], dtype=torch.float64)
LABELS = torch.tensor([[0, 3, 1], [-100, 2, 2]])


@pytest.mark.parametrize(
    ("kind", "shape", "targets"),
    [
        (nn.CrossEntropyLoss, (2, 4, 3), LABELS),
        (nn.CrossEntropyLoss, (2, 4), LABELS[:, 1]),
        (nn.BCEWithLogitsLoss, (2, 3), COUNTS.clamp(max=1)),
        (nn.MSELoss, (2, 3), COUNTS),
        (nn.MSELoss, (2,), COUNTS[:, 1]),
        (nn.PoissonNLLLoss, (2, 3), COUNTS),
    ],
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_is_the_torch_loss_up_to_a_constant(kind, shape, targets, reduction) -> None:
    outputs = list(randn(2, *shape))
    loss = kind(reduction=reduction)
    likelihood = from_loss(loss)
    expected = loss(outputs[0], targets) - loss(outputs[1], targets)
    num_samples = len(targets)
    if reduction == "sum":
        expected = expected / num_samples
    elif kind is not nn.MSELoss:  # whose average over entries is part of the variance
        expected = expected * (targets != -100).sum() / num_samples
    torch.testing.assert_close(difference(likelihood, outputs, targets), expected)


def test_mean_squared_error_differs_by_the_documented_constant() -> None:
    outputs, targets = randn(2, 5), COUNTS[:, :1].expand(2, 5)
    loss = nn.MSELoss()
    constant = 5 / 2 * torch.tensor(torch.pi * 5).log()  # K/2 · log(2π σ²) with σ² = K/2
    torch.testing.assert_close(
        from_loss(loss).loss(outputs, targets) - constant.double(), loss(outputs, targets)
    )


def test_gaussian_negative_log_likelihood() -> None:
    means, variances = randn(2, 2, 3), randn(2, 2, 3).exp()
    loss = nn.GaussianNLLLoss(reduction="sum")
    expected = loss(means[0], COUNTS, variances[0]) - loss(means[1], COUNTS, variances[1])
    outputs = list(zip(means, variances, strict=True))
    torch.testing.assert_close(difference(from_loss(loss), outputs, COUNTS), expected / 2)


def test_ignore_index_is_kept() -> None:
    likelihood = from_loss(nn.CrossEntropyLoss(ignore_index=255))
    assert repr(likelihood) == "Categorical(ignore_index=255, class_axis=1)"


class Focal(nn.CrossEntropyLoss):
    """A loss of its own."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input, target) ** 2


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss(weight=torch.ones(3)), r"weight.*Categorical\(class_axis=1\)"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), r"label_smoothing=0.1.*Categorical"),
        (nn.BCEWithLogitsLoss(weight=torch.ones(3)), r"\(weight=.*Bernoulli\(\)"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), r"pos_weight.*Bernoulli\(\)"),
        (nn.PoissonNLLLoss(log_input=False), r"log_input=False.*log rates"),
        (nn.L1Loss(), r"L1Loss.*nn\.MSELoss.*FromDistribution"),
        (Focal(), r"Focal.*FromDistribution"),
        (nn.functional.cross_entropy, r"cross_entropy.*modules nn\.CrossEntropyLoss"),
    ],
)
def test_what_is_no_likelihood_is_refused(loss: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        from_loss(loss)
