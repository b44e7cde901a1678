"""How a preconditioner sees the model at work, and measures without leaving a trace."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakMethod

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Observer", "as_inputs", "is_data_parallel", "undisturbed"]

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
        _tell(self, args, kwargs)

    def __reduce__(self) -> tuple[type[Observer], tuple[None]]:
        return Observer, (None,)


def _tell(observer: Observer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    told = None if observer._told is None else observer._told()
    if told is not None:
        told(args, kwargs)


# What torch.compiler.disable sets, without the import of the compiler, which takes a second: what
# is observed is no part of a compiled graph.
_tell._torchdynamo_disable = True  # type: ignore[attr-defined]


def as_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a model is called with, as data."""
    if not kwargs:
        return args[0] if len(args) == 1 else args
    if not args:
        return dict(kwargs)
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def is_data_parallel(model: nn.Module) -> bool:
    """Whether a model averages gradients over processes, or is being called by one that does."""
    # The wrapper may have been made after the optimizer, as trainers do.
    active = getattr(DistributedDataParallel, "_active_ddp_module", None)
    return isinstance(model, DistributedDataParallel) or active is not None


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Let batch normalisation use its running statistics, and put back random number generators.

    Dropout draws in a measurement what it will draw again when training goes on.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    device = next(model.parameters()).device
    forked = [] if device.type == "cpu" else [device]
    for norm in norms:
        norm.training = False
    try:
        with torch.random.fork_rng(forked, device_type=device.type if forked else "cuda"):
            yield
    finally:
        for norm in norms:
            norm.training = True
