"""What the numbers of one model say: a chart, a table, and two sentences for each question.

Every sentence is computed from the numbers that it stands beside. A section whose numbers were not
measured is left out.
"""

from __future__ import annotations

from neuromanifold.report.sections._base import Analysis, Section, Table
from neuromanifold.report.sections.approximation import layer_errors, whole_errors
from neuromanifold.report.sections.estimators import estimator_choice
from neuromanifold.report.sections.own_metrics import own_metric, unit_sensitivity
from neuromanifold.report.sections.sensitivity import diagonal, trace_by_layer
from neuromanifold.report.sections.spectrum import dimension_left, eigenvalues
from neuromanifold.report.sections.training import loss_by_epoch

__all__ = ["Section", "Table", "sections"]


def sections(analysis: Analysis) -> list[Section]:
    """Every section that the analysis has the numbers for, in reading order."""
    candidates = (
        trace_by_layer(analysis),
        diagonal(analysis),
        eigenvalues(analysis),
        dimension_left(analysis),
        layer_errors(analysis),
        whole_errors(analysis),
        unit_sensitivity(analysis),
        own_metric(analysis),
        estimator_choice(analysis),
        loss_by_epoch(analysis),
    )
    return [section for section in candidates if section is not None]
