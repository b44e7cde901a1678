"""The spectrum along training: the same numbers, within the budget, without a trace."""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional

import neuromanifold as nm

NUMBERS = {
    "trace",
    "norm",
    "effective_dimension",
    "participation_ratio",
    "stable_rank",
    "condition_number",
    "largest_eigenvalue",
    "learning_rate_bound",
}


class Clock:
    """Time that passes only when it is told to; calling the model for a measurement takes some."""

    def __init__(
        self, per_sample: float = 0.0, per_call: float = 0.0, per_cube: float = 0.0
    ) -> None:
        self.now = 100.0
        self.per_sample, self.per_call, self.per_cube = per_sample, per_call, per_cube

    def __call__(self) -> float:
        return self.now

    def forward(self, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        self.now += self.per_call + self.per_sample * len(x) + self.per_cube * len(x) ** 3
        return model(x)


def network() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, torch.randn(32, 6), torch.randint(3, (32,))


def ticking(clock: Clock, budget: float = 0.05, **options: object) -> nm.spectral.Monitor:
    model, x, _ = network()
    return nm.spectral.Monitor(
        model, nm.Categorical(), x, budget, forward=clock.forward, clock=clock, **options
    )


# ---- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_numbers_are_those_of_the_model_at_that_step(float64, optimizer):
    model, x, y = network()
    opt = optimizer(model.parameters(), lr=0.1)
    seen = {}
    monitor = nm.spectral.Monitor(
        model, nm.Categorical(), x, damping=0.01, per_layer=True, write=seen.__setitem__
    )
    for step in range(3):
        found = monitor.measure()
        F = nm.fisher(model, nm.Categorical(), x, nm.Gram(), estimator=nm.Exact())
        expected = nm.spectral.summary(F, damping=0.01, per_layer=True)
        for layer, part in [("", expected), *expected.layers.items()]:
            for name, number in part.numbers.items():
                key = f"{name}/{layer}" if layer else name
                assert found.values[key] == pytest.approx(float(number.value), rel=1e-12)
                assert found.errors[key] == 0
        assert set(found.values) == NUMBERS | {f"{n}/{m}" for n in NUMBERS for m in "02"}
        assert seen[step] == {
            **found.values,
            "seconds": found.seconds,
            "share": seen[step]["share"],
        }
        opt.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        opt.step()
        assert monitor.step() is None  # what was measured is not paid for yet
    assert [measured.step for measured in monitor.history] == [0, 1, 2]


def test_large_models_are_estimated_with_the_same_random_vectors(float64):
    model, x = nn.Linear(64, 8), torch.randn(4, 64)
    monitor = nm.spectral.Monitor(
        model,
        nm.Categorical(),
        x,
        max_bytes="1 KiB",
        generator=torch.Generator().manual_seed(0),
    )
    first, second = monitor.measure(), monitor.measure()
    assert first.method.startswith("Lanczos")
    assert first.errors["effective_dimension"] > 0
    assert first.values == second.values


def test_it_is_the_model_as_it_predicts(float64):
    norm = nn.BatchNorm1d(8)
    model = nn.Sequential(nn.Linear(6, 8), norm, nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    x = torch.randn(32, 6)
    monitor = nm.spectral.Monitor(model, nm.Categorical(), x)
    found = monitor.measure()
    model.eval()
    F = nm.fisher(model, nm.Categorical(), x, nm.Gram(), estimator=nm.Exact())
    assert found.values["trace"] == pytest.approx(float(F.trace()), rel=1e-12)


def test_samples_are_those_of_the_first_pass_through_a_loader(float64):
    model, x, y = network()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=12, shuffle=True
    )
    monitor = nm.spectral.Monitor(model, nm.Categorical(), loader)
    whole = nm.fisher(model, nm.Categorical(), x, nm.Gram(), estimator=nm.Exact())
    assert monitor.measure().values["trace"] == pytest.approx(float(whole.trace()), rel=1e-12)


# ---- budget ----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.01, 0.05, 0.5])
@pytest.mark.parametrize(
    "cost",
    [
        {"per_sample": 0.02},
        {"per_call": 0.3},
        {"per_sample": 1e-4},
        {"per_cube": 1e-4},
        {"per_call": 0.1, "per_cube": 1e-4},
    ],
    ids=str,
)
def test_the_budget_is_kept_at_every_step(budget, cost):
    clock = Clock(**cost)
    monitor = ticking(clock, budget)
    set_up = monitor.seconds
    assert set_up > 0
    began, training = clock.now, 0.0
    monitor.step()
    while len(monitor.history) < 4:
        clock.now += 0.1
        training += 0.1
        monitor.step()
        if monitor.seconds > set_up:
            assert monitor.seconds <= budget * training * (1 + 1e-9)
    assert monitor.training_seconds == pytest.approx(training)
    assert monitor.seconds == pytest.approx(set_up + clock.now - began - training)
    assert monitor.share == pytest.approx(monitor.seconds / training)
    # As soon as the budget allows, and not several in a row after a time without any.
    wait = monitor.history[-1].seconds / (0.8 * budget)  # a fifth is left for cold caches
    for one, other in pairwise(monitor.history):
        assert wait - 0.1 <= 0.1 * (other.step - one.step) <= wait + 0.1001


def test_the_first_measurement_is_foreseen_by_trials_on_few_samples():
    clock = Clock(per_sample=1.0)
    monitor = ticking(clock)
    sizes = []
    for _ in range(100_000):
        clock.now += 0.1
        before = clock.now
        found = monitor.step()
        if clock.now > before:
            sizes.append(clock.now - before)
        if found is not None:
            break
    # Twice the samples each time, and the last is the first that is kept.
    assert len(sizes) == 6
    assert all(b <= 2 * a + 1e-6 for a, b in pairwise(sizes))
    assert monitor.history == [found]


def test_a_measurement_out_of_turn_is_saved_up_for():
    clock = Clock(per_sample=0.01)
    monitor = ticking(clock, budget=0.1)
    start = monitor.measure()
    assert start.step == 0
    owed = monitor.seconds
    while monitor.step() is None:
        clock.now += 0.1
    assert monitor.training_seconds >= (owed + start.seconds) / 0.1 - 1e-9


def test_a_measurement_that_takes_longer_than_foreseen_is_saved_up_for():
    clock = Clock(per_sample=0.001)
    monitor = ticking(clock, budget=0.1)
    while len(monitor.history) < 3:
        clock.now += 0.1
        monitor.step()
    clock.per_sample = 0.01
    while len(monitor.history) < 4:
        clock.now += 0.1
        monitor.step()
    assert monitor.share > 0.1
    while len(monitor.history) < 5:
        clock.now += 0.1
        monitor.step()
        assert monitor.share <= 0.1 or len(monitor.history) == 4


def test_pauses_before_the_first_step_are_no_training():
    clock = Clock(per_sample=0.001)
    monitor = ticking(clock)
    clock.now += 1e6
    assert monitor.step() is None
    assert monitor.training_seconds == 0


def test_a_real_run_stays_within_its_budget():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    x, y = torch.randn(256, 64), torch.randint(10, (256,))
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    nm.spectral.Monitor(model, nm.Categorical(), x[:2])  # what is slow once only
    monitor = nm.spectral.Monitor(model, nm.Categorical(), x[:2], budget=0.5)
    began, in_steps = time.perf_counter(), 0.0
    while len(monitor.history) < 3 and time.perf_counter() - began < 60:
        opt.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        opt.step()
        entered = time.perf_counter()
        monitor.step()
        in_steps += time.perf_counter() - entered
    elapsed = time.perf_counter() - began
    assert len(monitor.history) == 3
    # The last one may have taken longer than those before it.
    allowed = 0.5 * (elapsed - in_steps) + monitor.history[-1].seconds
    assert in_steps <= allowed
    assert monitor.training_seconds == pytest.approx(elapsed - in_steps, rel=0.1)


# ---- no trace --------------------------------------------------------------------------------


class Counting(nn.Module):
    """Normalises, drops out, and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)
        )
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.body(x)


def trained(optimizer: str, *, watched: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = Counting()
    model.body[1].momentum = 0.2
    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    if optimizer == "kfac":
        opt = nm.optim.kfac(model, nm.Categorical(), lr=0.1)
    else:
        opt = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1)
    monitor = nm.spectral.Monitor(model, nm.Categorical(), x, per_layer=True) if watched else None
    for _ in range(6):
        functional.cross_entropy(model(x), y).backward()
        if monitor is not None:
            monitor.measure()  # between backward and step: gradients have to stay
        opt.step()
        opt.zero_grad()
        if monitor is not None:
            monitor.step()
    return {**model.state_dict(), "random": torch.rand(3)}


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "kfac"])
def test_training_goes_on_as_if_nothing_had_been_measured(optimizer):
    alone, watched = (trained(optimizer, watched=watched) for watched in (False, True))
    assert alone.keys() == watched.keys()
    assert all(torch.equal(alone[name], watched[name]) for name in alone)


def test_modes_hooks_and_gradients_stay():
    model, x, y = network()
    model.append(nn.Dropout(0.1))
    model[2].eval()
    functional.cross_entropy(model(x), y).backward()
    gradients = [p.grad for p in model.parameters()]
    copies = [grad.clone() for grad in gradients]
    monitor = nm.spectral.Monitor(model, nm.Categorical(), x)
    monitor.measure()
    assert [m.training for m in model.modules()] == [True, True, True, False, True]
    for p, grad, copy in zip(model.parameters(), gradients, copies, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, copy)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_measurement_that_fails_restores_the_model():
    model, x, _ = network()
    monitor = nm.spectral.Monitor(model, nm.Categorical(), x)
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    with pytest.warns(UserWarning, match="left out"):
        assert monitor.measure() is None
    assert (monitor.failed, monitor.history) == (1, [])
    assert all(module.training for module in model.modules())


# ---- state and writers -----------------------------------------------------------------------


def test_it_goes_on_where_it_stopped():
    clock = Clock(per_sample=0.01)
    monitor = ticking(clock)
    while len(monitor.history) < 2:
        clock.now += 0.1
        monitor.step()
    state = json.loads(json.dumps(monitor.state_dict()))
    later = ticking(clock)
    set_up = later.seconds
    clock.now += 1e5  # the time between the two runs is no training
    later.load_state_dict(state)
    assert later.history == monitor.history
    assert later.seconds == pytest.approx(monitor.seconds + set_up)
    assert later.step() is None
    assert later.steps == monitor.steps + 1
    assert later.training_seconds == pytest.approx(monitor.training_seconds)
    while len(later.history) < 3:
        clock.now += 0.1
        later.step()
    assert later.share <= 0.05


class Writer:
    """Takes numbers as TensorBoard's writer does."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[int, float]] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.rows[tag] = step, value


def test_tensorboard():
    model, x, _ = network()
    written = Writer()
    monitor = nm.spectral.Monitor(model, nm.Categorical(), x, write=written, prefix="run/")
    found = monitor.measure()
    assert written.rows.keys() == {f"run/{name}" for name in (*NUMBERS, "seconds", "share")}
    assert written.rows["run/trace"] == (0, found.values["trace"])


def test_the_time_of_writing_counts():
    clock = Clock(per_call=0.001)

    def slowly(step: int, found: dict[str, float]) -> None:
        clock.now += 5.0

    monitor = ticking(clock, write=slowly)
    before = monitor.seconds
    monitor.measure()
    assert monitor.seconds - before > 5.0


def test_what_makes_no_sense(monkeypatch, tmp_path):
    model, x, _ = network()
    likelihood = nm.Categorical()
    for budget in (0, -0.1, float("nan"), "5 %"):
        with pytest.raises(ValueError, match="share of the training time"):
            nm.spectral.Monitor(model, likelihood, x, budget)
    with pytest.raises(ValueError, match="damping"):
        nm.spectral.Monitor(model, likelihood, x, damping=0.0)
    with pytest.raises(TypeError, match="got int"):
        nm.spectral.Monitor(model, likelihood, x, write=3)
    with pytest.raises(TypeError, match="likelihood is a loss"):  # at once, not hours later
        nm.spectral.Monitor(model, nn.CrossEntropyLoss(), x)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(nm.errors.UnsupportedError, match="pip install tensorboard"):
        nm.spectral.Monitor(model, likelihood, x, write=tmp_path)
