"""The spectrum of a Fisher matrix, without the matrix: from its products, for any operator.

Each number is exact where the operator can say it (`Gram`, block-diagonal structures, or few
parameters), else it has a standard error or a bound; `draws == 0` or `.method` says which.
"""

from neuromanifold.spectral.choice import operator
from neuromanifold.spectral.eigenpairs import Extremes, extremes
from neuromanifold.spectral.monitoring import Measured, Monitor
from neuromanifold.spectral.quadrature import Density, density, logdet
from neuromanifold.spectral.quantities import Summary, summary
from neuromanifold.spectral.randomised import diagonal, trace
from neuromanifold.spectral.surrogates import Fidelity, Surrogate, surrogate

__all__ = [
    "Density",
    "Extremes",
    "Fidelity",
    "Measured",
    "Monitor",
    "Summary",
    "Surrogate",
    "density",
    "diagonal",
    "extremes",
    "logdet",
    "operator",
    "summary",
    "surrogate",
    "trace",
]
