"""Sums, multiples and principal submatrices of any Fisher matrices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from neuromanifold.errors import UnsupportedError
from neuromanifold.linalg import Layout
from neuromanifold.operators._base import FisherOperator, Origin
from neuromanifold.operators.coverage import join

__all__ = ["Restriction", "Sum", "add"]


def add(left: FisherOperator, right: FisherOperator) -> FisherOperator:
    """The sum, in the structure of the two terms where it is closed under sums.

    Raises:
        ValueError: If the terms belong to different parameters, or to another order of them.
    """
    if left.layout != right.layout:
        different = set(left.layout.shapes.items()) ^ set(right.layout.shapes.items())
        raise ValueError(
            "Only Fisher matrices over the same parameters in the same order can be added; these "
            f"differ in {sorted(different) if different else 'their order'}."
        )
    total = left._plus(right) or right._plus(left) or Sum([left, right], [1.0, 1.0])
    total.origin = _joint_origin([left, right])
    total.coverage = left.coverage.joined(right.coverage)
    return total


class Sum(FisherOperator):
    """`Σ cᵢ Fᵢ`: exact products, trace, diagonal and dense form."""

    def __init__(self, terms: Sequence[FisherOperator], factors: Sequence[float]) -> None:
        first = terms[0]
        dtype = first.dtype
        for term in terms[1:]:
            dtype = torch.promote_types(dtype, term.dtype)
        super().__init__(
            first.layout, first.coverage, _joint_origin(terms), dtype=dtype, device=first.device
        )
        self._terms = list(zip(factors, terms, strict=True))

    def _matmat(self, rows: Tensor) -> Tensor:
        return self._total(term._matmat(rows.to(term.dtype)) for _, term in self._terms)

    def _diagonal(self) -> Tensor:
        return self._total(term._diagonal() for _, term in self._terms)

    def to_dense(self) -> Tensor:
        """The matrix `(P, P)`."""
        return self._total(term.to_dense() for _, term in self._terms)

    def restrict(self, names: Iterable[str]) -> FisherOperator:
        """The principal submatrix of some parameters, term by term."""
        names = self.layout.restrict(names).names
        parts = [term.restrict(names) for _, term in self._terms]
        return Sum(parts, [factor for factor, _ in self._terms])

    def _scaled(self, factor: float) -> FisherOperator:
        return Sum([term for _, term in self._terms], [factor * c for c, _ in self._terms])

    def _unsupported(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"A sum over {self.origin.structure} has no exact {what}: these structures are not "
            f"closed under sums. Measure all data in one call of nm.fisher, or each part with "
            f"nm.Gram(), nm.Dense(), nm.BlockDiagonal(), nm.UnitWise() or nm.Diagonal(), whose "
            f"sums keep their structure; iterative methods can use F.to_scipy()."
        )

    def _total(self, values: object) -> Tensor:
        total: Tensor | None = None
        for (factor, _), value in zip(self._terms, values, strict=True):  # type: ignore[call-overload]
            part = factor * value.to(self.dtype)
            total = part if total is None else total + part
        assert total is not None
        return total


class Restriction(FisherOperator):
    """A principal submatrix of an operator that cannot cut itself."""

    def __init__(self, whole: FisherOperator, layout: Layout) -> None:
        super().__init__(
            layout,
            whole.coverage.restrict(layout.names),
            whole.origin,
            dtype=whole.dtype,
            device=whole.device,
        )
        self._whole = whole
        positions = torch.arange(whole.num_parameters, device=whole.device)
        self._index = torch.cat([positions[whole.layout.slices[name]] for name in layout.names])

    def _matmat(self, rows: Tensor) -> Tensor:
        padded = rows.new_zeros(rows.shape[0], self._whole.num_parameters)
        padded[:, self._index] = rows
        return self._whole._matmat(padded)[:, self._index]

    def _diagonal(self) -> Tensor:
        return self._whole._diagonal()[self._index]


def _joint_origin(terms: Sequence[FisherOperator]) -> Origin:
    """What the terms share; where they differ, all of them."""
    origins = [term.origin for term in terms]
    return replace(
        origins[0],
        num_samples=sum(origin.num_samples for origin in origins),
        structure=join(origin.structure for origin in origins),
        estimator=join(origin.estimator for origin in origins),
        likelihood=join(origin.likelihood for origin in origins),
        per=join(origin.per for origin in origins),
        notes=tuple(dict.fromkeys(note for origin in origins for note in origin.notes)),
    )
