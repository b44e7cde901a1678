"""Second derivatives of the log-probability of labels drawn from the model (papers.md §3.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from neuromanifold._typing import Params
from neuromanifold.errors import UnsupportedError
from neuromanifold.estimators._base import Estimator
from neuromanifold.estimators.moments import Moments
from neuromanifold.likelihoods import Likelihood

__all__ = ["Hessian", "Surprise"]

Surprise = Callable[[Tensor], Tensor]
"""`−log p` of labels that are held fixed, `(N,)` nats, as a function of the outputs."""


@dataclass(frozen=True)
class Hessian(Estimator):
    """Unbiased: the mean of `−∂² log p/∂θ²` over `samples` labels drawn for each input.

    Inside a layer of a piecewise-linear network, and in the last layer of any network, the label
    drops out of the second derivative for natural parameters (`nm.Categorical`, `nm.Bernoulli`,
    `nm.Poisson`, `nm.Gaussian`): there the estimate is exact. Elsewhere it varies, and the matrix
    may have negative eigenvalues.

    For `nm.Diagonal`, `nm.BlockDiagonal`, `nm.Dense` and `nm.Implicit`: the other structures are
    made of outer products of gradients, and this matrix is none.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(3, 4), torch.randn(8, 3)
        >>> F = nm.fisher(model, nm.Categorical(), x, nm.Dense(), estimator=nm.Hessian())
        >>> exact = nm.fisher(model, nm.Categorical(), x, nm.Dense(), estimator=nm.Exact())
        >>> torch.allclose(F.to_dense(), exact.to_dense(), atol=1e-6)
        True
    """

    samples: int = 1
    random = True

    @property
    def draws(self) -> int:
        """Labels for each input."""
        return self.samples

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"Hessian draws at least 1 label per input, got {self.samples}.")

    def surprise(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor | None,
        *,
        generator: torch.Generator | None = None,
    ) -> Surprise:
        """Draw labels; what is differentiated twice is their `−log p`, averaged over draws.

        Args:
            likelihood: what the outputs mean.
            outputs: `(N, ...)`, detached: where labels are drawn.
            targets: labels of the data, or None. Positions that they mark as ignored are constant.
            generator: source of randomness.
        """
        draws = likelihood.sample(outputs, self.samples, generator=generator)
        constant = outputs - likelihood.mask_cotangent(outputs, outputs, targets)

        def surprise(moving: Tensor) -> Tensor:
            seen = likelihood.mask_cotangent(moving, outputs, targets) + constant
            log_prob = [likelihood.log_prob(seen, labels) for labels in draws]
            return -torch.stack(log_prob).mean(dim=0)

        return surprise

    def cotangents(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor | None,
        *,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """There are none."""
        self._refuse()

    def num_sweeps(self, likelihood: Likelihood, outputs: Tensor) -> int:
        """There are no sweeps."""
        self._refuse()

    def output_product(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor | None,
        v: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """There is none: the matrix is not made of the outputs' alone."""
        self._refuse()

    def noise(self, moments: Moments) -> dict[str, Params]:
        """Not made of first derivatives."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UnsupportedError(
            f"{self!r} is made of second derivatives, so it is no sum of outer products of "
            f"gradients, and what was asked for is made of these. It is measured by nm.Diagonal(), "
            f"nm.BlockDiagonal(), nm.Dense() and nm.Implicit(), without max_bytes=... or "
            f"nm.forecast(...). For other structures use nm.MonteCarlo() or nm.Exact(); its "
            f"variance is told by nm.variance.second_derivative(...)."
        )
