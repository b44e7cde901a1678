"""Layers whose output has no sample axis, because it is the same for every sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import neuromanifold as nm
from neuromanifold.testing import reference

N, T, VOCABULARY, WIDTH = 6, 5, 7, 4

POSITIONS = {
    "without an axis": lambda tokens: torch.arange(tokens.shape[1]),
    "an axis of one": lambda tokens: torch.arange(tokens.shape[1])[None],
}


pytestmark = pytest.mark.usefixtures("float64")


class Model(nn.Module):
    """Tokens plus positions."""

    def __init__(
        self,
        positions: Callable[[Tensor], Tensor] = POSITIONS["an axis of one"],
        combine: Callable[[Tensor, Tensor], Tensor] = torch.add,
        after: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(8, WIDTH)
        self.after = nn.Identity() if after is None else after
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.positions, self.combine = positions, combine

    def forward(self, tokens: Tensor) -> Tensor:
        places = self.after(self.places(self.positions(tokens)))
        return self.head(torch.tanh(self.combine(self.tokens(tokens), places)))


def tokens(num_samples: int = N, length: int = T) -> Tensor:
    return torch.randint(VOCABULARY, (num_samples, length))


def assert_right(
    model: nn.Module, data: object, x: Tensor, rule: str, plain: nn.Module | None = None
) -> None:
    measured = nm.fisher(model, nm.Categorical(), data, nm.Dense(), estimator=nm.Exact())
    expected = reference.dense_fisher(model if plain is None else plain, nm.Categorical(), x)
    assert (measured.to_dense() - expected).norm() <= 1e-10 * expected.norm()
    assert measured.coverage["places.weight"].rule == rule


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("length", [T, N], ids=["T≠N", "T=N"])
def test_position_embeddings(positions: Callable[[Tensor], Tensor], length: int) -> None:
    model, x = Model(positions), tokens(length=length)
    assert_right(model, x, x, "embedding")
    assert_right(model, x, x, "embedding")  # by what is known of the model


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("sizes", [(4, 2), (1, 5), (5, 1)])
def test_batches_of_any_size(positions: Callable[[Tensor], Tensor], sizes: tuple[int, ...]) -> None:
    model, x = Model(positions), tokens()
    assert_right(model, [(part,) for part in x.split(sizes)], x, "embedding")


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize(
    "shapes", [[(4, 5), (5, 5), (4, 1), (1, 1)], [(4, 1), (4, 5)], [(5, 5), (4, 5), (1, 5)]]
)
def test_lengths_of_one_and_of_the_number_of_samples(
    positions: Callable[[Tensor], Tensor], shapes: list[tuple[int, int]]
) -> None:
    model = Model(positions)
    batches = [tokens(*shape) for shape in shapes]
    measured = nm.fisher(
        model, nm.Categorical(), [(x,) for x in batches], nm.Dense(), estimator=nm.Exact()
    )
    expected = sum(len(x) * reference.dense_fisher(model, nm.Categorical(), x) for x in batches)
    expected = expected / sum(map(len, batches))
    assert (measured.to_dense() - expected).norm() <= 1e-10 * expected.norm()
    assert measured.coverage["places.weight"].rule == "embedding"


def test_samples_in_the_second_axis() -> None:
    class SequenceFirst(Model):
        def forward(self, tokens: Tensor) -> Tensor:
            places = self.places(torch.arange(len(tokens)))[:, None]
            return self.head(torch.tanh(self.tokens(tokens) + places)).mean(dim=0)

    class BatchFirst(SequenceFirst):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens.T)

    model, x = SequenceFirst(), tokens()
    plain = BatchFirst()
    plain.load_state_dict(model.state_dict())
    assert_right(model, x.T, x, "generic", plain)


def test_a_hook_that_does_not_take_a_sample_axis() -> None:
    model, x = Model(POSITIONS["without an axis"]), tokens()

    def refuse(module: nn.Module, args: object, output: Tensor) -> None:
        assert output.ndim == 2

    model.places.register_forward_hook(refuse)
    assert_right(model, x, x, "generic")


def test_a_module_that_is_replaced() -> None:
    class Replaced(Model):
        def forward(self, tokens: Tensor) -> Tensor:
            given = self.tokens(tokens).flatten(0, 1)
            places = self.places(given).unflatten(0, tokens.shape)
            return self.head(torch.tanh(places))

    model, x = Model(POSITIONS["without an axis"]), tokens()
    assert_right(model, x, x, "embedding")
    model.__class__, model.places = Replaced, nn.Linear(WIDTH, WIDTH)
    assert_right(model, x, x, "linear")


def test_layers_between_table_and_sum() -> None:
    model, x = Model(after=nn.Linear(WIDTH, WIDTH)), tokens()
    assert_right(model, x, x, "embedding")


def test_a_model_that_does_not_take_a_sample_axis_there() -> None:
    model = Model(combine=lambda h, places: h + places.squeeze(0)[None])
    x = tokens()
    assert_right(model, x, x, "generic")


def test_a_model_that_gives_other_outputs_then() -> None:
    model = Model(combine=lambda h, places: h + places.mean(0) * places.shape[0])
    x = tokens()
    assert_right(model, x, x, "generic")


def test_the_model_is_left_as_it_was() -> None:
    model, x = Model(), tokens()
    before = model(x)
    nm.fisher(model, nm.Categorical(), x)
    assert model.places(model.positions(x)).shape == (1, T, WIDTH)
    assert torch.equal(model(x), before)


def test_activation_checkpointing() -> None:
    class Checkpointed(Model):
        def forward(self, tokens: Tensor) -> Tensor:
            forward = super().forward
            return checkpoint(forward, tokens, use_reentrant=False)

    model, plain, x = Checkpointed(), Model(), tokens()
    plain.load_state_dict(model.state_dict())
    assert_right(model, x, x, "embedding", plain)


def test_products_and_factors_agree_with_gradients() -> None:
    model, x = Model(), tokens()
    expected = reference.dense_fisher(model, nm.Categorical(), x)
    for structure in (nm.Gram(), nm.Implicit(), nm.BlockDiagonal(), nm.UnitWise(), nm.Diagonal()):
        got = nm.fisher(model, nm.Categorical(), x, structure, estimator=nm.Exact()).to_dense()
        kept = got != 0
        assert (got - expected)[kept].norm() <= 1e-10 * expected.norm()
        assert (got.diagonal() - expected.diagonal()).norm() <= 1e-10 * expected.diagonal().norm()
