from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from neuromanifold.linalg import Block, Layout, Slot

LAYOUT = Layout({"weight": (4, 3), "bias": (4,), "scale": ()})
VECTOR = torch.arange(17.0)


def test_flatten_and_unflatten_are_inverse() -> None:
    params = LAYOUT.unflatten(VECTOR)
    assert {name: tuple(p.shape) for name, p in params.items()} == dict(LAYOUT.shapes)
    assert torch.equal(LAYOUT.flatten(params), VECTOR)
    shuffled = dict(reversed(params.items()))
    assert torch.equal(LAYOUT.flatten(shuffled), VECTOR)


@pytest.mark.parametrize(
    "vector", [VECTOR, VECTOR[:, None] * torch.ones(5), LAYOUT.unflatten(VECTOR)]
)
def test_the_answer_has_the_kind_that_came_in(vector: object) -> None:
    rows, restore = LAYOUT.rows(vector)
    assert rows.shape[1] == 17
    assert torch.equal(rows[0], VECTOR)
    answer = restore(rows)
    if isinstance(vector, Tensor):
        assert torch.equal(answer, vector)
    else:
        assert answer.keys() == vector.keys()
        assert all(torch.equal(answer[name], vector[name]) for name in vector)


@pytest.mark.parametrize(
    ("vector", "error", "message"),
    [
        (torch.ones(16), ValueError, r"\(17,\) or \(17, R\); got \(16,\)"),
        (torch.ones(17, 1, 1), ValueError, "got"),
        ([1.0] * 17, TypeError, "got list"),
        ({"weight": torch.ones(4, 3)}, ValueError, r"missing \['bias', 'scale'\]"),
        (LAYOUT.unflatten(VECTOR) | {"x": VECTOR}, ValueError, r"unknown \['x'\]"),
        (LAYOUT.unflatten(VECTOR) | {"bias": torch.ones(3)}, ValueError, r"expected \(4,\)"),
    ],
)
def test_vectors_that_do_not_fit(vector: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LAYOUT.rows(vector)


def test_a_message_about_many_parameters_stays_short() -> None:
    names = [f"encoder.layers.{i}.attention.weight" for i in range(500)]
    layout = Layout(dict.fromkeys(names, (2,)))
    with pytest.raises(ValueError, match=r"missing .* and 491 more.*F\.layout\.names") as dropped:
        layout.flatten({names[0]: torch.ones(2)})
    with pytest.raises(ValueError, match=r"There are: .'encoder.layers.42.attention.w") as wrong:
        layout.restrict(["encoder.layer.42.attention.weight"])
    assert max(len(str(dropped.value)), len(str(wrong.value))) < 1000


def test_an_entry_without_a_gradient() -> None:
    with pytest.raises(TypeError, match=r"'a' is no tensor but NoneType.*give zeros"):
        Layout({"a": (2,)}).flatten({"a": None})


def test_restrict_keeps_the_order_of_the_layout() -> None:
    assert LAYOUT.restrict(["scale", "weight"]).names == ("weight", "scale")
    assert LAYOUT.restrict("bias") == Layout({"bias": (4,)})


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "at least one"), (["nothing"], r"No parameters named \['nothing'\]")],
)
def test_restrict_to_nothing(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAYOUT.restrict(names)


def test_equal_layouts_have_the_same_order() -> None:
    same = Layout({name: torch.Size(shape) for name, shape in LAYOUT.shapes.items()})
    assert same == LAYOUT
    assert hash(same) == hash(LAYOUT)
    assert Layout(dict(reversed(LAYOUT.shapes.items()))) != LAYOUT


def plain_block() -> Block:
    slots = (Slot.plain("weight", 2, 2, 3), Slot.plain("bias", 2, 2, 1))
    return Block("layer", 2, 2, slots, biased=True)


def permuted_block() -> Block:
    """A weight stored as `(I, O)`, like that of a transposed layer."""
    return Block("layer", 1, 3, (Slot("weight", 4, (4, 1, 3), (1, 2, 0)),))


@pytest.mark.parametrize(
    "block", [plain_block, permuted_block, lambda: Block.vector("bias", LAYOUT)]
)
def test_write_is_the_inverse_of_read(block: Callable[[], Block]) -> None:
    made = block()
    rows = torch.stack([VECTOR, -VECTOR])
    value = made.read(rows, LAYOUT)
    assert value.shape == (2, *made.shape)
    out = torch.full_like(rows, 99.0)
    made.write(value, out, LAYOUT)
    for name, s in LAYOUT.slices.items():
        inside = name in made.parameters
        assert torch.equal(out[:, s], rows[:, s] if inside else torch.full_like(rows[:, s], 99.0))


def test_read_puts_groups_and_units_first_and_the_bias_last() -> None:
    value = plain_block().read(VECTOR[None], LAYOUT)[0]
    assert value.shape == (2, 2, 4)
    assert value[1, 0].tolist() == [6.0, 7.0, 8.0, 14.0]
    permuted = permuted_block().read(VECTOR[None], LAYOUT)[0, 0]
    assert torch.equal(permuted, LAYOUT.unflatten(VECTOR)["weight"].T)


def test_the_whole_layout_as_one_unit() -> None:
    whole = Block.whole(LAYOUT)
    assert torch.equal(whole.read(VECTOR[None], LAYOUT).flatten(), VECTOR)


def test_restrict_a_block() -> None:
    block = plain_block()
    without_bias, columns = block.restrict(["weight"])
    assert (without_bias.shape, without_bias.biased, columns) == ((2, 2, 3), False, [0, 1, 2])
    bias, columns = block.restrict(["bias"])
    assert (bias.shape, bias.biased, columns) == ((2, 2, 1), True, [3])
    assert block.restrict(["scale"]) is None


@pytest.mark.parametrize("block", [plain_block(), permuted_block()])
def test_a_block_survives_json(block: Block) -> None:
    assert Block.from_dict(json.loads(json.dumps(block.to_dict()))) == block
