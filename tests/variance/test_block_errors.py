"""Errors of whole blocks, against enumerated labels and signs and dense per-sample matrices."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.testing import layer_cases, reference
from neuromanifold.testing.cases import CASES, Case

RTOL = 1e-10
FAMILIES = ("categorical", "bernoulli", "gaussian", "gaussian_mean_variance", "poisson")
CLOSED = [
    case
    for case in CASES
    if str(case).partition("-")[0] in ("mlp", "conv2d", "reused")
    and str(case).partition("-")[2] in FAMILIES
]
POSITIONS = [case for case in CASES if str(case) == "sequence_positions-categorical"]
TABLES = [case for case in layer_cases.LAYERS if str(case).startswith("embedding")]
SPECIAL = ("attention_self", "tied_head", "layer_norm", "shared_weight", "gru_cell")
ATTENTION = [case for case in layer_cases.LAYERS if str(case) == "transformer_encoder_layer"]
LAYERS = [case for case in layer_cases.LAYERS if str(case) in SPECIAL]


def labels_of(case: Case, output: Tensor) -> tuple[Tensor, Tensor]:
    """All labels `(L, 1, ...)` of one sample, with weights exact for polynomials of degree 8."""
    distribution = case.likelihood.distribution(output)
    while isinstance(distribution, torch.distributions.Independent):
        distribution = distribution.base_dist
    if isinstance(distribution, torch.distributions.Normal):
        # Gauss-Hermite: nodes of exp(−z²/2) from the Golub-Welsch matrix.
        beta = torch.arange(1, 5, dtype=torch.float64).sqrt()
        nodes, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
        shape = (-1, *[1] * distribution.mean.ndim)
        values = distribution.mean + distribution.stddev * nodes.reshape(shape)
        weights = vectors[0].square().reshape(shape).expand_as(values)
    else:
        values, weights = reference.quadrature(distribution)
    values, event = values.flatten(1), values.shape[1:]
    count = values.shape[1]
    labels = torch.cartesian_prod(*values.T).reshape(-1, *event)
    joint = torch.cartesian_prod(*weights.flatten(1).T).reshape(-1, count).prod(dim=1)
    return labels, joint


def layers_of(model: nn.Module, case: Case) -> dict[str, list[int]]:
    """Where the parameters of each layer are in a flat vector."""
    x, y = case.data()
    F = nm.fisher(model, case.likelihood, (x, y), nm.Diagonal(), estimator=nm.Exact())
    where: dict[str, list[int]] = {}
    for name, indices in F.layout.slices.items():
        where.setdefault(F.coverage[name].block, []).extend(range(indices.start, indices.stop))
    return where


def assert_close(got: dict[str, float], expected: dict[str, float]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert math.isclose(got[name], value, rel_tol=RTOL, abs_tol=1e-14), name


def squared_distance(vectors: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """Mean of `v vᵀ` over weighted vectors `(L, p)`, and the mean squared distance from it."""
    mean = torch.einsum("l,li,lj->ij", weights, vectors, vectors)
    fourth = weights @ vectors.square().sum(dim=1).square()
    return mean, float(fourth - mean.square().sum())


@pytest.mark.parametrize("case", [*CLOSED, *ATTENTION], ids=str)
def test_sampled_labels_over_all_labels(case: Case) -> None:
    model, (x, _) = case.model(), case.data()
    with torch.no_grad():
        outputs = model(x)
    jacobian, n = reference.jacobian(model, x), len(x)
    labels, data, norms = {}, {}, {}
    for layer, indices in layers_of(model, case).items():
        means, errors = [], []
        for i in range(n):
            support, weights = labels_of(case, outputs[i : i + 1])
            scores = torch.cat(
                [case.likelihood.score(outputs[i : i + 1], y).flatten(1) for y in support]
            )
            mean, error = squared_distance(scores @ jacobian[i][:, indices], weights)
            means.append(mean)
            errors.append(error)
        mean = torch.stack(means).mean(0)
        norms[layer] = float(mean.norm())
        labels[layer] = sum(errors) / n**2 / 3
        data[layer] = float(sum((m - mean).square().sum() for m in means)) / (n * (n - 1))
    got = nm.variance.blocks(model, case.likelihood, x, estimator=nm.MonteCarlo(3))
    assert (got.num_samples, got.draws) == (n, 3)
    assert_close(dict(got.norms), norms)
    assert_close(dict(got.squared["labels"]), labels)
    assert_close(dict(got.squared["data"]), data)


@pytest.mark.parametrize("case", CLOSED, ids=str)
def test_random_signs_over_all_sign_patterns(case: Case) -> None:
    model, (x, _) = case.model(), case.data()
    with torch.no_grad():
        outputs = model(x)
    columns = torch.stack(list(case.likelihood.fisher_columns(outputs))).flatten(2)  # (V, N, E)
    gradients = torch.einsum("vne,nep->vnp", columns, reference.jacobian(model, x))
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * len(columns))
    signs = signs.reshape(-1, len(columns))
    weights = torch.full((len(signs),), 1 / len(signs), dtype=torch.float64)
    expected = {
        layer: sum(
            squared_distance(signs @ gradients[:, i][:, indices], weights)[1] for i in range(len(x))
        )
        / len(x) ** 2
        for layer, indices in layers_of(model, case).items()
    }
    got = nm.variance.blocks(model, case.likelihood, x, estimator=nm.RandomSigns(1))
    assert_close(dict(got.squared["probes"]), expected)


@pytest.mark.parametrize("case", POSITIONS, ids=str)
def test_positions_are_independent_and_some_are_ignored(case: Case) -> None:
    model, (x, y) = case.model(), case.data()
    with torch.no_grad():
        outputs = model(x)
    jacobian = reference.jacobian(model, x)
    expected = {}
    for layer, indices in layers_of(model, case).items():
        total = 0.0
        for i in range(len(x)):
            output = outputs[i : i + 1]
            support, weights = labels_of(case, output)
            scores = torch.cat([case.likelihood.score(output, labels) for labels in support])
            scores = case.likelihood.mask_cotangent(scores, output, y[i : i + 1])
            total += squared_distance(scores.flatten(1) @ jacobian[i][:, indices], weights)[1]
        expected[layer] = total / len(x) ** 2
    assert bool((y < 0).any())
    got = nm.variance.blocks(model, case.likelihood, (x, y))
    assert_close(dict(got.squared["labels"]), expected)


@pytest.mark.parametrize("case", [*LAYERS, *TABLES], ids=str)
def test_gram_matrices_of_every_kind_of_layer(case: Case) -> None:
    """Gaussian and categorical outputs, from dense gradients along the columns."""
    model, (x, y) = case.model(), case.data()
    with torch.no_grad():
        outputs = model(*x) if isinstance(x, tuple) else model(x)
    columns = torch.stack(list(case.likelihood.fisher_columns(outputs)))
    columns = case.likelihood.mask_cotangent(columns, outputs, y).flatten(2)  # (V, N, E)
    gradients = torch.einsum("vne,nep->nvp", columns, reference.jacobian(model, x))
    norms, labels = {}, {}
    for layer, indices in layers_of(model, case).items():
        p = gradients[:, :, indices]
        matrices = p.mT @ p
        norms[layer] = float(matrices.mean(0).norm())
        trace = matrices.diagonal(dim1=1, dim2=2).sum(1)
        error = trace.square() - 2 * (p @ p.mT).diagonal(dim1=1, dim2=2).square().sum(1)
        error += matrices.square().sum(dim=(1, 2))
        labels[layer] = float(error.sum()) / len(outputs) ** 2
    got = nm.variance.blocks(model, case.likelihood, (x, y), estimator=nm.RandomSigns(1))
    assert_close(dict(got.norms), norms)
    assert_close(dict(got.squared["probes"]), labels)


@pytest.mark.parametrize("case", [*CLOSED[:3], *POSITIONS], ids=str)
def test_batches(case: Case) -> None:
    model, (x, y) = case.model(), case.data()
    whole = nm.variance.blocks(model, case.likelihood, (x, y))
    parts = nm.variance.blocks(model, case.likelihood, [(x[:3], y[:3]), (x[3:], y[3:])])
    assert_close(dict(parts.norms), dict(whole.norms))
    for source in ("data", "labels"):
        assert_close(dict(parts.squared[source]), dict(whole.squared[source]))


def test_norm_of_a_layer_too_large_for_a_matrix() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.Tanh()).double()  # 2460 parameters
    x = torch.randn(50, 40, dtype=torch.float64)  # 3000 gradients: more than one chunk
    got = nm.variance.blocks(model, nm.Bernoulli(), x)
    options = {"structure": nm.BlockDiagonal(), "estimator": nm.Exact()}
    exact = nm.fisher(model, nm.Bernoulli(), x, **options).to_dense()
    assert math.isclose(got.norms["0"], exact.norm(), rel_tol=RTOL)


def test_measured_distances_agree() -> None:
    """Mean squared distance of drawn blocks, within four standard errors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(20, 4, dtype=torch.float64)
    options = {"structure": nm.BlockDiagonal()}
    exact = nm.fisher(model, nm.Categorical(), x, estimator=nm.Exact(), **options)
    rng = torch.Generator().manual_seed(1)
    for estimator in (nm.MonteCarlo(2), nm.RandomSigns(2)):
        drawn = [
            nm.fisher(model, nm.Categorical(), x, estimator=estimator, generator=rng, **options)
            for _ in range(300)
        ]
        got = nm.variance.blocks(model, nm.Categorical(), x, estimator=estimator)
        (source,) = got.squared.keys() - {"data"}
        for layer in ("0", "2"):
            true = exact.block(layer).to_dense()
            distances = torch.stack(
                [(F.block(layer).to_dense() - true).square().sum() for F in drawn]
            )
            stderr = distances.std() / len(distances) ** 0.5
            assert abs(distances.mean() - got.squared[source][layer]) < 4 * stderr
            assert math.isclose(got.norms[layer], true.norm(), rel_tol=RTOL)


def test_as_text_and_as_data() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    x = torch.randn(50, 3)
    got = nm.variance.blocks(model, nm.Gaussian(), x, estimator=nm.MonteCarlo(4))
    plain = json.loads(json.dumps(got.to_dict()))
    assert plain["norm"] == got.norms
    assert plain["relative"]["labels"]["0"] == got.error("labels")["0"] / got.norms["0"]
    header, columns, *rows = str(got).splitlines()
    assert "50 samples, 4 draws each" in header
    assert columns.split() == ["layer", "norm", "data", "labels"]
    assert [row.split()[0] for row in rows] == ["0", "2"]
    assert rows[0].split()[-1] == f"{got.relative('labels')['0']:.2%}"
    with pytest.raises(KeyError, match=r"no error from 'probes'; there is \['data', 'labels'\]"):
        got.error("probes")
    assert set(nm.variance.blocks(model, nm.Gaussian(), x, estimator=nm.Exact()).squared) == {
        "data"
    }


def test_one_sample_says_nothing_of_others() -> None:
    model, x = nn.Linear(3, 2).double(), torch.randn(1, 3, dtype=torch.float64)
    got = nm.variance.blocks(model, nm.Gaussian(), x)
    assert got.squared["data"] == {"": math.inf}
    assert json.loads(json.dumps(got.to_dict(), allow_nan=False))["errors"]["data"] == {"": None}
    assert str(got).splitlines()[-1].startswith("(root) ")
    # A rank-two block with equal eigenvalues: (tr² + ‖I‖²) / ‖I‖² = 3.
    assert math.isclose(got.relative("labels")[""] ** 2, 3, rel_tol=RTOL)


def test_what_has_no_closed_form_is_refused() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    laplace = nm.FromDistribution(
        lambda f: torch.distributions.Independent(torch.distributions.Laplace(f, 1.0), 1)
    )
    with pytest.raises(nm.errors.UnsupportedError, match="no closed form"):
        nm.variance.blocks(model, laplace, x)
    with pytest.raises(nm.errors.UnsupportedError, match="no closed form"):
        nm.variance.blocks(model, nm.Gaussian(), (x, torch.randn(4, 2)), estimator=nm.Empirical())


def test_part_of_a_model_its_own_forward_and_progress() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(12, 3, dtype=torch.float64)
    seen: list[int] = []
    got = nm.variance.blocks(
        model,
        nm.Categorical(),
        [(x[:6], None), (x[6:], None)],
        params=["2.*"],
        forward=lambda model, inputs: model(2 * inputs),
        progress=lambda done, _: seen.append(done),
    )
    whole = nm.variance.blocks(model, nm.Categorical(), 2 * x)
    assert_close(got.error("labels"), {"2": whole.error("labels")["2"]})
    assert seen == [1, 2]
