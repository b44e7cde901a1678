"""Deep Bayesian networks: sigmoid belief networks and Helmholtz machines, with local geometry.

Source: Ay, Information Geometry 6 (2023), arXiv 2005.10791; Várady, Volpi, Malagò and Ay, Neural
Networks 155 (2022).
"""

from neuromanifold.belief.fishers import unit_blocks, unit_wise
from neuromanifold.belief.machines import HelmholtzMachine, RecognitionNetwork
from neuromanifold.belief.networks import SigmoidBeliefNetwork
from neuromanifold.belief.units import BernoulliUnits, CategoricalUnits, GaussianUnits
from neuromanifold.belief.visible import MissingInformation, visible_matrix

__all__ = [
    "BernoulliUnits",
    "CategoricalUnits",
    "GaussianUnits",
    "HelmholtzMachine",
    "MissingInformation",
    "RecognitionNetwork",
    "SigmoidBeliefNetwork",
    "unit_blocks",
    "unit_wise",
    "visible_matrix",
]
