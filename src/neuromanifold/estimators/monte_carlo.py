"""The Monte-Carlo Fisher: scores of labels drawn from the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from neuromanifold._typing import Params
from neuromanifold.errors import UnsupportedError
from neuromanifold.estimators._base import Estimator
from neuromanifold.estimators.moments import Moments
from neuromanifold.likelihoods import Likelihood

__all__ = ["MonteCarlo"]

Labels: TypeAlias = Literal["independent", "stratified", "weighted"]


@dataclass(frozen=True, repr=False)
class MonteCarlo(Estimator):
    """Unbiased: `samples` labels per input are drawn from the model, one sweep each.

    At the same cost, labels may be drawn so that the Fisher varies less:

    - "independent": one by one, for any likelihood;
    - "stratified": evenly, so that a class of probability p is ⌊s p⌋ or ⌈s p⌉ of s labels, and
      Gaussian targets are in orthogonal directions; not for `Poisson` and other infinite supports;
    - "weighted": evenly, but in proportion to what a label adds to the trace of the output Fisher,
      `p_y ‖score_y‖²`, its score scaled to make up for that; for `Categorical` and finite supports.

    Once a classifier is trained, most of the Fisher information is in labels that are hardly ever
    drawn. "weighted" draws these: there it varies several times less than random signs.

    Args:
        samples: labels for each input.
        labels: how they are drawn.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(3, 4), torch.randn(8, 3)
        >>> rng = torch.Generator().manual_seed(0)
        >>> F = nm.fisher(model, nm.Categorical(), x, estimator=nm.MonteCarlo(2), generator=rng)
        >>> F.num_samples
        8
        >>> nm.MonteCarlo(4, labels="weighted")
        MonteCarlo(samples=4, labels='weighted')
    """

    samples: int = 1
    labels: Labels = "independent"
    random = True

    @property
    def draws(self) -> int:
        """Labels for each input."""
        return self.samples

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"MonteCarlo draws at least 1 label per input, got {self.samples}.")
        if self.labels not in get_args(Labels):
            raise ValueError(f"labels is one of {list(get_args(Labels))}, got {self.labels!r}.")

    def __repr__(self) -> str:
        labels = "" if self.labels == "independent" else f", labels={self.labels!r}"
        return f"MonteCarlo(samples={self.samples}{labels})"

    def cotangents(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor | None,
        *,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Scores of sampled labels, over the square root of their number."""
        for score in self._scores(likelihood, outputs, generator):
            yield likelihood.mask_cotangent(score, outputs, targets) / self.samples**0.5

    def _scores(
        self, likelihood: Likelihood, outputs: Tensor, generator: torch.Generator | None
    ) -> Iterator[Tensor]:
        if self.labels != "independent":
            weighted = self.labels == "weighted"
            yield from likelihood.even_scores(
                outputs, self.samples, weighted=weighted, generator=generator
            )
            return
        for labels in likelihood.sample(outputs, self.samples, generator=generator):
            yield likelihood.score(outputs, labels)

    def num_sweeps(self, likelihood: Likelihood, outputs: Tensor) -> int:
        """Number of labels per input."""
        return self.samples

    def noise(self, moments: Moments) -> dict[str, Params]:
        """Of sampled labels: `E (j·z)⁴ − I²`."""
        draws = self._independent_draws(moments)
        return {"labels": {name: v / draws for name, v in moments.of_label.items()}}

    def noise_errors(self, moments: Moments) -> dict[str, Params]:
        """Of fourth moments that were measured from labels."""
        draws, errors = self._independent_draws(moments), moments.label_error
        if errors is None:
            return {}
        return {"labels": {name: error / draws for name, error in errors.items()}}

    def noise_bounds(self, moments: Moments) -> dict[str, Params]:
        """Of sampled labels."""
        draws = self._independent_draws(moments)
        if moments.cumulant_bound is None:
            return {}
        return {"labels": {name: v / draws for name, v in moments.of_label_at_most.items()}}

    def _independent_draws(self, moments: Moments) -> int:
        if self.labels != "independent":
            raise UnsupportedError(
                f"The variance of {self!r} has no closed form: its labels depend on each other. "
                f"Measure it from repeated draws: nm.estimate(..., estimator={self!r}). That of "
                f"nm.MonteCarlo({self.samples}) has one."
            )
        return moments.num_samples * self.samples
