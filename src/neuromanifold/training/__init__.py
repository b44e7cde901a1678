"""Training by several optimizers from the same start, and going on where it stopped."""

from neuromanifold.training.contest import compare_optimizers
from neuromanifold.training.entries import OPTIMIZERS, Entry, parse_entry
from neuromanifold.training.loop import Problem, Stopped

__all__ = ["OPTIMIZERS", "Entry", "Problem", "Stopped", "compare_optimizers", "parse_entry"]
