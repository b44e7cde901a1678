"""Sequences as their users have them: labels, padding, positions to ignore; a sample is a sequence.

Axes: N sequences, T positions, C tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

import neuromanifold as nm
from neuromanifold.capture import Batch
from neuromanifold.testing import reference

N, T, C = 3, 4, 5
WIDTH = 4
LENGTHS = torch.tensor([4, 2, 3])
RIGHT = (torch.arange(T) < LENGTHS[:, None]).long()
LEFT = RIGHT.flip(1)

EXACT = {
    "Dense": nm.Dense(),
    "BlockDiagonal": nm.BlockDiagonal(),
    "UnitWise": nm.UnitWise(),
    "Diagonal": nm.Diagonal(),
    "Gram": nm.Gram(),
    "Implicit": nm.Implicit(),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(C, shape, generator=torch.Generator().manual_seed(seed))


TOKENS = draw(N, T)


class Plain(nn.Module):
    """Causal attention without any library; padded positions are only told from by the targets."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(C, WIDTH)
        self.mixed = nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, C)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        q, k, v = self.mixed(x).chunk(3, dim=-1)
        return self.head(x + functional.scaled_dot_product_attention(q, k, v, is_causal=True))


def gpt2(**options: Any) -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=C,
            n_positions=T + 1,
            n_embd=WIDTH,
            n_layer=1,
            n_head=2,
            n_inner=WIDTH,
            bos_token_id=None,
            eos_token_id=None,
            **options,
        )
    )


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=C,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def bert(kind: str = "BertForMaskedLM", **options: Any) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=C,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=WIDTH,
        max_position_embeddings=T,
        type_vocab_size=1,
        **options,
    )
    return getattr(transformers, kind)(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "gpt2": lambda: gpt2(tie_word_embeddings=False),
    "gpt2, tied": gpt2,
    "llama": llama,
    "bert": bert,
}
PADDED = [name for name in MODELS if name != "plain"]


def build(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = MODELS[name]().double().eval()
    for p in model.parameters():  # away from the zeros and ones of the start
        p.data += 0.3 * torch.randn_like(p)
    return model


class Logits(nn.Module):
    """A model as a function of tensors that returns a tensor, for the oracle."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        outputs = self.model(**inputs)
        return getattr(outputs, "logits", outputs)


def oracle(model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor | None, **per) -> Tensor:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return reference.dense_fisher(
            Logits(model), nm.Categorical(), (dict(inputs), targets), **per
        )


def measure(model: nn.Module, data: Any, structure: Any = None, **options: Any) -> Any:
    structure = nm.Dense() if structure is None else structure
    options.setdefault("estimator", nm.Exact())
    return nm.fisher(model, nm.Categorical(), data, structure, **options)


def one_by_one(model: nn.Module, mask: Tensor) -> Tensor:
    """The mean over sequences, each without its padding."""
    parts = []
    for tokens, real in zip(TOKENS, mask.bool(), strict=True):
        inputs = {"input_ids": tokens[real][None]}
        parts.append(oracle(model, inputs, None))
    return torch.stack(parts).mean(dim=0)


# ---- every position, some positions -----------------------------------------------------------


SOME = torch.tensor([[0, -100, 2, 1], [-100, -100, 3, -100], [4, 1, -100, -100]])


@pytest.mark.parametrize("structure", EXACT)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("per", ["sample", "position"])
def test_ignored_positions(name, structure, per) -> None:
    """Targets given next to the inputs stand where the outputs are."""
    model, inputs = build(name), {"input_ids": TOKENS}
    F = measure(model, (inputs, SOME), EXACT[structure], per=per)
    kept = "Dense" if structure in ("Gram", "Implicit") else structure
    expected = reference.project(oracle(model, inputs, SOME, per=per), model, kept)
    torch.testing.assert_close(F.to_dense(), expected)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_ignored_positions_with_kronecker_factors(sharing) -> None:
    model = build("plain")
    F = measure(model, ({"input_ids": TOKENS}, SOME), nm.Kronecker(sharing))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = reference.kronecker(
            model, nm.Categorical(), ({"input_ids": TOKENS}, SOME), sharing
        )
    for layer in ("mixed", "head"):  # the oracle keeps the diagonal of a lookup
        names = [f"{layer}.weight", f"{layer}.bias"]
        rows = torch.cat([torch.arange(s.start, s.stop) for s in map(F.layout.slices.get, names)])
        part = expected[rows[:, None], rows]
        torch.testing.assert_close(F.restrict(names).to_dense(), part)


def test_a_sample_is_a_sequence() -> None:
    model, data = build("plain"), ({"input_ids": TOKENS}, SOME)
    whole, parts = measure(model, data), measure(model, data, per="position")
    assert whole.num_samples == N
    torch.testing.assert_close(whole.to_dense() * N, parts.to_dense() * int((SOME >= 0).sum()))


def test_a_part_of_the_positions_is_the_rest_of_the_whole() -> None:
    """The Fisher information of independent positions adds up."""
    model, inputs = build("gpt2"), {"input_ids": TOKENS}
    rest = torch.where(SOME < 0, 0, -100)
    both = [measure(model, (inputs, targets)).to_dense() for targets in (SOME, rest)]
    torch.testing.assert_close(both[0] + both[1], measure(model, inputs).to_dense())


# ---- padding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", EXACT)
@pytest.mark.parametrize("name", PADDED)
def test_padding_changes_nothing(name, structure) -> None:
    model = build(name)
    data = {"input_ids": TOKENS, "attention_mask": RIGHT}
    kept = "Dense" if structure in ("Gram", "Implicit") else structure
    expected = reference.project(one_by_one(model, RIGHT), model, kept)
    torch.testing.assert_close(measure(model, data, EXACT[structure]).to_dense(), expected)


@pytest.mark.parametrize("structure", [nm.Kronecker(), nm.Kronecker("reduce"), nm.EigenKronecker()])
@pytest.mark.parametrize("filler", [0, 3])
@pytest.mark.parametrize("name", PADDED)
def test_padding_changes_no_factor(name, filler, structure) -> None:
    """One padded batch is the same as each sequence alone."""
    model = build(name)
    tokens = torch.where(RIGHT == 1, TOKENS, filler)
    alone = [
        {"input_ids": sequence[real][None]}
        for sequence, real in zip(TOKENS, RIGHT.bool(), strict=True)
    ]
    padded = measure(model, {"input_ids": tokens, "attention_mask": RIGHT}, structure)
    torch.testing.assert_close(padded.to_dense(), measure(model, alone, structure).to_dense())


@pytest.mark.parametrize("filler", [0, 3])
@pytest.mark.parametrize("mask", [torch.long, torch.bool, torch.float64])
def test_whatever_fills_the_padding(filler, mask) -> None:
    model = build("gpt2")
    tokens = torch.where(RIGHT == 1, TOKENS, filler)
    F = measure(model, {"input_ids": tokens, "attention_mask": RIGHT.to(mask)})
    torch.testing.assert_close(F.to_dense(), one_by_one(model, RIGHT))


def test_padding_on_the_left() -> None:
    model = build("llama")  # rotary positions: a shift of all of them changes nothing
    F = measure(model, {"input_ids": TOKENS, "attention_mask": LEFT})
    torch.testing.assert_close(F.to_dense(), one_by_one(model, LEFT))


def test_padded_positions_are_not_counted() -> None:
    model = build("gpt2")
    data = {"input_ids": TOKENS, "attention_mask": RIGHT}
    F = measure(model, data, per="position")
    expected = one_by_one(model, RIGHT) * N / int(LENGTHS.sum())
    torch.testing.assert_close(F.to_dense(), expected)


def test_batches_padded_to_different_lengths() -> None:
    model = build("gpt2")
    batches = [
        {"input_ids": TOKENS[:1], "attention_mask": RIGHT[:1]},
        {"input_ids": TOKENS[1:, :3], "attention_mask": RIGHT[1:, :3]},
    ]
    torch.testing.assert_close(measure(model, batches).to_dense(), one_by_one(model, RIGHT))


def test_sampled_labels_leave_padding_out() -> None:
    """The mean over many draws is the exact matrix, within the error of the mean."""
    model = build("gpt2")
    data = {"input_ids": TOKENS, "attention_mask": RIGHT}
    rng = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [measure(model, data, estimator=nm.MonteCarlo(8), generator=rng).trace() for _ in range(64)]
    )
    error = draws.std() / len(draws) ** 0.5
    assert (draws.mean() - measure(model, data).trace()).abs() < 5 * error


def test_outputs_without_positions_do_not_mind_the_mask() -> None:
    torch.manual_seed(0)
    model = bert("BertForSequenceClassification", num_labels=3).double().eval()
    data = {"input_ids": TOKENS, "attention_mask": RIGHT}
    expected = oracle(model, data, None)
    torch.testing.assert_close(measure(model, data).to_dense(), expected)


def test_the_empirical_fisher_needs_labels_not_a_mask() -> None:
    data = {"input_ids": TOKENS, "attention_mask": RIGHT}
    with pytest.raises(ValueError, match="needs the labels of the data"):
        measure(build("gpt2"), data, estimator=nm.Empirical())


def test_a_mask_of_other_positions_is_refused() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1, 2)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(x.unflatten(1, (-1, 2)).mean(dim=2)[..., None])

    data = {"x": torch.ones(N, T), "attention_mask": RIGHT}
    with pytest.raises(nm.errors.UnsupportedError, match=r"mask has shape \(3, 4\).*\(3, 2\)"):
        measure(Pooled(), data)


@pytest.mark.parametrize("likelihood", [nm.Bernoulli(), nm.Gaussian()], ids=repr)
def test_a_likelihood_without_positions_refuses_padding(likelihood) -> None:
    """As long as it does not say how to leave positions out, and `forward` is a way to do so."""
    torch.manual_seed(0)
    model = bert("BertForTokenClassification", num_labels=2).double().eval()
    data = {"input_ids": TOKENS, "attention_mask": RIGHT}
    with pytest.raises(nm.errors.UnsupportedError, match=r"forward=.*torch\.where"):
        nm.fisher(model, likelihood, data, nm.Dense(), estimator=nm.Exact())

    def forward(model: nn.Module, inputs: Any) -> Tensor:
        outputs = model(**inputs).logits
        return torch.where(RIGHT[..., None] == 1, outputs, outputs.detach())

    F = nm.fisher(
        model, likelihood, (data, None), nm.Dense(), estimator=nm.Exact(), forward=forward
    )
    parts = []
    for n in range(N):
        inputs = {"input_ids": TOKENS[n : n + 1, : LENGTHS[n]]}
        parts.append(reference.dense_fisher(Logits(model), likelihood, (inputs, None)))
    torch.testing.assert_close(F.to_dense(), torch.stack(parts).mean(dim=0))


# ---- labels ------------------------------------------------------------------------------------

LABELS = TOKENS.masked_fill(RIGHT == 0, -100)
SHIFTED = functional.pad(LABELS[:, 1:], (0, 1), value=-100)


@pytest.mark.parametrize("name", ["gpt2", "gpt2, tied", "llama"])
def test_labels_of_a_causal_model_are_those_of_the_next_position(name) -> None:
    model = build(name)
    inputs = {"input_ids": TOKENS, "attention_mask": RIGHT}
    F = measure(model, {**inputs, "labels": LABELS})
    torch.testing.assert_close(F.to_dense(), oracle(model, inputs, SHIFTED))


def test_labels_of_a_masked_model_stay_where_they_are() -> None:
    model = build("bert")
    inputs = {"input_ids": TOKENS, "attention_mask": RIGHT}
    F = measure(model, {**inputs, "labels": LABELS})
    torch.testing.assert_close(F.to_dense(), oracle(model, inputs, LABELS))


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_the_empirical_fisher_is_that_of_the_models_own_loss(name) -> None:
    model = build(name)
    data = {"input_ids": TOKENS, "attention_mask": RIGHT, "labels": LABELS}
    rows = []
    for n in range(N):
        one = {key: value[n : n + 1] for key, value in data.items()}
        outputs = model(**one)
        counted = (SHIFTED if name != "bert" else LABELS)[n] >= 0
        gradients = torch.autograd.grad(
            outputs.loss * counted.sum(), list(model.parameters()), allow_unused=True
        )
        pairs = zip(gradients, model.parameters(), strict=True)
        rows.append(
            torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for g, p in pairs])
        )
    g = torch.stack([row.double() for row in rows])
    F = measure(model, data, estimator=nm.Empirical())
    # The loss of this library of models is computed in float32.
    torch.testing.assert_close(F.to_dense(), g.T @ g / N, rtol=1e-4, atol=1e-5)


def test_what_a_trainer_adds_for_the_loss_changes_nothing() -> None:
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(11, (4, 6))
    batch = {"input_ids": ids, "labels": ids, "num_items_in_batch": torch.tensor(24)}
    aligned = Batch.of(batch).aligned(model)
    assert (aligned.targets[:, -1] == -100).all()
    assert aligned.inputs.keys() == {"input_ids"}


def test_labels_next_to_the_inputs_are_not_shifted() -> None:
    model, inputs = build("gpt2"), {"input_ids": TOKENS}
    F = measure(model, (inputs, LABELS))
    torch.testing.assert_close(F.to_dense(), oracle(model, inputs, LABELS))


def test_labels_of_other_models_are_not_shifted() -> None:
    model = build("plain")
    F = measure(model, {"input_ids": TOKENS, "labels": LABELS})
    torch.testing.assert_close(F.to_dense(), oracle(model, {"input_ids": TOKENS}, LABELS))


def test_a_model_that_shifts_nothing_and_does_not_say_so() -> None:
    """Some models that generate text compare outputs and labels at the same position."""

    class Unshifted(Plain):
        loss_type = None

        def can_generate(self) -> bool:
            return True

        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
            logits = super().forward(input_ids)
            loss = None
            if labels is not None:
                loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    torch.manual_seed(0)
    model = Unshifted().double()
    F = measure(model, {"input_ids": TOKENS, "labels": LABELS})
    torch.testing.assert_close(F.to_dense(), oracle(model, {"input_ids": TOKENS}, LABELS))


def test_an_encoder_and_decoder_is_given_what_its_loss_gives_it() -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=C,
        d_model=WIDTH,
        d_kv=2,
        d_ff=WIDTH,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config).double().eval()
    labels = draw(N, 3, seed=1)
    F = measure(model, {"input_ids": TOKENS, "labels": labels}, nm.Diagonal())
    inputs = {
        "input_ids": TOKENS,
        "decoder_input_ids": functional.pad(labels[:, :-1], (1, 0), value=0),
    }
    expected = measure(model, (inputs, labels), nm.Diagonal())
    torch.testing.assert_close(F.to_dense(), expected.to_dense())
