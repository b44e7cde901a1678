"""The Fisher information of any PyTorch model: measured, explained, and used.

A Fisher matrix is three independent choices, one word each, and one call:

    likelihood   what the network output means   `Categorical`, `Bernoulli`, `Gaussian`, ...
    estimator    which vectors go back           `Exact`, `MonteCarlo`, `RandomSigns`, `Empirical`
    structure    what is kept of the matrix      `Dense`, `UnitWise`, `Kronecker`, `Gram`, ...

Names are imported when they are first used: `import neuromanifold` alone does not load torch, which
is why the command line answers `--help` at once.

Example:
    >>> import torch
    >>> import neuromanifold as nm
    >>> model = torch.nn.Linear(3, 2)
    >>> F = nm.fisher(model, nm.Categorical(), torch.ones(4, 3), nm.Dense(), estimator=nm.Exact())
    >>> F.shape
    (8, 8)
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neuromanifold import (
        belief,
        distributed,
        errors,
        estimators,
        layers,
        likelihoods,
        linalg,
        meanfield,
        operators,
        optim,
        relative,
        report,
        spectral,
        structures,
        testing,
        variance,
    )
    from neuromanifold._estimate import Estimate
    from neuromanifold._estimation import Estimated, estimate
    from neuromanifold._fisher import fisher, load
    from neuromanifold._forecast import Forecast, forecast
    from neuromanifold.estimators import Empirical, Exact, Hessian, MonteCarlo, RandomSigns
    from neuromanifold.likelihoods import (
        Bernoulli,
        Categorical,
        FromDistribution,
        Gaussian,
        GaussianMeanVariance,
        Poisson,
        from_loss,
    )
    from neuromanifold.operators import Coverage, FisherOperator
    from neuromanifold.structures import (
        BlockDiagonal,
        Dense,
        Diagonal,
        EigenKronecker,
        Full,
        Gram,
        Implicit,
        Kronecker,
        LowRank,
        MeanField,
        Projected,
        QuasiDiagonal,
        RecursiveInverse,
        UnitWise,
        auto,
    )

__version__ = version("neuromanifold")

__all__ = [
    "Bernoulli",
    "BlockDiagonal",
    "Categorical",
    "Coverage",
    "Dense",
    "Diagonal",
    "EigenKronecker",
    "Empirical",
    "Estimate",
    "Estimated",
    "Exact",
    "FisherOperator",
    "Forecast",
    "FromDistribution",
    "Full",
    "Gaussian",
    "GaussianMeanVariance",
    "Gram",
    "Hessian",
    "Implicit",
    "Kronecker",
    "LowRank",
    "MeanField",
    "MonteCarlo",
    "Poisson",
    "Projected",
    "QuasiDiagonal",
    "RandomSigns",
    "RecursiveInverse",
    "UnitWise",
    "auto",
    "belief",
    "distributed",
    "errors",
    "estimate",
    "estimators",
    "fisher",
    "forecast",
    "from_loss",
    "layers",
    "likelihoods",
    "linalg",
    "load",
    "meanfield",
    "operators",
    "optim",
    "relative",
    "report",
    "spectral",
    "structures",
    "testing",
    "variance",
]

# Where each name above lives; the imports for type checkers say the same, and a test compares them.
_CONTENTS = {
    "_estimate": ("Estimate",),
    "_estimation": ("Estimated", "estimate"),
    "_fisher": ("fisher", "load"),
    "_forecast": ("Forecast", "forecast"),
    "estimators": ("Empirical", "Exact", "Hessian", "MonteCarlo", "RandomSigns"),
    "likelihoods": (
        "Bernoulli",
        "Categorical",
        "FromDistribution",
        "Gaussian",
        "GaussianMeanVariance",
        "Poisson",
        "from_loss",
    ),
    "operators": ("Coverage", "FisherOperator"),
    "structures": (
        "BlockDiagonal",
        "Dense",
        "Diagonal",
        "EigenKronecker",
        "Full",
        "Gram",
        "Implicit",
        "Kronecker",
        "LowRank",
        "MeanField",
        "Projected",
        "QuasiDiagonal",
        "RecursiveInverse",
        "UnitWise",
        "auto",
    ),
}
_HOME = {name: module for module, names in _CONTENTS.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _HOME:
        value: object = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    else:
        value = importlib.import_module(f"{__name__}.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
