"""The Fisher matrix of units against its definition, dense algebra and Monte Carlo (§2.7)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import neuromanifold as nm
from neuromanifold.errors import NotPositiveDefiniteError
from neuromanifold.meanfield import UnitFisher, unit_fisher
from neuromanifold.meanfield.integrals import gaussian_integrals

pytestmark = pytest.mark.usefixtures("float64")

N, UNITS = 6, 4  # inputs, units
ACTIVATIONS = ["erf", "relu", "linear", "tanh", "leaky_relu", "bernoulli"]
INPUTS = ["standard", "mean", "diagonal", "diagonal and mean", "full", "full and mean"]


def inputs(kind: str) -> tuple[Tensor | None, Tensor | None]:
    """Mean and covariance."""
    mean = torch.randn(N) if "mean" in kind else None
    if "full" in kind:
        root = torch.randn(N, N) / N**0.5 + torch.eye(N)
        return mean, root @ root.T
    return mean, torch.rand(N) + 0.3 if "diagonal" in kind else None


def layer(activation="tanh", kind="standard", bias=True, error=None) -> UnitFisher:
    mean, covariance = inputs(kind)
    error = torch.rand(UNITS) + 0.5 if error is None else error
    weight = torch.randn(UNITS, N) / N**0.5
    return unit_fisher(
        activation, weight, torch.randn(UNITS) if bias else None, mean, covariance, error=error
    )


def assert_equal(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_matrix_is_the_one_of_the_paper():
    """A₀ I + (A₂ − A₀) e eᵀ and A₁ e, for standard normal inputs."""
    weight, bias = torch.randn(UNITS, N), torch.randn(UNITS)
    norm = weight.norm(dim=1)
    a0, a1, a2 = gaussian_integrals("erf", bias, norm).raw()
    for unit, matrix in enumerate(unit_fisher("erf", weight, bias, error=2.0).dense()):
        e = weight[unit] / norm[unit]
        expected = torch.eye(N + 1) * a0[unit]
        expected[:N, :N] += (a2 - a0)[unit] * torch.outer(e, e)
        expected[:N, N] = expected[N, :N] = a1[unit] * e
        assert_equal(matrix, 2 * expected)


def test_explicit_natural_gradient_is_the_one_of_the_paper():
    weight, bias = torch.randn(UNITS, N), torch.randn(UNITS)
    g_w, g_b = torch.randn(UNITS, N), torch.randn(UNITS)
    a0, a1, a2 = gaussian_integrals("tanh", bias, weight.norm(dim=1)).raw()
    determinant = a0 * a2 - a1**2
    e = torch.nn.functional.normalize(weight)
    along = (e * g_w).sum(1)
    x, y = a0 / determinant - 1 / a0, -a1 / determinant
    step_w, step_b = unit_fisher("tanh", weight, bias).solve(g_w, g_b)
    assert_equal(step_w, g_w / a0[:, None] + (x * along + y * g_b)[:, None] * e, 1e-10)
    assert_equal(step_b, y * along + a2 / determinant * g_b, 1e-10)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["full and mean", "diagonal and mean", "full"])
def test_general_inputs_are_a_congruence_of_standard_ones(activation, kind):
    """G = T G_z Tᵀ with R Rᵀ = S and T = [[R, m], [0, 1]]."""
    mean, covariance = inputs(kind)
    weight, bias = torch.randn(UNITS, N), torch.randn(UNITS)
    general = unit_fisher(activation, weight, bias, mean, covariance).dense()
    shift = torch.zeros(N) if mean is None else mean
    factor = torch.linalg.cholesky(covariance.diag() if covariance.ndim == 1 else covariance)
    transform = torch.eye(N + 1)
    transform[:N, :N], transform[:N, N] = factor, shift
    standard = unit_fisher(activation, weight @ factor, bias + weight @ shift).dense()
    assert_equal(general, transform @ standard @ transform.T)


@pytest.mark.parametrize(
    ("activation", "information"),
    [
        ("tanh", lambda u: (1 - u.tanh() ** 2) ** 2),
        ("relu", lambda u: (u > 0).to(u)),
        ("bernoulli", lambda u: u.sigmoid() * (1 - u.sigmoid())),
    ],
    ids=["tanh", "relu", "bernoulli"],
)
def test_matrix_equals_monte_carlo(activation, information):
    """4·10⁶ samples, to 1e-3, with inputs of any mean and covariance."""
    n, generator = 3, torch.Generator().manual_seed(1)
    mean, bias = torch.tensor([0.2, -0.3, 0.1]), torch.tensor(0.3)
    factor = torch.tensor([[0.6, 0.0, 0.0], [0.3, 0.5, 0.0], [-0.2, 0.1, 0.7]])
    weight = torch.tensor([0.8, -0.5, 0.6])
    total, samples, chunk = torch.zeros(n + 1, n + 1), 4_000_000, 500_000
    for _ in range(samples // chunk):
        x = mean + torch.randn(chunk, n, generator=generator) @ factor.T
        extended = torch.cat([x, torch.ones(chunk, 1)], dim=1)
        psi = information(x @ weight + bias)
        total += (extended * psi[:, None]).T @ extended
    exact = unit_fisher(activation, weight, bias, mean, factor @ factor.T).dense()
    torch.testing.assert_close(exact, total / samples, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_algebra_equals_dense_algebra(activation, kind, bias):
    fisher = layer(activation, kind, bias)
    dense, size = fisher.dense(), N + bias
    identity = torch.eye(size).expand(UNITS, size, size)
    v = torch.randn(3, UNITS, size)
    v_w, v_b = v[..., :N], v[..., N] if bias else None

    def flat(w: Tensor, b: Tensor | None) -> Tensor:
        assert (b is not None) == bias
        return w if b is None else torch.cat([w, b[..., None]], dim=-1)

    assert_equal(flat(*fisher.matmul(v_w, v_b)), (dense @ v[..., None])[..., 0])
    assert_equal(fisher.trace(), dense.diagonal(dim1=1, dim2=2).sum(1))
    for damping in (0.0, 1e-6, 0.1, 10.0):
        damped = dense + damping * identity
        assert_equal(fisher.inverse(damping=damping) @ damped, identity)
        expected = torch.linalg.solve(damped, v[..., None])[..., 0]
        assert_equal(flat(*fisher.solve(v_w, v_b, damping=damping)), expected, 1e-10)
        assert_equal(fisher.logdet(damping=damping), torch.linalg.slogdet(damped)[1])


@pytest.mark.parametrize("kind", INPUTS)
def test_one_unit_equals_the_same_unit_in_a_layer(kind):
    mean, covariance = inputs(kind)
    weight, bias, error = torch.randn(UNITS, N), torch.randn(UNITS), torch.rand(UNITS)
    whole = unit_fisher("tanh", weight, bias, mean, covariance, error=error)
    one = unit_fisher("tanh", weight[1], bias[1], mean, covariance, error=error[1])
    g_w, g_b = torch.randn(UNITS, N), torch.randn(UNITS)
    assert one.trace().shape == ()
    assert_equal(one.dense(), whole.dense()[1])
    assert_equal(one.inverse(), whole.inverse()[1])
    for single, every in zip(
        one.solve(g_w[1], g_b[1], damping=0.1), whole.solve(g_w, g_b, damping=0.1), strict=True
    ):
        assert_equal(single, every[1])


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "elu"])
@pytest.mark.parametrize("kind", INPUTS)
def test_units_without_weights_are_not_nan(activation, kind):
    """e = w/‖w‖ is undefined at w = 0; the limit of smooth activations is ψ(b) E[x̃ x̃ᵀ]."""
    mean, covariance = inputs(kind)
    weight = torch.randn(UNITS, N) * torch.tensor([0.0, 1e-200, 1e-100, 1e-12])[:, None]
    bias = torch.full((UNITS,), 0.5)
    fisher = unit_fisher(activation, weight, bias, mean, covariance)
    at_zero = unit_fisher(activation, torch.zeros(UNITS, N), bias, mean, covariance)
    assert_equal(fisher.dense(), at_zero.dense(), 1e-10)
    identity = torch.eye(N + 1).expand(UNITS, -1, -1)
    for damping in (0.0, 0.1):
        damped = fisher.dense() + damping * identity
        assert_equal(fisher.inverse(damping=damping) @ damped, identity)


def test_tiny_determinants_are_solved_to_full_precision():
    """Saturated units: A₀A₂ − A₁² has no digit left, the solution has all of them."""
    weight = torch.zeros(3, 2)
    weight[:, 0] = torch.tensor([1e6, 1e8, 1e10])
    bias = weight[:, 0].clone()  # decided at x = −1
    fisher = unit_fisher("erf", weight, bias)
    step_w, step_b = fisher.solve(torch.ones(3, 2), torch.zeros(3))
    # In the limit V = 1/(4w²), t = −1: n_w = 1/(a₀V), n_b = −t n_w.
    volume = fisher.amount / (4 * weight[:, 0] ** 2)
    assert_equal(step_w[:, 0] * volume, torch.ones(3), 1e-9)
    assert_equal(step_b * volume, torch.ones(3), 1e-9)
    damped_w, damped_b = fisher.solve(torch.ones(3, 2), torch.zeros(3), damping=1e-3)
    assert damped_w.isfinite().all()
    assert damped_b.isfinite().all()


@pytest.mark.parametrize("kind", INPUTS)
def test_units_that_say_nothing_need_damping(kind):
    mean, covariance = inputs(kind)
    weight, bias = torch.randn(2, N), torch.tensor([0.0, -1e6])
    fisher = unit_fisher("relu", weight, bias, mean, covariance)
    assert fisher.dense()[1].eq(0).all()
    with pytest.raises(NotPositiveDefiniteError, match="1 of 2 units"):
        fisher.solve(weight, bias)
    with pytest.raises(NotPositiveDefiniteError, match="damping"):
        fisher.logdet()
    step_w, step_b = fisher.solve(torch.ones(2, N), torch.ones(2), damping=0.5)
    assert_equal(step_w[1], torch.full((N,), 2.0))
    assert_equal(step_b[1], torch.tensor(2.0))


def test_inputs_that_never_vary_need_damping():
    variances, mean = torch.rand(N), torch.randn(N)
    variances[2] = 0
    weight, bias = torch.randn(UNITS, N), torch.randn(UNITS)
    g_w, g_b = torch.randn(UNITS, N), torch.randn(UNITS)
    for covariance in (variances, variances.diag()):
        fisher = unit_fisher("tanh", weight, bias, mean, covariance)
        with pytest.raises(NotPositiveDefiniteError, match="damping"):
            fisher.solve(g_w, g_b)
        damped = fisher.dense() + 0.01 * torch.eye(N + 1)
        expected = torch.linalg.solve(damped, torch.cat([g_w, g_b[:, None]], 1)[..., None])
        step_w, step_b = fisher.solve(g_w, g_b, damping=0.01)
        assert_equal(torch.cat([step_w, step_b[:, None]], 1), expected[..., 0], 1e-10)


@pytest.mark.parametrize("kind", INPUTS)
def test_results_keep_the_dtype(kind):
    mean, covariance = inputs(kind)
    given = [None if t is None else t.float() for t in (mean, covariance)]
    fisher = unit_fisher("tanh", torch.randn(UNITS, N).float(), torch.randn(UNITS).float(), *given)
    g_w, g_b = torch.randn(UNITS, N).float(), torch.randn(UNITS).float()
    for damping in (0.0, 0.1):
        results = [*fisher.solve(g_w, g_b, damping=damping), fisher.logdet(damping=damping)]
        for result in [*results, *fisher.matmul(g_w, g_b), fisher.dense(), fisher.trace()]:
            assert result is not None
            assert result.dtype == torch.float32


def test_it_equals_the_measured_block_of_a_unit_with_gaussian_inputs():
    """With one linear unit after the activation, the error is its weight: exact up to sampling."""
    torch.manual_seed(0)
    n, samples = 3, 40_000
    model = torch.nn.Sequential(torch.nn.Linear(n, 1), torch.nn.Tanh(), torch.nn.Linear(1, 1))
    x = torch.randn(samples, n)
    measured = nm.fisher(model, nm.Gaussian(), x, nm.Dense(), estimator=nm.Exact()).to_dense()
    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    error = model[2].weight.detach().square()[0]
    predicted = unit_fisher("tanh", weight, bias, error=error).dense()[0]
    bound = 5 * math.sqrt(15 / samples) * float(error)  # E[x⁴ x⁴'] of the entries is at most 15
    torch.testing.assert_close(predicted, measured[: n + 1, : n + 1], rtol=0, atol=bound)


def test_errors_say_what_was_expected():
    weight, bias = torch.randn(UNITS, N), torch.randn(UNITS)
    with pytest.raises(ValueError, match="weight is"):
        unit_fisher("tanh", torch.randn(2, UNITS, N), bias)
    with pytest.raises(ValueError, match=r"bias has the shape \(4,\)"):
        unit_fisher("tanh", weight, torch.randn(N))
    with pytest.raises(ValueError, match=r"covariance has the shape \(6,\) or \(6, 6\)"):
        unit_fisher("tanh", weight, bias, covariance=torch.eye(N + 1))
    with pytest.raises(ValueError, match="same dtype"):
        unit_fisher("tanh", weight, bias.float())
    with pytest.raises(ValueError, match="error is one number"):
        unit_fisher("tanh", weight, bias, error=torch.ones(N))
    fisher = unit_fisher("tanh", weight, bias)
    with pytest.raises(ValueError, match=r"weights \(\.\.\., 4, 6\) and biases \(\.\.\., 4\)"):
        fisher.solve(weight.T, bias)
    with pytest.raises(ValueError, match="biases"):
        fisher.matmul(weight)
    with pytest.raises(ValueError, match="no biases"):
        unit_fisher("tanh", weight, None).solve(weight, bias)
    with pytest.raises(ValueError, match="damping"):
        fisher.solve(weight, bias, damping=-1.0)
