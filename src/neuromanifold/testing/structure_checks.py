"""The contract of a structure as a callable test-suite."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuromanifold._fisher import fisher
from neuromanifold.estimators import Exact, MonteCarlo
from neuromanifold.operators import FisherOperator
from neuromanifold.structures import Structure
from neuromanifold.testing import reference
from neuromanifold.testing._compare import assert_close, rounding
from neuromanifold.testing.cases import Case
from neuromanifold.testing.operator_checks import check_operator

__all__ = ["check_structure"]


def check_structure(structure: Structure, case: Case, *, damping: float = 1e-2) -> None:
    """Check a structure on one case, in float64.

    What its coverage calls exact is compared with the oracle: the diagonal is there, and every
    other entry is the oracle's or dropped. The answer does not depend on how the data are split
    into batches, has the units asked for, follows the generator, and holds parameters without a
    layer rule. Its operator passes `check_operator`.

    Args:
        structure: what to check.
        case: on what; `testing.cases.CASES` has one for every kind of layer and likelihood.
        damping: for `check_operator`.

    Raises:
        AssertionError: If a part of the contract is broken; the sentence says which.

    Example:
        >>> from neuromanifold.structures import Diagonal
        >>> from neuromanifold.testing.cases import CASES
        >>> check_structure(Diagonal(), CASES[0])
    """
    model, data = case.model(), case.data()
    operator = fisher(model, case.likelihood, data, structure, estimator=Exact())
    _check_exact(operator, reference.dense_fisher(model, case.likelihood, data))
    check_operator(operator, damping=damping)
    _check_batches(structure, case, operator)
    _check_units(structure, case, operator)
    _check_generator(structure, case)
    _check_generic(structure, case)


def _check_exact(operator: FisherOperator, oracle: Tensor) -> None:
    claimed = torch.cat(
        [
            torch.full((oracle[s].shape[0],), operator.coverage[name].exact)
            for name, s in operator.layout.slices.items()
        ]
    )
    dense = operator.to_dense()
    tolerance = rounding(len(oracle), oracle.dtype) * torch.linalg.matrix_norm(oracle)
    diagonal = dense.diagonal()[claimed]
    assert_close("The exact part's diagonal", diagonal, oracle.diagonal()[claimed], tolerance)
    kept = (dense != 0) & claimed & claimed[:, None]
    assert_close("What is kept of the exact part", dense[kept], oracle[kept], tolerance)


def _check_batches(structure: Structure, case: Case, whole: FisherOperator) -> None:
    x, y = case.data()
    batches = [(x[:3], y[:3]), (x[3:6], y[3:6]), (x[6:], y[6:])]
    split = fisher(case.model(), case.likelihood, batches, structure, estimator=Exact())
    assert split.num_samples == whole.num_samples == len(x), "num_samples counts all batches."
    _same("One batch and three uneven ones", split, whole)


def _check_units(structure: Structure, case: Case, per_sample: FisherOperator) -> None:
    model, (x, y) = case.model(), case.data()
    per_position = fisher(
        model, case.likelihood, (x, y), structure, estimator=Exact(), per="position"
    )
    positions = int(case.likelihood.num_positions(model(x), y))
    _same('per="position"', (positions / len(x)) * per_position, per_sample)


def _check_generator(structure: Structure, case: Case) -> None:
    state = torch.get_rng_state()
    first, second = (
        fisher(
            case.model(),
            case.likelihood,
            case.data(),
            structure,
            estimator=MonteCarlo(2),
            generator=torch.Generator().manual_seed(0),
        ).to_dense()
        for _ in range(2)
    )
    assert torch.equal(first, second), "The same seed must give the same matrix."
    assert torch.equal(torch.get_rng_state(), state), "The global random state was moved."


class _Scaled(nn.Module):
    """A model whose outputs are multiplied by a parameter that no layer rule knows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.model(x)


def _check_generic(structure: Structure, case: Case) -> None:
    model, data = _Scaled(case.model()), case.data()
    operator = fisher(model, case.likelihood, data, structure, estimator=Exact())
    entry = operator.coverage["scale"]
    assert entry.rule == "generic", f"A raw parameter is read by rule {entry.rule!r}."
    _check_exact(operator, reference.dense_fisher(model, case.likelihood, data))


def _same(name: str, left: FisherOperator, right: FisherOperator) -> None:
    expected = right.to_dense()
    tolerance = rounding(len(expected), expected.dtype) * torch.linalg.matrix_norm(expected)
    assert_close(name, left.to_dense(), expected, tolerance)
