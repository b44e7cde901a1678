"""Products through layers whose own kernels lack a derivative, or have a wrong one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import neuromanifold as nm

N, VOCABULARY, WIDTH = 5, 6, 3
RTOL = 1e-10


pytestmark = pytest.mark.usefixtures("float64")


class Bags(nn.Module):
    """A head on bags of tokens."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(VOCABULARY, WIDTH, **options)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, tokens: Tensor, **how: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(tokens, **how)))


def assert_products_are_gram(model: nn.Module, inputs: Any) -> None:
    products, gram = (
        nm.fisher(model, nm.Categorical(), inputs, structure, estimator=nm.Exact()).to_dense()
        for structure in (nm.Implicit(), nm.Gram())
    )
    assert (products - gram).norm() <= RTOL * gram.norm()
    assert gram.norm() > 0


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_bags_of_equal_length(mode: str, padding_idx: int | None) -> None:
    tokens = torch.randint(VOCABULARY, (N, 4))
    tokens[:, 0] = torch.arange(N) % 2  # no bag is all padding
    assert_products_are_gram(Bags(mode=mode, padding_idx=padding_idx), tokens)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("include_last_offset", [False, True])
def test_bags_by_offsets(mode: str, include_last_offset: bool) -> None:
    offsets = torch.tensor([0, 2, 3, 3, 7] + [9] * include_last_offset)  # one bag is empty
    model = Bags(mode=mode, include_last_offset=include_last_offset)
    tokens = torch.randint(VOCABULARY, (9,))
    assert_products_are_gram(model, {"tokens": tokens, "offsets": offsets})


def test_what_can_be_differentiated_only_once_is_refused() -> None:
    inputs = {"tokens": torch.randint(VOCABULARY, (9,)), "offsets": torch.tensor([0, 2, 5])}
    F = nm.fisher(Bags(mode="max"), nm.Categorical(), inputs, nm.Implicit())
    with pytest.raises(nm.errors.UnsupportedError, match=r"only once.*nm\.Gram"):
        F @ torch.ones(F.num_parameters)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, [3, 2], batch_first=True)
        h, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.head(h)


@pytest.mark.parametrize(("model", "shape"), [(Checkpointed, (N, 4)), (Packed, (2, 3, 4))])
def test_models_that_torch_func_cannot_transform(
    model: type[nn.Module], shape: tuple[int, ...]
) -> None:
    assert_products_are_gram(model().double(), torch.randn(shape, dtype=torch.float64))


def test_weighted_bags() -> None:
    tokens = torch.randint(VOCABULARY, (N, 4))
    weights = torch.rand(N, 4)
    model = Bags(mode="sum")
    assert_products_are_gram(model, {"tokens": tokens, "per_sample_weights": weights})


def test_a_padding_row_has_no_information() -> None:
    model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH, padding_idx=1), nn.Linear(WIDTH, 4))
    tokens = torch.tensor([0, 1, 1, 2, 3])
    assert_products_are_gram(model, tokens)
    F = nm.fisher(model, nm.Categorical(), tokens, nm.Implicit(), estimator=nm.Exact())
    assert not F.diagonal()["0.weight"][1].any()
    v = torch.zeros(F.num_parameters)
    v[WIDTH : 2 * WIDTH] = 1
    assert not (F @ v).any()


def test_the_modules_are_left_as_they_were() -> None:
    model = Bags(mode="mean")
    F = nm.fisher(model, nm.Categorical(), torch.randint(VOCABULARY, (N, 4)), nm.Implicit())
    F @ torch.ones(F.num_parameters)
    assert "forward" not in vars(model.bag)
    assert not model.bag._forward_hooks
