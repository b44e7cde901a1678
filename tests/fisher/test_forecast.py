"""What a measurement will cost, told before it is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.linalg import memory
from neuromanifold.linalg.allocations import Usage, watching

CPU = torch.device("cpu")


class SequenceModel(nn.Module):
    """Next-token logits of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.head = nn.Linear(32, 40)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])


class WideEmbedding(nn.Module):
    """A table that is much larger than anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20_000, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens).mean(dim=1))


def perceptron() -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 10))
    return model, torch.randn(96, 100)


def convolutions() -> tuple[nn.Module, Any]:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    return model, torch.randn(64, 3, 24, 24)


def transformer() -> tuple[nn.Module, Any]:
    config = transformers.GPT2Config(
        vocab_size=200,
        n_positions=32,
        n_embd=48,
        n_layer=2,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    return model, {"input_ids": torch.randint(200, (24, 32))}


def recurrent() -> tuple[nn.Module, Any]:
    return SequenceModel(), torch.randint(40, (48, 12))


def wide() -> tuple[nn.Module, Any]:
    return WideEmbedding(), torch.randint(20_000, (64, 8))


KINDS: list[Callable[[], tuple[nn.Module, Any]]] = [
    perceptron,
    convolutions,
    transformer,
    recurrent,
    wide,
]


def actual(model: nn.Module, data: Any, structure: Any, **options: Any) -> Usage:
    """Bytes of the measurement itself, on a model that was not measured before."""
    with watching(CPU) as usage:
        F = nm.fisher(
            model, nm.Categorical(), data, structure, forward=lambda m, x: call(m, x), **options
        )
    del F
    return usage


def call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


@pytest.mark.parametrize("structure", [nm.Diagonal(), nm.Kronecker()], ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes(kind, structure, monkeypatch) -> None:
    """Within a factor 1.3, on five kinds of models, from an eighth of the samples."""
    monkeypatch.setattr("neuromanifold.structures.cost.PATIENCE", 0.0)
    monkeypatch.setattr("neuromanifold.structures.cost.LARGE", 0)
    torch.manual_seed(0)
    model, data = kind()
    told = nm.forecast(model, nm.Categorical(), data, structure)
    found = actual(model, data, structure)
    assert told.tried <= told.samples // 2
    assert found.peak / 1.3 <= told.bytes <= found.peak * 1.3
    assert told.statistics == found.kept


@pytest.mark.parametrize(
    "estimator", [nm.Exact(), nm.MonteCarlo(20), nm.RandomSigns(3), nm.Empirical()], ids=repr
)
@pytest.mark.parametrize("structure", [nm.Kronecker(), nm.Gram(), nm.Dense()], ids=repr)
def test_bytes_of_several_sweeps(estimator, structure, monkeypatch) -> None:
    monkeypatch.setattr("neuromanifold.structures.cost.PATIENCE", 0.0)
    monkeypatch.setattr("neuromanifold.structures.cost.LARGE", 0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 12))
    data = torch.randn(96, 30), torch.randint(12, (96,))
    told = nm.forecast(model, nm.Categorical(), data, structure, estimator=estimator)
    found = actual(model, data, structure, estimator=estimator)
    assert found.peak / 1.3 <= told.bytes <= found.peak * 1.3
    assert found.kept / 1.05 <= told.statistics <= found.kept * 1.05


def test_bytes_of_several_batches() -> None:
    torch.manual_seed(0)
    model, x = perceptron()
    batches = list(x.repeat(2, 1).split(48))
    data = [(batch, None) for batch in batches]
    told = nm.forecast(model, nm.Categorical(), data, nm.Kronecker())
    found = actual(model, data, nm.Kronecker())
    assert (told.samples, told.batches) == (48, 4)
    assert found.peak / 1.3 <= told.bytes <= found.peak * 1.3


def test_what_is_kept_is_counted() -> None:
    model = nn.Sequential(nn.Linear(31, 40), nn.ReLU(), nn.Linear(40, 8)).double()
    x = torch.randn(40, 31, dtype=torch.float64)
    for structure, numbers in (
        (nm.Diagonal(), 40 * 32 + 8 * 41),
        (nm.UnitWise(), 40 * 32**2 + 8 * 41**2),
        (nm.Kronecker(), 32**2 + 40**2 + 41**2 + 8**2),
        (nm.BlockDiagonal(), (40 * 32) ** 2 + (8 * 41) ** 2),
        (nm.Dense(), (40 * 32 + 8 * 41) ** 2),
    ):
        told = nm.forecast(model, nm.Categorical(), x, structure)
        # Rows may start at aligned addresses, eight numbers apart.
        assert 8 * numbers <= told.statistics <= 8 * numbers * 48 / 41, structure


def test_seconds_are_told() -> None:
    """How right they are is measured by `python -m benchmarks.forecast`, on an idle machine."""
    model, x = perceptron()
    told = nm.forecast(model, nm.Categorical(), [(x, None)] * 2, nm.Diagonal())
    assert told.seconds is not None
    assert told.seconds > 0
    assert told.batches == 2


# ---- what cannot fit ---------------------------------------------------------------------------


def test_a_million_parameters_as_a_dense_matrix_are_counted_and_not_allocated() -> None:
    model, x = nn.Linear(1000, 1000), torch.randn(4, 1000)
    p = 1000 * 1001
    with watching(CPU) as usage:
        told = nm.forecast(model, nm.Categorical(), x, nm.Dense())
    assert usage.peak < 2**26
    assert told.statistics == 4 * p**2
    assert told.bytes >= told.statistics
    assert told.seconds is None
    assert not told.fits
    assert "time unknown" in str(told)
    assert "are available" in str(told)


def test_the_error_quotes_what_others_would_need(monkeypatch) -> None:
    monkeypatch.setattr(memory, "available", lambda _: 2**20)
    model = nn.Sequential(nn.Linear(8, 1000), nn.Linear(1000, 9))
    kronecker = memory.readable(4 * (9**2 + 1000**2 + 1001**2 + 9**2))
    diagonal = memory.readable(4 * (9000 + 9009))
    dense = memory.readable(4 * (9000 + 9009) ** 2)
    with pytest.raises(nm.errors.TooLargeError) as raised:
        nm.fisher(model, nm.Categorical(), torch.ones(2, 8), nm.Dense())
    message = str(raised.value)
    assert f"Dense() of 18009 parameters needs {dense}, but 1.0 MiB are free" in message
    assert f"nm.Kronecker() would need {kronecker}" in message
    assert f"nm.Diagonal() would need {diagonal}" in message
    assert "nm.forecast" in message


def test_the_poorest_structure_has_no_poorer_one_to_quote(monkeypatch) -> None:
    monkeypatch.setattr(memory, "available", lambda _: 2**20)
    with pytest.raises(nm.errors.TooLargeError, match=r"Give params=\[\.\.\.\] for a part") as e:
        nm.fisher(nn.Linear(5000, 1000), nm.Gaussian(), torch.ones(2, 5000), nm.Diagonal())
    assert "would need" not in str(e.value)


# ---- the answer --------------------------------------------------------------------------------


def test_it_reads_and_stores() -> None:
    model, x = perceptron()
    told = nm.forecast(model, nm.Categorical(), x, nm.Diagonal())
    assert told.bytes == told.statistics + told.activations + told.temporaries
    assert told.fits
    stored = json.loads(json.dumps(told.to_dict()))
    assert stored["bytes"] == told.bytes
    assert stored["fits"] is True
    line = str(told)
    assert line.startswith(memory.readable(told.bytes))
    assert f"statistics {memory.readable(told.statistics)}" in line


def test_a_stream_of_unknown_length_is_told_by_the_batch() -> None:
    class Stream(torch.utils.data.IterableDataset[Tensor]):
        def __iter__(self):
            return iter(torch.randn(6, 5))

    loader = torch.utils.data.DataLoader(Stream(), batch_size=3)
    told = nm.forecast(nn.Linear(5, 2), nm.Categorical(), loader, nm.Diagonal())
    assert told.batches is None
    assert "for one batch" in str(told)


def test_a_forecast_leaves_everything_as_it_was() -> None:
    model, x = perceptron()
    state, before = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    nm.forecast(model, nm.Categorical(), x, nm.Kronecker())
    assert torch.equal(torch.get_rng_state(), state)
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
        assert p.grad is None
    assert not any(module._forward_hooks for module in model.modules())


def test_an_iterator_is_refused() -> None:
    model, x = perceptron()
    with pytest.raises(nm.errors.UnsupportedError, match="read only once"):
        nm.forecast(model, nm.Categorical(), iter([(x, None)]), nm.Diagonal())


def test_a_running_profiler_is_refused() -> None:
    model, x = perceptron()
    with (
        torch.autograd.profiler.profile(use_cpu=True),
        pytest.raises(nm.errors.UnsupportedError, match="one is running already"),
    ):
        nm.forecast(model, nm.Categorical(), x, nm.Diagonal())


def test_a_batch_that_does_not_show_its_samples_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return self.head(x + table.sum(dim=0))

    data = {"x": torch.ones(6, 3), "table": torch.ones(4, 3)}
    with pytest.raises(nm.errors.UnsupportedError, match=r"first axes of \[4, 6\]"):
        nm.forecast(Two(), nm.Categorical(), data, nm.Diagonal())
    told = nm.forecast(
        Two(), nm.Categorical(), {**data, "targets": torch.zeros(6, dtype=torch.long)}
    )
    assert told.samples == 6


def test_samples_that_depend_on_each_other_are_refused() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x - x.mean(dim=0))

    with pytest.raises(nm.errors.CaptureError, match="other outputs alone"):
        nm.forecast(Centred(), nm.Categorical(), torch.randn(6, 3), nm.Diagonal())


def test_a_random_model_is_not_taken_for_one_that_mixes_samples() -> None:
    model = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5), nn.Linear(50, 2)).train()
    told = nm.forecast(model, nm.Categorical(), torch.randn(16, 3), nm.Diagonal())
    assert told.bytes > 0
