"""Relative Fisher information: the metric of a component, given what surrounds it.

Source: Sun and Nielsen, arXiv 1606.06069.
"""

from neuromanifold.relative import layers, units
from neuromanifold.relative.composition import Link, chain
from neuromanifold.relative.invariance import Check, Invariance, check_invariance
from neuromanifold.relative.measure import fisher, of
from neuromanifold.relative.responses import Binary, Probabilities, Through
from neuromanifold.relative.sensitivity import Comparison, Layer, Quartiles, compare

__all__ = [
    "Binary",
    "Check",
    "Comparison",
    "Invariance",
    "Layer",
    "Link",
    "Probabilities",
    "Quartiles",
    "Through",
    "chain",
    "check_invariance",
    "compare",
    "fisher",
    "layers",
    "of",
    "units",
]
