"""`python -m benchmarks.forecast`: what `nm.forecast` says, and what then happens.

Five kinds of models. Bytes are to be within a factor 1.3, seconds within a factor 2.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import neuromanifold as nm
from benchmarks.harness import crowded, write_results
from benchmarks.workloads import WORKLOADS
from neuromanifold.linalg import memory
from neuromanifold.linalg.allocations import watching

FACTORS = {"bytes": 1.3, "seconds": 2.0}
STRUCTURES = (nm.Diagonal(), nm.Kronecker())


class LanguageModel(nn.Module):
    """Next-token logits (N, T, C) of an LSTM."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (N, T) to logits."""
        return self.head(self.lstm(self.embedding(tokens))[0])


class BagOfWords(nn.Module):
    """A table of embeddings that is much larger than anything else."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (N, T) to logits (N, 10)."""
        return self.head(self.table(tokens).mean(dim=1))


def gpt2() -> tuple[nn.Module, Any]:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=2000,
        n_positions=128,
        n_embd=192,
        n_layer=4,
        n_head=6,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    return model, {"input_ids": torch.randint(2000, (24, 64))}


def shared(workload: str) -> Callable[[], tuple[nn.Module, Any]]:
    def build() -> tuple[nn.Module, Any]:
        batch = WORKLOADS[workload].build()
        return batch.model, batch.inputs

    return build


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "perceptron": shared("W1"),
    "convolutions": shared("W2"),
    "GPT-2, small": gpt2,
    "LSTM": lambda: (LanguageModel(500, 128), torch.randint(500, (64, 32))),
    "wide embedding": lambda: (BagOfWords(50_000, 64), torch.randint(50_000, (256, 30))),
}


def compare(name: str, structure: nm.structures.Structure) -> dict[str, Any]:
    """A forecast, then the measurement, on a model that nothing is known of."""
    torch.manual_seed(0)
    model, data = MODELS[name]()
    start = time.perf_counter()
    told = nm.forecast(model, nm.Categorical(), data, structure)
    cost = time.perf_counter() - start
    start = time.perf_counter()
    nm.fisher(model, nm.Categorical(), data, structure)
    seconds = time.perf_counter() - start
    model, data = MODELS[name]()
    with watching(torch.device("cpu")) as usage:
        nm.fisher(model, nm.Categorical(), data, structure)
    return {
        "model": name,
        "structure": repr(structure),
        "told": told.to_dict(),
        "bytes": usage.peak,
        "seconds": seconds,
        "forecast_seconds": cost,
    }


def main() -> None:
    if crowded():
        print("Other programs are running: the seconds mean little.", file=sys.stderr)
    rows = [compare(name, structure) for name in MODELS for structure in STRUCTURES]
    table = Table("model", "structure", "bytes", "told", "", "seconds", "told", "", "trials took")
    for row in rows:
        cells = [row["model"], row["structure"]]
        for quantity, show in (("bytes", memory.readable), ("seconds", "{:.2f}".format)):
            told, found = row["told"][quantity], row[quantity]
            good = 1 / FACTORS[quantity] <= told / found <= FACTORS[quantity]
            colour = "green" if good else "red"
            cells += [show(found), show(told), f"[{colour}]× {told / found:.2f}[/]"]
        table.add_row(*cells, f"{row['forecast_seconds']:.2f} s")
    Console(width=130).print(table)
    write_results("forecast", {"rows": rows})


if __name__ == "__main__":
    main()
