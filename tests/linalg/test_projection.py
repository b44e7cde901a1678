"""A few directions and one number for the others, against dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neuromanifold.linalg.projection import Projection

G, N, K = 2, 9, 3
TIGHT: dict[str, float] = {"rtol": 1e-12, "atol": 1e-12}

pytestmark = pytest.mark.usefixtures("float64")


def orthonormal(n: int = N, k: int = N) -> Tensor:
    return torch.linalg.qr(torch.randn(G, n, k))[0]


def moment(rank: int = N + 2) -> Tensor:
    x = torch.randn(G, rank, N)
    return x.mT @ x


def projection() -> Projection:
    return Projection(torch.rand(G, K) + 1, orthonormal(k=K), torch.rand(G))


def dense(p: Projection) -> Tensor:
    """By the formula."""
    kept = p.vectors @ torch.diag_embed(p.values) @ p.vectors.mT
    return kept + p.rest[:, None, None] * (torch.eye(N) - p.vectors @ p.vectors.mT)


def test_it_is_the_matrix_of_its_formula() -> None:
    p = projection()
    x, expected = torch.randn(4, G, N, 5), dense(p)
    torch.testing.assert_close(p.matmul(x), expected @ x, **TIGHT)
    torch.testing.assert_close(p.dense(), expected, **TIGHT)
    torch.testing.assert_close(p.diagonal(), expected.diagonal(dim1=1, dim2=2), **TIGHT)
    torch.testing.assert_close(p.trace(), expected.diagonal(dim1=1, dim2=2).sum(1), **TIGHT)
    torch.testing.assert_close(p.norm(), expected.flatten(1).norm(dim=1), **TIGHT)
    values = p.eigenvalues().sort().values
    torch.testing.assert_close(values, torch.linalg.eigvalsh(expected), **TIGHT)
    along, left = p.split(x)
    torch.testing.assert_close(p.vectors @ along + left, x, **TIGHT)


def test_the_inverse_times_the_operator_is_the_identity() -> None:
    p, damping = projection(), 0.3
    inverse = p.function(lambda values: 1 / (values + damping))
    identity = inverse.matmul(dense(p) + damping * torch.eye(N))
    torch.testing.assert_close(identity, torch.eye(N).expand(G, N, N), **TIGHT)


@pytest.mark.parametrize("power", [0.5, 2.0, 5.0])
def test_in_other_directions_it_is_the_mean_of_the_inverse(power: float) -> None:
    n, k, damping = 400, 50, torch.tensor([1e-3])
    others = ((torch.arange(n - k) + 0.5) / (n - k)) ** power
    m = torch.diag_embed(torch.cat([others, torch.ones(k // 2), 2 * torch.ones(k // 2)]))[None]
    p = Projection.of(m, k)
    found = p.damped_inverse(damping)
    torch.testing.assert_close(found.values, 1 / (p.values + damping), **TIGHT)
    # The sum over others is the integral, which the power is found by, up to O(1 / n) for u^0.5.
    expected = (1 / (others + damping)).mean()
    torch.testing.assert_close(found.rest, expected[None], rtol=1 / n, atol=0)
    assert (1 / (p.rest + damping) < 0.9 * expected).all()


def test_others_that_are_equal_or_zero_are_inverted_exactly() -> None:
    u, damping = orthonormal(k=K), torch.tensor([0.3, 1e-3])
    for value in (0.0, 1.0):
        rest = torch.full((G,), value)
        p = Projection(torch.ones(G, K), u, rest)
        torch.testing.assert_close(p.rest_of_inverse(damping), 1 / (rest + damping), **TIGHT)
    nothing = Projection(torch.zeros(G, K), u, torch.zeros(G))
    torch.testing.assert_close(nothing.rest_of_inverse(damping), 1 / damping, **TIGHT)


def test_the_spread_of_others_has_their_mean() -> None:
    n, k = 1000, 100
    rest = torch.tensor([0.02, 0.2, 1.0, 3.0])
    p = Projection(torch.linspace(2, 1, k).expand(4, k), torch.zeros(4, n, k), rest)
    spread = p.spread_of_rest()
    torch.testing.assert_close(spread.mean(dim=1), rest, rtol=2e-3, atol=0)
    assert (spread.diff(dim=1) >= 0).all()


def test_products_take_a_symmetric_matrix_along_the_directions() -> None:
    p = projection()
    inner = moment()[:, :K, :K]
    q, x = Projection(inner, p.vectors, p.rest), torch.randn(G, N, 5)
    others = torch.eye(N) - p.vectors @ p.vectors.mT
    expected = p.vectors @ inner @ p.vectors.mT + p.rest[:, None, None] * others
    torch.testing.assert_close(q.matmul(x), expected @ x, **TIGHT)


def test_the_nearest_one_has_the_largest_eigenvalues_and_the_trace() -> None:
    m = moment()
    p = Projection.of(m, K)
    values = torch.linalg.eigvalsh(m)
    torch.testing.assert_close(p.values, values[:, -K:].flip(-1), **TIGHT)
    torch.testing.assert_close(p.rest, values[:, :-K].mean(dim=1), **TIGHT)
    distance = (p.dense() - m).flatten(1).norm(dim=1)
    for factor in (0.9, 1.1):  # of all numbers for the others, it is the nearest
        other = Projection(p.values, p.vectors, factor * p.rest)
        assert ((other.dense() - m).flatten(1).norm(dim=1) > distance).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_tell_all_of_a_matrix_of_low_rank(dtype: torch.dtype) -> None:
    m, test = moment(rank=K - 1), orthonormal(k=K)
    trace = m.diagonal(dim1=1, dim2=2).sum(1)
    p = Projection.of_image(*(t.to(dtype) for t in (test, m @ test, trace)))
    rounding = 100 * torch.finfo(dtype).eps * m.norm()
    assert (p.dense() - m).norm() <= rounding
    assert (p.vectors.mT @ p.vectors - torch.eye(K)).norm() <= 100 * torch.finfo(dtype).eps


def test_images_tell_no_more_than_there_is() -> None:
    m, test = moment(), orthonormal(k=K)
    p = Projection.of_image(test, m @ test, m.diagonal(dim1=1, dim2=2).sum(1))
    kept = p.vectors @ torch.diag_embed(p.values) @ p.vectors.mT
    assert torch.linalg.eigvalsh(m - kept).min() >= -1e-10
    torch.testing.assert_close(kept @ test, m @ test, **TIGHT)
    torch.testing.assert_close(p.trace(), m.diagonal(dim1=1, dim2=2).sum(1), **TIGHT)


@pytest.mark.parametrize("look", [Projection.of_image, Projection.turned])
def test_repeated_images_find_the_largest_eigenvalues(look: Any) -> None:
    values = 0.5 ** torch.arange(N)
    basis = orthonormal()
    m = basis * values @ basis.mT
    u = orthonormal(k=K)
    for _ in range(30):
        u = look(u, m @ u, values.sum().expand(G)).vectors
    found = look(u, m @ u, values.sum().expand(G))
    torch.testing.assert_close(found.values, values[:K].expand(G, K))


def test_to_turn_is_to_project_what_was_seen() -> None:
    m, u = moment(), orthonormal(k=K)
    trace = m.diagonal(dim1=1, dim2=2).sum(1)
    p = Projection.turned(u, m @ u, trace)
    along = u.mT @ m @ u
    rest = (trace - along.diagonal(dim1=1, dim2=2).sum(1)) / (N - K)
    seen = u @ along @ u.mT + rest[:, None, None] * (torch.eye(N) - u @ u.mT)
    basis = torch.linalg.qr(m @ u)[0]
    projected = basis.mT @ seen @ basis
    torch.testing.assert_close(p.values.flip(-1), torch.linalg.eigvalsh(projected))
    torch.testing.assert_close(p.vectors @ p.vectors.mT, basis @ basis.mT)
    torch.testing.assert_close(p.trace(), trace, **TIGHT)
    torch.testing.assert_close(p.vectors.mT @ p.vectors, torch.eye(K).expand(G, K, K), **TIGHT)
    # Nothing changes where nothing is new, or nothing is there.
    still = Projection.turned(p.vectors, p.matmul(p.vectors), trace)
    torch.testing.assert_close(still.dense(), p.dense(), **TIGHT)
    nothing = Projection.turned(u, torch.zeros_like(u), torch.zeros(G))
    assert not nothing.dense().any()


def test_a_share_of_the_trace_is_held_by_as_few_directions_as_can() -> None:
    values = torch.tensor([8.0, 4.0, 2.0, 1.0]).expand(G, 4)
    p = Projection(values, orthonormal(k=4), torch.full((G,), 0.2))  # a trace of 16
    for energy, rank in ((0.4, 1), (0.5, 1), (0.6, 2), (0.75, 2), (0.9, 4), (0.99, 4), (1.0, 4)):
        cut = p.cut(energy)
        assert cut.values.shape[-1] == rank, energy
        torch.testing.assert_close(cut.trace(), p.trace(), **TIGHT)
    nothing = Projection(torch.zeros(G, K), orthonormal(k=K), torch.zeros(G)).cut(0.5)
    assert nothing.values.shape[-1] == K
