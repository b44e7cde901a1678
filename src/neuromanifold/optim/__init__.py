"""Natural-gradient optimizers: the true Fisher matrix under the contract of `torch.optim`."""

from neuromanifold.optim.damping import LevenbergMarquardt
from neuromanifold.optim.exact import ExactNaturalGradient, gram
from neuromanifold.optim.matrix_free import ImplicitNaturalGradient, implicit
from neuromanifold.optim.monitoring import Monitor, scalars
from neuromanifold.optim.natural_gradient import NaturalGradient
from neuromanifold.optim.preconditioner import Preconditioner
from neuromanifold.optim.presets import (
    Options,
    diagonal,
    ekfac,
    kfac,
    meanfield,
    projected_kfac,
    quasidiagonal,
    relative,
    unitwise,
)
from neuromanifold.optim.residuals import GaussNewton
from neuromanifold.optim.schedules import Schedule

__all__ = [
    "ExactNaturalGradient",
    "GaussNewton",
    "ImplicitNaturalGradient",
    "LevenbergMarquardt",
    "Monitor",
    "NaturalGradient",
    "Options",
    "Preconditioner",
    "Schedule",
    "diagonal",
    "ekfac",
    "gram",
    "implicit",
    "kfac",
    "meanfield",
    "projected_kfac",
    "quasidiagonal",
    "relative",
    "scalars",
    "unitwise",
]
