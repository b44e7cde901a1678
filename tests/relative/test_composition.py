"""Metrics pulled back through a stack."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import neuromanifold as nm
from neuromanifold.errors import UnsupportedError
from neuromanifold.relative.composition import chain
from neuromanifold.relative.measure import fisher
from neuromanifold.relative.responses import Binary, Through
from neuromanifold.testing import reference


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def stack(kind: str) -> tuple[nn.Sequential, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "mlp":
            modules = nn.Sequential(
                nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)
            )
            return modules.double(), randn(7, 4)
        modules = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ELU(), nn.Flatten(), nn.Linear(8, 3)
        )
        return modules.double().eval(), randn(6, 1, 4, 4)


@pytest.mark.parametrize("kind", ["mlp", "convolutional"])
@pytest.mark.parametrize("structure", [nm.BlockDiagonal(), None, nm.Diagonal()], ids=repr)
@pytest.mark.parametrize("likelihood", [nm.Categorical(), nm.Gaussian(0.5)], ids=repr)
def test_with_nothing_dropped_equals_the_blocks_of_the_stack(kind, structure, likelihood):
    modules, x = stack(kind)
    whole = nm.fisher(modules, likelihood, x, structure or nm.UnitWise(), estimator=nm.Exact())
    links = chain(modules, x, likelihood, structure)
    assert [link.name for link in links] == ["0", "1", "2", "3", "4"]
    for link, module in zip(links, modules, strict=True):
        if not list(module.parameters()):
            assert link.fisher is None
            continue
        expected = whole.block(link.name).to_dense()
        assert_close(link.fisher.to_dense(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["mlp", "convolutional"])
def test_by_itself_each_component_has_its_own_metric(kind):
    modules, x = stack(kind)
    links = chain(modules, x, nm.Categorical(), depth=0, between=nm.Gaussian(2.0))
    for i, link in enumerate(links):
        inputs = modules[:i](x).detach()
        response = nm.Categorical() if i == 4 else nm.Gaussian(2.0)
        if link.fisher is not None:
            expected = fisher(modules[i], inputs, response).to_dense()
            assert_close(link.fisher.to_dense(), expected, rtol=1e-12, atol=1e-12)
        if i < 4:
            assert_close(link.seen, torch.eye(len(link.seen)).double() / 2)


def test_some_components_above():
    modules, x = stack("mlp")
    links = chain(modules, x, nm.Categorical(), depth=1, between=Binary((-1, 1)))
    expected = fisher(modules[0], x, Through(modules[1], Binary((-1, 1))))
    assert_close(links[0].fisher.to_dense(), expected.to_dense())
    slope = 1 - modules[:2](x).detach() ** 2  # of tanh: its squared slope over the variance
    assert_close(links[0].seen, slope.mean(0).diag())
    top = fisher(modules[4], modules[:4](x).detach(), nm.Categorical())
    assert_close(links[4].fisher.to_dense(), top.to_dense())


@pytest.mark.parametrize("kind", ["mlp", "convolutional"])
def test_what_is_seen_is_the_metric_pulled_back(kind):
    modules, x = stack(kind)
    for i, link in enumerate(chain(modules, x, nm.Categorical())):
        outputs = modules[: i + 1](x).detach()
        above = modules[i + 1 :]
        metric = reference.output_fisher(nm.Categorical(), modules(x))
        j = torch.stack(
            [
                torch.func.jacrev(lambda h: above(h.clone()[None])[0])(h).reshape(3, -1)  # noqa: B023
                for h in outputs
            ]
        )
        expected = torch.einsum("nei,nef,nfj->nij", j, metric, j).mean(0)
        assert_close(link.seen, expected, rtol=1e-12, atol=1e-12)


def test_batches_are_weighted_by_their_samples():
    modules, x = stack("mlp")
    whole = chain(modules, x, nm.Categorical())
    parts = chain(modules, [(x[:4], None), (x[4:], None)], nm.Categorical())
    for a, b in zip(whole, parts, strict=True):
        assert_close(a.seen, b.seen)
        if a.fisher is not None:
            assert_close(a.fisher.to_dense(), b.fisher.to_dense())


def test_the_inputs_are_left_alone():
    modules, x = stack("mlp")
    before = x.clone()
    chain([nn.Tanh(), nn.ReLU(inplace=True), *modules], x, nm.Categorical())
    chain([nn.ReLU(inplace=True), *modules], x, nm.Categorical())
    assert_close(x, before, rtol=0, atol=0)


def test_of_wide_outputs_the_diagonal_is_seen():
    modules = nn.Sequential(nn.Linear(2, 1025), nn.Tanh()).double()
    x = randn(3, 2)
    links = chain(modules, x, nm.Gaussian(), nm.Diagonal(), depth=0)
    assert [link.seen.shape for link in links] == [(1025,), (1025,)]
    assert_close(links[0].seen, torch.ones(1025).double())


def test_frozen_components_have_a_metric_to_see_only():
    modules, x = stack("mlp")
    modules[2].requires_grad_(False)
    links = chain(modules, x, nm.Categorical())
    assert links[2].fisher is None
    assert links[2].seen.shape == (4, 4)


def test_labels_to_ignore_are_ignored_at_the_top():
    top = nn.Linear(3, 2).double()
    x, y = randn(2, 4, 3), torch.tensor([[0, 1, -100, 1], [1, -100, -100, 0]])
    (link,) = chain([top], (x, y), nm.Categorical())
    expected = reference.output_fisher(nm.Categorical(), top(x), y).mean(0)
    assert_close(link.seen, expected)


@pytest.mark.parametrize(
    ("components", "options", "error", "message"),
    [
        pytest.param([], {}, ValueError, "no components", id="empty"),
        pytest.param([nn.Linear(2, 2), torch.tanh], {}, TypeError, "Modules", id="function"),
        pytest.param(nn.Linear(2, 2), {}, ValueError, "which order", id="one module"),
        pytest.param([nn.Linear(2, 2)], {"depth": -1}, ValueError, "depth", id="depth"),
    ],
)
def test_says_what_it_takes(components, options, error, message):
    with pytest.raises(error, match=message):
        chain(components, torch.randn(3, 2), nm.Gaussian(), **options)


def test_inputs_are_read_several_times():
    modules, x = stack("mlp")
    with pytest.raises(UnsupportedError, match="only once"):
        chain(modules, iter([(x, None)]), nm.Categorical())


def test_outputs_of_changing_size_have_no_mean_metric():
    layer = nn.Linear(3, 2)
    batches = [(torch.randn(2, length, 3), None) for length in (4, 5)]
    with pytest.raises(UnsupportedError, match="entries per sample"):
        chain([layer], batches, nm.Gaussian())
