"""A stack of components: the metric that each of them sees, pulled back from the top."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuromanifold.capture import Batch, Data, buffers_kept, call_model
from neuromanifold.errors import UnsupportedError
from neuromanifold.likelihoods import Gaussian, Likelihood
from neuromanifold.operators import FisherOperator
from neuromanifold.relative.measure import fisher
from neuromanifold.relative.responses import Through
from neuromanifold.structures import Structure

__all__ = ["Link", "chain"]

WIDE = 1024
"""Of a metric on more outputs than this, the diagonal is kept."""


@dataclass(frozen=True)
class Link:
    """One component of a chain.

    Attributes:
        name: in the stack.
        fisher: of its parameters, in the metric it sees; None if it has none to measure.
        seen: that metric, the mean over samples on its outputs, in nats per squared output unit:
            `(K, K)` for K entries of a sample, or its diagonal `(K,)` if K is above 1,024.
    """

    name: str
    fisher: FisherOperator | None
    seen: Tensor


def chain(
    components: Iterable[nn.Module],
    inputs: Any,
    response: Likelihood,
    structure: Structure | Mapping[str, Structure] | None = None,
    *,
    depth: int | None = None,
    between: Likelihood | None = None,
) -> list[Link]:
    """Find the metric of each component of a stack, seen from some way above.

    A component sees `response` pulled back through the components above it. With all of them its
    Fisher matrix is its block of the whole stack's; where only `depth` of them are kept, the last
    one kept is taken to respond by `between`. For each component the whole stack runs, what is
    below it and what is above: for L components, about L times what `nm.fisher` of the stack takes.

    Args:
        components: from the bottom up, each taking what the one below returns; an `nn.Sequential`
            or several modules.
        inputs: of the lowest one, as the data of `nm.fisher`. They are read several times.
        response: what the outputs of the topmost one mean.
        structure: what is kept of each matrix; `nm.UnitWise()` by default.
        depth: through how many components a metric is pulled back at most; None for all, 0 for
            each component by itself.
        between: response in the middle of the stack; `nm.Gaussian()` by default.

    Returns:
        A link for each component, from the bottom up.

    Raises:
        ValueError: If there are no components, or `depth` is negative.
        UnsupportedError: If inputs can be read only once, or outputs differ in size between
            batches.

    Example:
        >>> import torch, neuromanifold as nm
        >>> from neuromanifold.relative import chain
        >>> bottom, top = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)
        >>> stack = torch.nn.Sequential(bottom, torch.nn.Tanh(), top)
        >>> links = chain(stack, torch.randn(8, 4), nm.Categorical())
        >>> for link in links:
        ...     print(link.name, tuple(link.seen.shape), link.fisher is None)
        0 (3, 3) False
        1 (3, 3) True
        2 (2, 2) False
    """
    if depth is not None and depth < 0:
        raise ValueError(f"depth is a number of components >= 0, or None for all; got {depth}.")
    between = Gaussian() if between is None else between
    names, modules = _named(components)
    data = Data(inputs)
    data.require_repeatable("A chain")
    links = []
    for i, component in enumerate(modules):
        above = modules[i + 1 :] if depth is None else modules[i + 1 : i + 1 + depth]
        end = response if i + len(above) == len(modules) - 1 else between
        sees = Through(nn.Sequential(*above), end) if above else end
        below = _Below(modules[:i], data)
        measurable = any(p.requires_grad for p in component.parameters())
        links.append(
            Link(
                names[i],
                fisher(component, below, sees, structure) if measurable else None,
                _seen(component, below, sees),
            )
        )
    return links


class _Below:
    """The inputs of a component: what those below it make of the data, batch by batch."""

    def __init__(self, below: list[nn.Module], data: Data) -> None:
        self._below = below
        self._data = data

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._data:
            inputs = batch.inputs
            with torch.no_grad():
                for component in self._below:
                    inputs = _run(component, inputs)
            yield Batch(inputs, batch.targets, batch.observed)


def _run(component: nn.Module, inputs: Any) -> Any:
    # A copy where the component may write into it: the data are the caller's.
    with buffers_kept(component):
        return call_model(component, inputs.clone() if isinstance(inputs, Tensor) else inputs)


def _seen(component: nn.Module, below: _Below, sees: Likelihood) -> Tensor:
    """The mean metric on a component's outputs, `(K, K)`, or its diagonal `(K,)`."""
    total: Tensor | None = None
    num_samples = 0
    for batch in below:
        with torch.no_grad():
            outputs = sees.canonical(_run(component, batch.inputs))
        targets = batch.targets
        if batch.observed is not None:
            targets = sees.observing(outputs, batch.observed)
        size = outputs[0].numel()
        shape = (size,) if size > WIDE else (size, size)
        if total is None:
            total = torch.zeros(shape, dtype=_summed(outputs.dtype), device=outputs.device)
        if total.shape != shape:
            raise UnsupportedError(
                f"The outputs of {type(component).__name__} have {size} entries per sample in this "
                f"batch and {total.shape[0]} in the first one, so that they have no mean metric. "
                f"Give inputs of one size, or measure by nm.relative.fisher(...)."
            )
        for column in sees.fisher_columns(outputs):
            s = sees.mask_cotangent(column, outputs, targets).flatten(1).to(total.dtype)
            total += s.square().sum(0) if total.ndim == 1 else s.T @ s
        num_samples += len(outputs)
    assert total is not None  # data without a batch are refused
    return total / num_samples


def _summed(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _named(components: Iterable[nn.Module]) -> tuple[list[str], list[nn.Module]]:
    ordered = isinstance(components, (nn.Sequential, nn.ModuleList))
    if isinstance(components, nn.Module) and not ordered:
        raise ValueError(
            f"{type(components).__name__} does not say in which order its parts are called. "
            f"Give an nn.Sequential, or a list of modules from the bottom up."
        )
    modules = list(components)
    if not modules:
        raise ValueError("There are no components. Give modules from the bottom up.")
    if wrong := [type(m).__name__ for m in modules if not isinstance(m, nn.Module)]:
        raise TypeError(f"components are torch.nn.Modules; got {wrong[0]} among them.")
    if isinstance(components, nn.Sequential):
        # By position, as iteration goes: a module may stand in several places.
        return list(components._modules), modules
    return [str(i) for i in range(len(modules))], modules
