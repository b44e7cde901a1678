"""Random deep networks: what theory predicts of their Fisher matrix, next to what is measured."""

from neuromanifold.meanfield.integrals import (
    TiltedGaussian,
    gaussian_integrals,
    quadrature_error,
)
from neuromanifold.meanfield.locality import OffBlock, off_block
from neuromanifold.meanfield.unit_fisher import UnitFisher, unit_fisher

__all__ = [
    "OffBlock",
    "TiltedGaussian",
    "UnitFisher",
    "gaussian_integrals",
    "off_block",
    "quadrature_error",
    "unit_fisher",
]
