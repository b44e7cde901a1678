"""What is kept of a Fisher matrix: one file per structure, its statistics and its algebra."""

from neuromanifold.structures._base import AdditiveStructure, Progress, Reducer, Source, Structure
from neuromanifold.structures.dense import BlockDiagonal, Dense
from neuromanifold.structures.diagonal import Diagonal
from neuromanifold.structures.eigenkronecker import EigenKronecker
from neuromanifold.structures.factors import Full, Projected, RecursiveInverse
from neuromanifold.structures.gram import Gram
from neuromanifold.structures.implicit import Implicit
from neuromanifold.structures.kronecker import Kronecker
from neuromanifold.structures.lowrank import LowRank
from neuromanifold.structures.meanfield import MeanField
from neuromanifold.structures.policy import auto, per_layer
from neuromanifold.structures.quasidiagonal import QuasiDiagonal
from neuromanifold.structures.relative_units import RelativeUnits
from neuromanifold.structures.unitwise import UnitWise

__all__ = [
    "AdditiveStructure",
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
    "Progress",
    "Projected",
    "QuasiDiagonal",
    "RecursiveInverse",
    "Reducer",
    "RelativeUnits",
    "Source",
    "Structure",
    "UnitWise",
    "auto",
    "per_layer",
]
