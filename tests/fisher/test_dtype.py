"""Results are in the parameters' precision, but never below float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.structures import Structure

STRUCTURES = [
    nm.Dense(),
    nm.BlockDiagonal(),
    nm.UnitWise(),
    nm.Diagonal(),
    nm.Kronecker(),
    nm.Gram(),
]
BFLOAT16_EPS = 2.0**-8


@pytest.fixture(params=STRUCTURES, ids=repr)
def structure(request: pytest.FixtureRequest) -> Structure:
    return request.param


def network(dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(
            nn.Conv1d(1, 3, 3),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(18, 4),
            nn.Tanh(),
            nn.Linear(4, 3),
        )
    return model.to(dtype)


def inputs(dtype: torch.dtype) -> Tensor:
    return torch.randn(6, 1, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def measure(dtype: torch.dtype, structure: Structure) -> nm.FisherOperator:
    return nm.fisher(
        network(dtype), nm.Categorical(), inputs(dtype), structure, estimator=nm.Exact()
    )


def assert_all_float32(F: nm.FisherOperator) -> None:
    v = torch.ones(F.num_parameters)
    numbers = [F.to_dense(), F @ v, F.solve(v, damping=0.1), F.trace(), F.eigenvalues()]
    assert {F.dtype, *(x.dtype for x in numbers), *(x.dtype for x in F.diagonal().values())} == {
        torch.float32
    }


def relative_error(F: nm.FisherOperator, structure: Structure) -> float:
    exact = measure(torch.float64, structure).to_dense()
    return float((F.to_dense() - exact).norm() / exact.norm())


def test_float64(structure: Structure) -> None:
    F = measure(torch.float64, structure)
    assert F.dtype == F.to_dense().dtype == torch.float64


def test_float32(structure: Structure) -> None:
    F = measure(torch.float32, structure)
    assert_all_float32(F)
    # Three layers, forward and backward, each a sum of at most 18 products.
    assert relative_error(F, structure) <= 2 * 3 * 18 * torch.finfo(torch.float32).eps


def test_bfloat16_model(structure: Structure) -> None:
    F = measure(torch.bfloat16, structure)
    assert_all_float32(F)
    assert relative_error(F, structure) <= _BFLOAT16_RTOL


def test_bfloat16_autocast(structure: Structure) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        F = measure(torch.float32, structure)
    assert_all_float32(F)
    error = relative_error(F, structure)
    assert torch.finfo(torch.float32).eps < error <= _BFLOAT16_RTOL


# Rounding to bfloat16 happens once per tensor, since kernels sum in float32: per layer the weight,
# the input, the output, the activation and its cotangent, three layers; F is quadratic in them.
_BFLOAT16_RTOL = 2 * 3 * 5 * BFLOAT16_EPS


def test_implicit_keeps_float32() -> None:
    F = measure(torch.float32, nm.Implicit())
    v = torch.ones(F.num_parameters)
    assert {F.dtype, (F @ v).dtype, F.trace().dtype} == {torch.float32}


def test_vectors_of_another_dtype_answer_in_that_of_the_matrix() -> None:
    F = measure(torch.float32, nm.Diagonal())
    double = torch.ones(F.num_parameters, dtype=torch.float64)
    assert (F @ double).dtype == torch.float32
