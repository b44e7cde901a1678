"""The contract of an optimizer as a callable test-suite: what loops and tools of torch rely on."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from neuromanifold.errors import CaptureError
from neuromanifold.likelihoods import Categorical

__all__ = ["check_optimizer"]

Weights = list[Tensor]


class _Skipping(Protocol):
    """What is asked of an optimizer beside the contract of torch."""

    skipped: int


def check_optimizer(make: Callable[..., torch.optim.Optimizer]) -> None:
    """Check that an optimizer keeps the whole contract of `torch.optim`.

    Closures, parameter groups, learning-rate schedulers, accumulated and clipped gradients, states
    that are saved and loaded, copies, frozen parameters, and numbers that are not finite. What
    should be equal is compared bit for bit.

    Args:
        make: `make(model, likelihood, **options)` makes an optimizer, as `nm.optim.kfac` does; the
            options used are params, lr, momentum, weight_decay, maximize and generator. The
            optimizer counts the steps that it leaves out in `skipped`.

    Raises:
        AssertionError: If a part of the contract is broken; the sentence says which.

    Example:
        >>> import neuromanifold as nm
        >>> check_optimizer(nm.optim.diagonal)
    """
    _check_descent(make)
    _check_closures(make)
    _check_groups(make)
    _check_added_groups(make)
    _check_schedulers(make)
    _check_accumulation(make)
    _check_clipping(make)
    _check_maximize(make)
    _check_zero_grad(make)
    _check_absent_gradients(make)
    _check_frozen(make)
    _check_before_observation(make)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        _check_state(make, dtype)
    _check_copies(make)
    _check_gradients_that_are_not_finite(make)
    _check_losses_that_are_not_finite(make)


class _Training:
    """A small classifier, its optimizer, and batches that are the same each time."""

    def __init__(
        self,
        make: Callable[..., Any],
        dtype: torch.dtype = torch.float32,
        groups: Callable[[nn.Sequential], Any] | None = None,
        **options: Any,
    ) -> None:
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
            self.inputs = torch.randn(10, 16, 4).to(dtype)
            self.targets = torch.randint(3, (10, 16))
        if groups is not None:
            options["params"] = groups(self.model)
        generator = torch.Generator().manual_seed(0)
        options = {"lr": 0.1, "generator": generator, **options}
        self.optimizer = make(self.model, Categorical(), **options)

    @property
    def weights(self) -> Weights:
        return [p.detach().clone() for p in self.model.parameters()]

    @property
    def skipped(self) -> int:
        optimizer: _Skipping = self.optimizer
        return optimizer.skipped

    def loss(self, i: int) -> Tensor:
        return functional.cross_entropy(self.model(self.inputs[i]).float(), self.targets[i])

    def backward(self, i: int) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(i)
        loss.backward()
        return loss

    def step(self, i: int) -> None:
        self.backward(i)
        self.optimizer.step()

    def run(self, start: int, stop: int) -> _Training:
        for i in range(start, stop):
            self.step(i)
        return self


def _same(what: str, got: Weights, expected: Weights) -> None:
    same = [torch.equal(a, b) for a, b in zip(got, expected, strict=True)]
    assert all(same), f"{what}: the weights differ."


def _moved(what: str, before: Weights, after: Weights, expected: list[bool]) -> None:
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert moved == expected, f"{what}: parameters moved are {moved}, expected {expected}."


def _check_descent(make: Callable[..., Any]) -> None:
    training = _Training(make)
    first = float(training.loss(0).detach())
    for _ in range(10):
        training.step(0)
    last = float(training.loss(0).detach())
    assert last < first, f"Ten steps on one batch brought the loss from {first:.3g} to {last:.3g}."
    assert training.skipped == 0, f"{training.skipped} steps were left out for no reason."


def _check_closures(make: Callable[..., Any]) -> None:
    plain, training = _Training(make).run(0, 3), _Training(make)
    for i in range(3):

        def closure(i: int = i) -> Tensor:
            assert torch.is_grad_enabled(), "A closure must run with gradients enabled."
            return training.backward(i)

        loss = training.optimizer.step(closure)
        assert loss is not None, "step(closure) must return the loss."
    _same("With a closure and without", training.weights, plain.weights)


def _check_groups(make: Callable[..., Any]) -> None:
    training = _Training(
        make,
        groups=lambda model: [
            {"params": model[0].parameters(), "lr": 0.0},
            {"params": model[2].parameters()},
        ],
    )
    before = training.weights
    training.run(0, 2)
    _moved("A group with lr=0", before, training.weights, [False, False, True, True])


def _check_added_groups(make: Callable[..., Any]) -> None:
    training = _Training(make, groups=lambda model: model[0].parameters())
    before = training.weights
    after = training.run(0, 2).weights
    _moved("Half of the model", before, after, [True, True, False, False])
    training.optimizer.add_param_group({"params": training.model[2].parameters()})
    groups = training.optimizer.param_groups
    assert groups[1].keys() == groups[0].keys(), "An added group must get every option."
    _moved("An added group", after, training.run(2, 4).weights, [True] * 4)
    with _raises(ValueError, "A parameter of another model"):
        training.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(groups) == 2, "A group that is refused must not stay."


def _check_schedulers(make: Callable[..., Any]) -> None:
    training = _Training(make)
    decay = torch.optim.lr_scheduler.LambdaLR(training.optimizer, lambda step: float(step < 2))
    for i in range(2):
        training.step(i)
        decay.step()
    before = training.weights
    _same("With an lr of 0 by LambdaLR", training.run(2, 3).weights, before)

    training = _Training(make)
    cycle = torch.optim.lr_scheduler.OneCycleLR(training.optimizer, max_lr=0.2, total_steps=4)
    momenta = set()
    for i in range(4):
        momenta.add(training.optimizer.param_groups[0]["momentum"])
        training.step(i)
        if i < 3:
            cycle.step()
    assert len(momenta) > 1, "OneCycleLR must be able to cycle the momentum."
    assert all(bool(p.isfinite().all()) for p in training.weights), "OneCycleLR led to NaN."

    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(training.optimizer, patience=0)
    lr = training.optimizer.param_groups[0]["lr"]
    plateau.step(1.0)
    plateau.step(1.0)
    assert training.optimizer.param_groups[0]["lr"] < lr, "ReduceLROnPlateau changed no lr."


def _check_accumulation(make: Callable[..., Any]) -> None:
    whole, parts = _Training(make), _Training(make)
    for i in range(3):
        whole.step(i)
        parts.optimizer.zero_grad()
        for _ in range(2):
            (0.5 * parts.loss(i)).backward()
        parts.optimizer.step()
    _same("Twice half of a gradient, and the gradient", parts.weights, whole.weights)


def _check_clipping(make: Callable[..., Any]) -> None:
    lengths = []
    for bound in (1e30, 1e-8):
        training = _Training(make, momentum=0.0, weight_decay=0.0)
        before = training.weights
        training.backward(0)
        nn.utils.clip_grad_norm_(training.model.parameters(), bound)
        training.optimizer.step()
        moves = [(a - b).norm() for a, b in zip(training.weights, before, strict=True)]
        lengths.append(float(torch.stack(moves).norm()))
    assert lengths[1] < 1e-3 * lengths[0], "A gradient that is clipped must lead to a shorter step."


def _check_maximize(make: Callable[..., Any]) -> None:
    training = _Training(make, maximize=True)
    for i in range(3):
        training.optimizer.zero_grad()
        (-training.loss(i)).backward()
        training.optimizer.step()
    expected = _Training(make).run(0, 3).weights
    _same("The negative loss maximized, and the loss minimized", training.weights, expected)


def _check_zero_grad(make: Callable[..., Any]) -> None:
    expected, training = _Training(make).run(0, 3).weights, _Training(make)
    for i in range(3):
        training.optimizer.zero_grad(set_to_none=False)
        training.loss(i).backward()
        training.optimizer.step()
    _same("set_to_none=False and set_to_none=True", training.weights, expected)


def _check_absent_gradients(make: Callable[..., Any]) -> None:
    training = _Training(make)
    before = training.weights
    training.optimizer.step()
    _same("A step without any gradient", training.weights, before)
    training.backward(0)
    training.model[0].weight.grad = None
    training.optimizer.step()
    _moved("A gradient that is None", before, training.weights, [False, True, True, True])


def _check_frozen(make: Callable[..., Any]) -> None:
    training = _Training(make, weight_decay=0.1)
    training.model[0].requires_grad_(False)
    before = training.weights
    after = training.run(0, 2).weights
    _moved("A layer frozen at first", before, after, [False, False, True, True])
    training.model[0].requires_grad_(True)
    before, after = after, training.run(2, 4).weights
    _moved("A layer that is thawed", before, after, [True] * 4)
    training.optimizer.zero_grad(set_to_none=False)
    training.model[2].requires_grad_(False)
    training.loss(4).backward()
    training.optimizer.step()
    _moved("A layer frozen later", after, training.weights, [True, True, False, False])


def _check_before_observation(make: Callable[..., Any]) -> None:
    training = _Training(make)
    before = training.weights
    for p in training.model.parameters():
        p.grad = torch.zeros_like(p)
    training.optimizer.step()
    _same("A step of zero gradients before any forward pass", training.weights, before)
    for p in training.model.parameters():
        p.grad = torch.ones_like(p)
    with _raises(CaptureError, "Gradients without curvature"):
        training.optimizer.step()
    _same("A step that was refused", training.weights, before)
    _moved("The first real step", before, training.run(0, 1).weights, [True] * 4)


def _check_state(make: Callable[..., Any], dtype: torch.dtype) -> None:
    through = _Training(make, dtype).run(0, 3)
    file = io.BytesIO()
    torch.save((through.model.state_dict(), through.optimizer.state_dict()), file)
    file.seek(0)
    of_model, of_optimizer = torch.load(file, weights_only=True)
    loaded = _Training(make, dtype, generator=torch.Generator().manual_seed(1))
    loaded.model.load_state_dict(of_model)
    loaded.optimizer.load_state_dict(of_optimizer)
    before, after = (
        dict(_tensors(training.optimizer.state_dict())) for training in (through, loaded)
    )
    assert before.keys() == after.keys(), "state_dict has other entries after loading."
    for name, value in before.items():
        assert value.dtype == after[name].dtype, (
            f"state_dict{name} of a {dtype} model is {value.dtype}, and {after[name].dtype} after "
            f"loading."
        )
        assert torch.equal(value, after[name]), f"state_dict{name} changes in loading."
    _same(
        f"A run that was stopped, saved and loaded, and one that was not, in {dtype}",
        loaded.run(3, 7).weights,
        through.run(3, 7).weights,
    )


def _tensors(state: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested containers, by where they are."""
    if isinstance(state, Tensor):
        yield path, state
    elif isinstance(state, (dict, list, tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        for key, value in items:
            yield from _tensors(value, f"{path}[{key!r}]")


def _check_copies(make: Callable[..., Any]) -> None:
    ways: dict[str, Callable[[Any], Any]] = {
        "copy.deepcopy": copy.deepcopy,
        "pickle": lambda both: pickle.loads(pickle.dumps(both)),
    }
    for name, way in ways.items():
        training = _Training(make).run(0, 3)
        other = copy.copy(training)
        other.model, other.optimizer = way((training.model, training.optimizer))
        before = training.weights
        moved = other.run(3, 6).weights
        _same(f"The original, while a copy by {name} trains", training.weights, before)
        _same(f"A copy by {name}, and the original", moved, training.run(3, 6).weights)
    training = _Training(make)
    ema = copy.deepcopy(training.model)
    expected = _Training(make).run(0, 2).weights
    for i in range(2):
        ema(torch.full_like(training.inputs[i], torch.nan))
        training.step(i)
    _same("Training beside a copy of the model that is called", training.weights, expected)


def _check_gradients_that_are_not_finite(make: Callable[..., Any]) -> None:
    for good in (0, 2):  # steps before
        for bad in (torch.nan, torch.inf, -torch.inf):
            training = _Training(make, weight_decay=0.1).run(0, good)
            training.backward(good)
            before, state = training.weights, dict(_tensors(training.optimizer.state_dict()))
            gradient = list(training.model.parameters())[2].grad
            assert gradient is not None, "zero_grad or backward lost a gradient."
            gradient[0, 0] = bad
            training.optimizer.step()
            _same(f"A gradient with {bad} after {good} steps", training.weights, before)
            assert training.skipped == 1, f"skipped is {training.skipped} after one such step."
            after = dict(_tensors(training.optimizer.state_dict()))
            for name, value in state.items():
                assert torch.equal(value, after[name]), f"A gradient with {bad} moved {name}."
            for name, value in after.items():
                assert bool(value.isfinite().all()), f"A gradient with {bad} went into {name}."
            _moved("The next step", before, training.run(3, 4).weights, [True] * 4)


def _check_losses_that_are_not_finite(make: Callable[..., Any]) -> None:
    for good in (0, 2):
        training = _Training(make).run(0, good)
        training.inputs[good, 0, 0] = torch.nan
        before = training.weights
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the measurement that is left out
            training.step(good)
        _same(f"A NaN in the inputs after {good} steps", training.weights, before)
        assert training.skipped == 1, f"skipped is {training.skipped} after one such step."
        _moved("The next step", before, training.run(3, 4).weights, [True] * 4)
        finite = [bool(weight.isfinite().all()) for weight in training.weights]
        assert all(finite), "A NaN in the inputs comes back in later steps."


class _raises:
    """Whether an exception comes."""

    def __init__(self, kind: type[Exception], what: str) -> None:
        self.kind, self.what = kind, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> bool:
        assert kind is not None, f"{self.what} must raise {self.kind.__name__}."
        return issubclass(kind, self.kind)
