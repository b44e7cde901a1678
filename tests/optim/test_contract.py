"""What training loops and tools of torch rely on, and the models that people have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import neuromanifold as nm
from neuromanifold.testing import check_optimizer, run_ranks

PRESETS = [
    nm.optim.kfac,
    nm.optim.projected_kfac,
    nm.optim.ekfac,
    nm.optim.unitwise,
    nm.optim.quasidiagonal,
    nm.optim.relative,
    nm.optim.meanfield,
    nm.optim.diagonal,
]
LOSS = functional.cross_entropy


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        yield


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def batch(size: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 4), torch.randint(3, (size,))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def optimizer(model: nn.Module, **options: Any) -> nm.optim.NaturalGradient:
    options = {"lr": 0.1, "weight_decay": 0.0, "generator": seeded(), **options}
    return nm.optim.kfac(model, nm.Categorical(), **options)


def train(
    called: Callable[[Tensor], Tensor],
    opt: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    steps: int = 3,
) -> None:
    x, y = data
    for _ in range(steps):
        opt.zero_grad()
        LOSS(called(x), y).backward()
        opt.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(left), weights(right), strict=True))


@pytest.mark.parametrize("make", PRESETS, ids=lambda make: make.__name__)
def test_the_contract(make: Any) -> None:
    check_optimizer(make)


def test_momentum_and_weight_decay_are_resumed_bit_for_bit() -> None:
    def make(model: nn.Module, likelihood: Any, **options: Any) -> Any:
        return nm.optim.kfac(model, likelihood, **{"weight_decay": 0.1, **options}, damping=0.01)

    check_optimizer(make)


# ---- precision ---------------------------------------------------------------------------------


def test_autocast_measures_at_the_precision_of_training() -> None:
    model, data = mlp(), batch()
    opt = optimizer(model)
    for _ in range(3):
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = LOSS(model(data[0]), data[1])
        loss.backward()
        opt.step()
    assert opt.skipped == 0
    assert all(p.isfinite().all() for p in model.parameters())
    state = opt.state_dict()["preconditioner"]["preconditioner"]
    sums = state["curvature"]["averages"]["sums"]["0"]
    assert all(value.dtype == torch.float32 for value in sums.values() if value.ndim)


def test_grad_scaler_scales_nothing_but_gradients() -> None:
    model, data = mlp(), batch()
    other = copy.deepcopy(model)
    opt, plain = optimizer(model), optimizer(other)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for _ in range(3):
        opt.zero_grad()
        scaler.scale(LOSS(model(data[0]), data[1])).backward()
        scaler.step(opt)
        scaler.update()
    train(other, plain, data)
    # The scale is a power of two, so that nothing is rounded.
    assert same(model, other)


def test_grad_scaler_leaves_out_steps_that_overflow() -> None:
    model, (x, y) = mlp(), batch()
    opt = optimizer(model)
    train(model, opt, (x, y), 1)
    before = weights(model)
    scaler = torch.amp.GradScaler("cpu")
    opt.zero_grad()
    scaler.scale(LOSS(model(x), y) * 1e38).backward()
    scaler.step(opt)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    train(model, opt, (x, y), 1)
    assert not all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


# ---- compilation -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["given", "later", "in place", "in place before"])
def test_a_compiled_model_is_measured_as_it_was_written(how: str) -> None:
    torch._dynamo.reset()
    model, data = mlp(), batch()
    plain = copy.deepcopy(model)
    train(plain, optimizer(plain), data)
    called: Any = model
    if how == "given":
        called = torch.compile(model, backend="eager")
        called(data[0])
        opt = optimizer(called)
    elif how == "in place before":
        model.compile(backend="eager")
        opt = optimizer(model)
    else:
        opt = optimizer(model)
        called = torch.compile(model, backend="eager") if how == "later" else model
        if how == "in place":
            model.compile(backend="eager")
    train(called, opt, data)
    assert same(model, plain)


def test_a_model_that_ran_compiled_before_says_what_to_do() -> None:
    torch._dynamo.reset()
    model, data = mlp(), batch()
    compiled = torch.compile(model, backend="eager")
    compiled(data[0])
    with pytest.raises(nm.errors.CaptureError, match="make the optimizer of what you call"):
        train(compiled, optimizer(model), data)


# ---- several processes -------------------------------------------------------------------------


def _train_on_a_rank(wrapped_first: bool) -> list[Tensor]:
    torch.default_generator.manual_seed(0)
    model = mlp().double()
    x, y = torch.randn(16, 4).double(), torch.randint(3, (16,))
    half = slice(8 * dist.get_rank(), 8 * dist.get_rank() + 8)
    if wrapped_first:
        called = DistributedDataParallel(model)
        opt = optimizer(called, estimator=nm.Exact())
    else:
        opt = optimizer(model, estimator=nm.Exact())
        called = DistributedDataParallel(model)
    train(called, opt, (x[half], y[half]), 4)
    return weights(model)


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_two_ranks_take_the_steps_of_one_process(wrapped_first: bool) -> None:
    first, second = run_ranks(_train_on_a_rank, 2, wrapped_first)
    torch.default_generator.manual_seed(0)
    model = mlp().double()
    data = torch.randn(16, 4).double(), torch.randint(3, (16,))
    train(model, optimizer(model, estimator=nm.Exact()), data, 4)
    for a, b, one in zip(first, second, weights(model), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, one, rtol=1e-10, atol=1e-12)


# ---- what models do ----------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


def test_activation_checkpointing_changes_nothing() -> None:
    model, data = mlp(), batch()
    other = copy.deepcopy(model)
    train(model, optimizer(model), data)
    called = Checkpointed(other[:2], other[2])
    train(called, optimizer(called), data)
    assert same(model, other)


class CountsCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


def test_measuring_leaves_the_buffers_of_norms_to_training() -> None:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3), CountsCalls()
    )
    data = batch()
    opt = optimizer(model)
    plain = copy.deepcopy(model)
    plain(data[0])
    LOSS(model(data[0]), data[1]).backward()
    assert opt.preconditioner.covered
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, plain.get_buffer(name)), name
    assert all(module.training for module in model.modules())


def test_dropout_draws_the_same_with_and_without_measuring() -> None:
    model, data = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)), batch()
    state = torch.get_rng_state()
    expected = model(data[0])
    torch.set_rng_state(state)
    opt = optimizer(model)
    torch.set_rng_state(state)
    assert torch.equal(model(data[0]), expected)
    assert opt.preconditioner.covered
    train(model, opt, data)


def test_without_a_generator_only_making_the_optimizer_draws_from_the_global_one() -> None:
    model, data = mlp(), batch()
    opt = nm.optim.kfac(model, nm.Categorical())
    state = torch.get_rng_state()
    train(model, opt, data)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_seed_gives_the_same_run_and_another_one_another() -> None:
    data, models = batch(), [mlp()]
    models += [copy.deepcopy(models[0]) for _ in range(2)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        train(model, optimizer(model, generator=seeded(seed)), data)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.body = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)).tanh())


def test_tied_weights_have_one_step() -> None:
    model, tokens = Tied(), torch.randint(7, (8, 6))
    opt = optimizer(model, lr=0.3)
    losses = []
    for _ in range(10):
        opt.zero_grad()
        loss = LOSS(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert model.head.weight is model.embedding.weight
    assert opt.preconditioner.covered == {n for n, _ in model.named_parameters()}
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_language_model_of_hugging_face_is_called_with_labels(dropout: float) -> None:
    config = transformers.GPT2Config(
        vocab_size=11,
        n_positions=8,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    model = transformers.GPT2LMHeadModel(config)
    opt = optimizer(model, damping=1e-2)
    tokens = torch.randint(11, (4, 8))
    labels = tokens.masked_fill(torch.arange(8) < 2, -100)
    losses = []
    for _ in range(6):
        opt.zero_grad()
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert opt.skipped == 0
    assert opt.preconditioner.covered == {n for n, _ in model.named_parameters()}


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.left(left) + scale * self.right(right)


@pytest.mark.parametrize("how", ["by position", "by name", "both"])
def test_inputs_by_position_and_by_name_are_the_same(how: str) -> None:
    model, (x, y) = Named(), batch()
    expected = copy.deepcopy(model)
    train(lambda x: expected(x, x.flip(1), scale=1.0), optimizer(expected), (x, y))

    def call(x: Tensor) -> Tensor:
        if how == "by position":
            return model(x, x.flip(1))
        return model(left=x, right=x.flip(1)) if how == "by name" else model(x, right=x.flip(1))

    train(call, optimizer(model), (x, y))
    assert same(model, expected)


# ---- observation -------------------------------------------------------------------------------


def test_explicit_observation_with_targets_measures_like_the_front_door() -> None:
    model, (x, y) = mlp(), batch()
    y[::3] = -100
    opt = optimizer(model, observe="explicit", estimator=nm.Empirical(), split=False, damping=0.01)
    outputs = model(x)
    assert not opt.preconditioner.covered
    opt.preconditioner.observe(outputs, y)
    fisher = nm.fisher(
        model, nm.Categorical(), (x, y), nm.Kronecker(), estimator=nm.Empirical(), per="position"
    )
    LOSS(outputs, y).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = fisher.solve(gradients, damping=0.01)
    found = opt.preconditioner.precondition(gradients)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_outputs_of_another_batch_are_refused() -> None:
    model, (x, _) = mlp(), batch()
    pre = nm.optim.Preconditioner(model, nm.Categorical(), observe="explicit")
    outputs = model(x)
    model(x[:5])
    with pytest.raises(ValueError, match="outputs have 16 rows"):
        pre.observe(outputs)


@pytest.mark.parametrize("how", ["evaluation", "no gradients"])
def test_only_training_is_observed(how: str) -> None:
    model, (x, _) = mlp(), batch()
    opt = optimizer(model)
    if how == "evaluation":
        model.eval()
    with torch.set_grad_enabled(how == "evaluation"):
        model(x)
    assert not opt.preconditioner.covered


def test_measurements_of_others_are_not_observed() -> None:
    model, (x, _) = mlp(), batch()
    opt = optimizer(model)
    nm.fisher(model, nm.Categorical(), x)
    torch.func.functional_call(model, {n: p.detach() for n, p in model.named_parameters()}, x)
    assert not opt.preconditioner.covered
    model(x)
    assert opt.preconditioner.covered


def test_a_closed_preconditioner_watches_no_longer() -> None:
    model, (x, _) = mlp(), batch()
    opt = optimizer(model)
    opt.preconditioner.close()
    model(x)
    assert not opt.preconditioner.covered


def test_a_forgotten_optimizer_leaves_nothing_but_an_idle_hook() -> None:
    model, (x, _) = mlp(), batch()
    optimizer(model)
    assert model(x).requires_grad


# ---- parts of a model --------------------------------------------------------------------------


def test_parameters_without_a_rule_follow_adamw() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.scale = mlp(), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.body(x)

    model, data = Scaled(), batch()
    opt = optimizer(model, adamw_lr=0.01)
    train(model, opt, data, 1)
    # The first step of AdamW has the length of its learning rate.
    moved = (model.scale.detach() - 1).abs()
    torch.testing.assert_close(moved, torch.full((3,), 0.01), rtol=1e-4, atol=0)


def test_a_model_that_no_rule_reads_follows_adamw() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    model, data = Raw(), batch()
    expected = copy.deepcopy(model)
    train(model, optimizer(model), data)
    train(expected, torch.optim.AdamW(expected.parameters(), lr=1e-3, weight_decay=0.0), data)
    torch.testing.assert_close(model.weight, expected.weight)


def test_groups_without_curvature_follow_adamw() -> None:
    model, data = mlp(), batch()
    plain = copy.deepcopy(model)
    opt = optimizer(
        model,
        params=[
            {"params": model[0].parameters(), "lr": 0.0},
            {"params": model[2].parameters(), "curvature": False, "weight_decay": 0.1},
        ],
        adamw_lr=0.02,
    )
    reference = torch.optim.AdamW(plain[2].parameters(), lr=0.02, weight_decay=0.1)
    train(model, opt, data, 4)
    train(plain, reference, data, 4)
    for a, b in zip(weights(model), weights(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_new_layer_can_join_later() -> None:
    model, data = mlp(), batch()
    opt = optimizer(model)
    train(model, opt, data)
    model.append(nn.Linear(3, 3))
    opt.add_param_group({"params": model[3].parameters()})
    before = weights(model[3])
    train(model, opt, data)
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(model[3]), strict=True))


def test_a_state_without_curvature_is_measured_anew() -> None:
    model, data = mlp(), batch()
    opt = optimizer(model)
    train(model, opt, data)
    state = opt.state_dict()
    del state["preconditioner"]
    other = copy.deepcopy(model)
    fresh = optimizer(other)
    with pytest.warns(UserWarning, match="measured anew"):
        fresh.load_state_dict(state)
    train(other, fresh, data)
    assert all(p.isfinite().all() for p in other.parameters())


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"kl_max": 0.0}, "kl_max must be positive, or None"),
        ({"damping": 0.0}, "damping is a positive number"),
        ({"relative": -0.1}, "relative must be at least 0, or a function"),
        ({"per": "token"}, 'per must be "position" or "sample"'),
        ({"decay": 1.0}, r"decay must be in \[0, 1\)"),
        ({"fraction": 0.0}, r"fraction must be in \(0, 1\]"),
        ({"observe": "never"}, '"automatic" or "explicit"'),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer(mlp(), **options)


def test_unknown_options_are_named_with_those_that_exist() -> None:
    with pytest.raises(TypeError, match=r"no option 'betas'.*damping"):
        optimizer(mlp(), betas=(0.9, 0.99))


def test_differentiable_steps_are_refused() -> None:
    model = mlp()
    pre = nm.optim.Preconditioner(model, nm.Categorical())
    with pytest.raises(ValueError, match="differentiable=True is not supported"):
        nm.optim.NaturalGradient(model.parameters(), pre, differentiable=True)


def test_sparse_gradients_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3))
    opt = optimizer(model)
    with pytest.raises(RuntimeError, match="sparse=False"):
        train(model, opt, (torch.randint(5, (8,)), torch.randint(3, (8,))), 1)


def test_structures_without_sums_are_refused() -> None:
    with pytest.raises(TypeError, match=r"nm\.Kronecker\(\)"):
        nm.optim.Preconditioner(mlp(), nm.Categorical(), nm.Gram())
