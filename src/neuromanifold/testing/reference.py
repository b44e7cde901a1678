"""The oracle: Fisher matrices from their definitions, in float64, for a few hundred parameters.

Every function is a definition written down with `torch.func.jacrev`. Nothing is shared with the
code under test but what a likelihood is (`distribution`, `log_prob`, `observed`): no record, no
layer rule, no closed form of a score.

Axes: N samples, E output entries of one sample (positions and event together), P parameters, T uses
of a layer in one sample, G groups, O fan-out, I fan-in (bias last).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import singledispatch
from itertools import chain, product
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, Poisson
from torch.func import functional_call, jacrev

from neuromanifold._typing import Outputs, Params
from neuromanifold.errors import UnsupportedError
from neuromanifold.likelihoods import Likelihood

__all__ = [
    "dense_empirical",
    "dense_fisher",
    "jacobian",
    "kronecker",
    "output_fisher",
    "project",
    "quadrature",
]

Inputs: TypeAlias = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]
Data: TypeAlias = Tensor | tuple[Inputs, Tensor | None]
Normalization: TypeAlias = Literal["sample", "position"]
Structure: TypeAlias = Literal["Dense", "BlockDiagonal", "UnitWise", "Diagonal"]
WeightSharing: TypeAlias = Literal["expand", "reduce"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, *CONVOLUTIONS)
"""Modules with a weight of output units (axis 0) by fan-in, and one bias per unit."""


def jacobian(model: nn.Module, x: Inputs) -> Tensor:
    """Derivative of every output with respect to every trainable parameter.

    Args:
        model: any module that `torch.func` can differentiate.
        x: one batch: a tensor, a tuple for `model(*x)`, or a mapping for `model(**x)`.

    Returns:
        `(N, E, P)`, parameters in the order of `named_parameters`.

    Example:
        >>> jacobian(nn.Linear(3, 2), torch.ones(5, 3)).shape
        torch.Size([5, 2, 8])
    """
    columns = jacrev(lambda params: _rows(_evaluate(model, x, params)))(_trainable(model))
    return torch.cat([column.reshape(*column.shape[:2], -1) for column in columns.values()], dim=2)


def output_fisher(
    likelihood: Likelihood, outputs: Outputs, targets: Tensor | None = None
) -> Tensor:
    """Fisher information of the network output: the Hessian of `-E log p(y | f)` with respect to f.

    The expectation is over labels of the model at the given outputs, computed by `quadrature`.

    Args:
        likelihood: gives the distribution of the labels.
        outputs: what the network returned, axis 0 = N.
        targets: only which positions are observed is read from them.

    Returns:
        `(N, E, E)`, nats per squared output unit.

    Example:
        >>> from neuromanifold.likelihoods import Bernoulli
        >>> output_fisher(Bernoulli(), torch.zeros(1, 1))
        tensor([[[0.2500]]], dtype=torch.float64)
    """
    f = _single(outputs).detach().double().requires_grad_()
    distribution = _marginals(likelihood.distribution(f))
    with torch.no_grad():
        labels, weights = quadrature(distribution)
        observed = None if targets is None else likelihood.observed(f, targets)
        if observed is not None:
            weights = weights * observed
    risk = -(weights * distribution.log_prob(labels)).sum()
    (gradient,) = torch.autograd.grad(risk, f, create_graph=True)
    # Samples do not mix, so the sum over N of one entry of the gradient yields a row per sample.
    entries = _rows(gradient).sum(dim=0)
    rows = [torch.autograd.grad(entry, f, retain_graph=True)[0] for entry in entries]
    return torch.stack([_rows(row) for row in rows], dim=1)


@singledispatch
def quadrature(distribution: Distribution) -> tuple[Tensor, Tensor]:
    """Labels and weights whose weighted sum of `log p` is its expectation under the distribution.

    Finite supports are enumerated. A family of your own is added by `quadrature.register`.

    Args:
        distribution: with all independent axes in its batch shape.

    Returns:
        Labels `(L, *batch, *event)` and weights `(L, *batch)`.

    Raises:
        UnsupportedError: If no rule is known for this family.

    Example:
        >>> labels, weights = quadrature(torch.distributions.Bernoulli(torch.tensor(0.25)))
        >>> labels, weights
        (tensor([0., 1.]), tensor([0.7500, 0.2500]))
    """
    if not distribution.has_enumerate_support:
        raise UnsupportedError(
            f"The oracle has no quadrature for {type(distribution).__name__}; it enumerates finite "
            f"supports and knows Normal and Poisson. Add a rule with "
            f"reference.quadrature.register({type(distribution).__name__}, rule)."
        )
    labels = distribution.enumerate_support()
    return labels, distribution.log_prob(labels).exp()


@quadrature.register
def _normal(distribution: Normal) -> tuple[Tensor, Tensor]:
    # log p is quadratic in y, so the two nodes of the Gauss-Hermite rule are exact.
    labels = torch.stack(
        [distribution.mean - distribution.stddev, distribution.mean + distribution.stddev]
    )
    return labels, torch.full_like(labels, 0.5)


@quadrature.register
def _poisson(distribution: Poisson) -> tuple[Tensor, Tensor]:
    # The tail beyond 12 standard deviations and 40 counts is below the float64 resolution.
    rate = distribution.rate
    largest = float(rate.max())
    counts = torch.arange(math.ceil(largest + 12 * math.sqrt(largest)) + 40).to(rate)
    labels = counts.reshape(-1, *[1] * rate.ndim).expand(-1, *rate.shape)
    return labels, (labels * rate.log() - rate - (labels + 1).lgamma()).exp()


def dense_fisher(
    model: nn.Module, likelihood: Likelihood, data: Data, per: Normalization = "sample"
) -> Tensor:
    """The Fisher matrix `(1/N) Σ_n J_nᵀ Σ_out(n) J_n`.

    Args:
        model: any module that `torch.func` can differentiate.
        likelihood: what the outputs mean.
        data: one batch `x` or `(x, y)`; of the targets only the observed positions are read.
        per: divide by the number of samples, or of observed positions.

    Returns:
        `(P, P)` float64, nats per squared parameter unit.

    Example:
        >>> from neuromanifold.likelihoods import Gaussian
        >>> model = nn.Linear(1, 1, bias=False)
        >>> dense_fisher(model, Gaussian(variance=0.25), torch.tensor([[1.0], [3.0]]))
        tensor([[20.]], dtype=torch.float64)
    """
    x, targets = _pair(data)
    outputs = _evaluate(model, x)
    j = jacobian(model, x)
    sigma = output_fisher(likelihood, outputs, targets)
    total = torch.einsum("nep,nef,nfq->pq", j, sigma, j)
    return total / _count(likelihood, outputs, targets, per)


def dense_empirical(
    model: nn.Module, likelihood: Likelihood, data: Data, per: Normalization = "sample"
) -> Tensor:
    """The empirical Fisher `(1/N) Σ_n g_n g_nᵀ`, g the gradient of `log p` at the data's label.

    Args:
        model: any module that `torch.func` can differentiate.
        likelihood: what the outputs mean.
        data: one batch `(x, y)`.
        per: divide by the number of samples, or of observed positions.

    Returns:
        `(P, P)` float64, nats per squared parameter unit.

    Example:
        >>> from neuromanifold.likelihoods import Gaussian
        >>> model = nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[2.0]])
        >>> dense_empirical(model, Gaussian(), (x, 2 * x)).shape
        torch.Size([1, 1])
    """
    x, targets = _pair(data)
    if targets is None:
        raise ValueError("The empirical Fisher needs labels: pass data=(x, y).")
    y = targets.double() if targets.is_floating_point() else targets
    columns = jacrev(lambda params: likelihood.log_prob(_evaluate(model, x, params), y))(
        _trainable(model)
    )
    g = torch.cat([_rows(column) for column in columns.values()], dim=1)  # (N, P)
    return g.T @ g / _count(likelihood, _evaluate(model, x), y, per)


def project(fisher: Tensor, model: nn.Module, structure: Structure) -> Tensor:
    """The dense matrix with the entries removed that a structure does not keep.

    Args:
        fisher: `(P, P)`, parameters in the order of `named_parameters`.
        model: its parameters.
        structure: `Dense` keeps all; `BlockDiagonal` a block per layer and one per parameter
            that belongs to no layer; `UnitWise` a block per output unit of a layer and single
            entries of the rest; `Diagonal` single entries. A layer is a Linear or a convolution
            with the parameters that it shares with no other module.

    Returns:
        `(P, P)`.

    Example:
        >>> project(torch.ones(4, 4), nn.Linear(1, 2), "UnitWise")
        tensor([[1., 0., 1., 0.],
                [0., 1., 0., 1.],
                [1., 0., 1., 0.],
                [0., 1., 0., 1.]])
    """
    layer_of = {name: layer for layer, names in _layers(model).items() for name in names}
    keys: list[Hashable] = []
    for name, parameter in _trainable(model).items():
        for index in product(*map(range, parameter.shape)):
            match structure:
                case "Dense":
                    keys.append(None)
                case "BlockDiagonal":
                    keys.append(layer_of.get(name, ("parameter", name)))
                case "UnitWise" if name in layer_of:
                    keys.append((layer_of[name], index[0]))
                case "UnitWise" | "Diagonal":
                    keys.append((name, index))
                case _:
                    raise ValueError(
                        f"structure is Dense, BlockDiagonal, UnitWise or Diagonal; "
                        f"got {structure!r}."
                    )
    keep = torch.tensor([[a == b for b in keys] for a in keys], device=fisher.device)
    return fisher * keep


def kronecker(
    model: nn.Module,
    likelihood: Likelihood,
    data: Data,
    weight_sharing: WeightSharing = "expand",
) -> Tensor:
    """The Kronecker approximation `B ⊗ A` of each layer, one pair of factors per group.

    With inputs `ã_t` and output derivatives `J_t = ∂f/∂s_t` of the T uses of a layer in a sample:

    * expand: `A = (1/NT) Σ_n Σ_t ã_t ã_tᵀ` and `B = (1/N) Σ_n Σ_t J_tᵀ Σ_out J_t`;
    * reduce: `A = (1/N) Σ_n â âᵀ` and `B = (1/N) Σ_n Ĵᵀ Σ_out Ĵ`, where `â = (1/T) Σ_t ã_t` and
      `Ĵ = Σ_t J_t`.

    No input is unfolded: `ã_t` of unit o is `∂s_{o,t}/∂W_o`, from the layer's own Jacobian.

    Args:
        model: any module that `torch.func` can differentiate, one sample at a time.
        likelihood: what the outputs mean.
        data: one batch `x` or `(x, y)`; of the targets only the observed positions are read.
        weight_sharing: how the uses of a layer are combined.

    Returns:
        `(P, P)` float64: a block per layer (as in `project`) that is called and whose weight is
        trainable, the exact diagonal for the rest.

    Example:
        >>> from neuromanifold.likelihoods import Gaussian
        >>> model, x = nn.Linear(2, 3), torch.randn(4, 2)
        >>> exact = dense_fisher(model, Gaussian(), x)  # one linear layer: nothing is lost
        >>> torch.allclose(kronecker(model, Gaussian(), x), exact)
        True
    """
    if weight_sharing not in ("expand", "reduce"):
        raise ValueError(f"weight_sharing is 'expand' or 'reduce'; got {weight_sharing!r}.")
    x, targets = _pair(data)
    sigma = output_fisher(likelihood, _evaluate(model, x), targets)
    fisher = dense_fisher(model, likelihood, data).diagonal().diag()
    for layer, names in _layers(model).items():
        has_weight = f"{layer}.weight".removeprefix(".") in names
        if not has_weight or not _is_called(model, layer, x):
            continue
        where = _weight_matrix(model, layer, names)
        a, b = _factors(model, layer, names, x, sigma, weight_sharing)
        for rows, a_group, b_group in zip(where.flatten(1), a, b, strict=True):
            fisher[rows[:, None], rows] = torch.kron(b_group, a_group)
    return fisher


def _factors(
    model: nn.Module,
    layer: str,
    names: list[str],
    x: Inputs,
    sigma: Tensor,
    weight_sharing: WeightSharing,
) -> tuple[Tensor, Tensor]:
    """Input factors A `(G, I, I)` and output factors B `(G, O, O)` of one layer."""
    inputs, outputs = [], []
    for n, sigma_n in enumerate(sigma):
        a, j = _uses(model, layer, names, _sample(x, n))  # (T, G, I), (E, T, G, O)
        if weight_sharing == "reduce":
            a, j = a.mean(dim=0, keepdim=True), j.sum(dim=1, keepdim=True)
        inputs.append(torch.einsum("tgi,tgk->gik", a, a) / len(a))
        outputs.append(torch.einsum("etgo,ef,ftgp->gop", j, sigma_n, j))
    return torch.stack(inputs).mean(dim=0), torch.stack(outputs).mean(dim=0)


def _uses(model: nn.Module, layer: str, names: list[str], x: Inputs) -> tuple[Tensor, Tensor]:
    """Inputs ã `(T, G, I)` and derivatives of the outputs `(E, T, G, O)`; x is a single sample.

    Every position of every call of the layer is one use.
    """
    module = model.get_submodule(layer)
    arguments: list[Inputs] = []
    zeros: list[Tensor] = []

    def record(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        arguments.append(args or kwargs)
        zeros.append(torch.zeros_like(output))

    with _hooked(module, record):
        _evaluate(model, x)

    def perturbed(shifts: list[Tensor]) -> Tensor:
        remaining = iter(shifts)
        with _hooked(module, lambda _module, _args, _kwargs, output: output + next(remaining)):
            return _evaluate(model, x).flatten()

    derivatives = jacrev(perturbed)(zeros)
    local = {name.rpartition(".")[2] for name in names}
    a = torch.cat([_inputs(module, local, x) for x in arguments])
    j = torch.cat([torch.stack([_units(module, d) for d in call]) for call in derivatives], dim=1)
    return a, j.reshape(*j.shape[:2], _groups(module), -1)


def _inputs(module: nn.Module, names: set[str], x: Inputs) -> Tensor:
    """Inputs ã `(T, G, I)` of one call: what multiplies a unit's own weights and bias."""
    own = {name: value for name, value in _trainable(module).items() if name in names}
    blocks = jacrev(lambda params: _units(module, _evaluate(module, x, params)))(own)
    # (T, O_all, O_all, I): derivative of the unit on the second axis by the weights of the third.
    parts = [block.reshape(*block.shape[:3], -1) for block in blocks.values()]
    inputs = torch.cat(parts, dim=3).diagonal(dim1=1, dim2=2).movedim(-1, 1)
    by_group = inputs.reshape(len(inputs), _groups(module), -1, inputs.shape[2])  # (T, G, O, I)
    first = by_group[:, :, 0]
    torch.testing.assert_close(by_group, first[:, :, None].expand_as(by_group))
    return first


def _units(module: nn.Module, output: Tensor) -> Tensor:
    """Layer output to `(T, O_all)`: units last, all other axes are positions."""
    unit_axis = 1 if isinstance(module, CONVOLUTIONS) else -1
    return output.movedim(unit_axis, -1).flatten(0, -2)


def _groups(module: nn.Module) -> int:
    return module.groups if isinstance(module, CONVOLUTIONS) else 1


def _weight_matrix(model: nn.Module, layer: str, names: list[str]) -> Tensor:
    """Where the parameters of a layer lie in a flat vector, as `(G, O, I)`."""
    columns, start = [], 0
    for name, value in _trainable(model).items():
        where = torch.arange(start, start := start + value.numel())
        if name in names:
            columns.append(where.reshape(len(value), -1))
    matrix = torch.cat(columns, dim=1)
    return matrix.reshape(_groups(model.get_submodule(layer)), -1, matrix.shape[1])


def _layers(model: nn.Module) -> dict[str, list[str]]:
    """Linear and convolution modules, with their trainable parameters that are theirs alone."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {
        layer: [
            f"{layer}.{local}".removeprefix(".")
            for local, p in module.named_parameters(recurse=False)
            if p.requires_grad and owners[id(p)] == 1
        ]
        for layer, module in model.named_modules()
        if isinstance(module, LAYERS)
    }


def _is_called(model: nn.Module, layer: str, x: Inputs) -> bool:
    calls: list[nn.Module] = []
    with _hooked(model.get_submodule(layer), lambda module, *_: calls.append(module)):
        _evaluate(model, x)
    return bool(calls)


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _evaluate(model: nn.Module, x: Inputs, params: Params | None = None) -> Tensor:
    """The model in float64 as a function of its trainable parameters."""
    x = _map(_double, x)
    args = () if isinstance(x, Mapping) else x if isinstance(x, tuple) else (x,)
    kwargs = dict(x) if isinstance(x, Mapping) else {}
    # With its own tying of weights, functional_call would replace the parameters of a module that
    # is registered under two names twice, and afterwards leave the replacements in the module.
    state = _state(model, params or {})
    return _single(functional_call(model, state, args, kwargs, tie_weights=False))


def _state(model: nn.Module, params: Params) -> Params:
    """Parameters and buffers in float64, once for each module that holds them."""
    given = {id(p): params[name] for name, p in model.named_parameters() if name in params}
    held = {"recurse": False, "remove_duplicate": False}
    state = {}
    for path, module in model.named_modules():
        for local, value in chain(module.named_parameters(**held), module.named_buffers(**held)):
            name = f"{path}.{local}".removeprefix(".")
            state[name] = given.get(id(value), _double(value.detach()))
    return state


def _trainable(model: nn.Module) -> Params:
    return {
        name: parameter.detach().double()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _rows(batch: Tensor) -> Tensor:
    """One row per sample, also of an event without axes."""
    return batch.reshape(len(batch), -1)


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _single(outputs: Outputs) -> Tensor:
    """A tuple (mean, variance) counts as one tensor `(N, 2, *K)`."""
    return outputs if isinstance(outputs, Tensor) else torch.stack(outputs, dim=1)


def _marginals(distribution: Distribution) -> Distribution:
    """Independent axes moved back to the batch shape, where `quadrature` wants them."""
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return distribution


def _pair(data: Data) -> tuple[Inputs, Tensor | None]:
    return (data, None) if isinstance(data, Tensor) else data


def _sample(x: Inputs, n: int) -> Inputs:
    """Sample n as a batch of one."""
    return _map(lambda value: value[n : n + 1], x)


def _map(function: Callable[[Tensor], Tensor], x: Inputs) -> Inputs:
    if isinstance(x, Mapping):
        return {name: function(value) for name, value in x.items()}
    return tuple(function(value) for value in x) if isinstance(x, tuple) else function(x)


def _count(
    likelihood: Likelihood, outputs: Tensor, targets: Tensor | None, per: Normalization
) -> int:
    if per not in ("sample", "position"):
        raise ValueError(f"per is 'sample' or 'position'; got {per!r}.")
    return len(outputs) if per == "sample" else int(likelihood.num_positions(outputs, targets))
