"""The geometry of the visible units alone, and the information that hidden units hide.

The visible score is the posterior mean of the full one, so `G_V = E[m(v) m(v)ᵀ]` with
`m(v) = E[score | v]`, and by Louis' identity `G = G_V + E Cov(score | v)` (papers.md §5.2).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from neuromanifold._estimate import Estimate, Quantity
from neuromanifold.belief.enumeration import count_states, require_countable, state_chunks
from neuromanifold.belief.fishers import coverage, full_fisher, score_rows, unit_wise
from neuromanifold.belief.units import choose
from neuromanifold.linalg import Block, memory
from neuromanifold.operators import BlockOperator, FisherOperator, Matrices, Origin
from neuromanifold.operators.indefinite import IndefiniteOperator

if TYPE_CHECKING:
    from neuromanifold.belief.networks import SigmoidBeliefNetwork

__all__ = [
    "MissingInformation",
    "Posterior",
    "Proposal",
    "mean_scores",
    "missing_information",
    "posteriors",
    "visible_fisher",
    "visible_matrix",
]

MOST_SUMMED = 2**10
"""Hidden states that are summed for each sampled visible one rather than sampled."""
CHUNK_NUMEL = 2**22
"""Numbers of the largest tensor of a chunk."""
BATCHES = 64
"""Parts of a sample whose spread is its standard error: known to 9 %."""
FREE = 0.9
"""With fewer chains than this that left their first state, a warning is given."""
STEPS = 4
"""Of the chains that forget the hidden state they start from."""


class Proposal(Protocol):
    """Where hidden states for given visible ones come from, such as a `RecognitionNetwork`."""

    def sample(self, v: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """Values of all layers, the last being `v (..., n_v)`."""

    def log_prob(self, layers: Sequence[Tensor]) -> Tensor:
        """Log-probability of the hidden layers, `(...)`."""


@dataclass(frozen=True)
class Posterior:
    """Hidden states and their weights for some visible ones.

    Attributes:
        layers: values, each `(V, H, n_l)`; the last is the same for all H.
        weights: each sums to 1 over H: exact ones `(1, V, H)`, or two sets `(2, V, H)` that share
            the first hidden state alone (see `visible_matrix`).
        mass: what each visible state counts, `(V,)`.
        moved: how probably the chains that made them left their first state, `(V,)`; 1 if exact.
    """

    layers: list[Tensor]
    weights: Tensor
    mass: Tensor
    moved: Tensor


def posteriors(
    net: SigmoidBeliefNetwork,
    samples: int | None,
    *,
    draws: int = 64,
    proposal: Proposal | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Posterior]:
    """Visible states, all or sampled, with their posteriors, exact or weighted; in chunks.

    Args:
        net: the network.
        samples: number of visible samples; None for all states.
        draws: hidden samples for each visible one where hidden states are too many to sum.
        proposal: their source; the network's own prior by default.
        generator: source of randomness.

    Raises:
        ValueError: If there are too few samples or draws.
        TooLargeError: If there are too many states.
        UnsupportedError: If visible values are a continuum and no number of samples is given.
    """
    if samples is not None and samples < 2:
        raise ValueError(f"samples is at least 2, or None for all states; got {samples}.")
    if draws < 2:
        raise ValueError(f"draws is at least 2, got {draws}.")
    hidden = net.modelled[:-1]
    if samples is None:
        yield from _all(net, hidden)
        return
    proposal = _Prior(net) if proposal is None else proposal
    states = (
        [torch.cat(x) for x in zip(*state_chunks(net, hidden), strict=True)]
        if _are_few(net)
        else None
    )
    step = min(
        _rows(net, 2 * (draws + 1) if states is None else len(states[0])), -(-samples // BATCHES)
    )
    layers = net.sample(samples, generator)
    for start in range(0, samples, step):
        part = [values[start : start + step] for values in layers]
        mass = part[0].new_full((len(part[0]),), 1 / samples)
        if states is None:
            yield _resampled(net, part, mass, draws, proposal, generator)
        else:
            yield _summed(net, states, part[-1], mass)


@torch.no_grad()
def mean_scores(net: SigmoidBeliefNetwork, posterior: Posterior) -> Tensor:
    """Posterior means of the score for each visible state, one per set of weights, `(·, V, P)`."""
    means = posterior.weights.new_empty(*posterior.weights.shape[:2], net.layout.num_parameters)
    for layer, block in net.blocks.items():
        for rows, mean in zip(means, _means(net, posterior, layer), strict=True):
            block.write(mean[:, None], rows, net.layout)
    return means


def visible_matrix(
    net: SigmoidBeliefNetwork,
    samples: int | None = None,
    *,
    draws: int = 64,
    proposal: Proposal | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""Measure the Fisher matrix of the visible units, dense.

    Without `samples` all states are summed. With them `G_V = G − E Cov(score | v)`: v comes from
    the model, and G from its closed form at the same states, or exactly if hidden states are few;
    then they are summed for each v too. That varies less than the mean of `m(v) m(v)ᵀ` unless
    almost all information is missing; the sum of errors is of either sign, so a sampled matrix
    need not be positive semi-definite.

    Where hidden states are many, the state h₀ that v came from is an exact draw from the
    posterior. Two chains start there, each of four steps of iterated sampling importance
    resampling (Andrieu, Lee and Vihola 2018) with `draws / 2` proposals a step, for which the
    posterior is stationary. Their last steps make weighted means m̂ of the score, and `m̂₁ m̂₂ᵀ`
    takes the place of `m mᵀ`. Its expectation is never too small, and too large by what the chains
    still know of h₀: missing information is understated where the proposal is far from the
    posterior. Standard errors do not hold that; compare two numbers of draws to see it. Where more
    than a tenth of the chains never left h₀ a warning says so.

    Args:
        net: the network.
        samples: number of visible samples, at least 2; None sums over all states.
        draws: hidden samples for each and a step, where there are too many states to sum.
        proposal: their source, e.g. `machine.recognition`; the network's own prior by default.
        generator: source of randomness.

    Returns:
        `(P, P)` in the order of `net.layout`, nats/parameter², with variances because of "draws",
        from how much up to 64 batches of samples differ.

    Raises:
        ValueError: If there are too few samples or draws.
        TooLargeError: If there are too many states, or the matrix does not fit into memory.
        UnsupportedError: If leaves are Gaussian and no number of samples is given.

    Example:
        >>> from neuromanifold.belief import SigmoidBeliefNetwork, visible_matrix
        >>> net = SigmoidBeliefNetwork([2, 3])
        >>> found = visible_matrix(net, samples=100)
        >>> found.value.shape, found.stderr.shape
        (torch.Size([11, 11]), torch.Size([11, 11]))
    """
    p = net.layout.num_parameters
    memory.require(
        4 * p**2 * net.dtype.itemsize,
        net.device,
        what=f"A dense {p} x {p} matrix with standard errors",
        instead="Use net.missing_information(...), which keeps no matrix.",
    )
    with torch.no_grad():
        chunks = posteriors(net, samples, draws=draws, proposal=proposal, generator=generator)
        if samples is None:
            value = torch.zeros(p, p, dtype=net.dtype, device=net.device)
            for posterior in chunks:
                (means,) = mean_scores(net, posterior)
                value.addmm_((posterior.mass[:, None] * means).mT, means)
            count = count_states(net, net.modelled[-1:])
            return Estimate(value, {"draws": torch.zeros_like(value)}, count)
        full = full_fisher(net, None, None).to_dense() if _are_few(net) else None
        total = torch.zeros(p, p, dtype=net.dtype, device=net.device)
        squares, batches = torch.zeros_like(total), 0
        moved = total.new_zeros(())
        for posterior in chunks:
            batch = _louis(net, posterior, full)
            share = len(posterior.mass) / samples
            total.add_(batch, alpha=share)
            squares.add_(batch.square_(), alpha=share)
            batches += 1
            moved += posterior.mass @ posterior.moved
        _warn_if_stuck(float(moved))
        variance = (squares - total.square()).clamp(min=0) / (batches - 1)
        return Estimate(total, {"draws": variance}, samples, draws)


def visible_fisher(
    net: SigmoidBeliefNetwork,
    samples: int | None,
    *,
    draws: int,
    proposal: Proposal | None,
    generator: torch.Generator | None,
) -> FisherOperator:
    """See `SigmoidBeliefNetwork.visible_fisher`."""
    found = visible_matrix(net, samples, draws=draws, proposal=proposal, generator=generator)
    assert isinstance(found.value, Tensor)
    origin = Origin(
        num_samples=found.num_samples,
        structure="Dense()",
        estimator="Exact()" if samples is None else "ModelSamples()",
        likelihood=type(net).__name__,
        notes=("visible units alone",),
    )
    matrix = Matrices(Block.whole(net.layout), found.value[None])
    dense = BlockOperator(net.layout, [matrix], coverage(net, "Dense"), origin)
    return dense if samples is None else IndefiniteOperator(dense)


@dataclass(frozen=True)
class MissingInformation:
    """What is lost because hidden units are not seen: traces of `E Cov(score | v)`.

    Attributes:
        missing: per unit, `(n_l,)` by name of the layer, nats/parameter² summed over the unit's
            parameters.
        full: the traces of the full Fisher matrix, alike.
        unit_shares: missing over full, per unit: 0 for a unit as good as seen, 1 for one that
            the visible units say nothing about.
        layer_shares: the same of whole layers, scalars.
        share: the same of the whole network, a scalar.
        moved: share of the chains over hidden states that left the state they started from, 1 if
            hidden states were summed. What is missing is understated by about as much as this is
            below 1, and standard errors do not hold it.
    """

    missing: Estimate
    full: Estimate
    unit_shares: Estimate
    layer_shares: Estimate
    share: Estimate
    moved: float

    def __str__(self) -> str:
        value, stderr = self.layer_shares.value, self.layer_shares.stderr
        assert isinstance(value, dict)
        assert isinstance(stderr, dict)
        lines = [f"{name}: {100 * float(value[name]):.1f} % missing" for name in value]
        bars = [f" ± {100 * float(stderr[name]):.1f}" for name in value]
        return "\n".join(line + bar for line, bar in zip(lines, bars, strict=True))


def missing_information(
    net: SigmoidBeliefNetwork,
    samples: int | None,
    *,
    draws: int,
    proposal: Proposal | None,
    generator: torch.Generator | None,
) -> MissingInformation:
    """See `SigmoidBeliefNetwork.missing_information`."""
    masses, moved, missing, full = [], [], [], []
    with torch.no_grad():
        for posterior in posteriors(
            net, samples, draws=draws, proposal=proposal, generator=generator
        ):
            parts = [_traces(net, posterior, layer) for layer in net.modelled]
            missing.append(torch.cat([part[0] for part in parts], dim=-1))
            full.append(torch.cat([part[1] for part in parts], dim=-1))
            masses.append(posterior.mass)
            moved.append(posterior.moved)
        left = float(torch.cat(masses) @ torch.cat(moved))
        _warn_if_stuck(left)
        states = _States(torch.cat(masses), sampled=samples is not None, draws=draws)
        a, b = torch.cat(missing), torch.cat(full)  # (N, units of all layers)
        sizes = [net.sizes[layer] for layer in net.modelled]
        names = [block.name for block in net.blocks.values()]
        of_layers = [torch.stack([u.sum(-1) for u in x.split(sizes, -1)], -1) for x in (a, b)]
        return MissingInformation(
            missing=_named(states.mean(a), names, lambda x: x.split(sizes)),
            full=_named(states.mean(b), names, lambda x: x.split(sizes)),
            unit_shares=_named(states.ratio(a, b), names, lambda x: x.split(sizes)),
            layer_shares=_named(states.ratio(*of_layers), names, lambda x: x.unbind()),
            share=states.ratio(a.sum(-1), b.sum(-1)),
            moved=left,
        )


@dataclass(frozen=True)
class _States:
    """Visible states that means are taken over, weighted by `mass (N,)`."""

    mass: Tensor
    sampled: bool
    draws: int

    def mean(self, values: Tensor) -> Estimate:
        """Of `(N, ...)`."""
        mean = self._sum(values)
        return self._estimate(mean, values - mean)

    def ratio(self, above: Tensor, below: Tensor) -> Estimate:
        """Of means, with the error of the delta method; both `(N, ...)`."""
        mean = self._sum(below)
        ratio = self._sum(above) / mean
        return self._estimate(ratio, (above - ratio * below) / mean)

    def _estimate(self, value: Tensor, residuals: Tensor) -> Estimate:
        num = len(self.mass)
        if not self.sampled:
            return Estimate(value, {"draws": torch.zeros_like(value)}, num)
        return Estimate(
            value, {"draws": self._sum(residuals.square()) / (num - 1)}, num, self.draws
        )

    def _sum(self, values: Tensor) -> Tensor:
        return torch.tensordot(self.mass, values, dims=1)


def _named(
    found: Estimate, names: Sequence[str], split: Callable[[Tensor], Sequence[Tensor]]
) -> Estimate:
    """An estimate of numbers of all layers as one by name of the layer."""

    def parts(tensor: Quantity) -> Quantity:
        assert isinstance(tensor, Tensor)
        return dict(zip(names, split(tensor), strict=True))

    variances = {source: parts(variance) for source, variance in found.variances.items()}
    return Estimate(parts(found.value), variances, found.num_samples, found.draws)


def _means(net: SigmoidBeliefNetwork, posterior: Posterior, layer: int) -> Tensor:
    """Posterior means of the gradient of a layer's weight matrix, `(1 or 2, V, n_l, I)`."""
    score, x = net.score(posterior.layers, layer), net.inputs(posterior.layers, layer)
    return (posterior.weights[..., None] * score).mT @ x


def _louis(net: SigmoidBeliefNetwork, posterior: Posterior, full: Tensor | None) -> Tensor:
    """`G − Cov(score | v)`, the mean over a chunk, `(P, P)`."""
    num = len(posterior.mass)
    weights = posterior.weights.mean(0) / num
    means = mean_scores(net, posterior)
    product = means[0].mT @ means[-1] / num
    rows = score_rows(net, posterior.layers).mul_(weights.flatten().sqrt()[:, None])
    if full is None:
        full = unit_wise(net, posterior.layers, weights).to_dense()
    return full - rows.mT @ rows + (product + product.mT) / 2


def _traces(net: SigmoidBeliefNetwork, posterior: Posterior, layer: int) -> tuple[Tensor, Tensor]:
    """Traces per visible state and unit of Cov(score | v) and of the full Fisher, `(V, n_l)`."""
    lengths = net.inputs(posterior.layers, layer).square().sum(-1)
    weights = (posterior.weights.mean(0) * lengths)[:, None]  # (V, 1, H)
    means = _means(net, posterior, layer)
    squares = (weights @ net.score(posterior.layers, layer).square())[:, 0]
    logits = net.logits(posterior.layers, layer).expand_as(posterior.layers[layer])
    information = net.units[layer].covariance(logits).diagonal(dim1=-2, dim2=-1).flatten(-2)
    return squares - (means[0] * means[-1]).sum(-1), (weights @ information)[:, 0]


class _Prior:
    """The network's own hidden layers as a proposal, whatever the visible values are."""

    def __init__(self, net: SigmoidBeliefNetwork) -> None:
        self.net = net

    def sample(self, v: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        shape = v.shape[:-1]
        layers = self.net.sample(shape.numel(), generator)[:-1]
        return [*(values.unflatten(0, shape) for values in layers), v]

    def log_prob(self, layers: Sequence[Tensor]) -> Tensor:
        conditionals = [self.net.log_conditional(layers, layer) for layer in self.net.modelled[:-1]]
        return torch.stack(conditionals).sum(0)


def _are_few(net: SigmoidBeliefNetwork) -> bool:
    """Whether hidden states are summed for each sampled visible one."""
    return count_states(net, net.modelled[:-1]) <= MOST_SUMMED


def _rows(net: SigmoidBeliefNetwork, states: int) -> int:
    """Visible states whose hidden ones, and scores of all of them, are held at once."""
    return max(CHUNK_NUMEL // (states * net.layout.num_parameters), 1)


def _all(net: SigmoidBeliefNetwork, hidden: Sequence[int]) -> Iterator[Posterior]:
    """Every visible state with every hidden one."""
    require_countable(net, net.modelled)
    states = [torch.cat(parts) for parts in zip(*state_chunks(net, hidden), strict=True)]
    for (values,) in state_chunks(net, net.modelled[-1:]):
        for v in values.split(_rows(net, len(states[0]))):
            yield _summed(net, states, v, None)


@torch.no_grad()
def _summed(
    net: SigmoidBeliefNetwork, states: list[Tensor], v: Tensor, mass: Tensor | None
) -> Posterior:
    """Exact posteriors; the mass is p(v) if it is not given."""
    shape = (len(v), len(states[0]))
    layers = [values.expand(*shape, -1) for values in states] + [v[:, None].expand(*shape, -1)]
    joint = net.log_joint(layers)
    weights = joint.softmax(-1)
    mass = joint.logsumexp(-1).exp() if mass is None else mass
    return Posterior(layers, weights[None], mass, torch.ones_like(mass))


@torch.no_grad()
def _resampled(
    net: SigmoidBeliefNetwork,
    exact: list[Tensor],
    mass: Tensor,
    draws: int,
    proposal: Proposal,
    generator: torch.Generator | None,
) -> Posterior:
    """Posteriors from two chains that start at an exact draw; all steps but the last are taken."""
    half = draws // 2
    present = [values.expand(2, *values.shape) for values in exact]  # (2, V, n_l)
    v = present[-1][:, :, None].expand(-1, -1, half, -1)
    still = torch.ones(2, len(mass), dtype=mass.dtype, device=mass.device)
    for step in range(STEPS):
        drawn = proposal.sample(v, generator)
        layers = [torch.cat([x[:, :, None], d], dim=2) for x, d in zip(present, drawn, strict=True)]
        weights = (net.log_joint(layers) - proposal.log_prob(layers)).softmax(-1)  # (2, V, 1 + K)
        if step < STEPS - 1:
            index = choose(weights, generator)
            still = still * (index == 0)
            present = [x.take_along_dim(index[..., None, None], dim=2)[:, :, 0] for x in layers]
    # Both side by side, each chain's mean with no weight on the other's states.
    apart = torch.zeros(2, 2, *weights.shape[1:], dtype=weights.dtype, device=weights.device)
    apart[0, 0], apart[1, 1] = weights
    layers = [x.transpose(0, 1).flatten(1, 2) for x in layers]
    moved = 1 - (still * weights[..., 0]).mean(0)
    return Posterior(layers, apart.transpose(1, 2).flatten(2), mass, moved)


def _warn_if_stuck(moved: float) -> None:
    if moved < FREE:
        warnings.warn(
            f"Only {100 * moved:.0f} % of the chains left the hidden state they started from, so "
            f"that much less information is found missing, whatever the standard errors say. Give "
            f"more draws, or a better proposal: the recognition network of a trained machine.",
            UserWarning,
            stacklevel=4,
        )
