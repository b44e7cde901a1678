"""What keeps the library honest, shipped for extensions: oracle, cases, checks, harness."""

from __future__ import annotations

from neuromanifold.testing import cases, reference
from neuromanifold.testing.harness import run_ranks
from neuromanifold.testing.likelihood_checks import check_likelihood

__all__ = ["cases", "check_likelihood", "reference", "run_ranks"]
