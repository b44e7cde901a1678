"""Random deep networks: what theory predicts of their Fisher matrix, next to what is measured."""

from neuromanifold.meanfield.checks import Check, Compared, LayerCheck, Recommended, check
from neuromanifold.meanfield.initialisation import Variances, measured, variances
from neuromanifold.meanfield.integrals import (
    TiltedGaussian,
    gaussian_integrals,
    quadrature_error,
)
from neuromanifold.meanfield.kernels import Kernel, kernel
from neuromanifold.meanfield.locality import OffBlock, off_block
from neuromanifold.meanfield.normality import Gaussianity, LayerGaussianity, gaussianity
from neuromanifold.meanfield.phases import (
    FixedPoint,
    PhaseDiagram,
    edge_of_chaos,
    fixed_point,
    phase_diagram,
)
from neuromanifold.meanfield.recursions import Propagation, propagate
from neuromanifold.meanfield.statistics import SpectrumStatistics, spectrum_statistics
from neuromanifold.meanfield.unit_fisher import UnitFisher, unit_fisher

__all__ = [
    "Check",
    "Compared",
    "FixedPoint",
    "Gaussianity",
    "Kernel",
    "LayerCheck",
    "LayerGaussianity",
    "OffBlock",
    "PhaseDiagram",
    "Propagation",
    "Recommended",
    "SpectrumStatistics",
    "TiltedGaussian",
    "UnitFisher",
    "Variances",
    "check",
    "edge_of_chaos",
    "fixed_point",
    "gaussian_integrals",
    "gaussianity",
    "kernel",
    "measured",
    "off_block",
    "phase_diagram",
    "propagate",
    "quadrature_error",
    "spectrum_statistics",
    "unit_fisher",
    "variances",
]
