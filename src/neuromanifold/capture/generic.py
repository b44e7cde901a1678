"""Per-sample gradients of parameters that no layer rule covers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from neuromanifold.capture.data import Batch, Forward, logits_of
from neuromanifold.capture.graph import Graph
from neuromanifold.capture.kernels import differentiable_twice, plain_lookups
from neuromanifold.capture.layout import Plan
from neuromanifold.errors import CaptureError, NeuromanifoldError, UnsupportedError
from neuromanifold.linalg import memory

__all__ = [
    "buffers_kept",
    "differ",
    "functional_model",
    "per_sample_gradients",
    "require_function",
    "runs_alone",
]


class _Called(nn.Module):
    """A model with its way of being called, so that torch.func can replace its parameters."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, inputs: Any) -> Any:
        return self._forward(self.model, inputs)


FEW = 8
"""Samples that tell whether a model is a function of its inputs and parameters."""


def functional_model(
    plan: Plan, forward: Forward, canonical: Callable[[Any], Tensor]
) -> Callable[[dict[str, Tensor], Any], Tensor]:
    """The model as a function of some of its parameters (by name) and its inputs."""
    called = _Called(plan.model, forward)
    homes = _homes(plan.model)

    def function(params: dict[str, Tensor], inputs: Any) -> Tensor:
        state = {f"model.{home}": value for name, value in params.items() for home in homes[name]}
        # With its own tying of weights, functional_call would swap the parameters of a module that
        # is registered under two names twice, and leave plain tensors behind in the user's module.
        with buffers_kept(plan.model), _attributes_kept(plan.model), plain_lookups(plan.model):
            returned = functional_call(called, state, (inputs,), tie_weights=False)
        return canonical(logits_of(returned))

    return function


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Let modules in training mode write into copies of their buffers, thrown away at the end."""
    originals = [
        (module, name, buffer)
        for module in model.modules()
        if module.training
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    for module, name, buffer in originals:
        module._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for module, name, buffer in originals:
            module._buffers[name] = buffer


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Put back what modules keep of a pass: under a transformation it is dead afterwards."""
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for attributes, originals in before:
            for name in attributes.keys() - originals.keys():
                del attributes[name]
            attributes.update(originals)


def _homes(model: nn.Module) -> dict[str, list[str]]:
    """Per parameter name, one path for each module that holds the parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    homes: dict[str, list[str]] = {name: [] for name in names.values()}
    for path, module in model.named_modules():
        for local, p in module.named_parameters(recurse=False, remove_duplicate=False):
            homes[names[id(p)]].append(f"{path}.{local}".removeprefix("."))
    return homes


def per_sample_gradients(
    plan: Plan,
    forward: Forward,
    canonical: Callable[[Any], Tensor],
    batch: Batch,
    outputs: Tensor,
    cotangents: Tensor,
    *,
    by_samples: bool,
    eps: float,
) -> dict[str, Tensor]:
    """Gradients of `Σ cotangent · output` per sample and sweep, for the generic parameters.

    Args:
        plan: names the parameters and holds the model.
        forward: how the model is called.
        canonical: brings outputs to one tensor.
        batch: the inputs of N samples.
        outputs: the model's outputs `(N, ...)` for the batch, attached to their graph.
        cotangents: `(V, N, ...)`.
        by_samples: whether samples can be run alone, with the parameters replaced.
        eps: relative rounding of the least precise layer.

    Returns:
        Per parameter, `(V, N, p)`.
    """
    parameters = plan.parameters
    sizes = {name: parameters[name].numel() for name in plan.generic}
    memory.require(
        cotangents.shape[0] * cotangents.shape[1] * sum(sizes.values()) * outputs.dtype.itemsize,
        outputs.device,
        what=f"Per-sample gradients of parameters without a layer rule "
        f"(most for {max(sizes, key=lambda name: sizes[name])!r})",
        instead="Use smaller batches, or params=[...] without them.",
    )
    try:
        found = (
            _by_vmap(plan, forward, canonical, batch, outputs, cotangents, eps)
            if by_samples
            else None
        )
    except NeuromanifoldError:
        raise
    except Exception:
        # Recurrent cells and other operators without a batching rule, and models that cannot run
        # one sample alone.
        found = None
    if found is None:  # N backward passes per sweep, through the graph that is there
        found = _one_by_one(plan, outputs, cotangents)
    # A parameter may be a scalar: its gradients have no axis to flatten.
    return {name: value.reshape(*value.shape[:2], -1) for name, value in found.items()}


def _by_vmap(
    plan: Plan,
    forward: Forward,
    canonical: Callable[[Any], Tensor],
    batch: Batch,
    outputs: Tensor,
    cotangents: Tensor,
    eps: float,
) -> dict[str, Tensor]:
    function = functional_model(plan, forward, canonical)
    leaves, build, has_rows = batch.flatten(outputs.shape[0])
    parameters = plan.parameters
    params = {name: parameters[name].detach() for name in plan.generic}

    def contracted(
        params: dict[str, Tensor], rows: list[Tensor], cotangent: Tensor
    ) -> tuple[Tensor, Tensor]:
        found = iter(rows)
        sample = [
            next(found)[None] if rowed else leaf
            for leaf, rowed in zip(leaves, has_rows, strict=True)
        ]
        output = function(params, build(sample))[0]
        return (output * cotangent).sum(), output

    rows = [leaf for leaf, rowed in zip(leaves, has_rows, strict=True) if rowed]
    per_sample = vmap(grad(contracted, has_aux=True), in_dims=(None, 0, 0), randomness="error")
    found: list[dict[str, Tensor]] = []
    # Without no_grad the other parameters, which are not replaced, would keep a graph alive.
    with torch.no_grad(), differentiable_twice(plan.model):
        for cotangent in cotangents:
            gradients, alone = per_sample(params, rows, cotangent)
            if differ(alone, outputs, eps):
                raise _coupled_samples()
            found.append(gradients)
    return {name: torch.stack([gradients[name] for gradients in found]) for name in params}


def _coupled_samples() -> CaptureError:
    return CaptureError(
        "The outputs of a sample change when it is run alone, so there is no Fisher information "
        "per sample. Either the model mixes the samples of a batch (batch statistics, in-batch "
        "attention): make it treat each sample alone. Or an input without a sample axis is as "
        "long as the batch, and was cut into samples by mistake: use another batch size, or give "
        "that input in forward=..."
    )


def differ(one: Tensor, other: Tensor, eps: float) -> bool:
    """Whether outputs differ by more than rounding: by half of the digits."""
    one, other = one.detach(), other.detach()
    tolerance = eps**0.5 * other.abs().amax()
    return one.shape != other.shape or bool(((one - other).abs() > tolerance).any())


def runs_alone(
    plan: Plan,
    forward: Forward,
    canonical: Callable[[Any], Tensor],
    batch: Batch,
    outputs: Tensor,
    eps: float,
) -> bool:
    """Whether the samples of a batch can be run alone, with the generic parameters replaced.

    Raises:
        CaptureError: If they can, but then give other outputs than together.
    """
    num_samples = outputs.shape[0]
    leaves, build, has_rows = batch.flatten(num_samples)
    if not any(has_rows) or _kept_elsewhere(plan, forward, canonical, batch, plan.generic)[0]:
        return False
    # Without the first and the last sample, which a model may use as a reference for the others.
    some = slice(1, -1) if num_samples > 2 else slice(1)
    part = [leaf[some] if rowed else leaf for leaf, rowed in zip(leaves, has_rows, strict=True)]
    function = functional_model(plan, forward, canonical)
    with torch.no_grad():
        try:
            apart, again = function({}, build(part)), function({}, batch.inputs)
        except Exception:  # the model insists on the size of the batch
            return False
    # A random model gives other outputs anyway.
    if differ(apart, outputs[some], eps) and not differ(again, outputs, eps):
        raise _coupled_samples()
    return True


def _kept_elsewhere(
    plan: Plan,
    forward: Forward,
    canonical: Callable[[Any], Tensor],
    batch: Batch,
    names: Iterable[str],
) -> tuple[list[str], Tensor]:
    """Those of the parameters that the model reads from elsewhere than from its modules.

    Replacing a module's parameter does not reach a reference that is kept in a list or an
    attribute, and torch.func would take its derivative for zero.

    Returns:
        Their names, and the outputs with all of the parameters replaced by themselves.
    """
    parameters = plan.parameters
    replaced = {name: parameters[name].detach().requires_grad_() for name in names}
    with torch.enable_grad():
        outputs = functional_model(plan, forward, canonical)(replaced, batch.inputs)
    uses = Graph.of(outputs).uses
    return [name for name in replaced if uses[id(parameters[name])]], outputs


def require_function(
    plan: Plan,
    forward: Forward,
    canonical: Callable[[Any], Tensor],
    batch: Batch,
    outputs: Tensor,
    *,
    instead: str,
) -> None:
    """Refuse a model whose outputs are no function of its inputs and its modules' parameters.

    Args:
        plan: holds the model.
        forward: how the model is called.
        canonical: brings outputs to one tensor.
        batch: inputs.
        outputs: what the model gave for them.
        instead: a sentence with what to call instead.

    Raises:
        UnsupportedError: If it is random, or keeps parameters elsewhere.
    """
    found = _again(plan, forward, canonical, batch, outputs, FEW)
    if found is None:  # some samples do not tell, where a model mixes those of a batch
        found = _again(plan, forward, canonical, batch, outputs, None)
    if found is None:
        raise UnsupportedError(
            "The model gives other outputs when it is called again with the same inputs (dropout "
            "in training mode?), so each pass would belong to another Fisher matrix. Call "
            f"model.eval(). {instead}"
        )
    if found:
        raise UnsupportedError(
            f"The model reads {found} from a list or an attribute instead of from the module "
            f"that owns them, so torch.func cannot differentiate with respect to them. {instead}"
        )


def _again(
    plan: Plan,
    forward: Forward,
    canonical: Callable[[Any], Tensor],
    batch: Batch,
    outputs: Tensor,
    few: int | None,
) -> list[str] | None:
    """Parameters that are read from elsewhere; None if the first samples get other outputs."""
    if few is not None and few < outputs.shape[0]:
        try:
            batch = batch.samples(0, few)
        except UnsupportedError:
            return None
        outputs = outputs[:few]
    try:
        elsewhere, again = _kept_elsewhere(plan, forward, canonical, batch, plan.layout.names)
    except Exception:
        if few is None:
            raise
        return None  # the model insists on the size of the batch
    return None if differ(again, outputs, torch.finfo(outputs.dtype).eps) else elsewhere


def _one_by_one(plan: Plan, outputs: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
    parameters = plan.parameters
    wanted = [parameters[name] for name in plan.generic]
    found: dict[str, list[Tensor]] = {name: [] for name in plan.generic}
    with torch.enable_grad():
        samples = outputs.unbind()
    for cotangent in cotangents:
        for sample, u in zip(samples, cotangent, strict=True):
            gradients = torch.autograd.grad(sample, wanted, u, retain_graph=True, allow_unused=True)
            for values, p, g in zip(found.values(), wanted, gradients, strict=True):
                values.append(torch.zeros_like(p) if g is None else g.to_dense())
    shape = cotangents.shape[:2]
    return {name: torch.stack(values).unflatten(0, shape) for name, values in found.items()}
