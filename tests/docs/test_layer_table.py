"""The page that says, for every layer and structure, what is exact: made here, compared here.

`python tests/docs/test_layer_table.py` writes it anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest
import torch

import neuromanifold as nm
from neuromanifold.errors import NeuromanifoldError
from neuromanifold.structures import Structure
from neuromanifold.testing.cases import CASES, Case
from neuromanifold.testing.layer_cases import LAYERS

PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "layer-table.md"

STRUCTURES: dict[str, Structure] = {
    "Dense": nm.Dense(),
    "Gram": nm.Gram(),
    "Implicit": nm.Implicit(),
    "BlockDiagonal": nm.BlockDiagonal(),
    "UnitWise": nm.UnitWise(),
    "QuasiDiagonal": nm.QuasiDiagonal(),
    "Diagonal": nm.Diagonal(),
    "Kronecker": nm.Kronecker(),
    "Kronecker, reduce": nm.Kronecker("reduce"),
    "EigenKronecker": nm.EigenKronecker(),
    "LowRank": nm.LowRank(8),
}


@dataclass(frozen=True)
class Row:
    """A layer, the case that has it, and which parameters of the case are the layer's."""

    layer: str
    case: str
    parameters: str = "*"


ROWS = (
    Row("Linear", "mlp-categorical", "body.0.*"),
    Row("Linear, at several positions", "sequence_pooled-categorical", "body.0.*"),
    Row("One unit per group: depthwise", "conv_transpose1d_depthwise", "0.*"),
    Row("Conv1d", "conv1d-categorical", "body.0.*"),
    Row("Conv2d", "conv2d-categorical", "body.0.*"),
    Row("Conv3d", "conv3d-categorical", "body.0.*"),
    Row("ConvTranspose1d", "conv_transpose1d", "0.*"),
    Row("ConvTranspose2d", "conv_transpose2d", "0.*"),
    Row("ConvTranspose3d", "conv_transpose3d", "0.*"),
    Row("Hugging Face Conv1D", "hugging_face_conv1d_positions", "0.*"),
    Row("Embedding", "embedding_positions", "0.*"),
    Row("Embedding with padding_idx", "embedding_padding_idx", "0.*"),
    Row("EmbeddingBag", "embedding_bag_sum", "0.*"),
    Row("LayerNorm", "layer_norm_positions", "1.*"),
    Row("RMSNorm", "rms_norm_positions", "1.*"),
    Row("GroupNorm", "group_norm", "1.*"),
    Row("InstanceNorm", "instance_norm2d", "1.*"),
    Row("BatchNorm, in evaluation mode", "batch_norm2d", "1.*"),
    Row("PReLU", "prelu_per_channel", "1.*"),
    Row("Bilinear", "bilinear"),
    Row("MultiheadAttention, packed projections", "attention_self"),
    Row("MultiheadAttention, queries of another sequence", "attention_cross"),
    Row("MultiheadAttention, kdim and vdim", "attention_separate"),
    Row("MultiheadAttention, bias_k and bias_v", "attention_added_keys", "*.bias_[kv]"),
    Row("TransformerEncoderLayer", "transformer_encoder_layer"),
    Row("RNN", "rnn", "layer.*"),
    Row("GRU", "gru", "layer.*"),
    Row("LSTM", "lstm", "layer.*"),
    Row("RNNCell", "rnn_cell"),
    Row("GRUCell", "gru_cell"),
    Row("LSTMCell", "lstm_cell"),
    Row("Adapter of plain layers, base frozen", "low_rank_adapter"),
    Row("Adapter of raw parameters", "raw_adapter"),
    Row("Raw parameter", "raw_parameters", "[ps]*"),
    Row("Weight shared by embedding and head", "tied_head", "embedding.*"),
    Row("Embedding's weight used as a function", "embedding_as_head", "embedding.*"),
    Row("Weight shared by two linear layers", "shared_weight_positions", "first.weight"),
    Row("Layer called twice", "called_twice"),
)

HEAD = """# Every layer in every structure

What each structure keeps of each layer. The page is made and checked by the tests, on small models
in double precision with `nm.Exact()`, one for each row.

* **exact**: the entries that the structure keeps are those of the Fisher matrix. A name behind it
  says which structure holds them, where it is not the column's.
* **trace, matrix**: an approximation ([how](structures.md)), with its error in the trace of these
  parameters and, in Frobenius norm, in their matrix: that of each block, of all of them together
  for LowRank. Measured on the tested model; yours will have others. Entries that are summed over
  positions afterwards, as by pooling, are what "expand" loses and "reduce" keeps.
* **refused**: the error that is raised.

"""


@cache
def cases() -> dict[str, Case]:
    return {str(case): case for case in (*CASES, *LAYERS)}


@cache
def measured(case: str, structure: str) -> nm.FisherOperator | str:
    """The operator, or why there is none."""
    found = cases()[case]
    try:
        return nm.fisher(
            found.model(),
            found.likelihood,
            found.data(),
            STRUCTURES[structure],
            estimator=nm.Exact(),
            generator=torch.Generator().manual_seed(0),
        )
    except NeuromanifoldError as error:
        return str(error)


def cell(row: Row, structure: str) -> str:
    operator = measured(row.case, structure)
    if isinstance(operator, str):
        return f"refused: {operator.partition('. ')[0]}"
    entries = [e for e in operator.coverage if fnmatchcase(e.parameter, row.parameters)]
    assert entries, f"{row.case} has no parameter {row.parameters}"
    if all(entry.exact for entry in entries):
        kept = dict.fromkeys(
            e.structure for e in entries if e.structure != structure.partition(",")[0]
        )
        return f"exact ({', '.join(kept)})" if kept else "exact"
    exact = measured(row.case, "Dense" if structure == "LowRank" else "BlockDiagonal")
    assert not isinstance(exact, str)
    names = [entry.parameter for entry in entries]
    mine, right = (F.restrict(names).to_dense() for F in (operator, exact))
    trace = f"{100 * float(mine.trace() / right.trace() - 1):+.0f} %".replace("-0 %", "+0 %")
    return f"trace {trace}, matrix {100 * float((mine - right).norm() / right.norm()):.0f} %"


def page() -> str:
    lines = [
        "| layer | " + " | ".join(STRUCTURES) + " |",
        "|---" * (len(STRUCTURES) + 1) + "|",
    ]
    lines += [
        f"| {row.layer} | " + " | ".join(cell(row, name) for name in STRUCTURES) + " |"
        for row in ROWS
    ]
    return HEAD + "\n".join(lines) + "\n"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.layer)
def test_no_cell_is_blank_and_exact_is_exact(row: Row) -> None:
    exact = measured(row.case, "Diagonal")
    assert not isinstance(exact, str)
    for structure in STRUCTURES:
        said = cell(row, structure)
        assert said
        operator = measured(row.case, structure)
        if said.startswith("exact") and not isinstance(operator, str):
            for entry in operator.coverage:
                if fnmatchcase(entry.parameter, row.parameters):
                    expected = exact.diagonal()[entry.parameter]
                    error = (operator.diagonal()[entry.parameter] - expected).norm()
                    assert error <= 1e-8 * expected.norm(), f"{structure}: {entry}"


def test_every_layer_case_has_a_row() -> None:
    kinds = {row.case for row in ROWS}
    unseen = [
        str(case)
        for case in LAYERS
        if not any(str(case).startswith(kind.removesuffix("_positions")) for kind in kinds)
    ]
    assert set(unseen) <= SEEN_ELSEWHERE


SEEN_ELSEWHERE = {
    "attention_float_mask",
    "attention_masked",
    "attention_padding",
    "batch_norm1d",
    "batch_norm1d_positions",
    "embedding_bag_mean",
    "group_norm_2d",
    "instance_norm1d",
    "prelu",
    "prelu_per_unit",
}
"""Variants of the layers in the table; tests/layers/test_every_layer.py compares all of them."""


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), f"run: python {Path(__file__).name}"


if __name__ == "__main__":
    PAGE.write_text(page())
