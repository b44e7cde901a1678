"""`file.py:function` to the model, likelihood and data that the function returns."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from neuromanifold.capture import Batch, Data
from neuromanifold.likelihoods import Likelihood

__all__ = ["first_samples", "load_target", "training_target"]

EXAMPLE = "neuromanifold analyze train.py:load"
MODULE_NAME = "neuromanifold_target"
"""Not the file's own name, which may be that of a module in use: random.py, torch.py."""


def load_target(target: str) -> tuple[nn.Module, Likelihood, Any]:
    """Run `file.py:function` and check what it returns.

    Raises:
        ValueError: If anything on the way is not as it should be; the message says what to do.
    """
    return _checked(_called(target_function(target), target), target)


def training_target(target: str) -> Callable[[], tuple[nn.Module, Likelihood, Any, Any]]:
    """Run the file once; what comes back calls its function, which may also return test data.

    Raises:
        ValueError: If anything on the way is not as it should be, now or in the call.
    """
    function = target_function(target)

    def load() -> tuple[nn.Module, Likelihood, Any, Any]:
        result = _called(function, target)
        test = None
        if isinstance(result, tuple) and len(result) == 4:
            *three, test = result
            result = tuple(three)
        model, likelihood, data = _checked(result, target, "[, test]")
        return model, likelihood, data, test

    return load


def target_function(target: str) -> Callable[[], Any]:
    """Run the file of `file.py:function`, and find the function in it.

    Raises:
        ValueError: If there is none that can be called.
    """
    file, colon, name = target.rpartition(":")
    if not (colon and file and name):
        raise ValueError(f"The target is FILE.PY:FUNCTION, for example {EXAMPLE}; got {target!r}.")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"There is no file {file!r}. The target is FILE.PY:FUNCTION ({EXAMPLE}).")
    return _function(_run_file(path), name, file)


def _called(function: Callable[[], Any], target: str) -> Any:
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{target} raised {type(error).__name__}: {error}") from error


def _run_file(path: Path) -> ModuleType:
    """Run a file as Python would, its own folder first on the path, but not as `__main__`."""
    spec = importlib.util.spec_from_file_location(MODULE_NAME, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file; its name should end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{path} raised {type(error).__name__} while it was being read: {error}\n"
            f"{_remedy(error)}"
        ) from error
    return module


def _remedy(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return "Mend that line."
    if isinstance(error, ModuleNotFoundError):
        return f"Install it for {sys.executable}, or put it beside the file."
    return 'Keep what should not run now behind: if __name__ == "__main__":'


def _function(module: ModuleType, name: str, file: str) -> Callable[[], Any]:
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(
            f"{file} has no function {name!r}. Its functions: {', '.join(there) or 'none'}."
        )
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ValueError(
            f"{name} in {file} is called without arguments ({error}). Give its parameters "
            f"defaults, or write a small function that calls it."
        ) from None
    return function


def _checked(result: object, target: str, more: str = "") -> tuple[nn.Module, Likelihood, Any]:
    wanted = f"{target} must return (model, likelihood, data{more})"
    if not isinstance(result, tuple) or len(result) != 3:
        size = f" of {len(result)}" if isinstance(result, (tuple, list)) else ""
        raise ValueError(f"{wanted}; it returned a {type(result).__name__}{size}.")
    model, likelihood, data = result
    if not isinstance(model, nn.Module):
        raise ValueError(f"{wanted}; its model is a {type(model).__name__}, not a torch.nn.Module.")
    if not isinstance(likelihood, Likelihood):
        raise ValueError(
            f"{wanted}; its likelihood is a {type(likelihood).__name__}. Return one of "
            f"neuromanifold's, or neuromanifold.from_loss(loss) for a torch loss."
        )
    return model, likelihood, data


def first_samples(data: Any, num: int) -> list[Batch]:
    """The first `num` samples of any data that `neuromanifold.fisher` takes.

    Example:
        >>> import torch
        >>> [len(b.targets) for b in first_samples([(torch.ones(3, 2), torch.ones(3))] * 2, 5)]
        [3, 2]
    """
    kept: list[Batch] = []
    for batch in Data(data):
        left = num - sum(part.num_samples for part in kept)
        kept.append(batch.samples(0, left) if batch.num_samples > left else batch)
        if batch.num_samples >= left:
            break
    return kept
