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


def test_labels_and_masks_keep_their_meaning():
    ids, mask = Y[:, None].expand(10, 3), torch.tensor([[1, 1, 0]]).expand(10, 3)
    [labelled] = first_samples({"input_ids": ids, "labels": ids}, 4)
    assert labelled.as_labels
    [masked] = first_samples({"input_ids": ids, "attention_mask": mask}, 4)
    assert torch.equal(masked.observed, mask[:4] == 1)


def test_what_all_samples_share_stays_whole():
    shared = torch.eye(3)
    [batch] = first_samples((({"adjacency": shared, "x": X},), Y), 2)
    assert torch.equal(batch.inputs[0]["adjacency"], shared)
    assert torch.equal(batch.inputs[0]["x"], X[:2])
