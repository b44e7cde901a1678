"""Real targets with a fixed or a learned variance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from neuromanifold._typing import Outputs
from neuromanifold.likelihoods._base import ColumnCumulants, at_least_float32, random_device
from neuromanifold.likelihoods._diagonal import DiagonalLikelihood

__all__ = ["Gaussian", "GaussianMeanVariance"]

OutputsT = TypeVar("OutputsT", Tensor, tuple[Tensor, ...])
"""One tensor or a tuple: what comes in goes out."""


@dataclass(frozen=True, eq=False)
class Gaussian(DiagonalLikelihood):
    """Regression with a known noise: mean `(N, *K)`, real targets of the same shape.

    The output Fisher is `1 / variance`, per entry.

    Args:
        variance: of the noise, in squared units of the target: a number, or a tensor `(*K,)`.
        per_event: multiply the variance by the number of event entries. `variance=0.5` then makes
            the loss equal to `nn.MSELoss()`, which averages over entries, up to a constant.

    Example:
        >>> import torch
        >>> Gaussian(variance=0.25).score(torch.zeros(1, 2), torch.tensor([[1.0, -2.0]]))
        tensor([[ 4., -8.]])
    """

    target_values: ClassVar[str] = "finite real numbers"

    variance: float | Tensor = 1.0
    _: KW_ONLY
    per_event: bool = False

    def __post_init__(self) -> None:
        variance = torch.as_tensor(self.variance)
        if variance.requires_grad:
            raise ValueError(
                "Gaussian takes a fixed variance, got a tensor that requires gradients. Use "
                "GaussianMeanVariance() to learn it, or pass variance.detach()."
            )
        if not (torch.isfinite(variance) & (variance > 0)).all():
            raise ValueError(f"variance must be finite and > 0, got {self.variance}.")

    def canonical(self, outputs: Outputs) -> Tensor:
        """The means, once they are known to fit the variance."""
        outputs = super().canonical(outputs)
        shape = torch.as_tensor(self.variance).shape
        if shape and shape != outputs.shape[1:]:
            raise ValueError(
                f"Gaussian has a variance of shape {tuple(shape)}, so it takes outputs of shape "
                f"{('N', *shape)}, got {tuple(outputs.shape)}. Give one variance per event entry, "
                f"or a number."
            )
        return outputs

    def distribution(self, outputs: Outputs) -> Distribution:
        """Independent normal targets."""
        mean = at_least_float32(self.canonical(outputs))
        scale = self._variance(mean).sqrt()
        return Independent(Normal(mean, scale, validate_args=False), mean.ndim - 1)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`(y − mean) / variance`."""
        mean = at_least_float32(self.canonical(outputs).detach())
        return ((targets - mean) / self._variance(mean)).to(outputs.dtype)

    def sample(
        self, outputs: Outputs, num: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Targets `(num, N, *K)`."""
        mean = at_least_float32(self.canonical(outputs).detach())
        return mean + self._variance(mean).sqrt() * _standard_normal(num, mean, generator)

    def _even_targets(
        self, outputs: Tensor, num: int, generator: torch.Generator | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        mean = at_least_float32(outputs)
        return _even_normal(mean, self._variance(mean), num, generator)

    def _variance(self, outputs: Tensor) -> Tensor:
        """Variance of every entry, like `outputs`."""
        scale = math.prod(outputs.shape[1:]) if self.per_event else 1
        variance = torch.as_tensor(self.variance, dtype=outputs.dtype, device=outputs.device)
        return (scale * variance).expand_as(outputs)

    def _information(self, outputs: Tensor) -> Tensor:
        return self._variance(at_least_float32(outputs)).reciprocal()

    def _fourth_cumulants(self, outputs: Tensor, j: Tensor) -> Tensor:
        return torch.zeros_like(j)


@dataclass(frozen=True, eq=False)
class GaussianMeanVariance(DiagonalLikelihood):
    """Regression with a learned noise: real targets `(N, *K)`.

    Outputs are `(N, 2, *K)`, the mean first, or a tuple `(mean, raw)` of two `(N, *K)`; every
    answer that is like the outputs then is a tuple too. The output Fisher is `1 / variance` for the
    mean, and ½ for the log variance or `1 / (2 variance²)` for the variance.

    Args:
        log_variance: whether the second output is the log variance, or the variance itself as in
            `nn.GaussianNLLLoss`.

    Example:
        >>> import torch
        >>> outputs = torch.zeros(1, 2)  # mean 0, variance exp(0), scalar targets
        >>> GaussianMeanVariance().score(outputs, torch.tensor([3.0]))
        tensor([[3., 4.]])
    """

    target_values: ClassVar[str] = "finite real numbers"

    log_variance: bool = True

    def canonical(self, outputs: Outputs) -> Tensor:
        """Mean and second output as one tensor `(N, 2, *K)`."""
        if isinstance(outputs, tuple):
            shapes = [getattr(part, "shape", None) for part in outputs]
            if len(outputs) != 2 or shapes[0] is None or shapes[0] != shapes[1] or not shapes[0]:
                raise ValueError(
                    f"{self!r} takes a tuple of two tensors (N, *K), the mean and the "
                    f"{self._second}, got {len(outputs)} parts of shapes {shapes}."
                )
            return super().canonical(torch.stack(outputs, dim=1))
        outputs = super().canonical(outputs)
        if outputs.ndim < 2 or outputs.shape[1] != 2:
            raise ValueError(
                f"{self!r} takes outputs (N, 2, *K), the mean and the {self._second} on axis 1, or "
                f"a tuple of the two, got shape {tuple(outputs.shape)}."
            )
        return outputs

    def check(self, outputs: Outputs, targets: Tensor) -> None:
        """Refuse variances that are not positive and targets that do not fit: reads values."""
        outputs = self.canonical(outputs)
        if not self.log_variance and not (outputs[:, 1] > 0).all():
            raise ValueError(
                f"{self!r} takes variances > 0, got {outputs[:, 1].min().item():g} at least. Pass "
                f"the raw output through softplus, or use log_variance=True."
            )
        super().check(outputs, targets)

    def distribution(self, outputs: Outputs) -> Distribution:
        """Independent normal targets."""
        mean, variance = self._split(self.canonical(outputs))
        return Independent(Normal(mean, variance.sqrt(), validate_args=False), mean.ndim - 1)

    def score(self, outputs: OutputsT, targets: Tensor) -> OutputsT:
        """`z/σ` for the mean with `z = (y − mean)/σ`; `(z² − 1)/2` for the log variance."""
        stacked = self.canonical(outputs).detach()
        mean, variance = self._split(stacked)
        residual = targets - mean
        excess = (residual**2 / variance - 1) / 2
        second = excess if self.log_variance else excess / variance
        score = torch.stack((residual / variance, second), dim=1)
        return _like(outputs, score.to(stacked.dtype))

    def sample(
        self, outputs: Outputs, num: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Targets `(num, N, *K)`."""
        mean, variance = self._split(self.canonical(outputs).detach())
        return mean + variance.sqrt() * _standard_normal(num, mean, generator)

    def even_scores(
        self,
        outputs: OutputsT,
        num: int,
        *,
        weighted: bool = False,
        generator: torch.Generator | None = None,
    ) -> Iterator[OutputsT]:
        """Scores of targets that point in orthogonal directions from the mean."""
        stacked = self.canonical(outputs)
        for score in super().even_scores(stacked, num, weighted=weighted, generator=generator):
            yield _like(outputs, score)

    def _even_targets(
        self, outputs: Tensor, num: int, generator: torch.Generator | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        return _even_normal(*self._split(outputs), num, generator)

    def fisher_columns(self, outputs: OutputsT) -> Iterator[OutputsT]:
        """One column for the mean and one for the second output of every entry."""
        for column in super().fisher_columns(self.canonical(outputs)):
            yield _like(outputs, column)

    def fisher_product(self, outputs: OutputsT, v: OutputsT) -> OutputsT:
        """Information times `v`, entry by entry."""
        product = super().fisher_product(self.canonical(outputs), _stack(v, outputs))
        return _like(outputs, product)

    def random_signs(
        self, outputs: OutputsT, num: int, *, generator: torch.Generator | None = None
    ) -> Iterator[OutputsT]:
        """Square root of the information, with a random sign on every entry."""
        for u in super().random_signs(self.canonical(outputs), num, generator=generator):
            yield _like(outputs, u)

    def column_cumulants(self, outputs: OutputsT) -> ColumnCumulants:
        """Of `a z + b (z² − 1)`, `48 b² (a² + b²)`: `12 (γ₁² + γ₂²)² − 12 γ₁⁴` for each target."""
        stacked = self.canonical(outputs).detach()
        entries = stacked[:, 0].reshape(len(stacked), -1)  # (N, K), the means
        quartic = entries.new_zeros(2, entries.shape[1], len(stacked))
        quartic[0] = -12
        group = torch.arange(entries.shape[1], device=stacked.device).repeat(2)
        return ColumnCumulants(
            at_least_float32(quartic).flatten(0, 1), group, entries.shape[1], 12.0
        )

    def score_fourth_moment(self, outputs: OutputsT, j: OutputsT) -> Tensor:
        """`E (j · score)⁴`, `(..., N)`; the two outputs of an entry share one target."""
        return super().score_fourth_moment(self.canonical(outputs), _stack(j, outputs))

    @property
    def _second(self) -> str:
        return "log variance" if self.log_variance else "variance"

    def _split(self, stacked: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, each `(N, *K)`."""
        mean, raw = at_least_float32(stacked).unbind(1)
        return mean, raw.exp() if self.log_variance else raw

    def _information(self, outputs: Tensor) -> Tensor:
        _, variance = self._split(outputs)
        second = torch.ones_like(variance) if self.log_variance else variance**-2
        return torch.stack((1 / variance, second / 2), dim=1)

    def _fourth_cumulants(self, outputs: Tensor, j: Tensor) -> Tensor:
        # With z = (y − mean)/σ, j · score = a z + b (z² − 1): its fourth cumulant is below.
        _, variance = self._split(outputs)
        j_mean, j_second = j.unbind(j.ndim - outputs.ndim + 1)
        a2 = j_mean**2 / variance
        b2 = (j_second if self.log_variance else j_second / variance) ** 2 / 4
        return 48 * b2 * (a2 + b2)


def _standard_normal(num: int, mean: Tensor, generator: torch.Generator | None) -> Tensor:
    """Noise `(num, *mean.shape)`."""
    device = random_device(generator, mean)
    shape = (num, *mean.shape)
    return torch.randn(shape, generator=generator, dtype=mean.dtype, device=device).to(mean.device)


def _even_normal(
    mean: Tensor, variance: Tensor, num: int, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normal targets `(N, *K)` in orthogonal directions, up to K of them at a time; signs are one.

    −z beside z would be of no use: the two have the same outer product.
    """
    scale, sign = variance.sqrt(), torch.ones((), dtype=mean.dtype, device=mean.device)
    num_entries = mean[0].numel()
    for start in range(0, num, num_entries):
        together = min(num - start, num_entries)
        # Independent normal vectors: the frame of some has uniform directions, whatever the lengths
        # of others. So each noise is normal, and noises of a frame are orthogonal.
        vectors = _standard_normal(2 * together, mean, generator)
        directions, lengths = vectors.reshape(2, together, len(mean), -1).unbind()
        frame = _orthonormal(directions.movedim(0, -1)).movedim(-1, 0)  # (S, N, K)
        noise = frame * lengths.norm(dim=-1, keepdim=True)
        for z in noise.unbind():
            yield mean + scale * z.reshape(mean.shape), sign


def _orthonormal(vectors: Tensor) -> Tensor:
    """Frames `(N, K, S)` with uniform directions from independent normal vectors."""
    q, r = torch.linalg.qr(vectors)
    # The factorisation fixes signs by its algorithm; the diagonal of R says how.
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1, 1).to(q.dtype)
    return q * signs.unsqueeze(-2)


def _stack(value: OutputsT, outputs: OutputsT) -> Tensor:
    """`value`, like `outputs` or with extra leading axes, as one tensor `(..., N, 2, *K)`."""
    if isinstance(value, tuple):
        return torch.stack(value, dim=value[0].ndim - outputs[0].ndim + 1)
    return value


def _like(outputs: OutputsT, stacked: Tensor) -> OutputsT:
    """A stacked tensor in the kind of `outputs`."""
    if isinstance(outputs, tuple):
        return stacked.unbind(stacked.ndim - outputs[0].ndim)
    return stacked
