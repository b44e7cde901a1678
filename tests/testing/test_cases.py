from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, jacrev

from neuromanifold.testing import cases, reference


@pytest.fixture(params=cases.CASES, ids=str)
def case(request: pytest.FixtureRequest) -> cases.Case:
    return request.param


def test_names_are_unique() -> None:
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)


def test_a_case_is_small_double_precision_and_valid(case: cases.Case) -> None:
    model, (x, y) = case.model(), case.data()
    assert sum(p.numel() for p in model.parameters()) <= 600
    assert len(x) == len(y) == 7
    assert {p.dtype for p in model.parameters()} == {x.dtype} == {torch.float64}
    case.likelihood.check(model(x), y)


def test_a_case_is_the_same_each_time_and_leaves_the_global_generator_alone(
    case: cases.Case,
) -> None:
    state = torch.get_rng_state()
    first, second = case.model().state_dict(), case.model().state_dict()
    data = zip(case.data(), case.data(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))
    assert all(torch.equal(a, b) for a, b in data)
    assert torch.equal(torch.get_rng_state(), state)


def test_positions_are_ignored_in_some_cases() -> None:
    ignoring = {case.name for case in cases.CASES if (case.data()[1] == -100).any()}
    assert {"sequence_positions-categorical", "conv2d_positions-categorical_axis1"} <= ignoring


def test_the_oracle_is_symmetric_and_positive_semi_definite(case: cases.Case) -> None:
    fisher = reference.dense_fisher(case.model(), case.likelihood, case.data())
    eigenvalues = torch.linalg.eigvalsh(fisher)
    rounding = len(fisher) * torch.finfo(fisher.dtype).eps * eigenvalues[-1]
    torch.testing.assert_close(fisher, fisher.T)
    assert eigenvalues[-1] > 0
    assert eigenvalues[0] > -rounding


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in cases.CASES
        if case.name.endswith(("-categorical", "-distribution_categorical"))
        and "positions" not in case.name
    ],
    ids=str,
)
def test_the_oracle_is_the_covariance_of_the_score_over_every_label(case: cases.Case) -> None:
    model, (x, _) = case.model(), case.data()
    params = {name: p.detach() for name, p in model.named_parameters()}
    expected = torch.zeros(())
    for label in range(3):
        y = torch.full((len(x),), label)

        def log_prob(params: dict[str, torch.Tensor], y: torch.Tensor = y) -> torch.Tensor:
            return case.likelihood.log_prob(functional_call(model, params, (x,)), y)

        g = torch.cat([part.flatten(1) for part in jacrev(log_prob)(params).values()], dim=1)
        weights = log_prob(params).exp() / len(x)
        expected = expected + (g.T * weights) @ g
    actual = reference.dense_fisher(model, case.likelihood, (x, None))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
