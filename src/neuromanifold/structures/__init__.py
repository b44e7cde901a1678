"""What is kept of a Fisher matrix: one file per structure, its statistics and its algebra."""

from neuromanifold.structures._base import AdditiveStructure, Progress, Reducer, Source, Structure
from neuromanifold.structures.dense import BlockDiagonal, Dense
from neuromanifold.structures.diagonal import Diagonal
from neuromanifold.structures.gram import Gram
from neuromanifold.structures.implicit import Implicit
from neuromanifold.structures.kronecker import Kronecker
from neuromanifold.structures.unitwise import UnitWise

__all__ = [
    "AdditiveStructure",
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "Gram",
    "Implicit",
    "Kronecker",
    "Progress",
    "Reducer",
    "Source",
    "Structure",
    "UnitWise",
]
