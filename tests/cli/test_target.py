"""Cutting data down to its first samples."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from neuromanifold.cli.target import first_samples

X, Y = torch.arange(20.0).reshape(10, 2), torch.arange(10)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param((X, Y), id="pair"),
        pytest.param({"x": X, "labels": Y}, id="mapping"),
        pytest.param(((X, {"mask": Y}), Y), id="nested inputs"),
        pytest.param([(X[:3], Y[:3]), (X[3:], Y[3:])], id="list"),
        pytest.param(DataLoader(TensorDataset(X, Y), batch_size=4), id="loader"),
    ],
)
@pytest.mark.parametrize("num", [1, 3, 4, 7, 10, 12])
def test_first_samples(data, num):
    batches = first_samples(data, num)
    assert torch.equal(torch.cat([batch.targets for batch in batches]), Y[:num])
    leaves = [torch.utils._pytree.tree_leaves(batch.inputs) for batch in batches]
    for parts, whole in zip(zip(*leaves, strict=True), (X, Y), strict=False):
        assert torch.equal(torch.cat(parts), whole[:num])


def test_inputs_alone():
    [batch] = first_samples(X, 4)
    assert torch.equal(batch.inputs, X[:4])
    assert batch.targets is None


def test_what_follows_is_not_read():
    def batches():
        yield X, Y
        pytest.fail("read on")

    assert len(first_samples(batches(), 10)) == 1
