"""Products of `Implicit()` that repeat: they keep graphs, and see every change all the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.errors import NonFiniteError

N, WIDTH = 40, 400  # large enough for vectors to go one by one
RTOL = 1e-10

pytestmark = pytest.mark.usefixtures("float64")


class Net(nn.Module):
    """With a buffer, and a parameter that has no part in the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 300), nn.Tanh(), nn.Linear(300, 3))
        self.idle = nn.Linear(2, 2)
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 40, 3), nn.Linear(40 * 18**2, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x.reshape(N, 1, 20, 20))).flatten(1))


def measured(model: nn.Module, x: object, structure: nm.structures.Structure) -> nm.FisherOperator:
    return nm.fisher(
        model,
        nm.Categorical(),
        x,
        structure,
        estimator=nm.MonteCarlo(2),
        generator=torch.Generator().manual_seed(0),
    )


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("net", [Net, ConvNet])
def test_products_one_by_one_and_repeated_are_those_of_gram(
    net: Callable[[], nn.Module], keep: bool
) -> None:
    model, x = net(), torch.randn(N, WIDTH)
    F, gram = (measured(model, x, s) for s in (nm.Implicit(keep=keep), nm.Gram()))
    vectors = torch.randn(F.num_parameters, 3)
    expected = gram.matmat(vectors)
    for found in (F @ vectors[:, 0], F @ vectors[:, 0], F @ vectors[:, 0]):
        assert (found - expected[:, 0]).norm() <= RTOL * expected[:, 0].norm()
    for _ in range(2):
        assert (F.matmat(vectors) - expected).norm() <= RTOL * expected.norm()


def in_data(model: Net, x: Tensor) -> None:
    model.body[0].weight.data[0] += 1  # leaves no trace in the version of the parameter


def in_buffer(model: Net, x: Tensor) -> None:
    model.scale.mul_(2)


def in_inputs(model: Net, x: Tensor) -> None:
    x[0] += 1


def in_a_module(model: Net, x: Tensor) -> None:
    model.body[1] = nn.Sigmoid()


@pytest.mark.parametrize("change", [in_data, in_buffer, in_inputs, in_a_module])
def test_a_change_is_seen(change: Callable[[Net, Tensor], None]) -> None:
    model, x = Net(), torch.randn(N, WIDTH)
    F = measured(model, x, nm.Implicit())
    v = torch.randn(F.num_parameters)
    before = [F @ v for _ in range(3)][-1]
    change(model, x)
    after = [F @ v for _ in range(3)]
    gram = nm.fisher(model, nm.Categorical(), x, nm.Gram(), estimator=nm.Exact())
    exact = nm.fisher(model, nm.Categorical(), x, nm.Implicit(), estimator=nm.Exact())
    for found in (exact @ v, exact @ v):
        assert (found - gram @ v).norm() <= RTOL * found.norm()
    for found in after:
        assert (found - after[0]).norm() <= RTOL * found.norm()
        assert (found - before).norm() > 1e-3 * found.norm()


class Counting(Net):
    """Notes how many rows it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return super().forward(x)


def test_measuring_runs_a_few_samples_and_the_first_product_counts_all() -> None:
    model, batches = Counting(), [(torch.randn(N, WIDTH), None) for _ in range(3)]
    F = measured(model, batches, nm.Implicit())
    assert max(model.rows) < N
    model.rows.clear()
    F @ torch.ones(F.num_parameters)
    assert F.num_samples == measured(Net(), batches, nm.Implicit()).num_samples == 3 * N
    assert model.rows == [N] * 3


def test_outputs_that_are_not_finite_are_found_by_the_first_product() -> None:
    x = torch.randn(N, WIDTH)
    x[-1, 0] = torch.nan
    F = measured(Net(), x, nm.Implicit())
    with pytest.raises(NonFiniteError, match=f"1 of {N} samples"):
        F @ torch.ones(F.num_parameters)
    with pytest.raises(NonFiniteError, match=f"1 of {N} samples"):
        _ = F.num_samples
