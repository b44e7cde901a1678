"""nngeometry: representations of the covariance of the Jacobian of any function of the outputs.

With the log-probability of given labels as that function, it is the Fisher matrix of those labels.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from benchmarks.peers._peer import (
    Factors,
    Named,
    Peer,
    apart,
    copied,
    factored,
    flat,
    joint,
    on,
    split,
)
from benchmarks.workloads import DAMPING, Batch, direction

__all__ = ["NNGEOMETRY"]


class Own:
    """A copy of a batch as nngeometry takes it.

    Attributes:
        model: the copy.
        generator: of Jacobians of log-probabilities of the labels.
        exact: of the outputs times a root of their Fisher matrix.
        loader: gives all samples as one batch, without copying them one by one.
    """

    def __init__(self, batch: Batch, labels: Tensor, *, factored_only: bool = False) -> None:
        from nngeometry.backend import TorchHooksJacobianBackend
        from nngeometry.layercollection import LayerCollection

        own = copied(batch)
        self.model = own.model
        if factored_only:
            self.layers = LayerCollection()
            for layer in factored(own.model).values():
                self.layers.add_layer_from_model(own.model, layer)
        else:
            self.layers = LayerCollection.from_model(own.model)
        self.generator = TorchHooksJacobianBackend(
            own.model, function=self.log_probability, layer_collection=self.layers
        )
        self.loader: DataLoader[Any] = DataLoader(
            range(len(labels)),  # type: ignore[arg-type]
            batch_size=len(labels),
            collate_fn=lambda _: (own.inputs.detach(), labels),
        )

    def log_probability(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Of each sample's labels, (N, 1)."""
        logits = self.model(inputs)
        terms = functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        return -terms.view(len(labels), -1).sum(dim=1, keepdim=True)

    def vector(self, flat_vector: Tensor) -> Any:
        """In its form: by layer, as tuples of parameters."""
        from nngeometry.object import PVector

        v = split(flat_vector, self.model)
        pieces: dict[str, tuple[Tensor, ...]] = {}
        for name, p in v.items():
            layer = name.rpartition(".")[0]
            if layer in self.layers.layers:
                pieces[layer] = (*pieces.get(layer, ()), p)
        return PVector(self.layers, dict_repr=pieces)

    def flat(self, vector: Any) -> Tensor:
        """A vector of its form as (P,), zero outside of its layers."""
        pieces = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}
        for layer, found in vector.to_dict().items():
            pieces |= dict(zip((f"{layer}.weight", f"{layer}.bias"), found, strict=False))
        return flat(pieces.values())


def diagonal(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Named]]:
    from nngeometry.object import PMatDiag

    own = Own(batch, labels)

    def call() -> Callable[[], Named]:
        F = PMatDiag(own.generator, examples=own.loader)
        return lambda: split(F.get_diag(), own.model)

    return call


def diagonal_exact(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Named]]:
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDiag

    own = Own(batch, labels)

    def call() -> Callable[[], Named]:
        F = FIM(own.model, own.loader, PMatDiag, device=str(batch.inputs.device))
        return lambda: split(F.get_diag(), own.model)

    return call


def product_exact(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Tensor]]:
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatImplicit

    own = Own(batch, labels)
    v = own.vector(direction(batch))

    def call() -> Callable[[], Tensor]:
        F = FIM(own.model, own.loader, PMatImplicit, device=str(batch.inputs.device))
        product = F.mv(v)
        return lambda: own.flat(product)

    return call


def product(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Tensor]]:
    from nngeometry.object import PMatImplicit

    own = Own(batch, labels)
    v = own.vector(direction(batch))
    F = PMatImplicit(own.generator, examples=own.loader)

    def call() -> Callable[[], Tensor]:
        product = F.mv(v)
        return lambda: own.flat(product)

    return call


def kronecker(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Factors]]:
    from nngeometry.object import PMatKFAC

    own = Own(batch, labels, factored_only=True)

    def call() -> Callable[[], Factors]:
        F = PMatKFAC(own.generator, examples=own.loader)
        return lambda: dict(F.data)

    return call


def solve(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Tensor]]:
    """Of the eigenvalues of its factors: `PMatKFAC.solve` damps the factors, not their product."""
    from nngeometry.object import PMatEKFAC, PMatKFAC

    own = Own(batch, labels, factored_only=True)
    factors = PMatKFAC(own.generator, examples=own.loader).data
    kept = SimpleNamespace(layer_collection=own.layers, get_kfac_blocks=lambda _: dict(factors))
    v = own.vector(direction(batch))

    def call() -> Callable[[], Tensor]:
        x = PMatEKFAC(kept, examples=own.loader).solve(v, regul=DAMPING)
        return lambda: own.flat(x)

    return call


def ekfac(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Tensor]]:
    from nngeometry.object import PMatEKFAC

    own = Own(batch, labels, factored_only=True)
    v = own.vector(direction(batch))

    def call() -> Callable[[], Tensor]:
        F = PMatEKFAC(own.generator, examples=own.loader)
        F.update_diag(own.loader)
        return lambda: own.flat(F.mv(v))

    return call


def quasi_diagonal(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Tensor]]:
    """Its product leaves out the couplings of weights through the bias; they are added here."""
    from nngeometry.object import PMatQuasiDiag

    own = Own(batch, labels)
    v = split(direction(batch), own.model)

    def answer(statistics: Any) -> Tensor:
        products = {}
        for name, layer in factored(own.model).items():
            diagonal, couplings = statistics[name]
            squares, bias = diagonal.split([layer.weight.numel(), layer.bias.numel()])
            root = bias.sqrt()[:, None]
            row = torch.cat([couplings.flatten(1) / root, root], dim=1)
            rest = torch.cat([squares.view(len(bias), -1), bias[:, None]], dim=1) - row.square()
            rows = joint(v, name, layer)
            products[name] = rest * rows + row * (row * rows).sum(dim=1, keepdim=True)
        return apart(own.model, products)

    def call() -> Callable[[], Tensor]:
        F = PMatQuasiDiag(own.generator, examples=own.loader)
        return lambda: answer(F.data)

    return call


def gram(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Tensor]]:
    from nngeometry.object import FMatDense

    own = Own(batch, labels)

    def call() -> Callable[[], Tensor]:
        K = FMatDense(own.generator, examples=own.loader)
        return lambda: K.to_torch()[0, :, 0, :]

    return call


def gram_spectrum(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Tensor]]:
    from nngeometry.object import FMatDense

    own = Own(batch, labels)

    def call() -> Callable[[], Tensor]:
        K = FMatDense(own.generator, examples=own.loader)
        K.compute_eigendecomposition()
        return lambda: K.evals.flip(0) / len(labels)

    return call


NNGEOMETRY = Peer(
    "nngeometry",
    "nngeometry",
    {
        **on(
            "W1 W2 W3 W4",
            {
                "diagonal": diagonal,
                "product, first": product_exact,
                "product, records kept": product,
                "Kronecker factors": kronecker,
            },
        ),
        **on(
            "W1 W2",
            {
                "diagonal, exact": diagonal_exact,
                "Kronecker solve": solve,
                "EK-FAC fit": ekfac,
                "quasi-diagonal": quasi_diagonal,
            },
        ),
        **on("W1", {"Gram matrix, NTK": gram, "Gram spectrum, all eigenvalues": gram_spectrum}),
    },
)
