"""The natural gradient of each batch by products with its Fisher matrix alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from neuromanifold._typing import Params
from neuromanifold.capture import Batch
from neuromanifold.errors import NonFiniteError
from neuromanifold.estimators import Estimator, Exact, MonteCarlo
from neuromanifold.likelihoods import Likelihood
from neuromanifold.linalg.krylov import conjugate_gradients
from neuromanifold.operators import FisherOperator
from neuromanifold.optim.exact import ExactNaturalGradient
from neuromanifold.structures import Diagonal, Implicit

__all__ = ["ImplicitNaturalGradient", "implicit"]

_POWER = 0.75
"""Of the diagonal that preconditions: the whole of it is a poor picture of the matrix."""


class ImplicitNaturalGradient(ExactNaturalGradient):
    """Steps by the whole Fisher matrix of the batch, without any matrix.

    The step is that of `nm.optim.ExactNaturalGradient`,

        δ = momentum · δ' − (F + damping)⁻¹ (g + momentum · F δ')

    with the system solved by a fixed number of steps of conjugate gradients. They begin at
    `δ = momentum · δ'`, a part of the last step δ', and each takes one product with F, about as
    long as two backward passes; a training step takes two products more. Memory is that of a
    backward pass and a few gradients.

    Conjugate gradients are preconditioned by `(D + damping)^¾`, D a moving average of squared
    gradients of sampled labels, which costs one backward pass per step.

    While F is measured, the model is in evaluation mode: dropout is off, and batches are
    normalised with their running statistics.

    Args:
        model: that is trained; all its parameters with a gradient move.
        likelihood: what its outputs mean.
        steps: of conjugate gradients.
        decay: of earlier squared gradients, in [0, 1).
        estimator: which Fisher matrix the products are with: the exact one by default, which costs
            no more than that of sampled labels.
        **options: `lr`, `momentum`, `damping`, `kl_max`, `weight_decay`, `per`, `forward` and
            `generator`, as those of `nm.optim.ExactNaturalGradient`.

    Raises:
        ValueError: If a number makes no sense.
        UnsupportedError: When a model is called that is distributed over processes.

    Source: Martens, *Deep learning via Hessian-free optimization*, ICML 2010, for the start and the
    preconditioner, which there is of gradients with true labels.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x, y = torch.nn.Linear(4, 3), torch.randn(32, 4), torch.randint(3, (32,))
        >>> opt = nm.optim.implicit(model, nm.Categorical(), lr=0.5, steps=5)
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     loss = torch.nn.functional.cross_entropy(model(x), y)
        ...     loss.backward()
        ...     opt.step()
        >>> opt.skipped
        0
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        steps: int = 10,
        decay: float = 0.95,
        estimator: Estimator | None = None,
        **options: Any,
    ) -> None:
        if not (isinstance(steps, int) and steps >= 1):
            raise ValueError(
                f"steps counts the steps of conjugate gradients, at least 1, got {steps!r}."
            )
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay!r}.")
        estimator = Exact() if estimator is None else estimator
        super().__init__(model, likelihood, estimator=estimator, **options)
        self.param_groups[0].update(cg_steps=steps, decay=decay)

    def _move(self, gradients: Params, batches: list[Batch]) -> None:
        # Products repeat the forward pass, and dropout would draw other masks in each.
        with _evaluating(self.model):
            super()._move(gradients, batches)

    def _measured(self, batches: list[Batch], names: list[str]) -> FisherOperator:
        sampled = self._fisher(batches, names, Diagonal(), MonteCarlo(1)).diagonal()
        if not all(bool(torch.isfinite(squares).all()) for squares in sampled.values()):
            raise NonFiniteError("The squared gradients hold NaN or infinity.")
        fresh, named = 1 - self.param_groups[0]["decay"], dict(self.model.named_parameters())
        for name, squares in sampled.items():
            state, squares = self.state[named[name]], squares.to(named[name].dtype)
            state["squares"] = torch.lerp(state.get("squares", squares), squares, fresh)
        return self._fisher(batches, names, Implicit(), self.estimator)

    def _solved(self, matrix: FisherOperator, v: Tensor, damping: float) -> Tensor:
        """About `(F + damping)⁻¹ v`, by conjugate gradients."""
        named = dict(self.model.named_parameters())
        squares = {name: self.state[named[name]]["squares"] for name in matrix.layout.names}
        scales = (matrix.layout.flatten(squares).to(matrix.dtype) + damping) ** -_POWER
        return conjugate_gradients(
            lambda x: matrix @ x + damping * x,
            v,
            steps=self.param_groups[0]["cg_steps"],
            precondition=lambda x: scales * x,
        )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def implicit(model: nn.Module, likelihood: Likelihood, **options: Any) -> ImplicitNaturalGradient:
    """The natural gradient of each batch by conjugate gradients: any number of parameters, samples.

    Costs a dozen products with the Fisher matrix per step, and no memory to speak of.

    Args:
        model: that is trained.
        likelihood: what its outputs mean.
        **options: see `nm.optim.ImplicitNaturalGradient`.

    Source: Martens, *Deep learning via Hessian-free optimization*, ICML 2010.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x, y = torch.nn.Linear(3, 1), torch.randn(9, 3), torch.ones(9, 1)
        >>> opt = nm.optim.implicit(model, nm.Gaussian(), lr=1.0, damping=1e-6, kl_max=None)
        >>> loss = nm.Gaussian().loss(model(x), y)
        >>> loss.backward()
        >>> opt.step()
        >>> torch.allclose(model(x), y, atol=1e-3)
        True
    """
    return ImplicitNaturalGradient(model, likelihood, **options)
