"""Per-sample gradients of parameters that no layer rule covers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from neuromanifold.capture.data import Batch, Forward, logits_of
from neuromanifold.capture.layout import Plan
from neuromanifold.errors import CaptureError
from neuromanifold.linalg import memory

__all__ = ["differentiable_twice", "functional_model", "per_sample_gradients"]


class _Called(nn.Module):
    """A model with its way of being called, so that torch.func can replace its parameters."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, inputs: Any) -> Any:
        return self._forward(self.model, inputs)


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
        return canonical(logits_of(functional_call(called, state, (inputs,), tie_weights=False)))

    return function


def _homes(model: nn.Module) -> dict[str, list[str]]:
    """Per parameter name, one path for each module that holds the parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    homes: dict[str, list[str]] = {name: [] for name in names.values()}
    for path, module in model.named_modules():
        for local, p in module.named_parameters(recurse=False, remove_duplicate=False):
            homes[names[id(p)]].append(f"{path}.{local}".removeprefix("."))
    return homes


@contextlib.contextmanager
def differentiable_twice() -> Iterator[None]:
    """Kernels that torch.func can transform: attention by plain mathematics, no fused fast path."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    mkldnn = torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)  # its recurrent layers have no forward mode
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch._C._set_mkldnn_enabled(mkldnn)


def per_sample_gradients(
    plan: Plan,
    forward: Forward,
    canonical: Callable[[Any], Tensor],
    batch: Batch,
    outputs: Tensor,
    cotangents: Tensor,
) -> dict[str, Tensor]:
    """Gradients of `Σ cotangent · output` per sample and sweep, for the generic parameters.

    Args:
        plan: names the parameters and holds the model.
        forward: how the model is called.
        canonical: brings outputs to one tensor.
        batch: the inputs of N samples.
        outputs: the model's outputs `(N, ...)` for the batch, attached to their graph.
        cotangents: `(V, N, ...)`.

    Returns:
        Per parameter, `(V, N, p)`.
    """
    parameters = dict(plan.model.named_parameters())
    sizes = {name: parameters[name].numel() for name in plan.generic}
    memory.require(
        cotangents.shape[0] * cotangents.shape[1] * sum(sizes.values()) * outputs.dtype.itemsize,
        outputs.device,
        what=f"Per-sample gradients of parameters without a layer rule "
        f"(most for {max(sizes, key=lambda name: sizes[name])!r})",
        instead="Use smaller batches, or params=[...] without them.",
    )
    try:
        found = _by_vmap(plan, forward, canonical, batch, outputs, cotangents)
    except (RuntimeError, NotImplementedError):
        # Recurrent cells and other operators without a batching rule: N backward passes per sweep.
        found = _one_by_one(plan, outputs, cotangents)
    return {name: value.flatten(2) for name, value in found.items()}


def _by_vmap(
    plan: Plan,
    forward: Forward,
    canonical: Callable[[Any], Tensor],
    batch: Batch,
    outputs: Tensor,
    cotangents: Tensor,
) -> dict[str, Tensor]:
    function = functional_model(plan, forward, canonical)
    leaves, build, has_rows = batch.flatten(outputs.shape[0])
    parameters = dict(plan.model.named_parameters())
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
    with differentiable_twice():
        for cotangent in cotangents:
            gradients, alone = per_sample(params, rows, cotangent)
            _refuse_coupled_samples(alone, outputs)
            found.append(gradients)
    return {name: torch.stack([gradients[name] for gradients in found]) for name in params}


def _refuse_coupled_samples(alone: Tensor, together: Tensor) -> None:
    """Each sample alone must give what it gave inside the batch."""
    scale = together.detach().abs().amax()
    tolerance = 100 * torch.finfo(together.dtype).eps ** 0.5 * scale
    if bool(((alone - together.detach()).abs() > tolerance).any()):
        raise CaptureError(
            "The outputs of a sample change when it is run alone: the model mixes the samples of a "
            "batch (batch statistics, in-batch attention, or an input without a sample axis whose "
            "length happens to equal the batch size), so per-sample Fisher information does not "
            "exist, or pass forward=... that fixes the mixing input."
        )


def _one_by_one(plan: Plan, outputs: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
    parameters = dict(plan.model.named_parameters())
    wanted = [parameters[name] for name in plan.generic]
    found: dict[str, list[Tensor]] = {name: [] for name in plan.generic}
    for cotangent in cotangents:
        for n in range(outputs.shape[0]):
            gradients = torch.autograd.grad(
                outputs[n], wanted, cotangent[n], retain_graph=True, allow_unused=True
            )
            for (name, values), p, g in zip(found.items(), wanted, gradients, strict=True):
                assert name in parameters
                values.append(torch.zeros_like(p) if g is None else g)
    shape = cotangents.shape[:2]
    return {name: torch.stack(values).unflatten(0, shape) for name, values in found.items()}
