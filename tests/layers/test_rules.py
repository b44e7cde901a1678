"""Layer rules: every kind of Linear and convolution gives its per-sample gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from neuromanifold.layers import LayerRule, LinearRule, register, rule_for
from neuromanifold.layers import _base as registry
from neuromanifold.linalg import Block, Slot
from neuromanifold.testing import check_layer_rule


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(3, 2), (4, 3)),
    "linear without bias": (nn.Linear(3, 2, bias=False), (4, 3)),
    "linear one input": (nn.Linear(1, 2), (4, 1)),
    "linear sequence": (nn.Linear(3, 2), (4, 5, 3)),
    "linear image": (nn.Linear(3, 2), (2, 2, 3, 3)),
    "conv1d": (nn.Conv1d(2, 3, 3), (4, 2, 7)),
    "conv1d without bias": (nn.Conv1d(2, 3, 3, bias=False), (4, 2, 7)),
    "conv1d one position": (nn.Conv1d(2, 3, 7), (4, 2, 7)),
    "conv1d depthwise": (nn.Conv1d(4, 4, 3, groups=4), (2, 4, 6)),
    "conv1d depthwise multiplier": (nn.Conv1d(2, 6, 3, groups=2), (2, 2, 6)),
    "conv1d same even kernel": (nn.Conv1d(2, 3, 4, padding="same"), (2, 2, 6)),
    "conv1d reflect": (nn.Conv1d(2, 3, 3, padding=2, padding_mode="reflect"), (2, 2, 6)),
    "conv1d replicate": (nn.Conv1d(2, 3, 3, padding=2, padding_mode="replicate"), (2, 2, 6)),
    "conv1d circular": (nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), (2, 2, 6)),
    "conv2d": (nn.Conv2d(2, 3, (2, 3)), (2, 2, 4, 5)),
    "conv2d stride": (nn.Conv2d(2, 3, 2, stride=(2, 3)), (2, 2, 5, 7)),
    "conv2d dilation": (nn.Conv2d(2, 3, 2, dilation=(2, 1)), (2, 2, 5, 4)),
    "conv2d uneven padding": (nn.Conv2d(2, 3, 3, padding=(2, 0)), (2, 2, 3, 4)),
    "conv2d same dilation": (nn.Conv2d(2, 2, 3, padding="same", dilation=(1, 2)), (2, 2, 4, 4)),
    "conv2d circular same": (
        nn.Conv2d(2, 2, (2, 3), padding="same", padding_mode="circular"),
        (2, 2, 4, 4),
    ),
    "conv2d everything": (
        nn.Conv2d(
            4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2,
            padding_mode="reflect",
        ),
        (2, 4, 5, 6),
    ),
    "conv3d": (nn.Conv3d(2, 2, 2), (2, 2, 3, 3, 2)),
    "conv3d everything": (
        nn.Conv3d(2, 4, (1, 2, 2), stride=(1, 2, 1), padding=(0, 1, 1), groups=2),
        (2, 2, 2, 3, 3),
    ),
}  # fmt: skip


# torch itself warns about the uneven padding of "same" under an even kernel.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("layer", LAYERS)
def test_per_sample_gradients(layer: str) -> None:
    module, shape = LAYERS[layer]
    check_layer_rule(module, randn(*shape))


def test_inputs_that_are_not_contiguous() -> None:
    image = randn(2, 4, 5, 2).movedim(-1, 1)
    check_layer_rule(nn.Conv2d(2, 3, 2), image)
    check_layer_rule(nn.Conv2d(2, 3, 2), randn(2, 2, 4, 5).to(memory_format=torch.channels_last))
    check_layer_rule(nn.Linear(4, 2), randn(2, 4, 5).mT)
    check_layer_rule(nn.Linear(4, 2), randn(1, 4).expand(2, 4))


def test_convolution_that_was_changed_after_it_was_built() -> None:
    module = nn.Conv2d(2, 3, 3, padding=1)
    module.padding = module.dilation = (2, 2)
    check_layer_rule(module, randn(2, 2, 4, 5))


def test_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Halved(LinearRule):
        def cotangents(self, module: nn.Module, g: Tensor) -> Tensor:
            return super().cotangents(module, g) / 2

    monkeypatch.setattr(registry, "_RULES", {nn.Linear: Halved()})
    with pytest.raises(AssertionError, match=r"linear, \['weight'\] trainable.*off"):
        check_layer_rule(nn.Linear(3, 2), randn(4, 3))
    with pytest.raises(AssertionError, match="No rule is registered for Conv1d"):
        check_layer_rule(nn.Conv1d(1, 1, 1), randn(4, 1, 1))


class TestRegistry:
    def test_a_subclass_counts_while_it_keeps_its_forward(self) -> None:
        class Renamed(nn.Linear):
            pass

        class Changed(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:  # noqa: A002
                return super().forward(input) ** 2

        assert isinstance(rule_for(Renamed(2, 2)), LinearRule)
        assert rule_for(Changed(2, 2)) is None

    def test_a_computed_weight_is_no_parameter(self) -> None:
        assert rule_for(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))) is None

    def test_modules_without_parameters_have_no_rule(self) -> None:
        assert rule_for(nn.ReLU()) is None

    def test_a_new_layer_type(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A rule is three methods: here for a layer that stores its weight as `(I, O)`."""

        class Transposed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(randn(3, 2))

            def forward(self, x: Tensor) -> Tensor:
                return x @ self.weight

        class TransposedRule(LayerRule):
            name = "transposed"

            def block(self, module: nn.Module, name: str, trainable: frozenset[str]) -> Block:
                prefix = f"{name}." if name else ""
                slot = Slot(f"{prefix}weight", 3, (3, 1, 2), (1, 2, 0))
                return Block(name, 1, 2, (slot,))

            def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
                return x[None, :, None]

            def cotangents(self, module: nn.Module, g: Tensor) -> Tensor:
                return g[:, None, :, None]

        monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
        register(Transposed, TransposedRule())
        check_layer_rule(Transposed(), randn(4, 3))
