"""What keeps the library honest, shipped for extensions: oracle, cases, checks, harness."""

from __future__ import annotations

from neuromanifold.testing import cases, layer_cases, model_cases, reference
from neuromanifold.testing.composite_checks import check_composite_rule
from neuromanifold.testing.estimator_checks import check_estimator
from neuromanifold.testing.harness import run_ranks
from neuromanifold.testing.layer_checks import check_layer_rule
from neuromanifold.testing.likelihood_checks import check_likelihood
from neuromanifold.testing.operator_checks import check_operator
from neuromanifold.testing.optimizer_checks import check_optimizer
from neuromanifold.testing.structure_checks import check_structure

__all__ = [
    "cases",
    "check_composite_rule",
    "check_estimator",
    "check_layer_rule",
    "check_likelihood",
    "check_operator",
    "check_optimizer",
    "check_structure",
    "layer_cases",
    "model_cases",
    "reference",
    "run_ranks",
]
