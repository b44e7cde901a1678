"""Helmholtz machines: a generative network and a recognition network over the same layers."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from neuromanifold._estimate import Estimate
from neuromanifold.belief.networks import LayeredNetwork, SigmoidBeliefNetwork, check_graph
from neuromanifold.belief.units import BernoulliUnits, Units

__all__ = ["HelmholtzMachine", "RecognitionNetwork"]

CHUNK_NUMEL = 2**23
"""Numbers of all layers that are drawn at a time."""


class RecognitionNetwork(LayeredNetwork):
    """A bottom-up network `q(hidden | visible)` over the layers of a generative one.

    Layers keep the generative numbers, so both networks read the same `layers`: layer l has the
    parents l + 1 and, for each skip `(l, c)`, c. The visible layer, the last, is given.

    Args:
        sizes: units of each layer, roots first, visible last.
        coding: values for off and on of the hidden units.
        skips: the generative network's further pairs `(parent layer, child layer)`.
        bias: initial value of all biases; weights start as Glorot and Bengio (2010) draw them.
        generator: source of the initial weights.
        dtype: of the parameters.
        device: of the parameters.

    Raises:
        ValueError: If sizes, coding or skips make no network.

    Example:
        >>> import torch
        >>> q = RecognitionNetwork([2, 3, 4])
        >>> layers = q.sample(torch.ones(5, 4))
        >>> q.log_prob(layers).shape, q.modelled
        (torch.Size([5]), (0, 1))
    """

    def __init__(
        self,
        sizes: Sequence[int],
        coding: tuple[float, float] = (0, 1),
        skips: Collection[tuple[int, int]] = (),
        *,
        bias: float = 0.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_graph(sizes, coding, skips)
        last = len(sizes) - 1
        super().__init__(
            sizes,
            [BernoulliUnits(coding)] * last,
            {
                layer: (layer + 1, *sorted(c for p, c in skips if p == layer))
                for layer in reversed(range(last))
            },
            bias=bias,
            generator=generator,
            dtype=dtype,
            device=device,
        )

    def sample(self, v: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """Draw the hidden layers, from the one above the visible units upwards.

        Args:
            v: visible values, `(..., n_v)`.
            generator: source of randomness.

        Returns:
            Values of all layers, roots first, `v` last, each `(..., n_l)`.

        Raises:
            ValueError: If the values have another width.
        """
        if v.shape[-1] != self.sizes[-1]:
            raise ValueError(
                f"Visible values have the shape (..., {self.sizes[-1]}), got {tuple(v.shape)}."
            )
        hidden: list[Tensor | None] = [None] * (len(self.sizes) - 1)
        with torch.no_grad():
            return self._complete([*hidden, v], v.shape[:-1], generator)

    def log_prob(self, layers: Sequence[Tensor]) -> Tensor:
        """`log q(hidden | visible)` of values of all layers, nats, `(N,)`; differentiable.

        Raises:
            ValueError: If there is not one tensor of the right width for each layer.
        """
        self.check(layers)
        return torch.stack(self.log_conditionals(layers)).sum(0)

    def extra_repr(self) -> str:
        """Sizes and units."""
        return f"{list(self.sizes)}, hidden={self.units[0]!r}"


class HelmholtzMachine(nn.Module):
    """A generative network p(v, h) and a recognition network q(h | v) that stands for p(h | v).

    Args:
        sizes: units of each layer, roots first, visible last.
        coding: the values that stand for off and on, usually `(0, 1)` or `(-1, 1)`.
        skips: further pairs `(parent layer, child layer)`; recognition goes the other way.
        leaves: visible units: "bernoulli", "gaussian", "categorical", or an object.
        bias: initial value of all biases; weights start as Glorot and Bengio (2010) draw them.
        generator: source of the initial weights.
        dtype: of the parameters.
        device: of the parameters.

    Attributes:
        generative: a `SigmoidBeliefNetwork`.
        recognition: a `RecognitionNetwork`; both read `layers` in the same order.

    Raises:
        ValueError: If sizes, coding or skips make no network.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> machine = HelmholtzMachine([1, 6, 9], coding=(-1, 1), bias=-1, generator=generator)
        >>> v = machine.generative.sample(20, generator)[-1]
        >>> print(machine.log_likelihood(v, samples=1000, generator=generator))
        -5.24 ± 0.21 (20 samples)
    """

    def __init__(
        self,
        sizes: Sequence[int],
        coding: tuple[float, float] = (0, 1),
        skips: Collection[tuple[int, int]] = (),
        leaves: str | Units = "bernoulli",
        *,
        bias: float = 0.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.generative = SigmoidBeliefNetwork(
            sizes, coding, skips, leaves, bias=bias, generator=generator, dtype=dtype, device=device
        )
        self.recognition = RecognitionNetwork(
            sizes, coding, skips, bias=bias, generator=generator, dtype=dtype, device=device
        )

    def log_weights(self, layers: Sequence[Tensor]) -> Tensor:
        """`log p(v, h) − log q(h | v)` of values of all layers, nats, `(N,)`; differentiable."""
        return self.generative.log_joint(layers) - self.recognition.log_prob(layers)

    def log_likelihood(
        self,
        v: Tensor,
        samples: int = 1000,
        generator: torch.Generator | None = None,
        *,
        per_row: bool = False,
    ) -> Estimate:
        r"""Estimate the mean of `log p(v)` over rows by importance sampling, nats.

        For each row `log (1/K) Σ_k w_k`, with `w_k = p(v, h_k) / q(h_k | v)` and K samples of q. It
        is a lower bound in expectation: the mean of w is unbiased, its logarithm lies below the
        truth by about half its variance, `var(w) / (2 K mean(w)²)` (Burda, Grosse and
        Salakhutdinov 2016).

        Standard errors are those of the delta method, from the sample variance of the weights.
        Where a few weights outweigh all others both value and error may be too small: compare
        with a larger K, or with `generative.exact_log_likelihood(v)` for small networks.

        Args:
            v: visible values, `(N, n_v)`.
            samples: K, at least 2.
            generator: source of randomness.
            per_row: whether to give each row's own estimate, `(N,)`, instead of their mean.

        Returns:
            The value with its variances by source: "draws" because K is finite; of the mean also
            "data", because the rows are a sample.

        Raises:
            ValueError: If K is less than 2, or the values have another width.
        """
        if samples < 2:
            raise ValueError(f"log_likelihood takes at least 2 samples per row, got {samples}.")
        sums = torch.stack([v.new_full((len(v),), -math.inf)] * 2)  # of w and w², (2, N), logs
        with torch.no_grad():
            for weights in self._weight_chunks(v, samples, generator):
                powers = torch.stack([weights.logsumexp(0), (2 * weights).logsumexp(0)])
                sums = torch.logaddexp(sums, powers)
        value = sums[0] - math.log(samples)
        # var(w) / (K mean(w)²) with the unbiased variance, from Σ w² / (Σ w)².
        shares = (sums[1] - 2 * sums[0]).exp()
        variance = (samples * shares - 1).clamp(min=0) / (samples - 1)
        if per_row:
            return Estimate(value, {"draws": variance}, len(v), samples)
        drawn = variance.mean() / len(v)
        # What rows differ by holds the error of each, which is counted by itself.
        spread = (value.var() / len(v) - drawn).clamp(min=0) if len(v) > 1 else drawn.new_zeros(())
        return Estimate(value.mean(), {"data": spread, "draws": drawn}, len(v), samples)

    def _weight_chunks(
        self, v: Tensor, samples: int, generator: torch.Generator | None
    ) -> Iterator[Tensor]:
        """Logarithms of importance weights, `(k, N)` at a time."""
        numel = v.shape[0] * sum(self.generative.sizes)
        chunk = max(CHUNK_NUMEL // max(numel, 1), 1)
        for start in range(0, samples, chunk):
            rows = v.expand(min(chunk, samples - start), *v.shape)
            yield self.log_weights(self.recognition.sample(rows, generator))
