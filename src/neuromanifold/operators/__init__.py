"""What a Fisher matrix can do, whatever its structure."""

from neuromanifold.operators._base import FisherOperator, NaiveFallbackWarning, Origin
from neuromanifold.operators.algebra import Restriction, Sum
from neuromanifold.operators.blocks import BlockMatrix, BlockOperator, Matrices, frobenius
from neuromanifold.operators.coverage import Coverage, CoverageEntry
from neuromanifold.operators.direct_sum import DirectSum
from neuromanifold.operators.indefinite import IndefiniteOperator

__all__ = [
    "BlockMatrix",
    "BlockOperator",
    "Coverage",
    "CoverageEntry",
    "DirectSum",
    "FisherOperator",
    "IndefiniteOperator",
    "Matrices",
    "NaiveFallbackWarning",
    "Origin",
    "Restriction",
    "Sum",
    "frobenius",
]
