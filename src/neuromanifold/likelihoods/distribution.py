"""Any `torch.distributions.Distribution` as a likelihood."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Gumbel,
    HalfNormal,
    Laplace,
    Pareto,
    TransformedDistribution,
    Uniform,
    kl_divergence,
)

from neuromanifold._typing import Outputs
from neuromanifold.errors import UnsupportedError
from neuromanifold.likelihoods._base import Likelihood, at_least_float32

__all__ = ["FromDistribution"]


@dataclass(frozen=True, eq=False)
class FromDistribution(Likelihood):
    """The distribution that `fn` makes of the outputs.

    The output Fisher is a sum over the support where that is finite, and otherwise the Hessian at
    θ' = θ of `KL(p_θ ‖ p_θ')`, by two automatic derivatives through torch's `kl_divergence`.

    Args:
        fn: takes the outputs `(N, ...)` and returns a distribution whose batch shape starts with N;
            further batch axes are independent and are summed over.

    Example:
        >>> import torch
        >>> from torch.distributions import Gamma
        >>> likelihood = FromDistribution(lambda f: Gamma(f[:, 0].exp(), f[:, 1].exp()))
        >>> outputs = torch.zeros(1, 2)
        >>> likelihood.score(outputs, torch.tensor([2.0]))
        tensor([[ 1.2704, -1.0000]])
    """

    fn: Callable[[Tensor], Distribution]

    def distribution(self, outputs: Outputs) -> Distribution:
        """What `fn` returns, in float32 at least."""
        outputs = at_least_float32(self.canonical(outputs))
        distribution = self.fn(outputs)
        if not isinstance(distribution, Distribution):
            raise TypeError(
                f"fn must return a torch.distributions.Distribution, "
                f"got {type(distribution).__name__}."
            )
        if distribution.batch_shape[:1] != outputs.shape[:1]:
            raise ValueError(
                f"fn must return a distribution whose batch shape starts with the "
                f"{len(outputs)} samples, got batch shape {tuple(distribution.batch_shape)} and "
                f"event shape {tuple(distribution.event_shape)} for outputs of shape "
                f"{tuple(outputs.shape)}."
            )
        return distribution

    def fisher_columns(self, outputs: Tensor) -> Iterator[Tensor]:
        """`√p_y score(y)` over a finite support, else the columns of a root of the KL Hessian."""
        outputs = self.canonical(outputs).detach()
        support = self._finite_support(outputs)
        if support is not None:
            for targets, probability in zip(*support, strict=True):
                root = probability.sqrt().reshape(-1, *[1] * (outputs.ndim - 1))
                yield (root * self.score(outputs, targets)).to(outputs.dtype)
            return
        values, vectors = torch.linalg.eigh(self._kl_hessian(at_least_float32(outputs)))
        # Rounding leaves eigenvalues of a singular Fisher slightly off zero, on either side.
        rounding = values.shape[-1] * torch.finfo(values.dtype).eps * values[:, -1:].clamp(min=0)
        columns = vectors * values.where(values > rounding, 0).sqrt().unsqueeze(-2)
        for column in columns.unbind(-1):
            yield column.reshape(outputs.shape).to(outputs.dtype)

    def num_columns(self, outputs: Outputs) -> int:
        """Size of the support, or number of output entries of a sample."""
        outputs = self.canonical(outputs).detach()
        support = self._finite_support(outputs)
        return outputs[0].numel() if support is None else len(support[0])

    def _kl_hessian(self, outputs: Tensor) -> Tensor:
        """Hessian of `KL(p_θ ‖ p_θ')` in θ' at θ, `(N, E, E)`, E the output entries of a sample."""
        theta = outputs.clone().requires_grad_()
        with torch.enable_grad():
            moving = self.distribution(theta)
            self._require_smooth_kl(moving, theta)
            try:
                kl = kl_divergence(self.distribution(outputs), moving)
            except NotImplementedError:
                raise self._no_columns("torch has no KL divergence for it") from None
            (gradient,) = torch.autograd.grad(kl.sum(), theta, create_graph=True)
            rows = [
                torch.autograd.grad(entry.sum(), theta, retain_graph=True)[0]
                for entry in gradient.reshape(len(theta), -1).unbind(1)
            ]
        return torch.stack(rows, dim=1).reshape(len(theta), len(rows), -1)

    def _require_smooth_kl(self, distribution: Distribution, theta: Tensor) -> None:
        """Refuse where torch's KL divergence exists but its Hessian is not the Fisher."""
        if isinstance(distribution, (Uniform, Pareto)):
            raise self._no_columns("its support moves with the outputs, so no Fisher exists")
        if isinstance(distribution, Laplace):
            raise self._no_columns("its KL divergence has a kink where the two arguments agree")
        if isinstance(distribution, (Gumbel, HalfNormal)):
            return  # Transformed distributions, but torch knows their KL divergence itself.
        if isinstance(distribution, TransformedDistribution):
            base = distribution.base_dist
            x = theta.new_zeros(base.batch_shape + base.event_shape)
            for transform in distribution.transforms:
                x = transform(x)
            if x.requires_grad:
                raise self._no_columns("its transforms depend on the outputs, which KL overlooks")
            if not all(transform.bijective for transform in distribution.transforms):
                raise self._no_columns("its transforms are not one-to-one, which KL overlooks")
        if hasattr(distribution, "base_dist"):
            self._require_smooth_kl(distribution.base_dist, theta)

    def _no_columns(self, reason: str) -> UnsupportedError:
        return UnsupportedError(
            f"The output Fisher of {self!r} has no exact form: {reason}. Use an estimator that "
            f"needs only the score and samples: MonteCarlo()."
        )
