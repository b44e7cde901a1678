"""The contract of an estimator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from neuromanifold._typing import Params
from neuromanifold.errors import UnsupportedError
from neuromanifold.estimators.moments import Moments
from neuromanifold.likelihoods import Likelihood

__all__ = ["Estimator"]


class Estimator(ABC):
    """Chooses the cotangents of a batch.

    Attributes:
        random: whether two passes over the same data differ unless the generator is reset.
        needs_targets: whether the data must come with targets.
        independent_units: whether gradients get random signs at the output of every layer, on their
            way back.
    """

    random: bool
    needs_targets: bool = False
    independent_units: bool = False

    @property
    def draws(self) -> int:
        """Labels or probes that are drawn for each input; 0 if nothing is drawn."""
        return 0

    @abstractmethod
    def cotangents(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor | None,
        *,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Cotangents, one sweep each.

        Args:
            likelihood: what the outputs mean.
            outputs: `(N, ...)`, detached.
            targets: labels of the data, or None. Positions that they mark as ignored get zero.
            generator: source of randomness.

        Yields:
            Tensors like `outputs`; the (expected) sum of their outer products is the output Fisher.
        """

    @abstractmethod
    def num_sweeps(self, likelihood: Likelihood, outputs: Tensor) -> int:
        """V, how many cotangents a batch gets."""

    def noise(self, moments: Moments) -> dict[str, Params]:
        """Variance of the diagonal that comes from what is drawn for the N inputs, by its source.

        Args:
            moments: of the model's scores at these inputs.

        Raises:
            UnsupportedError: If the estimator has no closed form.
        """
        raise UnsupportedError(
            f"The variance of {self!r} has no closed form here. Use nm.MonteCarlo(), "
            f"nm.RandomSigns() or nm.Exact(), or estimate it from draws by nm.estimate(...)."
        )

    def require_columns(self, moments: Moments) -> None:
        """Refuse moments of an output Fisher that was itself measured from labels.

        Raises:
            UnsupportedError: If it was.
        """
        if moments.quartic is None:
            raise UnsupportedError(
                f"{self!r} needs the output Fisher in exact form, and this likelihood has none. "
                f"Use nm.MonteCarlo(), which needs only its score and samples."
            )

    def noise_errors(self, moments: Moments) -> dict[str, Params]:
        """Standard errors of `noise`, for the sources where it is measured itself."""
        return {}

    def noise_bounds(self, moments: Moments) -> dict[str, Params]:
        """Upper bounds on `noise`, for the sources that have one.

        Args:
            moments: with the bound on the fourth cumulant.
        """
        return {}

    def output_product(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor | None,
        v: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`Σ_v u_v (u_vᵀ v)` per sample, for vectors `v (R, *outputs.shape)`."""
        total = torch.zeros_like(v)
        for u in self.cotangents(likelihood, outputs, targets, generator=generator):
            inner = (u * v).reshape(*v.shape[:2], -1).sum(dim=2)  # (R, N)
            total += u * inner.reshape(*inner.shape, *[1] * (outputs.ndim - 1))
        return total
