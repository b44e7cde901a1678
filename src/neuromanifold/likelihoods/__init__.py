"""What a network's output means: scores, samples and output Fisher of `p(y | outputs)`."""

from neuromanifold.likelihoods._base import ColumnCumulants, Likelihood
from neuromanifold.likelihoods._diagonal import DiagonalLikelihood
from neuromanifold.likelihoods.bernoulli import Bernoulli
from neuromanifold.likelihoods.categorical import Categorical
from neuromanifold.likelihoods.distribution import FromDistribution
from neuromanifold.likelihoods.from_loss import from_loss
from neuromanifold.likelihoods.gaussian import Gaussian, GaussianMeanVariance
from neuromanifold.likelihoods.poisson import Poisson

__all__ = [
    "Bernoulli",
    "Categorical",
    "ColumnCumulants",
    "DiagonalLikelihood",
    "FromDistribution",
    "Gaussian",
    "GaussianMeanVariance",
    "Likelihood",
    "Poisson",
    "from_loss",
]
