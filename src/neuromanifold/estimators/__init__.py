"""Which vectors go back from the outputs; their outer products average to the output Fisher.

Every estimator answers the same question: for a batch of outputs, which cotangents `u (N, ...)`
make `Σ_v u_v u_vᵀ` the output Fisher of each sample, exactly or on average? `Hessian` alone has no
cotangents: it names what is differentiated twice instead.
"""

from neuromanifold.estimators._base import Estimator
from neuromanifold.estimators.back_propagated import BackPropagated
from neuromanifold.estimators.empirical import Empirical
from neuromanifold.estimators.exact import Exact
from neuromanifold.estimators.hessian import Hessian
from neuromanifold.estimators.moments import Moments
from neuromanifold.estimators.monte_carlo import MonteCarlo
from neuromanifold.estimators.random_signs import RandomSigns

__all__ = [
    "BackPropagated",
    "Empirical",
    "Estimator",
    "Exact",
    "Hessian",
    "Moments",
    "MonteCarlo",
    "RandomSigns",
]
