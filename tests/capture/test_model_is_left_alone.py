"""A measurement leaves no trace in the model, also when it fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as pruning

import neuromanifold as nm
from neuromanifold.errors import NeuromanifoldError
from neuromanifold.linalg import memory

STRUCTURES = [
    nm.Dense(),
    nm.BlockDiagonal(),
    nm.UnitWise(),
    nm.Diagonal(),
    nm.Kronecker(),
    nm.Gram(),
    nm.Implicit(),
]
X = torch.linspace(-1, 1, 4 * 6).sin().reshape(6, 4)


class Remembering(nn.Module):
    """Keeps its last output, as attention modules keep their weights."""

    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return x


@pytest.fixture
def model() -> nn.Module:
    """Rules and generic parameters, buffers, hooks, a frozen parameter, and gradients."""
    model = nn.Sequential(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        nn.Tanh(),
        Remembering(),
        pruning.l1_unstructured(nn.Linear(6, 6), "weight", 0.5),
        parametrizations.weight_norm(nn.Linear(6, 6)),
        nn.LayerNorm(6),
        nn.Linear(6, 3),
    )
    model(torch.randn(20, 4)).sum().backward()
    model[0].bias.requires_grad_(False)
    model[1].eval()
    model[0].register_forward_hook(lambda *call: call[-1] + 1)
    model[6].register_forward_pre_hook(lambda _, args: args)
    return model


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a module holds, by value where it is a tensor."""

    def by_value(value: Any) -> Any:
        return value.detach().clone().tolist() if isinstance(value, Tensor) else value

    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            found[f"{path}.{name}"] = (id(p), by_value(p), by_value(p.grad), p.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            found[f"{path}.{name}"] = (id(buffer), by_value(buffer))
        found[f"{path} mode"] = module.training
        found[f"{path} hooks"] = {
            name: list(hooks.values()) for name, hooks in vars(module).items() if "_hooks" in name
        }
        found[f"{path} names"] = sorted(vars(module))
    return found


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_nothing_changes(model, structure) -> None:
    before = state(model)
    measured = nm.fisher(model, nm.Categorical(), X, structure)
    measured @ torch.ones(measured.num_parameters)
    assert state(model) == before


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_what_modules_remember_stays_usable(model, structure) -> None:
    nm.fisher(model, nm.Categorical(), X, structure)
    assert model[3].last.shape == (6, 6)
    assert bool(model[3].last.isfinite().all())
    assert model[4].weight.tolist()


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_the_next_training_step_is_the_same(model, structure) -> None:
    def step() -> list[Tensor]:
        model.zero_grad()
        model(X).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = step()
    nm.fisher(model, nm.Categorical(), X, structure)
    for gradient, expected in zip(step(), before, strict=True):
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_statistics_of_layers_in_training_mode_do_not_move(structure) -> None:
    model = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(4, 6)),
        nn.Unflatten(1, (2, 3)),
        nn.InstanceNorm1d(2, affine=True, track_running_stats=True),
        nn.Flatten(),
        nn.LayerNorm(6),
        nn.Linear(6, 3),
    )
    before = state(model)
    measured = nm.fisher(model, nm.Categorical(), X, structure)
    measured @ torch.ones(measured.num_parameters)
    assert state(model) == before


class _InterruptionError(Exception):
    pass


def _fails_in_forward(model: nn.Module) -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise _InterruptionError

    nm.fisher(nn.Sequential(model, Fails()), nm.Categorical(), X, nm.Diagonal())


def _fails_in_the_data(model: nn.Module) -> None:
    def batches() -> Iterator[tuple[Tensor, None]]:
        yield X, None
        raise _InterruptionError

    nm.fisher(model, nm.Categorical(), batches(), nm.Diagonal())


def _fails_in_the_likelihood(model: nn.Module) -> None:
    nm.fisher(model, nm.Categorical(), (X, torch.full((6,), 17)), nm.Diagonal())


def _fails_on_nan(model: nn.Module) -> None:
    nm.fisher(model, nm.Categorical(), X * float("nan"), nm.Diagonal())


def _fails_in_the_progress_report(model: nn.Module) -> None:
    def report(done: int, total: int | None) -> None:
        raise _InterruptionError

    nm.fisher(model, nm.Categorical(), X, nm.Kronecker(), progress=report)


def _fails_in_the_structure(model: nn.Module) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "available", lambda _: 0)
        nm.fisher(model, nm.Categorical(), X.repeat(400, 1), nm.Gram())  # 2400², 22 MiB


@pytest.mark.parametrize(
    "failing",
    [
        _fails_in_forward,
        _fails_in_the_data,
        _fails_in_the_likelihood,
        _fails_on_nan,
        _fails_in_the_progress_report,
        _fails_in_the_structure,
    ],
)
def test_nothing_changes_when_it_fails(model, failing) -> None:
    before = state(model)
    error: BaseException | None = None
    try:
        failing(model)
    except (_InterruptionError, NeuromanifoldError, ValueError) as raised:
        error = raised  # kept with its traceback, and the frames that this keeps alive
    assert error is not None
    assert state(model) == before


def test_global_settings_stay() -> None:
    def settings() -> tuple[Any, ...]:
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.is_autocast_cache_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
            torch.backends.mkldnn.enabled,
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
        )

    before, rng = settings(), torch.get_rng_state()
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    rng = torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    for structure in STRUCTURES:
        measured = nm.fisher(model, nm.Categorical(), X, structure, generator=generator)
        measured @ torch.ones(measured.num_parameters)
    assert settings() == before
    assert torch.equal(torch.get_rng_state(), rng)
