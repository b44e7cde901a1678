"""How sure a measured Fisher information is: closed forms of its variance (papers.md §3).

Source: Soen and Sun, NeurIPS 2021 (arXiv 2107.04205) and NeurIPS 2024 (arXiv 2402.05379).
"""

from neuromanifold.variance.block_errors import BlockErrors, blocks
from neuromanifold.variance.bounds import bound
from neuromanifold.variance.comparison import Advice, Comparison, Row, Spread, compare
from neuromanifold.variance.empirical_bias import Bias, empirical
from neuromanifold.variance.first import DiagonalEstimate, diagonal
from neuromanifold.variance.planning import Demand, Plan, plan
from neuromanifold.variance.second import second_derivative
from neuromanifold.variance.spectrum import effective_dimension, eigenvalues, trace

__all__ = [
    "Advice",
    "Bias",
    "BlockErrors",
    "Comparison",
    "Demand",
    "DiagonalEstimate",
    "Plan",
    "Row",
    "Spread",
    "blocks",
    "bound",
    "compare",
    "diagonal",
    "effective_dimension",
    "eigenvalues",
    "empirical",
    "plan",
    "second_derivative",
    "trace",
]
