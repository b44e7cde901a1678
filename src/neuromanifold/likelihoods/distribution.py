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
    Independent,
    Laplace,
    Pareto,
    TransformedDistribution,
    Uniform,
    kl_divergence,
)

from neuromanifold._typing import Outputs
from neuromanifold.errors import UnsupportedError
from neuromanifold.likelihoods._base import ColumnCumulants, Likelihood, at_least_float32, sum_event

__all__ = ["FromDistribution"]


@dataclass(frozen=True, eq=False)
class FromDistribution(Likelihood):
    """The distribution that `fn` makes of the outputs.

    The output Fisher is a sum over the values of each independent target where these are finite in
    number, and otherwise the Hessian at θ' = θ of `KL(p_θ ‖ p_θ')`, by two automatic derivatives
    through torch's `kl_divergence`.

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
        leaf = outputs.requires_grad_()
        with torch.enable_grad():
            log_p = self._log_probabilities(leaf)
            rows = None if log_p is None else log_p.flatten(0, 1).unbind()
        if rows is not None:
            for of_value in rows:
                one = torch.ones_like(of_value)
                (score,) = torch.autograd.grad(of_value, leaf, one, retain_graph=True)
                root = (of_value.detach() / 2).exp().reshape(-1, *[1] * (leaf.ndim - 1))
                yield (root * score).to(leaf.dtype)
            return
        outputs = leaf.detach()
        values, vectors = torch.linalg.eigh(self._kl_hessian(at_least_float32(outputs)))
        # Rounding leaves eigenvalues of a singular Fisher slightly off zero, on either side.
        rounding = values.shape[-1] * torch.finfo(values.dtype).eps * values[:, -1:].clamp(min=0)
        columns = vectors * values.where(values > rounding, 0).sqrt().unsqueeze(-2)
        for column in columns.unbind(-1):
            yield column.reshape(outputs.shape).to(outputs.dtype)

    def column_cumulants(self, outputs: Tensor) -> ColumnCumulants | None:
        """Along `√p_y score(y)` of each target: `Σ_y γ_y⁴ / p_y − 3 (Σ_y γ_y²)²`."""
        log_p = self._log_probabilities(self.canonical(outputs).detach())
        if log_p is None:
            return None
        num_targets, size, _ = log_p.shape
        p = log_p.flatten(0, 1).exp()
        # A value without probability has no column either; below `tiny`, 1 / p is infinite.
        quartic = torch.where(p >= torch.finfo(p.dtype).tiny, 1 / p, 0)
        group = torch.arange(len(p), device=p.device) // size
        return ColumnCumulants(quartic, group, num_targets, -3.0, classes=True)

    def score_fourth_moment(self, outputs: Tensor, j: Tensor) -> Tensor:
        """`E (j · score)⁴`, `(..., N)`, over finite supports: cumulants of targets add up.

        Raises:
            UnsupportedError: If a support is infinite.
        """
        outputs = self.canonical(outputs).detach()
        cumulants = self.column_cumulants(outputs)
        if cumulants is None:
            return super().score_fourth_moment(outputs, j)
        j = at_least_float32(j)
        columns = self.fisher_columns(outputs)
        squares = torch.stack([sum_event(s * j, outputs.ndim - 1).square() for s in columns])
        a = cumulants.quartic.reshape(len(squares), *[1] * (squares.ndim - 2), -1)
        targets = squares.new_zeros(cumulants.num_groups, *squares.shape[1:])
        targets.index_add_(0, cumulants.group, squares)
        cumulant = (a * squares.square()).sum(0) + cumulants.squared * targets.square().sum(0)
        return cumulant + 3 * squares.sum(0).square()

    def num_columns(self, outputs: Outputs) -> int:
        """Values that the targets of a sample can take, or number of its output entries."""
        outputs = self.canonical(outputs).detach()
        log_p = self._log_probabilities(outputs)
        return outputs[0].numel() if log_p is None else log_p.shape[:2].numel()

    def _log_probabilities(self, outputs: Tensor) -> Tensor | None:
        """Of the S values of each of T independent targets, `(T, S, N)`; None if not finite."""
        distribution = self.distribution(outputs)
        while isinstance(distribution, Independent):
            distribution = distribution.base_dist
        if not distribution.has_enumerate_support:
            return None
        try:
            values = distribution.enumerate_support()
        except NotImplementedError:  # the support differs between samples
            return None
        log_p = distribution.log_prob(values)  # (S, N, *T)
        return log_p.reshape(*log_p.shape[:2], -1).movedim(2, 0)

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
