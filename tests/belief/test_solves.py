import pytest
import torch

from neuromanifold.belief.solves import (
    DenseSolver,
    DiagonalSolver,
    QRSolver,
    Rows,
    SharedSolver,
    WoodburySolver,
)
from neuromanifold.errors import NotPositiveDefiniteError


def make_rows(num, inputs, units, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, inputs, generator=generator, dtype=torch.float64)
    x[:, -1] = 1
    probabilities = torch.rand(num, units, generator=generator, dtype=torch.float64)
    probabilities = 0.05 + 0.9 * probabilities
    return Rows(x, (probabilities * (1 - probabilities) / num)[..., None, None])


def make_gradient(rows, *, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = rows.curvature.shape[1] * rows.curvature.shape[2], rows.inputs.shape[1]
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def dense_direction(rows, gradient, damping):
    """Unit by unit, from the definition."""
    directions = []
    for curvature, g in zip(rows.curvature[..., 0, 0].T, gradient, strict=True):
        fisher = rows.inputs.T @ torch.diag(curvature) @ rows.inputs
        shifted = fisher + damping * torch.eye(len(fisher), dtype=fisher.dtype)
        directions.append((1 + damping) * torch.linalg.pinv(shifted, hermitian=True) @ g)
    return torch.stack(directions)


@pytest.mark.parametrize("inputs", [3, 64, 65, 130])
def test_blocks_are_weighted_second_moments(inputs):
    rows = make_rows(20, inputs, 4)
    expected = torch.einsum("nu,ni,nj->uij", rows.curvature[..., 0, 0], rows.inputs, rows.inputs)
    torch.testing.assert_close(rows.fisher(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows.diagonal(), expected.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("num", [5, 8, 30])
@pytest.mark.parametrize("damping", [0.01, 0.2, 5.0])
def test_woodbury_and_dense_agree(num, damping):
    rows = make_rows(num, 8, 6)
    gradient = make_gradient(rows)
    expected = dense_direction(rows, gradient, damping)
    for solver in (DenseSolver.of(rows, damping), WoodburySolver.of(rows, damping)):
        torch.testing.assert_close(solver.solve(gradient), expected, rtol=0, atol=1e-10)


def test_qr_is_the_pseudo_inverse():
    rows = make_rows(5, 8, 6)
    gradient = make_gradient(rows)[:, :5] @ rows.inputs  # in the span of the rows, as always
    solver = rows.solver(damping=0.0)
    assert isinstance(solver, QRSolver)
    expected = dense_direction(rows, gradient, 0.0)
    torch.testing.assert_close(solver.solve(gradient), expected, rtol=0, atol=1e-10)


def test_undamped_cholesky_is_the_inverse():
    rows = make_rows(30, 8, 6)
    gradient = make_gradient(rows)
    expected = dense_direction(rows, gradient, 0.0)
    torch.testing.assert_close(
        rows.solver(damping=0.0).solve(gradient), expected, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("num", [5, 30])
@pytest.mark.parametrize("blocks", ["exact", "shared", "diagonal"])
def test_large_damping_leaves_the_gradient(num, blocks):
    rows = make_rows(num, 8, 6)
    gradient = make_gradient(rows)
    found = rows.solver(damping=1e13, blocks=blocks).solve(gradient)
    torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)


def test_roots_are_divided_by_their_variance():
    rows = Rows(torch.ones(4, 1), torch.tensor([0.25, 0.09]).div(4).expand(4, 2)[..., None, None])
    gradient = torch.tensor([[1.0], [1.0]])
    expected = 1.1 * gradient / (torch.tensor([[0.25], [0.09]]) + 0.1)
    torch.testing.assert_close(rows.solver(damping=0.1).solve(gradient), expected)


def test_diagonal_is_the_inverse_of_the_diagonal():
    rows = make_rows(30, 8, 6)
    gradient = make_gradient(rows)
    diagonal = rows.fisher().diagonal(dim1=1, dim2=2)
    found = rows.solver(damping=0.1, blocks="diagonal")
    torch.testing.assert_close(found.solve(gradient), 1.1 * gradient / (diagonal + 0.1))


@pytest.mark.parametrize("num", [5, 30])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_a_shared_basis_is_exact_for_units_of_proportional_blocks(num, damping):
    rows = make_rows(num, 8, 6)
    shares = torch.tensor([0.1, 0.2, 0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    rows = Rows(rows.inputs, rows.curvature[:, :1] * shares[:, None, None])
    gradient = make_gradient(rows)[:, :num] @ rows.inputs[:8]  # in the span of the rows, as always
    solver = rows.solver(damping=damping, blocks="shared")
    expected = dense_direction(rows, gradient, damping)
    torch.testing.assert_close(solver.solve(gradient), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num", [5, 30])
def test_a_shared_basis_keeps_the_diagonal_in_the_eigenvectors_of_the_mean_block(num):
    rows = make_rows(num, 8, 6)
    gradient = make_gradient(rows)
    basis = torch.linalg.eigh(rows.fisher().mean(0))[1]
    own = torch.einsum("ij,uik,kj->uj", basis, rows.fisher(), basis)
    expected = 1.1 * ((gradient @ basis) / (own + 0.1)) @ basis.T
    solver = rows.solver(damping=0.1, blocks="shared")
    torch.testing.assert_close(solver.solve(gradient), expected)
    length = torch.einsum("ui,ij,uj,kj,uk->", expected, basis, own, basis, expected)
    torch.testing.assert_close(solver.squared_length(gradient, expected), length)


@pytest.mark.parametrize(
    ("num", "damping", "blocks", "kind"),
    [
        (5, 0.1, "exact", WoodburySolver),
        (5, 0.0, "exact", QRSolver),
        (8, 0.1, "exact", DenseSolver),
        (5, 0.1, "diagonal", DiagonalSolver),
        (5, 0.1, "shared", SharedSolver),
        (40, 0.1, "shared", SharedSolver),
        (31, 0.1, "auto", SharedSolver),
        (32, 0.1, "auto", DenseSolver),
    ],
)
def test_the_cheapest_solver_is_chosen_and_its_memory_known(num, damping, blocks, kind):
    rows = make_rows(num, 8, 6)
    solver = rows.solver(damping=damping, blocks=blocks)
    assert isinstance(solver, kind)
    tensors = [
        value
        for value in vars(solver).values()
        if isinstance(value, torch.Tensor)
        and value.data_ptr() not in (rows.inputs.data_ptr(), rows.curvature.data_ptr())
    ]
    numbers = sum(tensor.numel() for tensor in tensors)
    assert numbers == rows.size.numbers(damping=damping, blocks=blocks)


def test_categorical_variables_are_solved_together():
    rows, logits = make_rows(30, 4, 1), make_rows(30, 6, 1).inputs.view(30, 2, 3)
    p = logits.softmax(-1)
    covariance = (torch.diag_embed(p) - p[..., :, None] * p[..., None, :]) / 30
    rows = Rows(rows.inputs, covariance)
    gradient = make_gradient(rows)
    found = rows.solver(damping=0.2).solve(gradient)
    blocks = torch.einsum("nbcd,ni,nj->bcidj", covariance, rows.inputs, rows.inputs)
    shifted = blocks.reshape(2, 12, 12) + 0.2 * torch.eye(12, dtype=torch.float64)
    expected = 1.2 * torch.linalg.solve(shifted, gradient.view(2, 12, 1))
    torch.testing.assert_close(found, expected.view(6, 4), rtol=0, atol=1e-10)
    diagonal = blocks.reshape(2, 12, 12).diagonal(dim1=1, dim2=2).reshape(6, 4)
    torch.testing.assert_close(rows.diagonal(), diagonal)


@pytest.mark.parametrize("num", [5, 30])
def test_the_squared_length_needs_no_product_with_the_fisher(num):
    rows = make_rows(num, 8, 6)
    gradient = make_gradient(rows)
    solver = rows.solver(damping=0.3)
    direction = solver.solve(gradient)
    expected = torch.einsum("ui,uij,uj->", direction, rows.fisher(), direction)
    torch.testing.assert_close(solver.squared_length(gradient, direction), expected)


@pytest.mark.parametrize("blocks", ["exact", "shared"])
def test_saturated_units_stay_finite(blocks):
    rows = make_rows(5, 8, 6)
    rows = Rows(rows.inputs, torch.zeros_like(rows.curvature))
    gradient = make_gradient(rows)
    found = rows.solver(damping=0.5, blocks=blocks).solve(gradient)
    torch.testing.assert_close(found, 3 * gradient)


def test_singular_blocks_without_damping_are_refused():
    rows = make_rows(4, 8, 6)
    repeated = Rows(rows.inputs[[0, 1, 2, 2]], rows.curvature)
    for blocks in ("exact", "shared"):
        with pytest.raises(NotPositiveDefiniteError, match="damping > 0"):
            repeated.solver(damping=0.0, blocks=blocks)
    with pytest.raises(NotPositiveDefiniteError, match="damping"):
        Rows(rows.inputs[:, :2] * torch.tensor([0.0, 1.0]), rows.curvature).solver(
            damping=0.0, blocks="diagonal"
        )


def test_arguments_out_of_range_are_refused():
    rows = make_rows(4, 8, 6)
    with pytest.raises(ValueError, match="damping must be >= 0"):
        rows.solver(damping=-1.0)
    with pytest.raises(ValueError, match="inputs \\(N, I\\)"):
        Rows(rows.inputs, rows.curvature[:2])
