"""The demonstration's data, networks and training loop."""

from __future__ import annotations

import pytest
import torch

from neuromanifold.cli.demo_models import MODELS, load_split, train


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def split():
    return load_split(seeded(0))


def rows(part) -> list[tuple[float, ...]]:
    images, labels = part
    return [(*image.flatten().tolist(), int(y)) for image, y in zip(images, labels, strict=True)]


def test_the_split_is_a_partition_of_the_digits(split):
    from sklearn.datasets import load_digits

    digits = load_digits()
    whole = (torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target))
    assert sorted(rows(split.train) + rows(split.test)) == sorted(rows(whole))
    assert len(split.test[1]) == 359


def test_the_split_follows_its_seed(split):
    assert torch.equal(load_split(seeded(0)).test[0], split.test[0])
    assert not torch.equal(load_split(seeded(1)).test[0], split.test[0])


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_the_exact_matrix_of_each_network_is_small(build, split):
    model = build()
    assert model(split.test[0]).shape == (359, 10)
    assert sum(p.numel() for p in model.parameters()) < 4000


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_training_learns_and_follows_its_seed(build, split):
    runs = []
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build()
        runs.append(train(model, split, epochs=3, generator=seeded(0)))
    first, second = runs
    assert first["loss"] == second["loss"]
    assert first["loss"] == sorted(first["loss"], reverse=True)
    assert first["test_accuracy"] > 0.5  # guessing gives 0.1, 20 epochs give 0.95
    assert first["train_accuracy"] > 0.5
