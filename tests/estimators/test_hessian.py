"""Second derivatives at sampled labels, against Hessians of the log-probability."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Gamma, StudentT
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import neuromanifold as nm
from neuromanifold.structures import Source
from neuromanifold.testing import layer_cases, reference
from neuromanifold.testing.cases import CASES, Case

TOLERANCE = 1e-10
NETWORKS = (
    *("conv2d-categorical", "conv2d-gaussian_mean_variance", "reused-bernoulli"),
    *("sequence_positions-categorical", "sequence_positions-categorical_axis1"),
    "sequence_positions-distribution_normal",
)
LAYERS = (
    *("layer_norm_positions", "instance_norm1d", "batch_norm2d", "attention_self", "lstm"),
    *("embedding_padding_idx", "raw_parameters", "tied_head", "shared_weight"),
)
PROBLEMS = [
    *(case for case in CASES if str(case).startswith("mlp-") or str(case) in NETWORKS),
    *(case for case in layer_cases.LAYERS if str(case) in LAYERS),
]
STRUCTURES = [nm.Diagonal(), nm.BlockDiagonal(), nm.Dense(), nm.Implicit()]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(sum(shape)), dtype=torch.float64)


def network(*layers: nn.Module) -> nn.Module:
    """Layers with the same parameters each time."""
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=seeded(i), dtype=p.dtype) / 2)
    return model


def mlp(features: int = 3, activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    return network(
        nn.Linear(4, 5), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, features)
    )


def hessian(
    model: nn.Module,
    likelihood: nm.Likelihood,
    x: Any,
    y: Tensor | None,
    samples: int,
    generator: torch.Generator,
) -> Tensor:
    """`−Σ_n ∂² log p/∂θ²`, `(P, P)`, mean over labels, by reverse mode over reverse mode.

    Row by row: batched over rows, torch's second derivative of layer norm is not symmetric.
    """
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        outputs = model(x)
    draws = likelihood.sample(outputs, samples, generator=generator)
    observed = None if y is None else likelihood.observed(outputs, y)
    if observed is not None:
        draws = draws.masked_fill(~observed, likelihood.ignore_index)

    def surprise(vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in params.values()])
        given = {
            name: part.reshape(p.shape)
            for (name, p), part in zip(params.items(), parts, strict=True)
        }
        with sdpa_kernel(SDPBackend.MATH):
            moved = functional_call(model, given, (x,))
        return -torch.stack([likelihood.log_prob(moved, labels) for labels in draws]).mean(0).sum()

    at = torch.cat([p.flatten() for p in params.values()])
    found = torch.autograd.functional.hessian(surprise, at)
    assert torch.allclose(found, found.T)
    return found


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).norm() <= TOLERANCE * expected.norm()


def assert_kept(F: nm.FisherOperator, expected: Tensor) -> None:
    """What a structure keeps of a matrix is that matrix's own."""
    kind = F.origin.structure
    if kind == "Diagonal()":
        assert_same(F.layout.flatten(F.diagonal()), expected.diagonal())
    elif kind == "BlockDiagonal()":
        position = F.layout.unflatten(torch.arange(len(expected)))
        for name in {entry.block for entry in F.coverage}:
            block = F.block(name)
            index = torch.cat([position[p].flatten() for p in block.layout.names])
            assert_same(block.to_dense(), expected[index][:, index])
    else:
        assert_same(F.matmat(torch.eye(len(expected), dtype=F.dtype)), expected)


@pytest.mark.parametrize("case", PROBLEMS, ids=str)
def test_equals_the_hessian_at_the_same_labels(case: Case) -> None:
    model, (x, y), likelihood = case.model(), case.data(), case.likelihood
    x, y = x[:3], y[:3]
    expected = hessian(model, likelihood, x, y, 2, seeded()) / len(x)
    for structure in STRUCTURES:
        F = nm.fisher(
            model, likelihood, (x, y), structure, estimator=nm.Hessian(2), generator=seeded()
        )
        assert_kept(F, expected)
        assert (F.num_samples, F.origin.estimator) == (3, "Hessian(samples=2)")


def gamma(outputs: Tensor) -> Distribution:
    return Gamma(outputs[:, 0].exp(), outputs[:, 1:].exp().sum(dim=1))


def student(outputs: Tensor) -> Distribution:
    return StudentT(3 + outputs[:, 2].exp(), outputs[:, 0], outputs[:, 1].exp())


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
@pytest.mark.parametrize("make", [gamma, student], ids=["gamma", "student"])
def test_any_distribution(
    make: Callable[[Tensor], Distribution], structure: nm.structures.Structure
) -> None:
    """Without a closed form of the Fisher (Student), and with labels that never drop out."""
    model, x, likelihood = mlp(activation=nn.ReLU), randn(5, 4), nm.FromDistribution(make)
    F = nm.fisher(model, likelihood, x, structure, estimator=nm.Hessian(2), generator=seeded())
    assert_kept(F, hessian(model, likelihood, x, None, 2, seeded()) / len(x))
    assert not any(entry.note for entry in F.coverage)


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_mean_over_all_labels_is_exact(structure: nm.structures.Structure) -> None:
    model, x, likelihood = mlp(), randn(1, 4), nm.Categorical()
    outputs = model(x).detach()
    of_label: dict[int, nm.FisherOperator] = {}
    for seed in range(100):
        label = int(likelihood.sample(outputs, 1, generator=seeded(seed)))
        if label not in of_label:
            of_label[label] = nm.fisher(
                *(model, likelihood, x, structure),
                estimator=nm.Hessian(),
                generator=seeded(seed),
            )
    assert sorted(of_label) == [0, 1, 2]
    p = outputs.softmax(1)[0]
    eye = torch.eye(of_label[0].num_parameters, dtype=p.dtype)
    mean = sum(p[label] * F.matmat(eye) for label, F in of_label.items())
    if structure in STRUCTURES[2:]:
        expected = reference.dense_fisher(model, likelihood, x)
    else:
        expected = nm.fisher(model, likelihood, x, structure, estimator=nm.Exact()).to_dense()
    assert_same(mean, expected)


@pytest.mark.parametrize("seed", range(3))
def test_error_is_what_the_closed_form_says(seed: int) -> None:
    model, x, samples = mlp(), randn(30, 4), 20
    F = nm.fisher(
        *(model, nm.Categorical(), x, nm.Diagonal()),
        estimator=nm.Hessian(samples),
        generator=seeded(seed),
    )
    of_labels = nm.variance.second_derivative(model, nm.Categorical(), x, samples=samples)
    stderr = F.layout.flatten(of_labels.variances["labels"]).sqrt()
    off = F.layout.flatten(F.diagonal()) - F.layout.flatten(of_labels.value)
    assert (off.abs() <= 5 * stderr + 1e-12).all()
    assert 0.5 < (off / stderr)[stderr > 0].square().mean() < 2


def test_unbiased_where_the_label_never_drops_out() -> None:
    """Of a learned variance, the second derivative in the outputs depends on the label."""
    model, x, likelihood = network(nn.Linear(2, 2)), randn(4, 2), nm.GaussianMeanVariance()
    exact = nm.fisher(model, likelihood, x, nm.Dense(), estimator=nm.Exact()).to_dense()
    draws = torch.stack(
        [
            nm.fisher(
                *(model, likelihood, x.repeat(100, 1), nm.Dense()),
                estimator=nm.Hessian(5),
                generator=seeded(seed),
            ).to_dense()
            for seed in range(16)
        ]
    )
    stderr = draws.std(dim=0) / len(draws) ** 0.5
    assert stderr.max() > 0.003
    assert ((draws.mean(dim=0) - exact).abs() <= 5 * stderr + 1e-12).all()


@pytest.mark.parametrize("structure", STRUCTURES[:2], ids=repr)
@pytest.mark.parametrize(
    "likelihood",
    [nm.Categorical(), nm.Bernoulli(), nm.Gaussian(0.5), nm.Poisson()],
    ids=lambda likelihood: type(likelihood).__name__,
)
def test_labels_drop_out_in_piecewise_linear_networks(
    likelihood: nm.Likelihood, structure: nm.structures.Structure
) -> None:
    model = network(
        *(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(12, 4), nn.LeakyReLU(), nn.Linear(4, 3)),
    )
    x = randn(5, 2, 4, 4)
    F = nm.fisher(model, likelihood, x, structure, estimator=nm.Hessian())
    exact = nm.fisher(model, likelihood, x, structure, estimator=nm.Exact())
    assert_same(F.to_dense(), exact.to_dense())
    assert all("labels drop out" in entry.note for entry in F.coverage)
    off_blocks = nm.fisher(model, likelihood, x, nm.Dense(), estimator=nm.Hessian()).to_dense()
    assert not torch.allclose(off_blocks, reference.dense_fisher(model, likelihood, x))


def test_labels_drop_out_in_the_last_layer_alone_of_a_smooth_network() -> None:
    model, x = mlp(), randn(6, 4)
    F = nm.fisher(model, nm.Categorical(), x, nm.BlockDiagonal(), estimator=nm.Hessian())
    exact = nm.fisher(model, nm.Categorical(), x, nm.BlockDiagonal(), estimator=nm.Exact())
    assert_same(F.block("4").to_dense(), exact.block("4").to_dense())
    noted = {entry.block for entry in F.coverage if "labels drop out" in entry.note}
    assert noted == {"4"}
    for name in ("0", "2"):
        assert not torch.allclose(F.block(name).to_dense(), exact.block(name).to_dense())


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_batches_and_groups_of_directions(
    structure: nm.structures.Structure, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, likelihood = mlp(), randn(7, 4), nm.Categorical()
    generator = seeded()
    expected = sum(hessian(model, likelihood, part, None, 1, generator) for part in x.split(3))
    monkeypatch.setattr(Source, "sweeps_together", lambda *_: 5)
    F = nm.fisher(
        *(model, likelihood, [(part, None) for part in x.split(3)], structure),
        estimator=nm.Hessian(),
        generator=seeded(),
    )
    assert_kept(F, expected / len(x))


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_per_position(structure: nm.structures.Structure) -> None:
    case = next(case for case in CASES if str(case) == "sequence_positions-categorical")
    model, (x, y) = case.model(), case.data()
    F = nm.fisher(
        *(model, case.likelihood, (x, y), structure),
        estimator=nm.Hessian(),
        per="position",
        generator=seeded(),
    )
    expected = hessian(model, case.likelihood, x, y, 1, seeded()) / (y != -100).sum()
    assert_kept(F, expected)


def test_sums_over_processes() -> None:
    """Two processes with the same data have the mean of one."""
    model, x = mlp(), randn(5, 4)

    def double(tensors: list[Tensor]) -> None:
        for tensor in tensors:
            tensor.mul_(2)

    for structure in STRUCTURES[:3]:
        one, two = (
            nm.fisher(
                *(model, nm.Poisson(), x, structure),
                estimator=nm.Hessian(),
                generator=seeded(),
                reducer=reducer,
            )
            for reducer in (None, double)
        )
        assert (one.num_samples, two.num_samples) == (5, 10)
        assert_same(two.to_dense(), one.to_dense())


def test_products_see_the_same_labels_each_time() -> None:
    model, x, v = mlp(), randn(5, 4), randn(64)
    F = nm.fisher(model, nm.Categorical(), x, nm.Implicit(), estimator=nm.Hessian(3))
    assert torch.equal(F @ v, F @ v)
    diagonal = F.layout.flatten(F.diagonal())
    assert_same(diagonal, F.matmat(torch.eye(64, dtype=v.dtype)).diagonal())
    other = nm.fisher(model, nm.Categorical(), x, nm.Implicit(), estimator=nm.Hessian(3))
    assert not torch.allclose(F @ v, other @ v)


# ---- what an indefinite matrix can do --------------------------------------------------------


def indefinite(structure: nm.structures.Structure) -> nm.FisherOperator:
    F = nm.fisher(
        *(mlp(), nm.Categorical(), randn(2, 4), structure),
        estimator=nm.Hessian(),
        generator=seeded(),
    )
    assert F.eigenvalues()[-1] < -0.01
    return F


@pytest.mark.parametrize("structure", STRUCTURES[:3], ids=repr)
def test_an_indefinite_matrix_refuses_what_does_not_exist(
    structure: nm.structures.Structure,
) -> None:
    F = indefinite(structure)
    lowest, v = float(F.eigenvalues()[-1]), randn(64)
    too_small = -lowest / 2
    for request in (
        lambda: F.solve(v, damping=too_small),
        lambda: F.solve(v, damping=0),
        lambda: F.logdet(damping=too_small),
        lambda: F.sqrt_matvec(v),
        lambda: F.inv_sqrt_matvec(v, damping=too_small),
        lambda: F.sample(1, damping=too_small),
    ):
        with pytest.raises(nm.errors.NotPositiveDefiniteError, match=r"indefinite: .* More labels"):
            request()
    with pytest.raises(nm.errors.NotPositiveDefiniteError, match="draws with any damping"):
        F.sample(1, damping=-2 * lowest)
    assert any("indefinite" in note for note in F.origin.notes)


@pytest.mark.parametrize("structure", STRUCTURES[:3], ids=repr)
def test_an_indefinite_matrix_gives_what_exists(
    structure: nm.structures.Structure, tmp_path: Path
) -> None:
    F, v = indefinite(structure), randn(64)
    dense = F.to_dense()
    values = torch.linalg.eigvalsh(dense).flip(0)
    assert_same(F.eigenvalues(), values)
    assert_same(F.trace(), values.sum())
    assert_same(F.norm(), values.square().sum().sqrt())
    assert_same(F @ v, dense @ v)
    damping = -2 * float(values[-1])
    damped = dense + damping * torch.eye(64, dtype=v.dtype)
    assert_same(F.solve(v, damping=damping), torch.linalg.solve(damped, v))
    assert_same(F.logdet(damping=damping), damped.logdet())
    assert_same((2 * F).eigenvalues(), 2 * values)
    assert_same((F + F).eigenvalues(), 2 * values)
    exact = nm.fisher(mlp(), nm.Categorical(), randn(2, 4), structure, estimator=nm.Exact())
    total = torch.linalg.eigvalsh(dense + exact.to_dense()).flip(0)
    assert_same((F + exact).eigenvalues(), total)
    assert_same((exact + F).eigenvalues(), total)
    names = ["0.weight", "2.bias"]
    part = F.restrict(names).to_dense()
    assert_same(F.restrict(names).eigenvalues(), torch.linalg.eigvalsh(part).flip(0))
    F.save(tmp_path / "F.safetensors")
    again = nm.load(tmp_path / "F.safetensors")
    assert torch.equal(again.to_dense(), dense)
    assert torch.equal(again.eigenvalues(), F.eigenvalues())


def test_a_positive_definite_estimate_has_roots() -> None:
    model, x = mlp(activation=nn.ReLU), randn(50, 4)
    F = nm.fisher(model, nm.Gaussian(), x, nm.BlockDiagonal(), estimator=nm.Hessian())
    exact = nm.fisher(model, nm.Gaussian(), x, nm.BlockDiagonal(), estimator=nm.Exact())
    v = randn(F.num_parameters)
    assert_same(F.sqrt_matvec(F.sqrt_matvec(v)), F @ v)
    got = F.inv_sqrt_matvec(v, damping=0.1)
    assert_same(got, exact.inv_sqrt_matvec(v, damping=0.1))
    assert F.sample(3, damping=0.1, generator=seeded()).shape == (3, F.num_parameters)


# ---- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "structure",
    [
        *(nm.UnitWise(), nm.QuasiDiagonal(), nm.Kronecker(), nm.EigenKronecker()),
        *(nm.LowRank(2), nm.Gram(), {"0": nm.Diagonal(), "*": nm.UnitWise()}),
    ],
    ids=str,
)
def test_structures_of_outer_products_are_refused(structure: Any) -> None:
    with pytest.raises(nm.errors.UnsupportedError, match=r"second derivatives.*nm\.Diagonal\(\)"):
        nm.fisher(mlp(), nm.Categorical(), randn(3, 4), structure, estimator=nm.Hessian())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least 1 label"):
        nm.Hessian(0)
    x = randn(3, 4)
    for structure in STRUCTURES:
        random = network(nn.Linear(4, 3), nn.Dropout(), nn.Tanh())
        with pytest.raises(nm.errors.UnsupportedError, match=r"model\.eval\(\)"):
            nm.fisher(random, nm.Categorical(), x, structure, estimator=nm.Hessian())
        with pytest.raises(nm.errors.NonFiniteError):
            nm.fisher(mlp(), nm.Categorical(), x * torch.nan, structure, estimator=nm.Hessian())
    wide = nn.Sequential(nn.Linear(4, 3000), nn.Tanh(), nn.Linear(3000, 3000))
    for structure in (nm.Dense(), nm.BlockDiagonal()):
        with pytest.raises(nm.errors.TooLargeError, match=repr(structure)[:-2]):
            nm.fisher(wide, nm.Categorical(), x.float(), structure, estimator=nm.Hessian())
    with pytest.raises(nm.errors.UnsupportedError, match="max_bytes"):
        nm.fisher(
            *(mlp(), nm.Categorical(), x, nm.Diagonal()),
            estimator=nm.Hessian(),
            max_bytes="1 GiB",
        )


class _Backwards(torch.autograd.Function):
    """A square that cannot be transformed, as those of many kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class _Kernel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Backwards.apply(x)


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_an_operator_that_torch_cannot_differentiate_twice(
    structure: nm.structures.Structure,
) -> None:
    model, x = network(nn.Linear(4, 3), _Kernel()), randn(3, 4)
    request = (model, nm.Categorical(), x, structure)
    with pytest.raises(nm.errors.UnsupportedError, match=r"twice.*nm\.MonteCarlo\(\)"):
        nm.fisher(*request, estimator=nm.Hessian()) @ torch.ones(15, dtype=x.dtype)
