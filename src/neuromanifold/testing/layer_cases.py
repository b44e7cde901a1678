"""Every layer type as data: one small float64 model each, with the uses of it that go wrong.

`LAYERS` is meant for `pytest.mark.parametrize("case", layer_cases.LAYERS, ids=str)`. Parameters are
few (P ≤ 200) and none of them, nor any running statistic, has its initial value: a scale of one
or a bias of zero would hide mistakes.

Axes: N samples, T positions, S positions of a second sequence, I and O features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from neuromanifold._extras import require_extra
from neuromanifold.likelihoods import Categorical, Gaussian, Likelihood
from neuromanifold.testing.cases import NUM_SAMPLES, Case

__all__ = ["LAYERS", "Draw", "case", "normal", "several", "tokens"]

Draw = Callable[[Generator], Any]
"""Inputs of a batch of seven samples, drawn with a generator."""


def case(
    name: str,
    make: Callable[[], nn.Module],
    draw: Draw,
    likelihood: Likelihood | None = None,
    *,
    ignored: bool = False,
) -> Case:
    """A case whose model is in float64 and evaluation mode, away from its initial values.

    Args:
        name: unique.
        make: makes the model, drawing from the global generator, whose state is put back.
        draw: draws the inputs; a tuple is called as `model(*inputs)`, a dict as `model(**inputs)`.
        likelihood: what the outputs mean; Gaussian by default. Labels are drawn from it.
        ignored: whether some positions of three samples are unobserved, and all those that an
            `attention_mask` among the inputs hides.

    Returns:
        The case, the same each time it is asked.
    """
    likelihood = Gaussian(variance=0.5) if likelihood is None else likelihood

    def data() -> tuple[Any, Tensor]:
        generator = Generator().manual_seed(1)
        inputs = draw(generator)
        with torch.no_grad():
            outputs = _called(_made(make), inputs)
        y = likelihood.sample(outputs, 1, generator=generator)[0]
        if ignored:
            assert isinstance(likelihood, Categorical)
            y[0, 1:] = y[1, 0] = y[-1, -2:] = likelihood.ignore_index
            if isinstance(inputs, dict) and "attention_mask" in inputs:
                y[inputs["attention_mask"] == 0] = likelihood.ignore_index
        return inputs, y

    return Case(name, partial(_made, make), likelihood, data)


def _made(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = make().double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            for name, buffer in model.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    buffer.add_(torch.rand_like(buffer))
    return model


def _called(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        outputs = model(**inputs)
    else:
        outputs = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return getattr(outputs, "logits", outputs)


def normal(*shape: int) -> Draw:
    """Float inputs `(N, *shape)`."""
    return lambda generator: torch.randn(
        NUM_SAMPLES, *shape, generator=generator, dtype=torch.float64
    )


def tokens(vocabulary: int, *shape: int) -> Draw:
    """Integer inputs `(N, *shape)`; with more positions than tokens some are repeated."""
    return lambda generator: torch.randint(vocabulary, (NUM_SAMPLES, *shape), generator=generator)


def several(*draws: Draw) -> Draw:
    """Inputs for `model(*inputs)`."""
    return lambda generator: tuple(draw(generator) for draw in draws)


def _padding(length: int) -> Draw:
    """Which of `length` positions are padding, `(N, length)` bool: never the first."""
    lengths = 1 + torch.arange(NUM_SAMPLES) % length
    return lambda _: torch.arange(length) >= lengths[:, None]


class _Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def _channels_last() -> nn.Module:
    """`(N, C, *T)` to `(N, *T, C)`."""
    return _Apply(lambda x: x.movedim(1, -1))


def _positions_mean() -> nn.Module:
    """`(N, C, *T)` to `(N, C)`, after a nonlinearity."""
    return _Apply(lambda x: x.tanh().flatten(2).mean(dim=2))


# ---- convolutions and Hugging Face's linear layer ---------------------------------------------


def _transposed(make: Callable[[], nn.Module], channels: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(make(), _positions_mean(), nn.Linear(channels, 2))


def _hugging_face_linear() -> nn.Module:
    require_extra("hf", "transformers")
    from transformers import pytorch_utils

    linear: Callable[[int, int], nn.Module] = pytorch_utils.Conv1D  # (out, in)
    return nn.Sequential(linear(4, 3), nn.Tanh(), linear(3, 4))


_CONVOLUTIONS = (
    case(
        "conv_transpose1d",
        _transposed(
            lambda: nn.ConvTranspose1d(
                4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2
            ),
            6,
        ),
        normal(4, 5),
    ),
    case(
        "conv_transpose1d_positions",
        lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 2, stride=2), _channels_last()),
        normal(2, 3),
        Categorical(),
        ignored=True,
    ),
    case(
        "conv_transpose1d_depthwise",
        _transposed(lambda: nn.ConvTranspose1d(3, 3, 2, groups=3, bias=False), 3),
        normal(3, 4),
    ),
    case(
        "conv_transpose2d",
        _transposed(
            lambda: nn.ConvTranspose2d(
                2, 4, (3, 2), stride=(2, 1), padding=(1, 0), output_padding=(1, 0), groups=2
            ),
            4,
        ),
        normal(2, 3, 4),
        Categorical(),
    ),
    case(
        "conv_transpose3d",
        _transposed(
            lambda: nn.ConvTranspose3d(
                2, 3, (1, 2, 2), stride=(1, 2, 1), padding=(0, 1, 0), dilation=(1, 1, 2)
            ),
            3,
        ),
        normal(2, 2, 3, 2),
    ),
    case("hugging_face_conv1d", _hugging_face_linear, normal(3), Categorical()),
    case(
        "hugging_face_conv1d_positions",
        _hugging_face_linear,
        normal(4, 3),
        Categorical(),
        ignored=True,
    ),
)


# ---- embeddings -------------------------------------------------------------------------------


def _embedding(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 3, **options), nn.Tanh(), nn.Linear(3, 4))


_EMBEDDINGS = (
    case("embedding", _embedding, tokens(5)),
    case("embedding_positions", _embedding, tokens(5, 8), Categorical(), ignored=True),
    case("embedding_padding_idx", partial(_embedding, padding_idx=1), tokens(5, 8)),
    case(
        "embedding_two_axes",
        lambda: nn.Sequential(
            nn.Embedding(4, 2), _Apply(lambda x: x.tanh().mean(dim=2)), nn.Linear(2, 2)
        ),
        tokens(4, 3, 2),
    ),
    case(
        "embedding_bag_sum",
        lambda: nn.Sequential(nn.EmbeddingBag(5, 3, mode="sum"), nn.Tanh(), nn.Linear(3, 2)),
        tokens(5, 6),
    ),
    case(
        "embedding_bag_mean",
        lambda: nn.Sequential(nn.EmbeddingBag(5, 3, mode="mean"), nn.Tanh(), nn.Linear(3, 4)),
        tokens(5, 6),
        Categorical(),
    ),
)


# ---- normalisation and activations ------------------------------------------------------------


def _between(norm: Callable[[], nn.Module], width: int) -> Callable[[], nn.Module]:
    """A norm over the last axis between two linear layers."""
    return lambda: nn.Sequential(nn.Linear(2, width), norm(), nn.Tanh(), nn.Linear(width, 2))


def _after_conv(norm: Callable[[], nn.Module], dim: int) -> Callable[[], nn.Module]:
    """A norm over four channels between a convolution and a linear layer."""
    conv: type[nn.Conv1d | nn.Conv2d] = nn.Conv1d if dim == 1 else nn.Conv2d
    return lambda: nn.Sequential(conv(2, 4, 2), norm(), _positions_mean(), nn.Linear(4, 2))


_NORMS = (
    case("layer_norm", _between(lambda: nn.LayerNorm(4), 4), normal(2)),
    case("layer_norm_positions", _between(lambda: nn.LayerNorm(4), 4), normal(3, 2)),
    case(
        "layer_norm_without_bias",
        _between(lambda: nn.LayerNorm(4, bias=False), 4),
        normal(3, 2),
        Categorical(),
        ignored=True,
    ),
    case(
        "layer_norm_two_axes",
        lambda: nn.Sequential(nn.LayerNorm((3, 2)), _Apply(torch.tanh), nn.Linear(2, 2)),
        normal(3, 2),
    ),
    case(
        "layer_norm_two_axes_positions",
        lambda: nn.Sequential(
            nn.LayerNorm((3, 2)), _Apply(lambda x: x.tanh().mean(dim=2)), nn.Linear(2, 2)
        ),
        normal(2, 3, 2),
    ),
    case("rms_norm", _between(lambda: nn.RMSNorm(4), 4), normal(2), Categorical()),
    case("rms_norm_positions", _between(lambda: nn.RMSNorm(4, eps=1e-6), 4), normal(3, 2)),
    case("group_norm", _after_conv(lambda: nn.GroupNorm(2, 4), 1), normal(2, 5)),
    case("group_norm_2d", _after_conv(lambda: nn.GroupNorm(2, 4), 2), normal(2, 3, 3)),
    case("group_norm_vector", _between(lambda: nn.GroupNorm(2, 4), 4), normal(2)),
    case(
        "instance_norm1d", _after_conv(lambda: nn.InstanceNorm1d(4, affine=True), 1), normal(2, 5)
    ),
    case(
        "instance_norm2d",
        _after_conv(lambda: nn.InstanceNorm2d(4, affine=True), 2),
        normal(2, 3, 3),
        Categorical(),
    ),
    case(
        "instance_norm2d_running",
        _after_conv(lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), 2),
        normal(2, 3, 3),
    ),
    case("batch_norm1d", _between(lambda: nn.BatchNorm1d(4), 4), normal(2)),
    case("batch_norm1d_positions", _after_conv(lambda: nn.BatchNorm1d(4), 1), normal(2, 5)),
    case("batch_norm2d", _after_conv(lambda: nn.BatchNorm2d(4), 2), normal(2, 3, 3), Categorical()),
)

_ACTIVATIONS = (
    case("prelu", _between(nn.PReLU, 4), normal(2)),
    case("prelu_per_channel", _after_conv(lambda: nn.PReLU(4), 2), normal(2, 3, 3)),
    case("prelu_per_unit", _between(lambda: nn.PReLU(4), 4), normal(2), Categorical()),
)


# ---- attention --------------------------------------------------------------------------------


class _Attention(nn.Module):
    """Attention whose queries, keys and values all differ, `(N, T, I)` and `(N, S, I)` in.

    Args:
        attention: of either layout.
        values: whether values have their own width, `(N, S, I_v)` in.
        masked: whether position t may see only the first `t + 1` keys.
    """

    def __init__(
        self, attention: nn.MultiheadAttention, *, masked: bool = False, need_weights: bool = True
    ) -> None:
        super().__init__()
        self.attention = attention
        self.masked = masked
        self.need_weights = need_weights

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        key = query if key is None else key
        value = key if value is None else value
        mask = None
        if self.masked:
            mask = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).triu(1)
        out, _ = self.attention(
            *(self._arranged(x) for x in (query, key, value)),
            key_padding_mask=padding,
            attn_mask=mask,
            need_weights=self.need_weights,
        )
        return self._arranged(out)

    def _arranged(self, x: Tensor) -> Tensor:
        return x if self.attention.batch_first else x.transpose(0, 1)


def _attention(
    width: int, heads: int, *, masked: bool = False, need_weights: bool = True, **options: Any
) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        attention = nn.MultiheadAttention(width, heads, **options)
        return _Attention(attention, masked=masked, need_weights=need_weights)

    return make


def _float_mask() -> nn.Module:
    """Self-attention with an additive mask of distances."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            t = torch.arange(x.shape[1], dtype=x.dtype)
            mask = -(t[:, None] - t).abs()
            return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]

    return Biased()


_ATTENTION = (
    case("attention_self", _attention(4, 2, batch_first=True), normal(3, 4)),
    case("attention_self_sequence_first", _attention(4, 2), normal(3, 4)),
    case(
        "attention_self_fused",
        _attention(4, 2, batch_first=True, need_weights=False),
        normal(3, 4),
        Categorical(),
        ignored=True,
    ),
    case(
        "attention_self_without_bias", _attention(4, 1, bias=False, batch_first=True), normal(3, 4)
    ),
    case(
        "attention_cross",
        _attention(4, 2, batch_first=True),
        several(normal(2, 4), normal(3, 4), normal(3, 4)),
    ),
    case(
        "attention_cross_sequence_first",
        _attention(4, 2, need_weights=False),
        several(normal(3, 4), normal(2, 4)),
    ),
    case(
        "attention_separate",
        _attention(4, 2, kdim=3, vdim=2, batch_first=True),
        several(normal(2, 4), normal(3, 3), normal(3, 2)),
    ),
    case(
        "attention_separate_without_bias",
        _attention(4, 2, kdim=3, vdim=2, bias=False, batch_first=True),
        several(normal(2, 4), normal(3, 3), normal(3, 2)),
    ),
    case(
        "attention_separate_sequence_first",
        _attention(2, 1, kdim=3, vdim=1, need_weights=False),
        several(normal(3, 2), normal(2, 3), normal(2, 1)),
        Categorical(),
    ),
    case(
        "attention_added_keys",
        _attention(4, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True),
        normal(3, 4),
    ),
    case(
        "attention_added_keys_sequence_first",
        _attention(2, 1, add_bias_kv=True, need_weights=False),
        several(normal(3, 2), normal(2, 2)),
    ),
    case(
        "attention_masked",
        _attention(4, 2, masked=True, batch_first=True),
        normal(3, 4),
        Categorical(),
        ignored=True,
    ),
    case("attention_float_mask", _float_mask, normal(3, 4)),
    case(
        "attention_padding",
        _attention(4, 2, batch_first=True, need_weights=False),
        several(normal(2, 4), normal(3, 4), normal(3, 4), _padding(3)),
    ),
    case(
        "transformer_encoder_layer",
        lambda: nn.TransformerEncoderLayer(4, 2, dim_feedforward=3, batch_first=True),
        normal(3, 4),
        Categorical(),
        ignored=True,
    ),
    case(
        "transformer_encoder_layer_norm_first",
        lambda: nn.Sequential(
            _Apply(lambda x: x.transpose(0, 1)),
            nn.TransformerEncoderLayer(4, 2, dim_feedforward=3, norm_first=True),
            _Apply(lambda x: x.transpose(0, 1)),
        ),
        normal(3, 4),
    ),
)


# ---- recurrent layers and cells ---------------------------------------------------------------


class _Recurrent(nn.Module):
    """Outputs `(N, T, O)` of a recurrent layer of either layout, with a head."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        width = layer.proj_size or layer.hidden_size
        self.head = nn.Linear(width * (1 + layer.bidirectional), 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.layer.batch_first else x.transpose(0, 1)
        h, _ = self.layer(x)
        return self.head(h if self.layer.batch_first else h.transpose(0, 1))


class _Loop(nn.Module):
    """A cell applied to one position after the other; its last state `(N, O)`."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for x_t in x.unbind(dim=1):
            state = self.cell(x_t, state)
        return state[0] if isinstance(state, tuple) else state


_RECURRENT = (
    case("rnn", lambda: _Recurrent(nn.RNN(2, 3, batch_first=True)), normal(4, 2)),
    case(
        "rnn_relu",
        lambda: _Recurrent(nn.RNN(2, 3, nonlinearity="relu", bias=False)),
        normal(4, 2),
        Categorical(),
        ignored=True,
    ),
    case(
        "gru",
        lambda: _Recurrent(nn.GRU(2, 2, num_layers=2, bidirectional=True, batch_first=True)),
        normal(3, 2),
    ),
    case("gru_sequence_first", lambda: _Recurrent(nn.GRU(2, 3)), normal(4, 2)),
    case(
        "lstm",
        lambda: _Recurrent(nn.LSTM(2, 2, num_layers=2, batch_first=True)),
        normal(3, 2),
        Categorical(),
        ignored=True,
    ),
    case(
        "lstm_bidirectional",
        lambda: _Recurrent(nn.LSTM(2, 2, bidirectional=True)),
        normal(3, 2),
    ),
    case(
        "lstm_projected",
        lambda: _Recurrent(nn.LSTM(2, 3, proj_size=2, bidirectional=True, batch_first=True)),
        normal(3, 2),
    ),
    case("rnn_cell", lambda: _Loop(nn.RNNCell(2, 3)), normal(4, 2)),
    case("gru_cell", lambda: _Loop(nn.GRUCell(2, 3)), normal(4, 2), Categorical()),
    case("lstm_cell", lambda: _Loop(nn.LSTMCell(2, 3)), normal(4, 2)),
)


# ---- bilinear layers, adapters, raw parameters ------------------------------------------------


class _LowRankAdapter(nn.Module):
    """A frozen linear layer and a trainable update of rank two beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 3).requires_grad_(False)
        self.down = nn.Linear(4, 2, bias=False)
        self.up = nn.Linear(2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


class _RawAdapter(nn.Module):
    """The same with the update in two raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 3).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, 4))
        self.up = nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * F.linear(F.linear(x, self.down), self.up)


class _RawParameters(nn.Module):
    """A positional embedding `(T, I)` and a scale without axes, around a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(3, 2))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.linear = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.linear((x + self.position).tanh())


_OTHERS = (
    case("bilinear", lambda: nn.Bilinear(2, 3, 2), several(normal(2), normal(3))),
    case(
        "bilinear_without_bias",
        lambda: nn.Bilinear(2, 3, 2, bias=False),
        several(normal(4, 2), normal(4, 3)),
        Categorical(),
        ignored=True,
    ),
    case(
        "low_rank_adapter",
        lambda: nn.Sequential(_LowRankAdapter(), nn.Tanh(), nn.Linear(3, 2).requires_grad_(False)),
        normal(4),
    ),
    case("raw_adapter", _RawAdapter, normal(3, 4), Categorical(), ignored=True),
    case("raw_parameters", _RawParameters, normal(3, 2), Categorical(), ignored=True),
)


# ---- weights used more than once --------------------------------------------------------------


class _TiedHead(nn.Module):
    """An embedding and a linear head that share one weight; the head has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.inner = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.inner(self.embedding(tokens)).tanh())


class _EmbeddingAsHead(nn.Module):
    """An embedding whose weight a function reads a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.inner = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.inner(self.embedding(tokens)).tanh(), self.embedding.weight)


class _SharedWeight(nn.Module):
    """Two linear layers with one weight and a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class _CalledTwice(nn.Module):
    """A convolution and a norm called twice, with another number of positions each time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 2)
        self.norm = nn.GroupNorm(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        once = self.norm(self.conv(x)).tanh()
        return self.norm(self.conv(once)).mean(dim=2)


class _EmbeddingTwice(nn.Module):
    """One embedding for two sequences of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(self.embedding(left).mean(dim=1) * self.embedding(right).sum(dim=1))


_SHARED = (
    case("tied_head", _TiedHead, tokens(5, 4), Categorical(), ignored=True),
    case("embedding_as_head", _EmbeddingAsHead, tokens(5, 4), Categorical(), ignored=True),
    case("shared_weight", _SharedWeight, normal(3)),
    case("shared_weight_positions", _SharedWeight, normal(2, 3), Categorical()),
    case("called_twice", _CalledTwice, normal(2, 5)),
    case("embedding_twice", _EmbeddingTwice, several(tokens(4, 3), tokens(4, 2))),
)

LAYERS: tuple[Case, ...] = (
    *_CONVOLUTIONS,
    *_EMBEDDINGS,
    *_NORMS,
    *_ACTIVATIONS,
    *_ATTENTION,
    *_RECURRENT,
    *_OTHERS,
    *_SHARED,
)
"""Every layer type in its uses; see the names."""
