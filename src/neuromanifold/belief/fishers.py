"""The Fisher matrix of all units together: one block per unit, local and exact.

The score of a unit has mean zero given everything but its descendants, so units do not interact:
`G_r = E_parents[scale A''(η) x̃ x̃ᵀ]`, for a Bernoulli unit `E[σ(1 − σ) x̃ x̃ᵀ]` (papers.md §5.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from neuromanifold._estimate import Estimate
from neuromanifold.belief.enumeration import count_states, state_chunks
from neuromanifold.belief.solves import Rows
from neuromanifold.linalg import memory
from neuromanifold.operators import BlockOperator, Coverage, CoverageEntry, Matrices, Origin

if TYPE_CHECKING:
    from neuromanifold.belief.networks import LayeredNetwork, SigmoidBeliefNetwork

__all__ = ["coverage", "full_fisher", "score_rows", "unit_blocks", "unit_moments", "unit_wise"]


@torch.no_grad()
def unit_moments(
    net: LayeredNetwork,
    layers: Sequence[Tensor],
    layer: int,
    weights: Tensor | None = None,
    *,
    power: int = 1,
) -> Tensor:
    """Sum over rows of `weight · (A'' ⊗ x̃ x̃ᵀ)`, the Fisher matrix of each unit of a layer.

    Args:
        net: a generative or a recognition network.
        layers: values, each `(..., n_l)`.
        layer: whose units.
        weights: of the rows, `(...)`; 1 by default.
        power: of the entries before they are summed; 2 serves variances.

    Returns:
        `(B, c (fan-in + 1), c (fan-in + 1))`, unit-major: B variables of c units, c being 1 but for
        categorical units.
    """
    x = net.inputs(layers, layer).flatten(0, -2)  # (N, I)
    logits = net.logits(layers, layer).expand(*layers[layer].shape[:-1], -1).flatten(0, -2)
    curvature = net.units[layer].covariance(logits).pow(power)  # (N, B, c, c)
    if weights is not None:
        curvature = curvature * weights.flatten()[:, None, None, None]
    return Rows(x.pow(power), curvature).fisher()


def full_fisher(
    net: SigmoidBeliefNetwork, samples: int | None, generator: torch.Generator | None
) -> BlockOperator:
    """See `SigmoidBeliefNetwork.fisher`."""
    with torch.no_grad():
        if samples is None:
            matrices, num = _by_enumeration(net)
        else:
            found = unit_blocks(net, samples, generator).value
            assert isinstance(found, dict)
            matrices, num = list(found.values()), samples
    exact = samples is None
    return _operator(net, matrices, num, "Exact()" if exact else "ModelSamples()")


def unit_wise(
    net: LayeredNetwork, layers: Sequence[Tensor], weights: Tensor | None = None
) -> BlockOperator:
    """The Fisher matrix of a network at given values: the weighted sum over rows.

    Of a recognition network it is that of `q(hidden | visible)` for these visible values.

    Args:
        net: a generative or a recognition network.
        layers: values, each `(..., n_l)`.
        weights: of the rows, `(...)`, with sum 1; uniform by default.

    Returns:
        The matrix as an operator, nats/parameter².

    Example:
        >>> import torch
        >>> from neuromanifold.belief import RecognitionNetwork, unit_wise
        >>> q = RecognitionNetwork([2, 3])
        >>> unit_wise(q, q.sample(torch.ones(5, 3))).num_parameters
        8
    """
    num = layers[0].shape[:-1].numel()
    if weights is None:
        weights = layers[0].new_full(layers[0].shape[:-1], 1 / num)
    matrices = [unit_moments(net, layers, layer, weights) for layer in net.modelled]
    return _operator(net, matrices, num, "ModelSamples()")


def _operator(
    net: LayeredNetwork, matrices: Sequence[Tensor], num: int, estimator: str
) -> BlockOperator:
    origin = Origin(num, "UnitWise()", estimator, type(net).__name__)
    blocks = [
        Matrices(block, matrix) for block, matrix in zip(net.blocks.values(), matrices, strict=True)
    ]
    return BlockOperator(net.layout, list(blocks), coverage(net, "UnitWise"), origin)


def unit_blocks(
    net: SigmoidBeliefNetwork, samples: int, generator: torch.Generator | None = None
) -> Estimate:
    """Estimate the unit-wise blocks of `net.fisher()` from samples of the model.

    Given its parents a unit's information is known, so only they are sampled: roots have no error.

    Args:
        net: the network.
        samples: number of samples, at least 2.
        generator: source of randomness.

    Returns:
        Blocks by name of the layer, `{"layers.1": (n_1, I, I)}`, nats/parameter², with variances
        because of the "draws". The value is that of `net.fisher(samples, generator)`.

    Raises:
        ValueError: If there are fewer than 2 samples.

    Example:
        >>> import torch
        >>> from neuromanifold.belief import SigmoidBeliefNetwork, unit_blocks
        >>> found = unit_blocks(SigmoidBeliefNetwork([2, 3]), samples=100)
        >>> {name: tuple(block.shape) for name, block in found.stderr.items()}
        {'layers.0': (2, 1, 1), 'layers.1': (3, 3, 3)}
    """
    if samples < 2:
        raise ValueError(f"The Fisher matrix takes at least 2 samples, got {samples}.")
    values: dict[str, Tensor] = {}
    variances: dict[str, Tensor] = {}
    with torch.no_grad():
        layers = net.sample(samples, generator)
        for layer, block in net.blocks.items():
            mean, square = (
                unit_moments(net, layers, layer, power=power) / samples for power in (1, 2)
            )
            values[block.name] = mean
            spread = (square - mean.square()).clamp(min=0) / (samples - 1)
            variances[block.name] = spread if net.parents[layer] else torch.zeros_like(spread)
    return Estimate(values, {"draws": variances}, samples)


def score_rows(net: LayeredNetwork, layers: Sequence[Tensor]) -> Tensor:
    """Gradient of the log-probability for the parameters, row by row, `(N, P)`; constants.

    Args:
        net: a generative or a recognition network.
        layers: values, each `(..., n_l)`; leading axes are flattened into N.

    Example:
        >>> from neuromanifold.belief import SigmoidBeliefNetwork
        >>> net = SigmoidBeliefNetwork([2, 3])
        >>> score_rows(net, net.sample(5)).shape
        torch.Size([5, 11])
    """
    with torch.no_grad():
        flat = [values.reshape(-1, values.shape[-1]) for values in layers]
        p, num = net.layout.num_parameters, len(flat[0])
        memory.require(
            num * p * net.dtype.itemsize,
            net.device,
            what=f"{num} scores of {p} parameters",
            instead="Use fewer rows at a time.",
        )
        rows = flat[0].new_empty(num, p)
        for layer, block in net.blocks.items():
            outer = net.score(flat, layer)[:, :, None] * net.inputs(flat, layer)[:, None, :]
            block.write(outer[:, None], rows, net.layout)
        return rows


def coverage(net: LayeredNetwork, structure: str) -> Coverage:
    """What is kept of each parameter."""
    owner = {name: block.name for block in net.blocks.values() for name in block.parameters}
    return Coverage(
        tuple(
            CoverageEntry(name, owner[name], "belief", structure, exact=True)
            for name in net.layout.names
        )
    )


def _by_enumeration(net: SigmoidBeliefNetwork) -> tuple[list[Tensor], int]:
    hidden = net.modelled[:-1]
    totals: list[Tensor] = []
    for values in state_chunks(net, hidden):
        # The leaves' own values do not matter, only their parents'.
        layers = [*values, values[0].new_zeros(len(values[0]), net.sizes[-1])]
        prior = sum(net.log_conditional(layers, layer) for layer in hidden)
        weights = torch.as_tensor(prior).exp()
        parts = [unit_moments(net, layers, layer, weights) for layer in net.modelled]
        totals = [a + b for a, b in zip(totals, parts, strict=True)] if totals else parts
    return totals, count_states(net, hidden)
