"""What a network's Fisher information says, as one page that a newcomer can read."""

from __future__ import annotations

from neuromanifold.report.belief import render_belief
from neuromanifold.report.collect import collect
from neuromanifold.report.contest import render_contest
from neuromanifold.report.meanfield import render_meanfield
from neuromanifold.report.random_networks import study_model, study_random
from neuromanifold.report.render import render
from neuromanifold.report.spectra import spectra_chart
from neuromanifold.report.standing import verdict
from neuromanifold.report.wake_sleep import study_belief

__all__ = [
    "collect",
    "render",
    "render_belief",
    "render_contest",
    "render_meanfield",
    "spectra_chart",
    "study_belief",
    "study_model",
    "study_random",
    "verdict",
]
