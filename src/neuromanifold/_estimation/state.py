"""All that was drawn, as sums: the analysis of variance of labels within inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["State"]


@dataclass(frozen=True)
class State:
    """Sums over everything that was drawn.

    Attributes:
        totals: over whole rounds, `(4, K)`: of the numbers, of their squares, of squared sums over
            the draws of an input, and of squared sums over a round; over all processes.
        partial: the first three of the round that goes on, in this process.
        rounds: whole ones.
        batches: done in the round that goes on.
        samples: in these batches.
        num_samples: N, in a whole round of all processes.
        generator: its state after these draws.
    """

    totals: Tensor
    partial: Tensor
    rounds: int
    batches: int
    samples: int
    num_samples: int
    generator: Tensor

    @classmethod
    def empty(cls, numel: int, generator: torch.Generator, device: torch.device) -> State:
        """Before the first draw, of K numbers."""
        totals = torch.zeros(4, numel, dtype=torch.float64, device=device)
        return cls(totals, totals[:3], 0, 0, 0, 0, generator.get_state())

    def after_batch(self, sums: Tensor, samples: int, generator: torch.Generator) -> State:
        """With one batch more."""
        return replace(
            self,
            partial=self.partial + sums,
            batches=self.batches + 1,
            samples=self.samples + samples,
            generator=generator.get_state(),
        )

    def after_round(self, partial: Tensor, samples: int) -> State:
        """With a whole round, whose sums and inputs are those of all processes.

        Raises:
            ValueError: If there is one input only, or the rounds have different numbers of them.
        """
        if samples < 2:
            raise ValueError(
                "One input says nothing of others: nm.estimate(...) needs at least 2 inputs."
            )
        if self.num_samples not in (0, samples):
            raise ValueError(
                f"A round over the data had {self.num_samples} inputs, the next {samples}: "
                f"pass data that are the same each time they are read."
            )
        return replace(
            self,
            totals=self.totals + torch.cat([partial, partial[:1].square()]),
            partial=torch.zeros_like(self.partial),
            rounds=self.rounds + 1,
            batches=0,
            samples=0,
            num_samples=samples,
        )

    def variances(self, draws: int) -> tuple[Tensor, Tensor, Tensor]:
        """The mean, and its variances from data and from draws, `(K,)` each."""
        n, rounds = self.num_samples, self.rounds
        total, squares, of_inputs, of_rounds = self.totals
        within = torch.zeros_like(total)
        if draws > 1:
            within = (squares - of_inputs / draws).clamp(min=0) / (n * rounds * (draws - 1))
        between = (of_inputs - of_rounds / n) / (draws**2 * rounds * (n - 1))
        data = (between - within / draws).clamp(min=0) / n
        return total / (n * rounds * draws), data, within / (n * rounds * draws)
