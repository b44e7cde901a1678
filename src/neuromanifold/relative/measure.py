"""The metric of a component, given its inputs or a model that gives it its inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from neuromanifold import _fisher
from neuromanifold._fisher import _under_present_autocast
from neuromanifold.capture import Batch, Data, Forward, buffers_kept, call_model, unwrap
from neuromanifold.errors import CaptureError, listed
from neuromanifold.estimators import Estimator, Exact
from neuromanifold.likelihoods import Likelihood
from neuromanifold.operators import FisherOperator
from neuromanifold.structures import Progress, Structure, UnitWise

__all__ = ["fisher", "of"]


def fisher(
    component: nn.Module,
    inputs: Any,
    response: Likelihood,
    structure: Structure | Mapping[str, Structure] | None = None,
    *,
    estimator: Estimator | None = None,
    params: Iterable[str] | None = None,
    per: Literal["sample", "position"] = "sample",
    forward: Forward | None = None,
    generator: torch.Generator | None = None,
    progress: bool | Progress = False,
    max_bytes: int | str | None = None,
) -> FisherOperator:
    r"""Measure the Fisher information of a component, given its inputs.

    `(1/N) Σ_n J_nᵀ Σ_n J_n` in nats/parameter²: J the Jacobian of the component's outputs, Σ the
    metric that the response puts on them. It depends on nothing that surrounds the component.

    Args:
        component: any module: a unit, a layer, a block, a sub-network.
        inputs: what the component is given, as the data of `nm.fisher`: a tensor, a tuple
            `(inputs, targets)`, a mapping of keyword arguments, or an iterable of those.
        response: what its outputs mean. A choice, and each one has a metric of its own:
            `nm.Gaussian()` for unbounded units, `Binary` or `Probabilities` where outputs are
            means, `nm.Categorical()` for logits, `Through` for what is seen from above.
        structure: what is kept of the matrix; `nm.UnitWise()` by default.
        estimator: which vectors are sent back; `nm.Exact()` by default.
        params: names or shell-style patterns of the component's parameters to measure.
        per: "sample" or "position".
        forward: `forward(component, inputs) -> outputs`, if it is not called the usual way.
        generator: source of the estimator's randomness.
        progress: True shows a progress bar on stderr; a function is told `(done, total)`.
        max_bytes: e.g. "2 GiB": cut batches so that tensors take no more than this.

    Returns:
        The matrix as an operator; parameters have the names they have in the component.

    Raises:
        TypeError: If the component is no module, or the response no likelihood.
        ValueError: As `nm.fisher` does.

    Example:
        >>> import torch, neuromanifold as nm
        >>> from neuromanifold.relative import fisher
        >>> unit, x = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()), torch.randn(8, 4)
        >>> fisher(unit, x, nm.Gaussian()).blocks[0].matrices.shape
        torch.Size([3, 5, 5])
    """
    _check_kinds(component, response)
    return _fisher.fisher(
        component,
        response,
        inputs,
        UnitWise() if structure is None else structure,
        estimator=Exact() if estimator is None else estimator,
        params=params,
        per=per,
        forward=forward,
        generator=generator,
        progress=progress,
        max_bytes=max_bytes,
    )


def of(
    model: nn.Module,
    name: str,
    data: Any,
    response: Likelihood,
    structure: Structure | Mapping[str, Structure] | None = None,
    *,
    forward: Forward | None = None,
    outputs: Callable[[Any], Any] | None = None,
    estimator: Estimator | None = None,
    params: Iterable[str] | None = None,
    per: Literal["sample", "position"] = "sample",
    generator: torch.Generator | None = None,
    progress: bool | Progress = False,
    max_bytes: int | str | None = None,
) -> FisherOperator:
    """Measure the Fisher information of a part of a model, given what the model feeds it.

    The model runs on the data, batch by batch, and `fisher` measures the part at the inputs it got
    there. A part that is called several times in a batch has its calls counted one by one: the
    metric is the mean over the samples of all calls.

    Args:
        model: runs as it is, in the mode it has.
        name: of the part, as in `model.named_modules()`.
        data: of the model, as for `nm.fisher`; targets are not used.
        response: what the outputs of the part mean.
        structure: what is kept of the matrix; `nm.UnitWise()` by default.
        forward: `forward(model, inputs)`, if the model is not called the usual way.
        outputs: picks the tensor that the response is about out of what the part returns, such as
            `lambda returned: returned[0]` for `nn.MultiheadAttention`.
        estimator: as for `fisher`.
        params: names within the part, as for `fisher`.
        per: as for `fisher`.
        generator: as for `fisher`.
        progress: as for `fisher`.
        max_bytes: as for `fisher`.

    Returns:
        The matrix as an operator; parameters have the names they have in the part.

    Raises:
        ValueError: If the model has no part of this name; the message lists the nearest ones.
        CaptureError: If the model did not call the part.

    Example:
        >>> import torch, neuromanifold as nm
        >>> from neuromanifold.relative import of
        >>> bottom, top = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)
        >>> model = torch.nn.Sequential(bottom, torch.nn.ReLU(), top)
        >>> F = of(model, "2", torch.randn(8, 4), nm.Categorical())
        >>> F.layout.names, F.num_samples
        (('weight', 'bias'), 8)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a torch.nn.Module; got {type(model).__name__}.")
    model = unwrap(model)
    component = _part(model, name)
    _check_kinds(component, response)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    run = _under_present_autocast(call_model if forward is None else forward, device)

    def call(module: nn.Module, given: Any) -> Any:
        args, kwargs = given
        returned = module(*args, **kwargs)
        return returned if outputs is None else outputs(returned)

    calls = _Calls(model, name, component, Data(data, model), run)
    calls.sampler = getattr(data, "sampler", None)
    return fisher(
        component,
        iter(calls) if isinstance(data, Iterator) else calls,  # read once only, as the data are
        response,
        structure,
        estimator=estimator,
        params=params,
        per=per,
        forward=call,
        generator=generator,
        progress=progress,
        max_bytes=max_bytes,
    )


class _Calls:
    """What a model calls one of its parts with: a batch of `(args, kwargs)` for each call.

    The model runs anew in every pass, so that no more than one of its batches is kept.

    Attributes:
        sampler: of the data, which tells whether each pass has another order.
    """

    sampler: Any = None

    def __init__(
        self, model: nn.Module, name: str, component: nn.Module, data: Data, run: Forward
    ) -> None:
        self._model = model
        self._name = name
        self._component = component
        self._data = data
        self._run = run

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._data:
            calls: list[Any] = []

            def keep(_: nn.Module, args: Any, kwargs: Any, calls: list[Any] = calls) -> None:
                # Copies: an operation further on may write into the input.
                calls.append(tree_map_only(Tensor, _copy, (args, kwargs)))

            # Before the user's own hooks, which see the component called once more.
            handle = self._component.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
            try:
                with torch.no_grad(), buffers_kept(self._model), _layers_called():
                    self._run(self._model, batch.inputs)
            finally:
                handle.remove()
            if not calls:
                raise CaptureError(
                    f"The model ran without calling its part {self._name!r}, so that there are no "
                    f"inputs to measure it at. Name a part that it calls (a list of modules is not "
                    f"called, its members are), or give inputs to nm.relative.fisher(...)."
                )
            for call in calls:
                yield Batch(call, None)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


@contextlib.contextmanager
def _layers_called() -> Iterator[None]:
    """Keep transformers from a fused path that calls none of their parts."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _part(model: nn.Module, name: str) -> nn.Module:
    parts = dict(model.named_modules(remove_duplicate=False))
    if name not in parts:
        names = [part for part in parts if part]
        raise ValueError(
            f"{type(model).__name__} has no part {name!r}. It has {listed(names, near=name)}; see "
            f"model.named_modules()."
        )
    return parts[name]


def _check_kinds(component: Any, response: Any) -> None:
    if not isinstance(component, nn.Module):
        raise TypeError(
            f"component is a torch.nn.Module; got {type(component).__name__}. Pass the module, "
            f"then its inputs."
        )
    if not isinstance(response, Likelihood):
        given = response.__name__ if isinstance(response, type) else repr(response)
        raise TypeError(
            f"response says what the component's outputs mean; got {given}. Pass an object: "
            f"nm.Gaussian() for real values, Binary((-1, 1)) behind tanh, Binary() behind a "
            f"sigmoid, Probabilities() behind a softmax, nm.Categorical() for logits."
        )
