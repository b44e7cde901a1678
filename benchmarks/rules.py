"""`python -m benchmarks.rules`: what a layer rule saves over the generic path (decision 0002).

Each model is measured as it is, and with the rule of the layer in question switched off, so that
its parameters are read by per-sample gradients of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import neuromanifold as nm
from benchmarks.harness import crowded, environment, interleave, quartiles, write_results

N, T, WIDTH, VOCABULARY, ROUNDS = 16, 32, 64, 500, 11


class Tagger(nn.Module):
    """Tokens and positions, some layer over the sequence, a head."""

    def __init__(self, layer: nn.Module, *, shared: bool = False) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(T, WIDTH)
        self.layer = layer
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if shared:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `(N, T, vocabulary)`."""
        h = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1])[None])
        out = self.layer(h)
        return self.head(out[0] if isinstance(out, tuple) else out)


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[type[nn.Module], ...]]] = {
    "LSTM": (lambda: Tagger(nn.LSTM(WIDTH, WIDTH, batch_first=True)), (nn.LSTM,)),
    "GRU": (lambda: Tagger(nn.GRU(WIDTH, WIDTH, batch_first=True)), (nn.GRU,)),
    "attention and norms": (lambda: Tagger(encoder()), (nn.MultiheadAttention, nn.LayerNorm)),
    "embeddings": (lambda: Tagger(nn.Tanh()), (nn.Embedding,)),
    "shared embedding": (lambda: Tagger(nn.Tanh(), shared=True), (nn.Embedding,)),
}


def without_rules(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> nn.Module:
    """A forward of its own makes a layer one that no rule knows."""
    for module in model.modules():
        if isinstance(module, kinds):
            vars(module)["forward"] = module.forward
    return model


def measure(name: str) -> dict[str, Any]:
    """Time a model with its rules and without, against forward and backward."""
    make, kinds = MODELS[name]
    torch.manual_seed(0)
    model = make()
    tokens = torch.randint(VOCABULARY, (N, T))
    labels = torch.randint(VOCABULARY, (N, T))
    likelihood = nm.Categorical()

    def unit() -> None:
        model.zero_grad()
        likelihood.loss(model(tokens), labels).backward()

    tasks: dict[str, Callable[[], object]] = {"unit": unit}
    plain = without_rules(make(), kinds)
    plain.load_state_dict(model.state_dict())
    answers = {}
    for structure in (nm.Diagonal(), nm.Kronecker()):
        for how, subject in (("rule", model), ("generic", plain)):
            key = f"{structure!r}, {how}"
            tasks[key] = partial(
                lambda subject, structure: nm.fisher(
                    subject,
                    likelihood,
                    tokens,
                    structure,
                    generator=torch.Generator().manual_seed(0),
                ),
                subject,
                structure,
            )
            answers[key] = tasks[key]()
    ruled, generic = answers["Diagonal(), rule"], answers["Diagonal(), generic"]
    assert isinstance(ruled, nm.FisherOperator)
    assert isinstance(generic, nm.FisherOperator)
    torch.testing.assert_close(ruled.trace(), generic.trace(), rtol=1e-4, atol=0.0)
    assert "generic" not in {entry.rule for entry in ruled.coverage}
    assert "generic" in {entry.rule for entry in generic.coverage}
    seconds = interleave(tasks, ROUNDS)
    times = seconds.pop("unit")
    return {key: quartiles(values, times) for key, values in seconds.items()}


def main() -> None:
    """Measure all, print a table, write JSON."""
    found = {name: measure(name) for name in MODELS}
    columns = list(next(iter(found.values())))
    title = f"time, in forward + backward passes; {torch.get_num_threads()} threads"
    table = Table("model", *columns, title=title)
    for name, row in found.items():
        table.add_row(name, *(f"{row[column][1]:.2f}" for column in columns))
    Console(width=120).print(table)
    trusted = not crowded()
    write_results("rules", {"environment": environment(), "trusted": trusted, "ratios": found})


if __name__ == "__main__":
    main()
