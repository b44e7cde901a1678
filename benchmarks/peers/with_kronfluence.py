"""kronfluence: K-FAC and EK-FAC for influence functions, on wrapped layers.

Its analyzer writes all factors to files and reads them again; the functions that it calls are used
here without that, which is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.peers._peer import (
    Factors,
    Peer,
    apart,
    copied,
    factored,
    joint,
    negative_log_likelihood,
    on,
    split,
)
from benchmarks.workloads import Batch, direction

__all__ = ["KRONFLUENCE"]


class Own:
    """A wrapped copy of a batch's model, with its settings."""

    def __init__(self, batch: Batch, labels: Tensor) -> None:
        from kronfluence.analyzer import prepare_model
        from kronfluence.arguments import FactorArguments
        from kronfluence.task import Task
        from kronfluence.utils.state import State

        class Likelihood(Task):
            def compute_train_loss(
                self, batch: Any, model: nn.Module, sample: bool = False
            ) -> Tensor:
                inputs, labels = batch
                return negative_log_likelihood(model(inputs), labels)

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return self.compute_train_loss(batch, model)

        own = copied(batch)
        self.task = Likelihood()
        self.model = prepare_model(own.model, self.task)
        self.settings = FactorArguments(use_empirical_fisher=True)  # the labels are sampled ones
        self.state = State(cpu=batch.inputs.device.type == "cpu")
        self.loader: DataLoader[Any] = DataLoader(
            range(len(labels)),  # type: ignore[arg-type]
            batch_size=len(labels),
            collate_fn=lambda _: (own.inputs, labels),
        )

    def covariances(self) -> Any:
        """Sums of outer products of inputs and of gradients."""
        from kronfluence.factor.covariance import fit_covariance_matrices_with_loader

        _, found = fit_covariance_matrices_with_loader(
            self.model, self.state, self.task, self.loader, self.settings, disable_tqdm=True
        )
        return found

    def eigen(self, covariances: Any) -> Any:
        """Eigenbases, in float64 as it recommends."""
        from kronfluence.factor.eigen import perform_eigendecomposition

        return perform_eigendecomposition(
            covariances, self.model, self.state, self.settings, disable_tqdm=True
        )

    def second_moments(self, eigen: Any) -> Any:
        """Of gradients in the eigenbases."""
        from kronfluence.factor.eigen import fit_lambda_matrices_with_loader

        _, found = fit_lambda_matrices_with_loader(
            self.model, self.state, self.task, self.loader, self.settings, eigen, disable_tqdm=True
        )
        return found


def kronecker(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Factors]]:
    own = Own(batch, labels)

    def answer(found: Any) -> Factors:
        inputs, gradients = found["activation_covariance"], found["gradient_covariance"]
        return {name: (inputs[name], gradients[name]) for name in inputs}

    def call() -> Callable[[], Factors]:
        found = own.covariances()
        return lambda: answer(found)

    return call


def ekfac(batch: Batch, labels: Tensor) -> Callable[[], Callable[[], Tensor]]:
    own = Own(batch, labels)
    v = split(direction(batch), batch.model)

    def answer(eigen: Any, moments: Any) -> Tensor:
        """It keeps eigenvectors on the CPU, wherever the model is."""
        bases = eigen["activation_eigenvectors"], eigen["gradient_eigenvectors"]
        products = {}
        for name, layer in factored(batch.model).items():
            rows = joint(v, name, layer)
            a, g, along = (x[name].to(rows.device) for x in (*bases, moments["lambda_matrix"]))
            products[name] = g @ ((g.mT @ rows @ a) * along) @ a.mT / len(labels)
        return apart(batch.model, products)

    def call() -> Callable[[], Tensor]:
        eigen = own.eigen(own.covariances())
        moments = own.second_moments(eigen)
        return lambda: answer(eigen, moments)

    return call


KRONFLUENCE = Peer(
    "kronfluence",
    "kronfluence",
    on("W1 W2 W3 W4", {"Kronecker factors": kronecker}) | on("W1 W2", {"EK-FAC fit": ekfac}),
)
