"""Off-block to block ratios against the dense matrix, and their order in the width."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import neuromanifold as nm
from neuromanifold.meanfield import off_block
from neuromanifold.testing.reference import dense_fisher


def tanh_network(*widths, seed=0):
    """Weights of variance 1 over the fan-in, biases of variance 0.01, float64."""
    generator = torch.Generator().manual_seed(seed)
    modules = []
    for fan_in, fan_out in pairwise(widths):
        layer = nn.Linear(fan_in, fan_out, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.normal_(std=fan_in**-0.5, generator=generator)
            layer.bias.normal_(std=0.1, generator=generator)
        modules += [layer, nn.Tanh()]
    return nn.Sequential(*modules[:-1])


def inputs(n, width, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, dtype=torch.float64, generator=generator)


def conv_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)
    ).double()


def expected_of(model, likelihood, x):
    """Block norms `(units, units)`, layer of each unit, unit blocks: from the dense oracle."""
    dense = dense_fisher(model, likelihood, x)
    unit, layer, count, start = [], [], 0, 0
    modules = {}
    for name, p in model.named_parameters():
        module = name.rpartition(".")[0]
        if module not in modules:
            modules[module] = (count, len(modules))
            count += len(p)
            layer += [modules[module][1]] * len(p)
        first, _ = modules[module]
        unit += [first + i for i in range(len(p)) for _ in range(p[0].numel())]
        start += p.numel()
    assert start == len(dense)
    member = nn.functional.one_hot(torch.tensor(unit), count).double()
    norms = (member.T @ dense.square() @ member).sqrt()
    blocks = [dense[member[:, i] > 0][:, member[:, i] > 0] for i in range(count)]
    return dense, norms, torch.tensor(layer), blocks


CASES = {
    "linear": (lambda: tanh_network(5, 6, 4, 3), lambda: inputs(7, 5), nm.Gaussian()),
    "categorical": (lambda: tanh_network(5, 6, 3), lambda: inputs(7, 5), nm.Categorical()),
    "more samples than inputs": (
        lambda: tanh_network(2, 3, 2),
        lambda: inputs(20, 2),
        nm.Gaussian(),
    ),
    "convolution": (conv_network, lambda: inputs(5, 32).reshape(5, 2, 4, 4), nm.Gaussian()),
    "one output": (lambda: tanh_network(4, 5, 1), lambda: inputs(6, 4), nm.Gaussian()),
}


@pytest.mark.parametrize("by", ["model", "batches", "matrix"])
@pytest.mark.parametrize("case", CASES)
def test_everything_equals_the_dense_matrix(case, by):
    build, data, likelihood = CASES[case]
    model, x = build(), data()
    dense, norms, layer, blocks = expected_of(model, likelihood, x)
    if by == "matrix":
        found = off_block(nm.fisher(model, likelihood, x, nm.Dense(), estimator=nm.Exact()))
    else:
        found = off_block(model, x if by == "model" else [(x[:2],), (x[2:],)], likelihood)
    # Where blocks vanish, a ratio is the root of a difference that leaves rounding.
    tolerance = {"rtol": 1e-9, "atol": 10 * torch.finfo(torch.float64).eps ** 0.5}
    own = norms.diagonal()
    other = ~torch.eye(len(norms), dtype=torch.bool)
    num_layers = int(layer.max()) + 1
    for i in range(num_layers):
        mine = layer == i
        for j in range(num_layers):
            theirs = layer == j
            pairs = norms[mine][:, theirs][other[mine][:, theirs]]
            scale = own[mine].square().mean() * own[theirs].square().mean()
            ratio = pairs.square().mean().sqrt() / scale**0.25
            torch.testing.assert_close(found.ratios[i, j], ratio, equal_nan=True, **tolerance)
        for unit, ratios in zip(mine.nonzero()[:, 0], found.by_unit[i], strict=True):
            same = norms[unit][mine & other[unit]].square().sum() / max(int(mine.sum()) - 1, 1)
            cross = norms[unit][~mine].square().mean()
            expected = torch.stack([same, cross]).sqrt() / own[unit]
            torch.testing.assert_close(ratios, expected, **tolerance)
        parts = [torch.linalg.eigvalsh(blocks[k])[-1] for k in mine.nonzero()[:, 0]]
        torch.testing.assert_close(found.largest_of_units[i], max(parts), **tolerance)
    torch.testing.assert_close(found.largest, torch.linalg.eigvalsh(dense)[-1], **tolerance)
    share = 1 - own.square().sum() / norms.square().sum()
    torch.testing.assert_close(found.off_block_share, share, **tolerance)
    for i, name in enumerate(found.layers):
        names = [f"{name}.weight", f"{name}.bias"]
        whole = nm.fisher(model, likelihood, x, nm.Gram(), estimator=nm.Exact()).restrict(names)
        torch.testing.assert_close(found.largest_of_layers[i], whole.eigenvalues(1)[0], **tolerance)


def test_order_is_one_over_root_n_with_many_outputs_only():
    """papers.md §2.3: multiplied by √n the ratio is flat for C = n, and grows for C = 1."""
    widths = (16, 32, 64)
    many, one = [], []
    for n in widths:
        x = inputs(8, n)
        found = [off_block(tanh_network(n, n, n, n, seed=s), x) for s in range(3)]
        many.append([sum(getattr(f, k) for f in found) / 3 for k in ("same_layer", "cross_layer")])
        found = [off_block(tanh_network(n, n, n, 1, seed=s), x) for s in range(3)]
        one.append([sum(getattr(f, k) for f in found) / 3 for k in ("same_layer", "cross_layer")])
    roots = torch.tensor(widths).sqrt()[:, None]
    flat = torch.tensor(many) * roots
    assert float(flat.max(0).values.div(flat.min(0).values).max()) < 1.3
    fixed = torch.tensor(one)
    assert float(fixed.min()) > 0.2
    assert float((fixed[-1] / fixed[0]).min()) > 0.7


def test_small_entries_are_no_small_spectral_effect():
    """papers.md §2.3: the largest eigenvalue is about three times that of the unit blocks."""
    found = off_block(tanh_network(40, 40, 40, 40), inputs(40, 40))
    assert found.same_layer < 0.2
    assert 2 < found.spectral_effect < 5
    assert found.largest_of_units.max() <= found.largest_of_layers.max() <= found.largest


def test_a_network_of_independent_units_has_no_off_blocks():
    model, x = nn.Linear(3, 4).double(), inputs(5, 3)
    found = off_block(model, x)
    assert float(found.off_block_share) == pytest.approx(0, abs=1e-12)
    assert found.same_layer == pytest.approx(0, abs=10 * torch.finfo(torch.float64).eps ** 0.5)
    assert "step size" in str(found)


def test_plain_data_have_no_nan():
    found = off_block(tanh_network(4, 5, 1), inputs(6, 4))
    assert found.to_dict()["ratios"][1][1] is None
    assert math.isfinite(found.to_dict()["spectral_effect"])


def test_a_model_needs_data():
    with pytest.raises(ValueError, match="needs data"):
        off_block(nn.Linear(2, 2))
