"""Likelihoods whose output Fisher is diagonal: independent event entries."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from neuromanifold._typing import Outputs
from neuromanifold.errors import UnsupportedError
from neuromanifold.likelihoods._base import (
    ColumnCumulants,
    Likelihood,
    at_least_float32,
    rademacher,
    sum_event,
)

__all__ = ["DiagonalLikelihood"]


class DiagonalLikelihood(Likelihood):
    """Everything that follows from the diagonal of the output Fisher.

    The event is one position, whatever its shape.
    """

    @abstractmethod
    def _information(self, outputs: Tensor) -> Tensor:
        """Diagonal of the output Fisher, like `outputs`, in float32 at least."""

    @abstractmethod
    def _fourth_cumulants(self, outputs: Tensor, j: Tensor) -> Tensor:
        """Fourth cumulant of `j · score` for each independent target entry, `(..., N, *K)`."""

    def log_prob(self, outputs: Outputs, targets: Tensor) -> Tensor:
        """Log-probability of every sample, `(N,)` nats; targets may be of any dtype."""
        outputs = self.canonical(outputs)
        return super().log_prob(outputs, targets.to(at_least_float32(outputs).dtype))

    def fisher_columns(self, outputs: Tensor) -> Iterator[Tensor]:
        """One column per event entry: the square root of its information."""
        root = self._information(self.canonical(outputs).detach()).sqrt().to(outputs.dtype)
        entries = root.reshape(len(root), -1)
        for k in range(entries.shape[1]):
            column = torch.zeros_like(entries)
            column[:, k] = entries[:, k]
            yield column.reshape(root.shape)

    def num_columns(self, outputs: Outputs) -> int:
        """How many entries the outputs of one sample have."""
        return self.canonical(outputs)[0].numel()

    def fisher_diagonal(self, outputs: Tensor) -> Tensor:
        """The information."""
        return self._information(self.canonical(outputs).detach()).to(outputs.dtype)

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """Information times `v`, entry by entry."""
        return (self._information(self.canonical(outputs).detach()) * v).to(v.dtype)

    def random_signs(
        self, outputs: Tensor, num: int, *, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """Square root of the information, with a random sign on every entry."""
        root = self._information(self.canonical(outputs).detach()).sqrt()
        for _ in range(num):
            yield (root * rademacher(root.shape, root, generator)).to(outputs.dtype)

    def even_scores(
        self,
        outputs: Tensor,
        num: int,
        *,
        weighted: bool = False,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Scores of targets that cover each entry's distribution evenly.

        Raises:
            UnsupportedError: If they are to be weighted: the score of an entry, scaled so that all
                of its targets add the same, is its information's root with a random sign.
        """
        if weighted:
            raise UnsupportedError(
                f"Weighted labels of {self!r} would be random signs: each entry of the outputs has "
                f"a target of its own. Use nm.RandomSigns(...)."
            )
        outputs = self.canonical(outputs).detach()
        for targets, signs in self._even_targets(outputs, num, generator):
            score = at_least_float32(self.score(outputs, targets))
            yield (score * signs).to(outputs.dtype)

    def _even_targets(
        self, outputs: Tensor, num: int, generator: torch.Generator | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Targets of `even_scores`, and the signs of their scores."""
        raise self._no_even_scores(weighted=False)

    def column_cumulants(self, outputs: Tensor) -> ColumnCumulants:
        """Entries are independent: the excess kurtosis of each."""
        outputs = self.canonical(outputs).detach()
        information = self._information(outputs)
        cumulants = self._fourth_cumulants(outputs, torch.ones_like(information))
        # No information, no column, whatever the kurtosis. One division after the other: the square
        # of a small information would be zero.
        informed = information >= torch.finfo(information.dtype).tiny
        kurtosis = torch.where(informed, cumulants / information / information, 0)
        quartic = kurtosis.reshape(len(outputs), -1).T
        group = torch.arange(len(quartic), device=quartic.device)
        return ColumnCumulants(quartic, group, len(quartic), 0.0)

    def score_fourth_moment(self, outputs: Tensor, j: Tensor) -> Tensor:
        """`E (j · score)⁴`, `(..., N)`: entries are independent, so their cumulants add up."""
        outputs = self.canonical(outputs).detach()
        j = at_least_float32(j)
        cumulants = self._fourth_cumulants(outputs, j)
        variance = sum_event(self._information(outputs) * j**2, outputs.ndim - 1)
        event_ndim = cumulants.ndim - variance.ndim
        return sum_event(cumulants, event_ndim) + 3 * variance**2
