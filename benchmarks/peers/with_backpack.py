"""BackPACK: a second quantity that travels backward through extended modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers._peer import (
    Factors,
    Named,
    Peer,
    copied,
    factored,
    flat,
    on,
    split,
    without_positions,
)
from benchmarks.quantities import Drawn
from benchmarks.workloads import Batch, direction

__all__ = ["BACKPACK"]


def extended(batch: Batch, labels: Tensor) -> tuple[nn.Module, Callable[[Any], None]]:
    """A copy of the model, and a backward pass with an extension that fills its parameters.

    The loss is a mean over samples and positions.
    """
    from backpack import backpack, extend

    model, loss = extend(copied(batch).model), extend(nn.CrossEntropyLoss())
    inputs, targets = batch.inputs, labels.flatten()

    def backward(extension: Any) -> None:
        with backpack(extension):
            loss(model(inputs).flatten(0, -2), targets).backward()
        for p in model.parameters():
            p.grad = None

    return model, backward


def diagonal(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Named]]:
    """Squares of gradients of the mean loss, in which a sample's share is 1/(N T)."""
    from backpack.extensions import SumGradSquared

    model, backward = extended(batch, labels)
    scale = len(labels) * labels[0].numel() ** 2

    def call() -> Callable[[], Named]:
        backward(SumGradSquared())
        return lambda: filled(batch, model, "sum_grad_squared", scale)

    return call


def diagonal_exact(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Named]]:
    from backpack.extensions import DiagGGNExact

    model, backward = extended(batch, labels)

    def call() -> Callable[[], Named]:
        backward(DiagGGNExact())
        return lambda: filled(batch, model, "diag_ggn_exact", labels[0].numel())

    return call


def filled(batch: Batch, model: nn.Module, field: str, scale: float) -> Named:
    """What the backward pass left; it leaves out layers that it has no rule for, silently."""
    names = [name for name, _ in batch.model.named_parameters()]
    pairs = list(zip(names, model.parameters(), strict=True))
    missing = [name for name, p in pairs if not hasattr(p, field)]
    if missing:
        raise NotImplementedError(f"{field} is not set for {', '.join(missing)}.")
    return {name: scale * getattr(p, field) for name, p in pairs}


def kronecker(batch: Batch, labels: Tensor) -> Callable[[], Drawn]:
    """It draws its own labels, and has no factor for the bias."""
    from backpack.extensions import KFAC

    model, backward = extended(batch, labels)

    def answer() -> Factors:
        layers = zip(factored(batch.model), factored(model).values(), strict=True)
        return {name: (layer.weight.kfac[1], layer.weight.kfac[0]) for name, layer in layers}

    def call() -> Drawn:
        backward(KFAC(mc_samples=1))
        return Drawn(answer)

    return call


def product(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Tensor]]:
    from backpack.hessianfree.ggnvp import ggn_vector_product

    model, positions = without_positions(batch)
    v = list(split(direction(batch), batch.model).values())
    targets = labels.flatten()

    def call() -> Callable[[], Tensor]:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivatives
            logits = model(batch.inputs)
            loss = functional.cross_entropy(logits, targets)
            pieces = ggn_vector_product(loss, logits, model, v)
        return lambda: positions * flat(pieces)

    return call


BACKPACK = Peer(
    "BackPACK",
    "backpack-for-pytorch",
    {
        **on(
            "W1 W2 W3 W4",
            {"diagonal": diagonal, "Kronecker factors": kronecker, "product, first": product},
        ),
        **on("W1 W2", {"diagonal, exact": diagonal_exact}),
    },
)
