"""Per-sample gradients in float64 from `torch.func`: what an answer is checked against."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from benchmarks.workloads import Batch

__all__ = ["Reference", "check_close", "reference"]


@dataclass(frozen=True)
class Reference:
    """The sampled-label Fisher of a batch as its rows.

    Attributes:
        gradients: of each sample's log-probability with respect to each parameter, (N, *shape).
        inputs: of each Linear layer, (N, *T, I).
    """

    gradients: dict[str, Tensor]
    inputs: dict[str, Tensor]

    @property
    def num_samples(self) -> int:
        """N."""
        return len(next(iter(self.gradients.values())))

    def rows(self) -> Tensor:
        """The gradients side by side, (N, P): F is their mean outer product."""
        return torch.cat([g.flatten(1) for g in self.gradients.values()], dim=1)


def reference(batch: Batch, labels: Tensor) -> Reference:
    """Differentiate every sample's log-probability of its labels (N, *T)."""
    exact = batch.double()
    parameters = {name: p.detach() for name, p in exact.model.named_parameters()}

    def log_prob(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = functional_call(exact.model, parameters, (x.unsqueeze(0),))
        return -functional.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="sum")

    gradients = vmap(grad(log_prob), in_dims=(None, 0, 0))(parameters, exact.inputs, labels)
    return Reference(gradients, linear_inputs(exact))


def linear_inputs(batch: Batch) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = {}

    def note(name: str, layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG001
        inputs[name] = args[0]

    handles = [
        layer.register_forward_hook(partial(note, name))
        for name, layer in batch.model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    with torch.no_grad():
        batch.model(batch.inputs)
    for handle in handles:
        handle.remove()
    return inputs


def check_close(answer: Tensor, expected: Tensor, *, terms: int) -> None:
    """Compare with a float64 value, relative to its norm.

    A float32 sum of n terms is off by at most n eps of the sum of their sizes, so that is what
    an answer may be off; a wrong scale, sample or sign is off by far more.
    """
    assert answer.shape == expected.shape, f"shape {answer.shape}, expected {expected.shape}."
    error = ((answer - expected).norm() / expected.norm()).item()
    bound = terms * torch.finfo(answer.dtype).eps
    assert error <= bound, f"relative error {error:.1e}, expected at most {bound:.1e}."
