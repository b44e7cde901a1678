"""Whole models as data, unchanged but small: language models, vision, time series, graphs.

`MODELS` is meant for `pytest.mark.parametrize("case", model_cases.MODELS, ids=str)`. Each model has
some hundred parameters in float64, random weights, and is in evaluation mode. Those of the Hugging
Face family need the extra `hf`.

Axes: N samples, T positions, C channels or classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from neuromanifold._extras import require_extra
from neuromanifold.likelihoods import Categorical
from neuromanifold.testing.cases import NUM_SAMPLES, Case
from neuromanifold.testing.layer_cases import Draw, case, normal, several, tokens

__all__ = ["MODELS"]

VOCABULARY = 17
LENGTH = 5


# ---- Hugging Face -----------------------------------------------------------------------------


def _transformers() -> Any:
    """The package, which takes long to import and is optional.

    Raises:
        UnsupportedError: If it is not installed, with the command that does.
    """
    require_extra("hf", "transformers")
    import transformers

    return transformers


def _gpt2() -> nn.Module:
    package = _transformers()
    config = package.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=6,
        n_embd=8,
        n_layer=2,
        n_head=2,
        n_inner=8,
        bos_token_id=0,
        eos_token_id=0,
    )
    return package.GPT2LMHeadModel(config)


def _bert(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        package = _transformers()
        config = package.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=6,
            num_labels=3,
        )
        return getattr(package, name)(config)

    return make


def _llama() -> nn.Module:
    package = _transformers()
    config = package.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,  # both heads share keys and values
        max_position_embeddings=6,
    )
    return package.LlamaForCausalLM(config)


def _vit() -> nn.Module:
    package = _transformers()
    config = package.ViTConfig(
        image_size=6,
        patch_size=3,
        num_channels=2,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
    )
    return package.ViTForImageClassification(config)


def _text(**more: Draw) -> Draw:
    """Token sequences of different lengths, padded on the right, as keyword arguments."""

    def draw(generator: Generator) -> dict[str, Tensor]:
        lengths = LENGTH - torch.arange(NUM_SAMPLES) % 4
        return {
            "input_ids": tokens(VOCABULARY, LENGTH)(generator),
            "attention_mask": (torch.arange(LENGTH) < lengths[:, None]).long(),
            **{name: other(generator) for name, other in more.items()},
        }

    return draw


def _image(channels: int, size: int) -> Draw:
    return lambda generator: {"pixel_values": normal(channels, size, size)(generator)}


# ---- a residual network -----------------------------------------------------------------------


class _BasicBlock(nn.Module):
    """Two convolutions with a shortcut, which is a convolution where the shape changes."""

    def __init__(self, width_in: int, width: int, stride: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or width_in != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), norm(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


def _resnet18(norm: Callable[[int], nn.Module]) -> nn.Module:
    """Four stages of two blocks each, as ResNet-18 has, with two to four channels."""

    def live(width: int) -> nn.Module:
        layer = norm(width)
        nn.init.ones_(layer.get_parameter("bias"))  # few channels, so that none should be dead
        return layer

    widths = (2, 2, 2, 3, 4)
    blocks = [
        _BasicBlock(before if first else width, width, stride if first else 1, live)
        for before, width, stride in zip(widths, widths[1:], (1, 2, 2, 2), strict=False)
        for first in (True, False)
    ]
    return nn.Sequential(
        nn.Conv2d(1, widths[0], 3, padding=1, bias=False),
        live(widths[0]),
        nn.ReLU(inplace=True),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(widths[-1], 3),
    )


# ---- recurrent language models ----------------------------------------------------------------


class _RecurrentLanguageModel(nn.Module):
    """Embedding, two layers of LSTM, and a head that may share the embedding's weight."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 3)
        self.recurrent = nn.LSTM(3, 3, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(3, VOCABULARY)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h, _ = self.recurrent(self.embedding(tokens))
        return self.head(h)


# ---- time series and graphs -------------------------------------------------------------------


class _DLinear(nn.Module):
    """Trend and remainder of each channel, forecast by one linear layer each.

    Source: Zeng et al., Are transformers effective for time series forecasting?, arXiv 2205.13504.
    """

    def __init__(self, length: int, horizon: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.trend = nn.Linear(length, horizon)
        self.remainder = nn.Linear(length, horizon)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)  # (N, C, T)
        half = self.window // 2
        trend = F.avg_pool1d(F.pad(x, (half, half), mode="replicate"), self.window, stride=1)
        return (self.trend(trend) + self.remainder(x - trend)).transpose(1, 2)


class _GraphConvolution(nn.Module):
    """`Â X W + b` with raw parameters, the weight as `(in, out)`."""

    def __init__(self, features_in: int, features_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features_in, features_out))
        self.bias = nn.Parameter(torch.zeros(features_out))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ (x @ self.weight) + self.bias


class _GraphNetwork(nn.Module):
    """Classes of the nodes of a graph: features `(N, T, I)`, edge weights `(N, T, T)`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = _GraphConvolution(3, 4)
        self.gate = nn.Parameter(torch.ones(4))
        self.second = _GraphConvolution(4, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        adjacency = (edges + edges.mT).softmax(dim=-1)
        return self.second(self.gate * self.first(x, adjacency).tanh(), adjacency)


MODELS: tuple[Case, ...] = (
    case("gpt2", _gpt2, _text(), Categorical(), ignored=True),
    case(
        "bert_masked_lm",
        _bert("BertForMaskedLM"),
        _text(token_type_ids=tokens(2, LENGTH)),
        Categorical(),
        ignored=True,
    ),
    case("bert_classifier", _bert("BertForSequenceClassification"), _text(), Categorical()),
    case("llama", _llama, _text(), Categorical(), ignored=True),
    case("vit", _vit, _image(2, 6), Categorical()),
    case(
        "resnet18_group_norm",
        lambda: _resnet18(lambda width: nn.GroupNorm(1, width)),
        normal(1, 8, 8),
        Categorical(),
    ),
    case("resnet18_batch_norm", lambda: _resnet18(nn.BatchNorm2d), normal(1, 8, 8), Categorical()),
    case(
        "lstm_lm",
        lambda: _RecurrentLanguageModel(tied=False),
        tokens(VOCABULARY, LENGTH),
        Categorical(),
        ignored=True,
    ),
    case(
        "lstm_lm_tied",
        lambda: _RecurrentLanguageModel(tied=True),
        tokens(VOCABULARY, LENGTH),
        Categorical(),
        ignored=True,
    ),
    case("dlinear", lambda: _DLinear(8, 3, window=3), normal(8, 2)),
    case(
        "graph_network",
        _GraphNetwork,
        several(normal(4, 3), normal(4, 4)),
        Categorical(),
        ignored=True,
    ),
)
"""Every whole model; see the names."""
