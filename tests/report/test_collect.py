"""What is measured for a report, of models as people have them."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import neuromanifold as nm
from neuromanifold.report import collect


class Tagger(nn.Module):
    """Embedding and head share a weight; a recurrent layer and a raw parameter in between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.rnn = nn.RNN(4, 4, batch_first=True)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        hidden, _ = self.rnn(self.embed(tokens) * self.scale)
        return self.head(hidden)


@pytest.fixture
def tagger():
    torch.manual_seed(0)
    return Tagger().double().eval()


def tokens(num: int) -> torch.Tensor:
    return torch.arange(num * 3).reshape(num, 3) % 7


def test_every_block_names_the_modules_that_own_it(tagger):
    analysis = collect(tagger, nm.Categorical(), tokens(4), name="tagger")
    assert {layer["name"]: layer["type"] for layer in analysis["layers"]} == {
        "embed.weight": "Embedding + Linear",
        "scale": "Tagger",
        "rnn.ih_l0": "RNN",
        "rnn.hh_l0": "RNN",
        "head.bias": "Linear",
    }


def test_few_samples_are_exact(tagger):
    analysis = collect(tagger, nm.Categorical(), tokens(4), name="tagger")
    assert analysis["estimator"] == "Exact()"
    [note] = analysis["notes"]
    assert "no layer but those of the outputs has an activation function of its own" in note
    F = nm.fisher(tagger, nm.Categorical(), tokens(4), nm.Gram(), estimator=nm.Exact())
    assert_close(analysis["trace"], F.trace().item())


@pytest.mark.parametrize(("num", "draws"), [(200, 2), (600, 1)])
def test_of_many_samples_some_labels_are_drawn(tagger, num, draws):
    analysis = collect(tagger, nm.Categorical(), tokens(num), name="tagger")
    assert analysis["estimator"] == f"MonteCarlo(samples={draws})"
    assert analysis["num_rows"] == num * draws
    note, _ = analysis["notes"]
    assert f"takes {num * 21:,} gradients, 21 for each of {num:,} samples" in note
    assert f"estimated by {draws} for each" in note
    assert "Up to 195 samples are measured exactly." in note


def test_large_models_get_fewer_draws(tagger, monkeypatch):
    entries = 1000 * sum(p.numel() for p in tagger.parameters())
    monkeypatch.setattr(sys.modules[collect.__module__], "SAMPLED_ENTRIES", entries // 2)
    assert collect(tagger, nm.Categorical(), tokens(200), name="tagger")["num_rows"] == 400
    monkeypatch.setattr(sys.modules[collect.__module__], "SAMPLED_ENTRIES", entries // 5)
    assert collect(tagger, nm.Categorical(), tokens(200), name="tagger")["num_rows"] == 200


def test_errors_are_those_of_the_dense_matrices(tagger):
    data = nm.Categorical(), tokens(4)
    analysis = collect(tagger, *data, name="tagger")
    exact = nm.fisher(tagger, *data, nm.Dense(), estimator=nm.Exact())
    for structure in (nm.Diagonal(), nm.UnitWise(), nm.Kronecker(), nm.BlockDiagonal()):
        kind = type(structure).__name__
        S = nm.fisher(tagger, *data, structure, estimator=nm.Exact())
        error = (exact.to_dense() - S.to_dense()).norm() / exact.to_dense().norm()
        assert_close(analysis["whole_errors"][kind], error.item())
        for layer in analysis["layers"]:
            if kind != "BlockDiagonal":
                F, K = (matrix.block(layer["name"]).to_dense() for matrix in (exact, S))
                expected = (F - K).norm() / F.norm()
                assert_close(layer[f"{kind.lower()}_error"], expected.item(), rtol=0, atol=1e-7)
            if kind == "Kronecker":
                trace, largest = (
                    (K.trace() / F.trace()).item(),
                    (torch.linalg.eigvalsh(K)[-1] / torch.linalg.eigvalsh(F)[-1]).item(),
                )
                assert_close(layer["kronecker_trace_ratio"], trace, rtol=1e-5, atol=0)
                assert_close(layer["kronecker_largest_ratio"], largest, rtol=1e-5, atol=0)


def test_what_is_too_large_to_compare_is_left_out(tagger, monkeypatch):
    monkeypatch.setattr(sys.modules[collect.__module__], "LARGEST_COMPARED", 2000)
    analysis = collect(tagger, nm.Categorical(), tokens(4), name="tagger")
    assert analysis["whole_errors"]["BlockDiagonal"] is None
    assert analysis["whole_errors"]["Diagonal"] is not None
    left_out = [note.partition(":")[0] for note in analysis["notes"]]
    assert "BlockDiagonal was left out" in left_out
    assert any("structures are compared up to 2.0 KiB" in note for note in analysis["notes"])


def test_labels_belong_to_the_outputs_that_predict_them(tagger):
    tagger.loss_type = "ForCausalLM"  # as models of the Hugging Face family say it
    tagger.forward = lambda input_ids, **_: Tagger.forward(tagger, input_ids)
    ids = tokens(4)
    batch = {"input_ids": ids, "labels": ids.masked_fill(ids == 3, -100)}
    targets = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    given, moved = (
        collect(tagger, nm.Categorical(), data, name="tagger")
        for data in (batch, ({"input_ids": ids}, targets))
    )
    assert_close(given["trace"], moved["trace"])
