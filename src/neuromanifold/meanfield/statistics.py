"""Statistics of the Fisher spectrum of a random network (papers.md §2.5).

The non-zero eigenvalues of F are those of the dual matrix of T samples and C outputs. In a wide
random network its blocks of different outputs vanish, and each output's `(T, T)` block is
`D_st = (1/T) Σ_l (n R_st + 1) q̃_st` over layers of n inputs: R the overlap of their inputs, q̃ that
of the back-propagated errors, the 1 for the bias. Trace, norm and largest eigenvalue follow.
(Karakida, Akaho, Amari, AISTATS 2019, arXiv 1806.01316.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuromanifold._estimate import plain
from neuromanifold.linalg import psd
from neuromanifold.meanfield.recursions import Propagation

__all__ = ["SpectrumStatistics", "spectrum_statistics"]


@dataclass(frozen=True)
class SpectrumStatistics:
    """Predicted or measured statistics of the eigenvalues λ of a Fisher matrix.

    Attributes:
        mean: m_λ, over all P, in nats/parameter².
        second_moment: s_λ, mean of λ².
        largest: λ_max.
        samples: T.
        outputs: C, or how many of them an output Fisher matrix counts.
        num_parameters: P.
        kappa: κ1 and κ2, T times an entry of the dual matrix on and off the diagonal, in units of
            P/M with M the mean width of hidden layers: the mean is `κ1 C/M`. None if measured.
    """

    mean: float
    second_moment: float
    largest: float
    samples: int
    outputs: int
    num_parameters: int
    kappa: tuple[float, float] | None = None

    @property
    def learning_rate_bound(self) -> float:
        """2/λ_max: gradient descent on the mean loss is locally stable below it."""
        return 2 / self.largest if self.largest > 0 else float("inf")

    @property
    def trace(self) -> float:
        """Sum of the eigenvalues, in nats/parameter²."""
        return self.mean * self.num_parameters

    def count_bound(self, threshold: float) -> float:
        """How many eigenvalues can be at least `threshold`: by Markov's inequality and by rank.

        Raises:
            ValueError: If the threshold is not positive.
        """
        if not threshold > 0:
            raise ValueError(f"A threshold of eigenvalues is > 0 nats/parameter², got {threshold}.")
        rank = min(self.samples * self.outputs, self.num_parameters)
        return min(self.trace / threshold, float(rank))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return plain(
            {
                "mean": self.mean,
                "second_moment": self.second_moment,
                "largest": self.largest,
                "learning_rate_bound": self.learning_rate_bound,
                "samples": self.samples,
                "outputs": self.outputs,
                "num_parameters": self.num_parameters,
                "kappa": self.kappa,
            }
        )

    def __str__(self) -> str:
        return (
            f"mean {self.mean:.4g}, second moment {self.second_moment:.4g}, largest "
            f"{self.largest:.4g} nats/parameter²; gradient descent is stable below "
            f"{self.learning_rate_bound:.4g}; at most {self.count_bound(self.largest / 10):.0f} "
            f"of {self.num_parameters:,} eigenvalues are above a tenth of the largest"
        )


def spectrum_statistics(
    propagation: Propagation,
    samples: int | None = None,
    outputs: int | None = None,
    *,
    biased: bool | Sequence[bool] = True,
    fan_in: Sequence[int] | None = None,
    num_parameters: int | None = None,
    output_fisher: Tensor | None = None,
) -> SpectrumStatistics:
    """Predict mean, second moment and largest eigenvalue of a random network's Fisher matrix.

    Of regression with unit noise; other likelihoods enter by the mean Fisher matrix of their
    outputs. With one activity and one overlap, all samples are alike (κ1, κ2); with those of a data
    set, `propagate(..., activity=A, overlap=R)` for `(T,)` and `(T, T)`, its own dual matrix is
    used, which is what finite data need. Products of the errors of different outputs, of order
    1/√width, are left out: where samples hardly overlap, the largest eigenvalue of networks of
    1,000 units is measured up to a tenth above (`python -m benchmarks.meanfield`).

    Args:
        propagation: with widths.
        samples: T, if the propagation has one activity for all.
        outputs: C; the last width by default.
        biased: whether layers have biases.
        fan_in: of each layer, if it is not the width of the one before, as in convolutions.
        num_parameters: P, likewise.
        output_fisher: mean over samples, `(C, C)`; the identity by default.

    Returns:
        The statistics, with bounds on learning rate and number of large eigenvalues.

    Raises:
        ValueError: If widths or the number of samples are missing or at odds.

    Example:
        >>> import neuromanifold as nm
        >>> net = nm.meanfield.propagate("tanh", weight_variance=1.0, widths=[100, 100, 100, 2])
        >>> nm.meanfield.spectrum_statistics(net, samples=10).num_parameters
        20402
    """
    depth = propagation.depth
    widths = propagation.widths
    if widths is None and (fan_in is None or num_parameters is None or outputs is None):
        raise ValueError(
            "The spectrum depends on the widths: propagate(..., widths=[784, 1000, 10]) counts the "
            "input, all hidden layers, and the outputs."
        )
    biases = [biased] * depth if isinstance(biased, bool) else list(biased)
    inputs = list(widths[:-1] if fan_in is None and widths is not None else fan_in or ())
    for name, given in (("biased", biases), ("fan_in", inputs)):
        if len(given) != depth:
            raise ValueError(f"{name} is one per layer: {depth} here, got {len(given)}.")
    if num_parameters is None:
        assert widths is not None
        num_parameters = sum(
            out * (n + b) for out, n, b in zip(widths[1:], inputs, biases, strict=True)
        )
    if outputs is None:
        outputs = widths[-1] if widths is not None else 0
    identical = propagation.activity.dim() == 1
    num_samples = samples if identical else propagation.activity.shape[1]
    if num_samples is None or num_samples < 1 or (samples or num_samples) != num_samples:
        raise ValueError(
            f"The largest eigenvalue depends on the number of samples: give samples=T >= 1, or "
            f"activities of {num_samples} samples alone; got samples={samples}."
        )
    if output_fisher is None:
        output_fisher = torch.eye(outputs).to(propagation.activity)
    own, pairs = _terms(propagation, inputs, biases)
    if identical:
        spectrum = _of_alike(own, pairs, num_samples)
    else:
        dual = pairs / num_samples
        dual.diagonal().copy_(own / num_samples)
        spectrum = dual.trace(), dual.square().sum(), psd.eigenvalues(dual)[-1]
        pairs = (pairs.sum() - pairs.trace()) / max(num_samples * (num_samples - 1), 1)
    trace, squares, largest = (float(value) for value in spectrum)
    fisher = output_fisher.to(own)
    width = num_parameters / max(_hidden_width(widths, inputs), 1)
    return SpectrumStatistics(
        mean=trace * float(fisher.trace()) / num_parameters,
        second_moment=squares * float(fisher.square().sum()) / num_parameters,
        largest=largest * float(psd.eigenvalues(fisher)[-1]),
        samples=num_samples,
        outputs=len(fisher),
        num_parameters=num_parameters,
        kappa=(float(own.mean()) / width, float(pairs) / width),
    )


def _terms(
    propagation: Propagation, fan_in: list[int], biased: list[bool]
) -> tuple[Tensor, Tensor]:
    """`Σ_l (n A + 1) q̃` of samples, and the same of pairs."""
    own = torch.zeros_like(propagation.error[0])
    pairs = torch.zeros_like(propagation.error_overlap[0])
    for layer, (n, bias) in enumerate(zip(fan_in, biased, strict=True)):
        own += (n * propagation.activity[layer] + bias) * propagation.error[layer]
        pairs += (n * propagation.overlap[layer] + bias) * propagation.error_overlap[layer]
    return own, pairs


def _of_alike(own: Tensor, pair: Tensor, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Trace, squared norm and largest eigenvalue of `(own - pair) + pair 1 1ᵀ`, over T."""
    trace = own
    squares = (own**2 + (samples - 1) * pair**2) / samples
    # A negative overlap leaves the largest eigenvalue to the other T - 1 vectors.
    largest = torch.maximum(own + (samples - 1) * pair, own - pair) / samples
    return trace, squares, (own / samples if samples == 1 else largest)


def _hidden_width(widths: tuple[int, ...] | None, fan_in: list[int]) -> float:
    """M: the mean over hidden layers."""
    hidden = list(widths[1:-1]) if widths is not None else fan_in[1:]
    return sum(hidden) / len(hidden) if hidden else 1.0
