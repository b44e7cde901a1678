"""The two natural gradients of a network with hidden units, side by side (papers.md §5.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuromanifold._typing import Params
from neuromanifold.belief.datasets import Patterns
from neuromanifold.belief.networks import SigmoidBeliefNetwork
from neuromanifold.linalg import psd

__all__ = ["GradientComparison", "compare_gradients", "compare_natural_gradients"]


@dataclass(frozen=True)
class GradientComparison:
    """Natural gradients in the geometry of all units, and in that of the visible ones.

    Both are ascent directions for the same objective, a function of the visible distribution, and
    are compared as changes of that distribution: lengths and angles are in the visible metric.

    Attributes:
        full: `ξ = G⁺ g`, `(P,)`.
        visible: `ξ_V = G_V⁺ g`, the steepest of all changes of the visible distribution, `(P,)`.
        full_rate: `g · ξ`, what a short step along ξ gains, nats per unit of step.
        visible_rate: `g · ξ_V`, which is never less.
        cosine: of the angle between the two.
        distance: length of `ξ − ξ_V` in units of that of `ξ_V`.
        missing: `min z · (G − G_V) z / z · G_V z` over all z that change the visible distribution
            as ξ_V does. 0 if one of them is horizontal: it leaves the hidden units, given the
            visible ones, as they are.
    """

    full: Tensor
    visible: Tensor
    full_rate: Tensor
    visible_rate: Tensor
    cosine: Tensor
    distance: Tensor
    missing: Tensor

    @property
    def agree(self) -> bool:
        """Whether both change the visible distribution alike: whether a lift is horizontal."""
        return bool(self.missing < self.missing.new_tensor(torch.finfo(self.full.dtype).eps).sqrt())

    def __str__(self) -> str:
        return (
            f"gain per step: {float(self.visible_rate):.3g} nats visible, "
            f"{float(self.full_rate):.3g} full; cosine {float(self.cosine):.3f}; "
            f"they {'agree' if self.agree else 'differ'}"
        )


def compare_gradients(net: SigmoidBeliefNetwork, data: Tensor | Patterns) -> GradientComparison:
    """Compare the natural gradients of the mean log-likelihood, exactly, by enumeration.

    Args:
        net: a small network, best in float64.
        data: visible values `(N, n_v)` of equal weight, or patterns with probabilities.

    Returns:
        Directions in the order of `net.named_parameters()`, and how they differ.

    Raises:
        TooLargeError: If there are too many states to enumerate.
        UnsupportedError: If leaves are Gaussian.

    Example:
        >>> from neuromanifold.belief import SigmoidBeliefNetwork
        >>> from neuromanifold.belief.datasets import bars_and_stripes
        >>> generator = torch.Generator().manual_seed(0)
        >>> net = SigmoidBeliefNetwork([2, 4], generator=generator, dtype=torch.float64)
        >>> found = compare_gradients(net, bars_and_stripes(2, dtype=torch.float64))
        >>> found.agree, bool(found.full_rate < found.visible_rate)
        (False, True)
    """
    if isinstance(data, Patterns):
        states, probabilities = data.states, data.probabilities
    else:
        states, probabilities = data, data.new_full((len(data),), 1 / len(data))
    with torch.enable_grad():
        objective = (probabilities * net.exact_log_likelihood(states)).sum()
        parameters = dict(net.named_parameters())
        parts = torch.autograd.grad(objective, list(parameters.values()))
    gradient: Params = dict(zip(parameters, parts, strict=True))
    return compare_natural_gradients(
        net.fisher().to_dense(), net.visible_fisher().to_dense(), net.layout.flatten(gradient)
    )


def compare_natural_gradients(
    full: Tensor, visible: Tensor, gradient: Tensor
) -> GradientComparison:
    """Compare the natural gradients of any model with hidden variables.

    Args:
        full: Fisher matrix of all variables, `(P, P)`.
        visible: Fisher matrix of the visible ones, `(P, P)`.
        gradient: of a function of the visible distribution, `(P,)`.

    Example:
        >>> full = torch.diag(torch.tensor([1.0, 2.0]))
        >>> visible = torch.diag(torch.tensor([1.0, 0.5]))
        >>> found = compare_natural_gradients(full, visible, torch.tensor([1.0, 1.0]))
        >>> print(found)
        gain per step: 3 nats visible, 1.5 full; cosine 0.816; they differ
    """
    values, vectors = psd.eigh(visible)
    seen = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    kernel = vectors[:, ~seen]
    lift = vectors[:, seen] @ ((vectors[:, seen].mT @ gradient) / values[seen])
    natural = _pseudo_inverse(full) @ gradient

    # Of all lifts, lift + kernel @ c, the one that misses least.
    hidden = full - visible
    shift = _pseudo_inverse(kernel.mT @ hidden @ kernel) @ (kernel.mT @ (hidden @ lift))
    best = lift - kernel @ shift

    def motion(direction: Tensor) -> Tensor:
        # Not as a product with the matrix: what is large in its kernel would leave rounding.
        return values[seen].sqrt() * (vectors[:, seen].mT @ direction)

    length = motion(lift).norm()
    return GradientComparison(
        full=natural,
        visible=lift,
        full_rate=gradient @ natural,
        visible_rate=gradient @ lift,
        cosine=(motion(natural) @ motion(lift)) / (motion(natural).norm() * length),
        distance=motion(natural - lift).norm() / length,
        missing=(best @ hidden @ best).clamp(min=0) / length.square(),
    )


def _pseudo_inverse(matrix: Tensor) -> Tensor:
    if not len(matrix):
        return matrix
    return torch.linalg.pinv(matrix, hermitian=True)
