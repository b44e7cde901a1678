"""Deep Bayesian networks: sigmoid belief networks and Helmholtz machines, with local geometry.

Source: Ay, Information Geometry 6 (2023), arXiv 2005.10791; Várady, Volpi, Malagò and Ay, Neural
Networks 155 (2022).
"""

from neuromanifold.belief.datasets import bars_and_stripes, binarised_digits, lines
from neuromanifold.belief.fishers import unit_blocks, unit_wise
from neuromanifold.belief.gradients import (
    GradientComparison,
    compare_gradients,
    compare_natural_gradients,
)
from neuromanifold.belief.machines import HelmholtzMachine, RecognitionNetwork
from neuromanifold.belief.networks import SigmoidBeliefNetwork
from neuromanifold.belief.training import BidirectionalHelmholtz, ReweightedWakeSleep, WakeSleep
from neuromanifold.belief.units import BernoulliUnits, CategoricalUnits, GaussianUnits
from neuromanifold.belief.visible import MissingInformation, visible_matrix

__all__ = [
    "BernoulliUnits",
    "BidirectionalHelmholtz",
    "CategoricalUnits",
    "GaussianUnits",
    "GradientComparison",
    "HelmholtzMachine",
    "MissingInformation",
    "RecognitionNetwork",
    "ReweightedWakeSleep",
    "SigmoidBeliefNetwork",
    "WakeSleep",
    "bars_and_stripes",
    "binarised_digits",
    "compare_gradients",
    "compare_natural_gradients",
    "lines",
    "unit_blocks",
    "unit_wise",
    "visible_matrix",
]
