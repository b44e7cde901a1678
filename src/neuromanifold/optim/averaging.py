"""How the curvature of a structure is averaged over training."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from neuromanifold.optim.curvature import Curvature, InEigenbases
from neuromanifold.optim.projected import ProjectedCurvature
from neuromanifold.structures import EigenKronecker, Kronecker, Projected, Structure
from neuromanifold.structures._base import AdditiveStructure

__all__ = ["curvature_of"]


def curvature_of(structure: Structure, parameters: Mapping[str, Tensor]) -> Curvature:
    """Averages for a structure.

    Args:
        structure: what is kept.
        parameters: of the model, by name.

    Raises:
        TypeError: If its statistics are no sums over samples.
    """
    if isinstance(structure, EigenKronecker):
        return InEigenbases(structure)
    if isinstance(structure, Kronecker) and any(
        isinstance(factor, Projected) for factor in (structure.inputs, structure.outputs)
    ):
        return ProjectedCurvature(structure)
    if isinstance(structure, AdditiveStructure):
        return Curvature(structure.at(parameters))
    raise TypeError(
        f"A preconditioner averages sums over samples, which {structure!r} has none of. Use an "
        f"additive structure such as nm.Kronecker(), nm.UnitWise() or nm.Diagonal(), or "
        f"nm.EigenKronecker(). nm.optim.gram takes the exact matrix of each batch."
    )
