"""How a preconditioner sees the model at work, and measures without leaving a trace."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from neuromanifold.capture import Batch, is_measured

__all__ = [
    "Observer",
    "as_batch",
    "in_training",
    "is_data_parallel",
    "own_parameters",
    "undisturbed",
]

Told = Callable[[tuple[Any, ...], Mapping[str, Any]], None]


class Observer:
    """A hook that tells what a module is called with.

    It neither keeps its listener alive nor goes along when the module is copied or saved: a copy,
    such as a moving average of the weights, has a hook that does nothing.

    Args:
        told: a method, which is given the arguments by position and by name.
    """

    def __init__(self, told: Told | None) -> None:
        self._told = None if told is None else WeakMethod(told)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each call of the module."""
        _tell(self, args, kwargs)

    def __reduce__(self) -> tuple[type[Observer], tuple[None]]:
        return Observer, (None,)


def _tell(observer: Observer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    told = None if observer._told is None else observer._told()
    if told is not None:
        (torch.compiler.disable(told) if _compiles() else told)(args, kwargs)


# What is observed is no part of a compiled graph: this function is not, and what it calls neither.
_tell._torchdynamo_disable = True  # type: ignore[attr-defined]


def _compiles() -> bool:
    """Whether anything may be compiled: the import of the compiler takes a second."""
    return "torch._dynamo" in sys.modules


def as_batch(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch:
    """What a model is called with, as data; labels that a model takes are targets."""
    if not kwargs:
        return Batch(args[0] if len(args) == 1 else args, None)
    if not args:
        return Batch.of(kwargs)
    signature = inspect.signature(model.forward)
    named = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return Batch.of(named)


def is_data_parallel(model: nn.Module) -> bool:
    """Whether a model averages gradients over processes, or is being called by one that does."""
    # The wrapper may have been made after the optimizer, as trainers do.
    active = getattr(DistributedDataParallel, "_active_ddp_module", None)
    return isinstance(model, DistributedDataParallel) or active is not None


def in_training(model: nn.Module) -> bool:
    """Whether a call of the model is one of training: no evaluation, no measurement, no torch.func.

    torch.func puts other tensors in the place of parameters.
    """
    return (
        model.training
        and torch.is_grad_enabled()
        and not is_measured(model)
        and all(isinstance(p, nn.Parameter) for p in own_parameters(model))
    )


def own_parameters(model: nn.Module) -> Iterator[Tensor]:
    """Those of all modules, in no order to rely on: `model.parameters()` makes their names too."""
    modules = [model]
    while modules:
        module = modules.pop()
        yield from (p for p in module._parameters.values() if p is not None)
        modules.extend(child for child in module._modules.values() if child is not None)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Let a model be measured: as it was written, and with no effect on the training around it.

    Batches are normalised by their running statistics, and nothing that is compiled runs compiled.
    Random number generators are put back: dropout draws in a measurement what it will draw again
    when training goes on.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    device = next(model.parameters()).device
    forked = [] if device.type == "cpu" else [device]
    for norm in norms:
        norm.training = False
    try:
        with _eager(), torch.random.fork_rng(forked, device_type=device.type if forked else "cuda"):
            yield
    finally:
        for norm in norms:
            norm.training = True


def _eager() -> contextlib.AbstractContextManager[Any]:
    return torch.compiler.set_stance("force_eager") if _compiles() else contextlib.nullcontext()
