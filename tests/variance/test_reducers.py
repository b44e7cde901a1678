"""Errors of blocks and of the empirical Fisher over two processes are those of all the data."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.testing.harness import run_ranks

SIZES = (7, 4)
ROUNDING = 1e-10


def network(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 3)).double()


def data() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(sum(SIZES), 3, generator=rng, dtype=torch.float64)
    return x, torch.randint(3, (sum(SIZES),), generator=rng)


def mine() -> tuple[Tensor, Tensor]:
    x, y = (part.split(SIZES)[dist.get_rank()] for part in data())
    return x, y


def test_errors_of_blocks() -> None:
    reducer = nm.distributed.sum_over_ranks
    one, other = run_ranks(
        lambda: nm.variance.blocks(network(), nm.Categorical(), mine(), reducer=reducer), 2
    )
    whole = nm.variance.blocks(network(), nm.Categorical(), data())
    assert one.to_dict() == other.to_dict()
    assert one.num_samples == sum(SIZES)
    for layer, norm in whole.norms.items():
        assert math.isclose(one.norms[layer], norm, rel_tol=ROUNDING)
        for source in ("data", "labels"):
            assert math.isclose(
                one.squared[source][layer], whole.squared[source][layer], rel_tol=ROUNDING
            )


def test_blocks_that_are_no_sum_over_samples_are_refused() -> None:
    with pytest.raises(nm.errors.UnsupportedError, match=r"'0'.*2048.*without reducer"):
        nm.variance.blocks(network(600), nm.Categorical(), data(), reducer=lambda _: None)


def test_the_bias_of_the_empirical_fisher() -> None:
    reducer = nm.distributed.sum_over_ranks
    one, other = run_ranks(
        lambda: nm.variance.empirical(network(), nm.Categorical(), mine(), reducer=reducer), 2
    )
    whole = nm.variance.empirical(network(), nm.Categorical(), data())
    assert one.to_dict() == other.to_dict()
    assert one.num_samples == sum(SIZES)
    for got, expected in (
        (one.ratio, whole.ratio),
        *((one.ratios[layer], ratio) for layer, ratio in whole.ratios.items()),
    ):
        assert math.isclose(got.value, expected.value, rel_tol=ROUNDING)  # type: ignore[arg-type]
        assert math.isclose(got.stderr, expected.stderr, rel_tol=ROUNDING)  # type: ignore[arg-type]
    for name, value in whole.difference.value.items():  # type: ignore[union-attr]
        assert (one.difference.value[name] - value).norm() <= ROUNDING * value.norm()
