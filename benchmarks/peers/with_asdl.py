"""ASDL: operations in the hooks of layers. On PyPI it is `asdfghjkl`; its module is `asdl`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.peers._peer import (
    Factors,
    Named,
    Peer,
    apart,
    copied,
    factored,
    joint,
    on,
    split,
)
from benchmarks.workloads import Batch, direction

__all__ = ["ASDL"]


def measurement(
    batch: Batch, labels: Tensor, kind: str, shape: str, *, factored_only: bool = False
) -> tuple[Any, nn.Module]:
    """Its maker of one kind of Fisher matrix, and the copied model that keeps the result."""
    from asdl import FisherConfig, get_fisher_maker

    own = copied(batch)
    config = FisherConfig(
        fisher_type=kind,
        fisher_shapes=[shape],
        loss_type="cross_entropy",
        data_size=len(own.inputs),
        ignore_index=-100,
        ignore_modules=[nn.Embedding, nn.LayerNorm, nn.BatchNorm2d] if factored_only else None,
    )
    maker = get_fisher_maker(own.model, config)
    logits = maker.setup_model_call(own.model, own.inputs)
    maker.setup_loss_call(functional.cross_entropy, logits.flatten(0, -2), labels.flatten())
    maker.setup_logits_repr(logits)
    return maker, own.model


def diagonal(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Named]]:
    """With positions it sums squares, not gradients, over them, and so for wide convolutions.

    A 3×3 convolution of 256 channels at 8×8 was off by 63 % of its norm: where few positions meet
    many weights, it takes the formula that needs less memory, without products of two positions.
    """
    return diagonal_of("fisher_emp", batch, labels)


def diagonal_exact(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Named]]:
    return diagonal_of("fisher_exact", batch, labels)


def diagonal_of(kind: str, batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Named]]:
    maker, model = measurement(batch, labels, kind, "diag")

    def answer() -> Named:
        return {
            f"{name}.{parameter}": getattr(module.fisher.diag, parameter)
            for name, module in model.named_modules()
            for parameter, _ in module.named_parameters(recurse=False)
        }

    def call() -> Callable[[], Named]:
        maker.forward_and_backward()
        return answer

    return call


def product(kind: str) -> Callable[[Batch, Tensor], Callable[[], Callable[[], Tensor]]]:
    """With the full matrix; it forms per-sample gradients of all parameters."""

    def prepare(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Tensor]]:
        from asdl import ParamVector

        maker, model = measurement(batch, labels, kind, "full")
        v = ParamVector(list(model.parameters()), direction(batch))

        def call() -> Callable[[], Tensor]:
            maker.forward_and_backward(fvp=True, vec=v)
            return lambda: maker.load_fvp("full").get_flatten_vector()

        return call

    return prepare


def kronecker(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Factors]]:
    maker, model = measurement(batch, labels, "fisher_emp", "kron", factored_only=True)

    def answer() -> Factors:
        layers = factored(model).items()
        return {name: (m.fisher.kron.A, m.fisher.kron.B) for name, m in layers}

    def call() -> Callable[[], Factors]:
        maker.forward_and_backward()
        return answer

    return call


def unit_wise(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Tensor]]:
    maker, model = measurement(batch, labels, "fisher_emp", "unit_wise", factored_only=True)
    v = split(direction(batch), model)

    def answer() -> Tensor:
        products = {}
        for name, layer in factored(model).items():
            blocks, rows = layer.fisher.unit.data, joint(v, name, layer)
            products[name] = torch.einsum("oij,oj->oi", blocks, rows)
        return apart(model, products)

    def call() -> Callable[[], Tensor]:
        maker.forward_and_backward()
        return answer

    return call


ASDL = Peer(
    "asdfghjkl",
    "asdfghjkl",
    {
        **on("W1 W2 W3 W4", {"diagonal": diagonal, "Kronecker factors": kronecker}),
        **on("W1 W2", {"diagonal, exact": diagonal_exact}),
        **on("W1 W2", {"product, records kept": product("fisher_emp")}),
        **on("W2", {"product, first": product("fisher_exact"), "unit-wise": unit_wise}),
    },
    {("W1", "product, first"): "it was seen to take 1,560 passes forward and backward"},
)
