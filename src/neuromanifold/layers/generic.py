"""Parameters that no rule reads: their per-sample gradients, made by the generic path."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuromanifold.layers._base import ElementwiseRule
from neuromanifold.layers.record import Call, Port, Record
from neuromanifold.linalg import Block

__all__ = ["record_of_parameter"]


class _Parameter(ElementwiseRule):
    """Each entry counts as a unit with a bias and no inputs."""

    name = "generic"

    def block(self, module: nn.Module, name: str, trainable: frozenset[str]) -> Block:
        raise AssertionError("the plan makes the blocks of parameters without a rule")

    def gradients(self, module: nn.Module, x: Tensor | None, g: Tensor, block: Block) -> Tensor:
        """`(V, N, p)` to `(V, 1, N, p, 1)`."""
        return g[:, None, :, :, None]


_PORT = Port(_Parameter(), nn.Identity())


def record_of_parameter(
    block: Block, gradients: Tensor, *, first: bool, dtype: torch.dtype
) -> Record:
    """A record of per-sample gradients `(V, N, p)`."""
    call = Call(_PORT, None, gradients, 1)
    sweeps, num_samples, _ = gradients.shape
    return Record(
        block,
        (_PORT,),
        (call,),
        (sweeps, num_samples),
        first=first,
        dtype=dtype,
        device=gradients.device,
    )
