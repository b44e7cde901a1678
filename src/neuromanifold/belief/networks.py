"""Deep Bayesian networks: layers of units, each unit a small regression on its parents.

Layers are numbered from the roots, 0, to the visible leaves. The values of a network are
`layers: list[Tensor]`, one `(N, n_l)` per layer in coded values; leading axes may be any, not only
N. Source: Ay, Information Geometry 6 (2023), arXiv 2005.10791 (papers.md §5).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional

from neuromanifold._estimate import Estimate
from neuromanifold.belief import fishers, visible
from neuromanifold.belief.enumeration import state_chunks
from neuromanifold.belief.units import BernoulliUnits, CategoricalUnits, GaussianUnits, Units
from neuromanifold.belief.visible import MissingInformation
from neuromanifold.linalg import Block, Layout, Slot
from neuromanifold.operators import BlockOperator, FisherOperator

__all__ = ["LayeredNetwork", "SigmoidBeliefNetwork", "leaf_units"]


def leaf_units(leaves: str | Units, coding: tuple[float, float]) -> Units:
    """Visible units by name.

    Args:
        leaves: "bernoulli", "gaussian" (variance 1), "categorical" (one variable), or an object
            such as `GaussianUnits(variance=0.1)` or `CategoricalUnits(classes=10)`.
        coding: values of Bernoulli units.

    Raises:
        ValueError: If there are no such units.
    """
    if isinstance(leaves, Units):
        return leaves
    if leaves == "bernoulli":
        return BernoulliUnits(coding)
    if leaves == "gaussian":
        return GaussianUnits()
    if leaves == "categorical":
        return CategoricalUnits()
    raise ValueError(
        f'leaves is "bernoulli", "gaussian", "categorical" or an object such as '
        f"GaussianUnits(variance=0.1); got {leaves!r}."
    )


class LayeredNetwork(nn.Module):
    """A directed graph over layers of units: each layer is modelled given its parents, or given.

    Unit r of layer l has the logit `b_r + Σ W x` over all parents; parameters are called
    `biases.<layer>` and `weights.<layer>_<parent>`. Not for direct use: `SigmoidBeliefNetwork` and
    `RecognitionNetwork` are the two kinds.

    Args:
        sizes: units of each layer, roots first.
        units: of each layer.
        parents: of each layer that is modelled, in ancestral order: layers come after their
            parents.
        bias: initial value of all biases; weights start as Glorot and Bengio (2010) draw them.
        generator: source of the initial weights.
        dtype: of the parameters.
        device: of the parameters.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        units: Sequence[Units],
        parents: Mapping[int, tuple[int, ...]],
        *,
        bias: float,
        generator: torch.Generator | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.units = tuple(units)
        self.parents = dict(parents)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))

        self.biases = nn.ParameterDict(
            {str(layer): parameter(sizes[layer]) for layer in self.modelled}
        )
        self.weights = nn.ParameterDict(
            {
                f"{layer}_{p}": parameter(sizes[layer], sizes[p])
                for layer in self.modelled
                for p in parents[layer]
            }
        )
        self.reset_parameters(bias, generator)

    def reset_parameters(self, bias: float = 0.0, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew, uniform with variance 2 / (fan-in + fan-out), and set biases.

        Args:
            bias: their value; −1 starts sparse.
            generator: source of randomness.
        """
        for value in self.biases.values():
            nn.init.constant_(value, bias)
        for weight in self.weights.values():
            # Drawn where the generator is, so that one seed means one network everywhere.
            device = weight.device if generator is None else generator.device
            drawn = torch.empty_like(weight, device=device)
            nn.init.xavier_uniform_(drawn, generator=generator)
            with torch.no_grad():
                weight.copy_(drawn)

    # ---- the graph -------------------------------------------------------------------------

    @property
    def modelled(self) -> tuple[int, ...]:
        """Layers that the network has a distribution for, in ascending order."""
        return tuple(sorted(self.parents))

    @cached_property
    def layout(self) -> Layout:
        """Names and shapes of the parameters, for flat vectors."""
        return Layout({name: tuple(p.shape) for name, p in self.named_parameters()})

    @cached_property
    def blocks(self) -> dict[int, Block]:
        """The parameters of each modelled layer as one matrix `(1, n_l, fan-in + 1)`."""
        return {
            layer: Block(
                f"layers.{layer}",
                groups=1,
                fan_out=self.sizes[layer],
                slots=(
                    *(
                        Slot.plain(f"weights.{layer}_{p}", 1, self.sizes[layer], self.sizes[p])
                        for p in self.parents[layer]
                    ),
                    Slot.plain(f"biases.{layer}", 1, self.sizes[layer], 1),
                ),
                biased=True,
            )
            for layer in self.modelled
        }

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next(self.parameters()).device

    # ---- one layer given its parents -------------------------------------------------------

    def inputs(self, layers: Sequence[Tensor | None], layer: int) -> Tensor:
        """What the units of a layer see: values of all parents and a last 1, `(N, fan-in + 1)`.

        Of a root this is the 1 alone; N is that of the first layer that has values.
        """
        some = next(values for values in layers if values is not None)
        one = some.new_ones(*some.shape[:-1], 1)
        return torch.cat([*self._parent_values(layers, layer), one], dim=-1)

    def weight_matrix(self, layer: int) -> Tensor:
        """All weights of a layer side by side in the order of `inputs`, `(n_l, fan-in + 1)`."""
        weights = [self.weights[f"{layer}_{p}"] for p in self.parents[layer]]
        return torch.cat([*weights, self.biases[str(layer)][:, None]], dim=-1)

    def split(self, layer: int, matrix: Tensor) -> dict[str, Tensor]:
        """The inverse of `weight_matrix` for any matrix of its shape: parts by parameter name."""
        columns = [self.sizes[p] for p in self.parents[layer]]
        *weights, bias = matrix.split_with_sizes([*columns, 1], dim=-1)
        names = [f"weights.{layer}_{p}" for p in self.parents[layer]]
        return {**dict(zip(names, weights, strict=True)), f"biases.{layer}": bias[..., 0]}

    def logits(self, layers: Sequence[Tensor | None], layer: int) -> Tensor:
        """`b + Σ W x` over the parents, `(N, n_l)`; of a root, `(n_l,)`."""
        total: Tensor = self.biases[str(layer)]
        for p, values in zip(self.parents[layer], self._parent_values(layers, layer), strict=True):
            total = functional.linear(values, self.weights[f"{layer}_{p}"]) + total
        return total

    def probabilities(self, layers: Sequence[Tensor | None], layer: int) -> Tensor:
        """P(on) of a layer's units given its parents (mean, class probabilities), `(N, n_l)`."""
        return self.units[layer].mean(self.logits(layers, layer))

    def log_conditional(self, layers: Sequence[Tensor], layer: int) -> Tensor:
        """Log-probability of a layer given its parents, nats, `(N,)`."""
        return self.units[layer].log_prob(self.logits(layers, layer), layers[layer])

    def log_conditionals(self, layers: Sequence[Tensor]) -> list[Tensor]:
        """Log-probability of each modelled layer given its parents, nats, each `(N,)`."""
        return [self.log_conditional(layers, layer) for layer in self.modelled]

    def score(self, layers: Sequence[Tensor], layer: int) -> Tensor:
        """Derivative of the log-probability for the logits of a layer, `(N, n_l)`.

        With `inputs` it makes all gradients: that of `weight_matrix` is
        `score[n, r] inputs[n, i]`.
        """
        return self.units[layer].score(self.logits(layers, layer), layers[layer])

    def check(self, layers: Sequence[Tensor]) -> None:
        """Refuse values that are not one `(..., n_l)` for each layer.

        Raises:
            ValueError: If the number of layers or a width is another one.
        """
        widths = tuple(values.shape[-1] for values in layers)
        if widths != self.sizes:
            raise ValueError(
                f"The network has layers of {self.sizes} units, roots first; got values of widths "
                f"{widths}."
            )

    def _parent_values(self, layers: Sequence[Tensor | None], layer: int) -> Iterator[Tensor]:
        for p in self.parents[layer]:
            values = layers[p]
            assert values is not None, f"layer {layer} needs values of its parent {p}"
            yield values

    def _complete(
        self,
        layers: list[Tensor | None],
        shape: tuple[int, ...],
        generator: torch.Generator | None,
    ) -> list[Tensor]:
        """Draw the modelled layers one after the other, in ancestral order."""
        for layer in self.parents:
            logits = self.logits(layers, layer).expand(*shape, self.sizes[layer])
            layers[layer] = self.units[layer].sample(logits, generator)
        return [values for values in layers if values is not None]


class SigmoidBeliefNetwork(LayeredNetwork):
    r"""A generative network: roots, layers of Bernoulli units, visible leaves.

    `p(x) = Π_l Π_r p(x_r | parents)`, with `P(x_r = on) = σ(b_r + Σ W x)` for Bernoulli units.

    Args:
        sizes: units of each layer, roots first, visible leaves last.
        coding: the values that stand for off and on, usually `(0, 1)` or `(-1, 1)`.
        skips: further pairs `(parent layer, child layer)` that are connected, beyond neighbours.
        leaves: "bernoulli", "gaussian" (variance 1), "categorical" (one variable), or an object
            such as `GaussianUnits(variance=0.1)` or `CategoricalUnits(classes=10)`.
        bias: initial value of all biases; weights start as Glorot and Bengio (2010) draw them.
        generator: source of the initial weights.
        dtype: of the parameters.
        device: of the parameters.

    Raises:
        ValueError: If sizes, coding or skips make no network.

    Example:
        >>> import torch
        >>> net = SigmoidBeliefNetwork([2, 3, 4], generator=torch.Generator().manual_seed(0))
        >>> print(*(tuple(layer.shape) for layer in net.sample(5)))
        (5, 2) (5, 3) (5, 4)
        >>> F = net.fisher()
        >>> F.num_parameters, F.block("layers.1").num_parameters
        (27, 9)
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
        check_graph(sizes, coding, skips)
        last = len(sizes) - 1
        visible_units = leaf_units(leaves, coding)
        if sizes[last] % visible_units.group(sizes[last]):
            raise ValueError(
                f"{sizes[last]} leaves are not made of whole variables of {visible_units!r}; give "
                f"a multiple of {visible_units.group(sizes[last])}."
            )
        super().__init__(
            sizes,
            [*[BernoulliUnits(coding)] * last, visible_units],
            {
                layer: (layer - 1, *sorted(p for p, c in skips if c == layer)) if layer else ()
                for layer in range(last + 1)
            },
            bias=bias,
            generator=generator,
            dtype=dtype,
            device=device,
        )

    def sample(self, n: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """Draw all layers, parents before children.

        Args:
            n: number of samples.
            generator: source of randomness.

        Returns:
            Values of each layer, `(n, n_l)`.
        """
        with torch.no_grad():
            return self._complete([None] * len(self.sizes), (n,), generator)

    def log_joint(self, layers: Sequence[Tensor]) -> Tensor:
        """`log p(x)` of values of all layers, nats, `(N,)`; differentiable.

        Raises:
            ValueError: If there is not one tensor of the right width for each layer.
        """
        self.check(layers)
        total = self.log_conditional(layers, 0)
        for layer in self.modelled[1:]:
            total = total + self.log_conditional(layers, layer)
        return total

    def exact_log_likelihood(self, v: Tensor) -> Tensor:
        """`log p(v)` by a sum over all states of the hidden units, nats; differentiable.

        Args:
            v: visible values, `(N, n_v)`.

        Returns:
            `(N,)`.

        Raises:
            TooLargeError: If there are too many hidden states.
            ValueError: If the values have another width.

        Example:
            >>> import torch
            >>> net = SigmoidBeliefNetwork([1, 2], dtype=torch.float64)
            >>> v = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).double()
            >>> float(net.exact_log_likelihood(v).exp().sum().detach().round(decimals=12))
            1.0
        """
        last = len(self.sizes) - 1
        if v.ndim != 2 or v.shape[-1] != self.sizes[last]:
            raise ValueError(
                f"Visible values have the shape (N, {self.sizes[last]}), got {tuple(v.shape)}."
            )
        total = v.new_full((len(v),), -torch.inf)
        for hidden in state_chunks(self, self.modelled[:-1], rows=len(v)):
            layers = [*hidden, v]
            prior = sum(self.log_conditional(layers, layer) for layer in self.modelled[:-1])
            table = self.units[last].log_prob_table(self.logits(layers, last), v)  # (N, S)
            total = torch.logaddexp(total, (table + prior).logsumexp(-1))
        return total

    def fisher(
        self, samples: int | None = None, generator: torch.Generator | None = None
    ) -> BlockOperator:
        """The Fisher matrix of the full system, block diagonal unit by unit.

        That of unit r is `E[σ(1 − σ) x̃ x̃ᵀ]` over its parents, which follow the model; units do
        not interact (papers.md §5.2), so nothing is left out. Of a root it is the scalar
        `σ(1 − σ)`. The standard errors of sampled blocks are those of `belief.unit_blocks`.

        Args:
            samples: number of samples of the model that stand for the expectation; None sums over
                all states of the hidden units, which is exact.
            generator: source of randomness.

        Returns:
            The matrix as an operator, nats/parameter²; `F.block("layers.1")` is that of a layer.

        Raises:
            TooLargeError: If there are too many states to enumerate.
        """
        return fishers.full_fisher(self, samples, generator)

    def visible_fisher(
        self,
        samples: int | None = None,
        *,
        draws: int = 64,
        proposal: visible.Proposal | None = None,
        generator: torch.Generator | None = None,
    ) -> FisherOperator:
        """The Fisher matrix of the visible units alone, `G_V = G − E Cov(score | v)`, dense.

        Exact by enumeration, or from samples of the model: see `belief.visible_matrix`, which
        also gives standard errors. A sampled matrix need not be positive semi-definite.

        Args:
            samples: number of visible samples; None sums over all states.
            draws: hidden samples for each visible one, where hidden states are too many to sum.
            proposal: where these come from, e.g. the recognition network of a `HelmholtzMachine`;
                by default the network itself.
            generator: source of randomness.

        Raises:
            TooLargeError: If there are too many states, or the dense matrix does not fit.
            UnsupportedError: If leaves are Gaussian and no number of samples is given.
        """
        return visible.visible_fisher(
            self, samples, draws=draws, proposal=proposal, generator=generator
        )

    def missing_information(
        self,
        samples: int | None = None,
        *,
        draws: int = 64,
        proposal: visible.Proposal | None = None,
        generator: torch.Generator | None = None,
    ) -> MissingInformation:
        """How much of its information each unit loses because the hidden units are not seen.

        The trace of `E Cov(score | v)` per unit, next to that of the full Fisher matrix; arguments
        are those of `visible_fisher`, but no matrix is kept.
        """
        return visible.missing_information(
            self, samples, draws=draws, proposal=proposal, generator=generator
        )

    def unit_blocks(self, samples: int, generator: torch.Generator | None = None) -> Estimate:
        """Sampled blocks of `fisher` with standard errors, by name of the layer."""
        return fishers.unit_blocks(self, samples, generator)

    def extra_repr(self) -> str:
        """Sizes and units."""
        return f"{list(self.sizes)}, hidden={self.units[0]!r}, leaves={self.units[-1]!r}"


def check_graph(
    sizes: Sequence[int], coding: tuple[float, float], skips: Collection[tuple[int, int]]
) -> None:
    """Refuse what makes no layered network.

    Raises:
        ValueError: The message names the argument.
    """
    if len(sizes) < 2 or any(size < 1 for size in sizes):
        raise ValueError(
            f"sizes are the units of at least two layers, roots first; got {list(sizes)}."
        )
    if len(coding) != 2 or coding[0] == coding[1]:
        raise ValueError(f"coding is two different values, off and on; got {coding}.")
    for parent, child in skips:
        if not 0 <= parent < child - 1 < len(sizes) - 1:
            raise ValueError(
                f"A skip is (parent layer, child layer) with at least one layer between them, out "
                f"of 0 to {len(sizes) - 1}; got {(parent, child)}. Neighbours are connected anyway."
            )
    if len(set(skips)) != len(skips):
        raise ValueError(f"A pair is listed twice in skips: {list(skips)}.")
