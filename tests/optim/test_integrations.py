"""The optimizer in trainers of others: the same weights as a plain loop, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import neuromanifold as nm

BATCH, BATCHES, EPOCHS = 16, 4, 4

BACKEND = "aot_eager"
"""Of torch.compile: it rounds as eager code does, and needs no C++ compiler."""

# Of Lightning itself: with torch 2.13 about trees, and that there are few batches and workers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*(num_workers|number of training batches):UserWarning"),
    # Of torch.compile, where Lightning's own code breaks the graph.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@dataclass(frozen=True)
class How:
    """A way to train that every host knows."""

    accumulate: int = 1
    clip: float | None = None
    bf16: bool = False
    schedule: bool = False
    rare: bool = False
    compile: bool = False


WAYS = {
    "plain": How(),
    "accumulated": How(accumulate=2),
    "clipped": How(clip=0.1),
    "bfloat16": How(bf16=True),
    "scheduled": How(schedule=True),
    "rare": How(rare=True),
    "compiled": How(compile=True),
}
ways = pytest.mark.parametrize("how", WAYS.values(), ids=WAYS.keys())


class Net(nn.Module):
    """With the loss inside, as Hugging Face's Trainer likes it, or without."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)
            self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.layers(x)
        if labels is None:
            return logits
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def data() -> TensorDataset:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(BATCHES * BATCH, 4, generator=rng)
    return TensorDataset(x, (x @ torch.randn(4, 3, generator=rng)).argmax(1))


def loader() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=BATCH)


def kfac(model: nn.Module, how: How = WAYS["plain"], **options: Any) -> nm.optim.NaturalGradient:
    if how.rare:
        options["schedule"] = nm.optim.Schedule(statistics=3, inverses=5)
    options = {"lr": 0.3, "damping": 1e-2, "weight_decay": 1e-3, **options}
    rng = torch.Generator().manual_seed(2)
    return nm.optim.kfac(model, nm.Categorical(), generator=rng, **options)


def cosine(optimizer: Any, how: How) -> torch.optim.lr_scheduler.LambdaLR:
    """From one step to the next, to zero at the end; or none."""
    steps = EPOCHS * BATCHES // how.accumulate

    def share(step: int) -> float:
        return 1 - step / steps if how.schedule else 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def in_a_plain_loop(how: How) -> nn.Module:
    """The oracle."""
    model = Net()
    optimizer = kfac(model, how)
    schedule = cosine(optimizer, how)
    for _ in range(EPOCHS):
        for i, (x, y) in enumerate(loader()):
            with torch.autocast("cpu", torch.bfloat16, enabled=how.bf16):
                loss = nn.functional.cross_entropy(model(x), y)
            (loss / how.accumulate).backward()
            if (i + 1) % how.accumulate == 0:
                if how.clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), how.clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    return model


def test_each_way_leads_elsewhere():
    ends = [
        nn.utils.parameters_to_vector(in_a_plain_loop(how).parameters()) for how in WAYS.values()
    ]
    same = [(i, j) for i, a in enumerate(ends) for j, b in enumerate(ends) if i < j and a.equal(b)]
    assert same == [(0, len(WAYS) - 1)]  # but for the compiled one


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q), name


# ---- Hugging Face ---------------------------------------------------------------------------

TrainWith = Callable[..., Any]


@pytest.fixture
def trainer(tmp_path: Path) -> TrainWith:
    transformers = import_module("transformers")
    rows = [{"x": x, "labels": y} for x, y in data()]

    def make(
        model: nn.Module | None, how: How = WAYS["plain"], rows: Any = rows, **options: Any
    ) -> Any:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=BATCH,
            num_train_epochs=EPOCHS,
            gradient_accumulation_steps=how.accumulate,
            max_grad_norm=how.clip or 0,
            bf16=how.bf16,
            torch_compile=how.compile,
            torch_compile_backend=BACKEND if how.compile else None,
            train_sampling_strategy="sequential",
            save_strategy=options.pop("save_strategy", "no"),
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            logging_steps=BATCHES,
        )
        return transformers.Trainer(model, arguments, train_dataset=rows, **options)

    return make


@ways
def test_hugging_face_trains_as_a_plain_loop(trainer, how):
    model = Net()
    optimizer = kfac(model, how)
    trainer(model, how, optimizers=(optimizer, cosine(optimizer, how))).train()
    assert_same(model, in_a_plain_loop(how))


def test_hugging_face_makes_the_optimizer_from_its_model(trainer):
    made = trainer(
        None,
        model_init=Net,
        optimizer_cls_and_kwargs=(lambda: kfac, {"lr": 0.3}),
    )
    made.train()
    assert_same(made.model, in_a_plain_loop(WAYS["plain"]))


def test_hugging_face_logs_what_the_optimizer_sees(trainer):
    model = Net()
    optimizer = kfac(model)
    made = trainer(model, optimizers=(optimizer, None))
    nm.optim.Monitor(optimizer, lambda _, seen: made.log(seen), every=8)
    made.train()
    logged = [row for row in made.state.log_history if "kl" in row]
    assert len(logged) == 3
    assert all(row["skipped"] == 0 and row["kl"] > 0 for row in logged)


def test_hugging_face_resumes_a_language_model(trainer, tmp_path):
    transformers = import_module("transformers")
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(11, (BATCHES * BATCH, 8), generator=rng)
    rows = [{"input_ids": row, "labels": row} for row in tokens]

    def fresh(**options: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    vocab_size=11,
                    hidden_size=16,
                    intermediate_size=32,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    max_position_embeddings=8,
                )
            )
        return trainer(model, WAYS["bfloat16"], rows, optimizers=(kfac(model), None), **options)

    whole = fresh(save_strategy="epoch")
    whole.train()
    resumed = fresh()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{2 * BATCHES}"))
    assert resumed.optimizer.optimizer.preconditioner.step == EPOCHS * BATCHES
    assert_same(resumed.model, whole.model)
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]


# ---- Lightning ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lightning() -> Any:
    return import_module("lightning")


def lightning_module(lightning: Any, how: How, *, manual: bool = False, whole: bool = False) -> Any:
    """A module; `whole`: its optimizer watches it, and not the network inside."""

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.automatic_optimization = not manual

        def forward(self, x: Tensor) -> Any:
            return self.net(x)

        def training_step(self, batch: Any, _: int) -> Any:
            x, y = batch
            loss = nn.functional.cross_entropy((self if whole else self.net)(x), y)
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = kfac(self if whole else self.net, how)
            if manual:
                return optimizer
            schedule = {"scheduler": cosine(optimizer, how), "interval": "step"}
            return [optimizer], [schedule]

    return Module()


@pytest.fixture
def fit(lightning: Any, tmp_path: Path) -> Callable[..., Any]:
    def run(
        module: Any, how: How = WAYS["plain"], checkpoint: Path | None = None, **options: Any
    ) -> Any:
        trainer = lightning.Trainer(
            **{
                "max_epochs": EPOCHS,
                "accelerator": "cpu",
                "accumulate_grad_batches": how.accumulate,
                "gradient_clip_val": how.clip,
                "precision": "bf16-mixed" if how.bf16 else "32-true",
                "default_root_dir": tmp_path,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                **options,
            }
        )
        watched = torch.compile(module, backend=BACKEND) if how.compile else module
        trainer.fit(watched, loader(), ckpt_path=checkpoint, weights_only=True)
        return trainer

    return run


@ways
def test_lightning_trains_as_a_plain_loop(lightning, fit, how):
    module = lightning_module(lightning, how)
    fit(module, how)
    assert_same(module.net, in_a_plain_loop(how))


def test_the_lightning_module_itself_can_be_watched(lightning, fit):
    module = lightning_module(lightning, WAYS["bfloat16"], whole=True)
    fit(module, WAYS["bfloat16"])
    assert_same(module.net, in_a_plain_loop(WAYS["bfloat16"]))


def test_lightning_with_manual_optimization(lightning, fit):
    module = lightning_module(lightning, WAYS["plain"], manual=True)
    fit(module)
    assert_same(module.net, in_a_plain_loop(WAYS["plain"]))


@pytest.mark.parametrize("name", ["scheduled", "rare"])
def test_lightning_resumes(lightning, fit, tmp_path, name):
    how = WAYS[name]
    begun = fit(lightning_module(lightning, how), how, max_epochs=EPOCHS // 2)
    begun.save_checkpoint(tmp_path / "half.ckpt")
    module = lightning_module(lightning, how)
    fit(module, how, checkpoint=tmp_path / "half.ckpt")
    assert_same(module.net, in_a_plain_loop(how))


def test_lightning_gives_the_closure_that_adaptive_damping_needs(lightning, fit):
    damping = nm.optim.LevenbergMarquardt(1.0, period=2)

    class Adaptive(type(lightning_module(lightning, WAYS["plain"]))):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            return kfac(self.net, damping=damping)

    fit(Adaptive())
    assert damping.ratio > 0.75
    assert damping.value < 1


# ---- accelerate -----------------------------------------------------------------------------


@pytest.fixture
def accelerator() -> Iterator[Callable[..., Any]]:
    state = import_module("accelerate.state")

    def make(how: How) -> Any:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        return import_module("accelerate").Accelerator(
            cpu=True,
            gradient_accumulation_steps=how.accumulate,
            mixed_precision="bf16" if how.bf16 else "no",
            dynamo_backend=BACKEND if how.compile else "no",
        )

    yield make
    state.AcceleratorState._reset_state(reset_partial_state=True)


@ways
@pytest.mark.parametrize("resumed", [False, True], ids=["without a stop", "resumed"])
def test_accelerate_trains_as_a_plain_loop(accelerator, tmp_path, how, resumed):
    def train(epochs: int, state: Path | None = None) -> tuple[Any, nn.Module]:
        host, model = accelerator(how), Net()
        optimizer = kfac(model, how)
        model, wrapped, batches, schedule = host.prepare(
            model, optimizer, loader(), cosine(optimizer, how)
        )
        if state is not None:
            host.load_state(state)
        for _ in range(epochs):
            for x, y in batches:
                with host.accumulate(model):
                    host.backward(nn.functional.cross_entropy(model(x), y))
                    if how.clip is not None and host.sync_gradients:
                        host.clip_grad_norm_(model.parameters(), how.clip)
                    wrapped.step()
                    schedule.step()
                    wrapped.zero_grad()
        return host, host.unwrap_model(model)

    if resumed:
        host, _ = train(EPOCHS // 2)
        host.save_state(tmp_path)
        _, model = train(EPOCHS // 2, tmp_path)
    else:
        _, model = train(EPOCHS)
    assert_same(model, in_a_plain_loop(how))
