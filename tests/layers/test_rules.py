"""Layer rules: every layer type gives its per-sample gradients, however it is configured."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
from transformers.models.dinov2.modeling_dinov2 import Dinov2LayerScale
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

import neuromanifold as nm
from neuromanifold.errors import UnsupportedError
from neuromanifold.layers import (
    Call,
    ConvTransposeRule,
    Factored,
    LayerRule,
    LinearRule,
    Port,
    Record,
    ScaleRule,
    Side,
    WeightRule,
    register,
    rule_for,
)
from neuromanifold.layers import _base as registry
from neuromanifold.layers.parts import Inputs, Vectors
from neuromanifold.linalg import Block, Slot
from neuromanifold.testing import check_layer_rule


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def made(module: nn.Module) -> nn.Module:
    """In evaluation mode, with parameters and statistics away from their initial values."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if value.is_floating_point():
                draw = torch.rand if name.endswith("running_var") else torch.randn
                value.add_(draw(value.shape, generator=generator), alpha=0.5)
    return module.eval()


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(3, 2), (4, 3)),
    "linear without bias": (nn.Linear(3, 2, bias=False), (4, 3)),
    "linear one input": (nn.Linear(1, 2), (4, 1)),
    "linear sequence": (nn.Linear(3, 2), (4, 5, 3)),
    "linear image": (nn.Linear(3, 2), (2, 2, 3, 3)),
    "hugging face linear": (Conv1D(2, 3), (4, 3)),
    "hugging face linear sequence": (Conv1D(2, 3), (4, 5, 3)),
    "conv1d": (nn.Conv1d(2, 3, 3), (4, 2, 7)),
    "conv1d without bias": (nn.Conv1d(2, 3, 3, bias=False), (4, 2, 7)),
    "conv1d one position": (nn.Conv1d(2, 3, 7), (4, 2, 7)),
    "conv1d depthwise": (nn.Conv1d(4, 4, 3, groups=4), (2, 4, 6)),
    "conv1d depthwise multiplier": (nn.Conv1d(2, 6, 3, groups=2), (2, 2, 6)),
    "conv1d same even kernel": (nn.Conv1d(2, 3, 4, padding="same"), (2, 2, 6)),
    "conv1d valid": (nn.Conv1d(2, 3, 4, padding="valid"), (2, 2, 6)),
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
    "transposed1d": (nn.ConvTranspose1d(2, 3, 3), (4, 2, 4)),
    "transposed1d without bias": (nn.ConvTranspose1d(2, 3, 3, bias=False), (2, 2, 4)),
    "transposed1d one position": (nn.ConvTranspose1d(2, 3, 1), (4, 2, 1)),
    "transposed1d apart": (nn.ConvTranspose1d(2, 3, 2, stride=4), (2, 2, 3)),
    "transposed1d depthwise": (nn.ConvTranspose1d(3, 3, 2, groups=3), (2, 3, 4)),
    "transposed1d all groups": (nn.ConvTranspose1d(4, 6, 2, stride=2, groups=2), (2, 4, 3)),
    "transposed1d padding cuts inputs off": (
        nn.ConvTranspose1d(2, 3, 1, stride=2, padding=2, output_padding=5, dilation=6),
        (2, 2, 2),
    ),
    "transposed2d": (nn.ConvTranspose2d(2, 3, (2, 3)), (2, 2, 3, 2)),
    "transposed2d everything": (
        nn.ConvTranspose2d(
            4, 6, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), dilation=(1, 2),
            groups=2,
        ),
        (2, 4, 3, 2),
    ),
    "transposed3d": (
        nn.ConvTranspose3d(2, 3, (1, 2, 2), stride=(1, 2, 1), padding=(0, 1, 0)),
        (2, 2, 2, 3, 2),
    ),
    "layer norm": (nn.LayerNorm(4), (4, 4)),
    "layer norm sequence": (nn.LayerNorm(4, eps=0.1), (4, 3, 4)),
    "layer norm without bias": (nn.LayerNorm(4, bias=False), (4, 3, 4)),
    "layer norm two axes": (nn.LayerNorm((3, 2)), (4, 3, 2)),
    "layer norm two axes sequence": (nn.LayerNorm((3, 2)), (2, 2, 2, 3, 2)),
    "rms norm": (nn.RMSNorm(4), (4, 4)),
    "rms norm sequence": (nn.RMSNorm(4, eps=0.1), (4, 3, 4)),
    "rms norm two axes": (nn.RMSNorm((2, 3)), (4, 2, 3)),
    "group norm": (nn.GroupNorm(2, 4), (4, 4)),
    "group norm image": (nn.GroupNorm(2, 4, eps=0.1), (4, 4, 3, 2)),
    "instance norm1d": (nn.InstanceNorm1d(3, affine=True), (4, 3, 5)),
    "instance norm2d": (nn.InstanceNorm2d(3, affine=True, eps=0.1), (4, 3, 5, 2)),
    "instance norm2d running": (
        nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        (4, 3, 5, 2),
    ),
    "instance norm3d": (nn.InstanceNorm3d(3, affine=True), (2, 3, 2, 2, 2)),
    "batch norm1d": (nn.BatchNorm1d(3), (4, 3)),
    "batch norm1d sequence": (nn.BatchNorm1d(3, eps=0.1), (4, 3, 5)),
    "batch norm2d": (nn.BatchNorm2d(3), (2, 3, 4, 2)),
    "batch norm3d": (nn.BatchNorm3d(3), (2, 3, 2, 2, 2)),
    "synchronised batch norm": (nn.SyncBatchNorm(3), (2, 3, 4)),
    "prelu": (nn.PReLU(), (4, 3)),
    "prelu no channels": (nn.PReLU(), (4,)),
    "prelu one slope for an image": (nn.PReLU(), (4, 3, 2, 2)),
    "prelu per unit": (nn.PReLU(3), (4, 3)),
    "prelu per channel": (nn.PReLU(3), (4, 3, 2, 2)),
}  # fmt: skip


# torch itself warns about the uneven padding of "same" under an even kernel.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("layer", LAYERS)
def test_per_sample_gradients(layer: str) -> None:
    module, shape = LAYERS[layer]
    check_layer_rule(made(module), randn(*shape))


@pytest.mark.parametrize("shape", [(6,), (6, 1), (4, 8), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 1, -1])
def test_embedding(shape: tuple[int, ...], padding_idx: int | None) -> None:
    tokens = torch.randint(4, shape, generator=torch.Generator().manual_seed(0))
    check_layer_rule(nn.Embedding(4, 3, padding_idx=padding_idx), tokens)
    check_layer_rule(nn.Embedding(4, 1, padding_idx=padding_idx), tokens.int())


def test_inputs_that_are_not_contiguous() -> None:
    image = randn(2, 4, 5, 2).movedim(-1, 1)
    for module in (nn.Conv2d(2, 3, 2), nn.ConvTranspose2d(2, 3, 2), made(nn.GroupNorm(1, 2))):
        check_layer_rule(module, image)
        check_layer_rule(module, randn(2, 2, 4, 5).to(memory_format=torch.channels_last))
    check_layer_rule(nn.Linear(4, 2), randn(2, 4, 5).mT)
    check_layer_rule(nn.Linear(4, 2), randn(1, 4).expand(2, 4))
    check_layer_rule(made(nn.LayerNorm(4)), randn(2, 4, 5).mT)


@pytest.mark.parametrize("padding", [1, "same"])
def test_convolution_that_was_changed_after_it_was_built(padding: int | str) -> None:
    module = nn.Conv2d(2, 3, 3, padding=padding)
    module.dilation = (2, 2)
    if padding == 1:
        module.padding = (2, 2)
    check_layer_rule(module, randn(2, 2, 4, 5))


def test_transposed_convolution_called_with_an_output_size() -> None:
    module = nn.ConvTranspose2d(2, 3, 2, stride=3).double()
    x = randn(4, 2, 3, 2).double()
    sizes = ([9, 6], [10, 7])
    g = [randn(4, 3, *size).double() for size in sizes]
    port = Port(ConvTransposeRule(), module)
    block = port.rule.block(module, "", frozenset(("weight", "bias")))
    calls = tuple(Call(port, x, one[None], 1) for one in g)
    record = Record(block, (port,), calls, (1, 4), first=True, dtype=torch.float64, device=x.device)
    got = record.per_sample().sum(dim=(0, 2)).reshape(1, *block.shape)
    outputs = [module(x, output_size=size) for size in sizes]
    expected = torch.autograd.grad(outputs, list(module.parameters()), g)
    assert record.parts[0].num_positions == 9 * 6 + 10 * 7
    assert_read(block, got, expected)


def assert_read(block: Block, got: Tensor, expected: tuple[Tensor, ...]) -> None:
    """The block's gradient `(1, G, O, I)` is that of its parameters."""
    slots = got.split([slot.columns for slot in block.slots], dim=-1)
    for slot, part, value in zip(block.slots, slots, expected, strict=True):
        right = value.reshape(slot.view).permute(slot.order).reshape(part.shape)
        torch.testing.assert_close(part, right)


def test_norms_in_the_precision_of_the_statistics() -> None:
    """Running statistics follow; the default eps of RMSNorm is that of the layer."""
    for module in (made(nn.BatchNorm1d(4)).bfloat16(), made(nn.RMSNorm(4)).bfloat16()):
        x = (1e-4 * randn(6, 4)).bfloat16()
        g = randn(1, 6, 4).bfloat16()
        got = gradients(module, x, g, dtype=torch.float32)
        expected = gradients(module, x, g, dtype=torch.float64)
        torch.testing.assert_close(got, expected.float())
        by_layer = torch.autograd.grad(module(x), module.weight, g[0])[0].double()
        error = (got[0, :, :, 0, 0].sum(1) - by_layer).abs().max()
        assert error < 6 * 2**-8 * by_layer.abs().max()


def gradients(module: nn.Module, x: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """Per-sample gradients `(V, G, N, O, I)` of one call of all parameters."""
    rule = rule_for(module)
    assert isinstance(rule, LayerRule)
    port = Port(rule, module)
    names = frozenset(name for name, _ in module.named_parameters())
    shape = (len(g), len(x))
    record = Record(
        rule.block(module, "", names),
        (port,),
        (Call(port, x, g, 1),),
        shape,
        first=True,
        dtype=dtype,
        device=x.device,
    )
    return record.per_sample()


def test_instance_norm_without_samples() -> None:
    """A batch of as many vectors as there are channels would be taken for one sample."""
    module = nn.InstanceNorm1d(4, affine=True)
    with pytest.raises(UnsupportedError, match=r"2 axes.*Give it 3 axes"):
        gradients(module, randn(4, 4), randn(1, 4, 4), torch.float32)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
@pytest.mark.parametrize("params", ["*", "bias"])
def test_convolutions_without_samples(kind: type[nn.Module], params: str) -> None:
    with pytest.raises(UnsupportedError, match=r"2 axes.*Give it 3 axes"):
        nm.fisher(kind(4, 4, 1), nm.Gaussian(), randn(4, 5), nm.Diagonal(), params=params)


def test_norm_over_samples() -> None:
    with pytest.raises(UnsupportedError, match=r"2 axes.*Give it 3 axes"):
        nm.fisher(nn.LayerNorm((4, 5)), nm.Gaussian(), randn(4, 5), nm.Diagonal())


# ---- norms of Hugging Face models, known by what they compute -------------------------------

MODEL_LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "llama": (LlamaRMSNorm(4), (4, 3, 4), "norm"),
    "llama vector": (LlamaRMSNorm(4), (4, 4), "norm"),
    "t5": (T5LayerNorm(4), (4, 3, 4), "norm"),
    "nemotron": (NemotronLayerNorm1P(4), (4, 3, 4), "norm"),
    "convnext": (ConvNextLayerNorm(4), (4, 3, 2, 4), "norm"),
    "convnext channels first": (
        ConvNextLayerNorm(4, data_format="channels_first"),
        (4, 4, 3, 2),
        "norm",
    ),
    "dinov2": (
        Dinov2LayerScale(SimpleNamespace(layerscale_value=0.5, hidden_size=4)),
        (4, 3, 4),
        "scale",
    ),
}


@pytest.mark.parametrize("layer", MODEL_LAYERS)
def test_layers_of_models(layer: str) -> None:
    module, shape, name = MODEL_LAYERS[layer]
    check_layer_rule(made(module), randn(*shape))
    assert rule_for(module).name == name


def test_layers_of_models_that_compute_in_single_precision() -> None:
    check_layer_rule(made(GemmaRMSNorm(4)), randn(4, 3, 4), precision=torch.float32)
    check_layer_rule(made(CohereLayerNorm((2, 4))), randn(4, 3, 2, 4), precision=torch.float32)


class MyNorm(nn.Module):
    """Computes `function(x, scale, shift)` with parameters of these shapes."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(randn(*shapes[0]))
        self.shift = nn.Parameter(randn(*shapes[1])) if len(shapes) > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.scale, self.shift)


def test_a_norm_is_known_by_what_it_computes() -> None:
    residual = MyNorm(lambda x, w, b: x + w * F.normalize(x, dim=-1) + b, (4,), (4,))
    channels = MyNorm(lambda x, w, _: F.normalize(x, dim=1) * w[:, None, None], (4,))
    check_layer_rule(residual, randn(4, 3, 4))
    check_layer_rule(channels, randn(4, 4, 3, 2))
    with pytest.raises(UnsupportedError, match=r"MyNorm.*took an input of 3 axes"):
        gradients(channels, randn(2, 4, 3), randn(1, 2, 4, 3), torch.float32)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda x, w, _: x * w**2, [(4,)]),
        (lambda x, w, _: x * w.flip(0), [(4,)]),
        (lambda x, w, b: x * w + b.flip(0), [(4,), (4,)]),
        (lambda x, w, b: (x + b) * w, [(4,), (4,)]),
        (lambda x, w, _: x.softmax(0) * w, [(4,)]),
        (lambda x, w, _: x * w, [(1,)]),
        (lambda x, w, _: x * w, [()]),
        (lambda x, w, _: x @ w, [(4, 4)]),
        (lambda x, w, b: x * w + b, [(4,), (1,)]),
    ],
)
def test_what_computes_something_else_is_no_norm(
    function: Callable[..., Tensor], shapes: list[tuple[int, ...]]
) -> None:
    assert rule_for(MyNorm(function, *shapes)) is None


def test_a_norm_with_a_gate_is_none() -> None:
    """It takes a second input, which a rule would not see."""
    assert rule_for(MambaRMSNormGated(4, 2)) is None


def test_looking_at_a_module_leaves_no_trace() -> None:
    class CountingNorm(LlamaRMSNorm):
        def __init__(self) -> None:
            super().__init__(4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = x
            return super().forward(x)

    module, seen = CountingNorm(), []
    module.register_forward_hook(lambda module, *_: seen.append(module))
    state = torch.get_rng_state()
    assert isinstance(rule_for(module), ScaleRule)
    gradients(module, randn(2, 4), randn(1, 2, 4), torch.float32)
    assert module.calls == 0
    assert not hasattr(module, "last")
    assert not seen
    assert torch.equal(torch.get_rng_state(), state)


# ---- the check and the registry -------------------------------------------------------------


class Halved(LinearRule):
    def cotangents(self, module: nn.Module, g: Tensor) -> Tensor:
        return super().cotangents(module, g) / 2


class Nameless(LinearRule):
    def block(self, module: nn.Module, name: str, trainable: frozenset[str]) -> Block:
        return super().block(module, "", trainable)


class FromFirstSample(LinearRule):
    """Right for a whole batch, but not for a part of it."""

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        return super().inputs(module, x if len(x) > 1 else 2 * x)


class Doubled(Factored):
    """Another sum of squares than that of its gradients."""

    def squared(self) -> Tensor:
        return 2 * super().squared()


class Rooted(Factored):
    """Moments that are not those of its vectors."""

    @property
    def sides(self) -> tuple[Side, Side] | None:
        if self.a is None:
            return None
        return Vectors(self.g), Inputs(self.a.sqrt(), self.biased, self.used)


class Made(LinearRule):
    """Its parts are of another class."""

    def __init__(self, kind: type[Factored]) -> None:
        super().__init__()
        self.kind = kind

    def part(
        self, block: Block, calls: tuple[Call, ...], num_samples: int, dtype: torch.dtype
    ) -> Factored:
        part = super().part(block, calls, num_samples, dtype)
        return self.kind(part.a, part.g, part.biased, part.groups)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Made(Doubled), r"squared is off"),
        (Made(Rooted), r"sides at one position is off"),
        (Halved(), r"linear, \['weight'\] trainable, 1 rows per sample: gradients is off"),
        (Nameless(), "block of module 'layer' holds"),
        (FromFirstSample(), "one by one is off"),
    ],
)
def test_a_wrong_rule_is_found(
    rule: LinearRule, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_RULES", {nn.Linear: rule})
    with pytest.raises(AssertionError, match=message):
        check_layer_rule(nn.Linear(3, 2), randn(4, 3).abs())
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

    def test_a_replaced_forward_is_another_layer(self) -> None:
        for module in (nn.Linear(2, 2), nn.LayerNorm(2), LlamaRMSNorm(2)):
            assert rule_for(module) is not None
            module.forward = lambda x: x
            assert rule_for(module) is None

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

        class TransposedRule(WeightRule):
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
