"""The oracle: Fisher matrices from their definitions, in float64, for a few hundred parameters.

Every function is a definition written down with `torch.func.jacrev`. Nothing is shared with the
code under test but what a likelihood is (`distribution`, `log_prob`, `observed`): no record, no
layer rule, no closed form of a score.

Axes: N samples, E output entries of one sample (positions and event together), P parameters, T uses
of a layer in one sample, G groups, O fan-out, I fan-in (bias last).
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import singledispatch
from itertools import chain, product
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, Poisson
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

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

Unit: TypeAlias = Callable[[nn.Module, tuple[int, ...]], Hashable]
"""Which unit of a module an entry of a parameter belongs to, by the index of the entry."""

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
)


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
    columns = _jacobian(lambda params: _rows(_evaluate(model, x, params)), _trainable(model))
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
    columns = _jacobian(
        lambda params: likelihood.log_prob(_evaluate(model, x, params), y), _trainable(model)
    )
    g = torch.cat([_rows(column) for column in columns.values()], dim=1)  # (N, P)
    return g.T @ g / _count(likelihood, _evaluate(model, x), y, per)


def project(
    fisher: Tensor, model: nn.Module, structure: Structure, *, apart: Collection[str] = ()
) -> Tensor:
    """The dense matrix with the entries removed that a structure does not keep.

    What a unit and a block are, is said by one table of module types:

    * Linear and convolutions, transposed or not: one block, a unit per output feature or channel
      with its bias. Norm layers: one block, a unit per channel.
    * Embedding: one block, a unit per token.
    * MultiheadAttention: a block for each projection that is a parameter of its own, with its
      bias, units are rows. Recurrent layers and cells: a block for input weights, hidden weights
      and projection of each layer and direction, units are rows.
    * A parameter that several modules own is a block of its own, with the units it has there.
    * Every other parameter is a block of its own, each of its entries a unit.

    Args:
        fisher: `(P, P)`, parameters in the order of `named_parameters`.
        model: its parameters.
        structure: `Dense` keeps all, `BlockDiagonal` the blocks, `UnitWise` the units of each
            block, `Diagonal` single entries.
        apart: parameters that the model also uses outside of their modules, so that each of them
            is a block of its own, and each of its entries a unit.

    Returns:
        `(P, P)`.

    Example:
        >>> project(torch.ones(4, 4), nn.Linear(1, 2), "UnitWise")
        tensor([[1., 0., 1., 0.],
                [0., 1., 0., 1.],
                [1., 0., 1., 0.],
                [0., 1., 0., 1.]])
    """
    labels: list[Hashable]
    match structure:
        case "Dense":
            labels = [0] * len(fisher)
        case "BlockDiagonal":
            labels = [entry.block for entry in _entries(model, apart)]
        case "UnitWise":
            labels = [(entry.block, entry.unit) for entry in _entries(model, apart)]
        case "Diagonal":
            labels = list(range(len(fisher)))
        case _:
            raise ValueError(
                f"structure is Dense, BlockDiagonal, UnitWise or Diagonal; got {structure!r}."
            )
    return fisher * _same(labels).to(fisher.device)


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
        `(P, P)` float64. Layers with a weight `(unit, input)` that is trainable and theirs alone
        (Linear, convolutions) get a block if they are called. A layer whose groups have one unit
        (norms, depthwise convolutions, a single output) has nothing to approximate: its units are
        exact. The rest is the exact diagonal.

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
    exact = dense_fisher(model, likelihood, data)
    fisher = exact.diagonal().diag()
    for layer, where in _weight_matrices(model).items():
        if where.shape[1] == 1:
            for unit in where.flatten(0, 1):
                fisher[unit[:, None], unit] = exact[unit[:, None], unit]
        elif _is_called(model, layer, x):
            a, b = _factors(model, layer, where, x, sigma, weight_sharing)
            for rows, a_group, b_group in zip(where.flatten(1), a, b, strict=True):
                fisher[rows[:, None], rows] = torch.kron(b_group, a_group)
    return fisher


def _factors(
    model: nn.Module,
    layer: str,
    where: Tensor,
    x: Inputs,
    sigma: Tensor,
    weight_sharing: WeightSharing,
) -> tuple[Tensor, Tensor]:
    """Input factors A `(G, I, I)` and output factors B `(G, O, O)` of one layer."""
    inputs, outputs = [], []
    for n, sigma_n in enumerate(sigma):
        a, j = _uses(model, layer, where, _sample(x, n))  # (T, G, I), (E, T, G, O)
        if weight_sharing == "reduce":
            a, j = a.mean(dim=0, keepdim=True), j.sum(dim=1, keepdim=True)
        inputs.append(torch.einsum("tgi,tgk->gik", a, a) / len(a))
        outputs.append(torch.einsum("etgo,ef,ftgp->gop", j, sigma_n, j))
    return torch.stack(inputs).mean(dim=0), torch.stack(outputs).mean(dim=0)


def _uses(model: nn.Module, layer: str, where: Tensor, x: Inputs) -> tuple[Tensor, Tensor]:
    """Inputs ã `(T, G, I)` and derivatives of the outputs `(E, T, G, O)`; x is a single sample.

    Every position of every call of the layer is one use.
    """
    module = model.get_submodule(layer)
    own = {e.parameter.rpartition(".")[2] for e in _entries(model) if e.block == layer}
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

    derivatives = _jacobian(perturbed, zeros)
    a = torch.cat([_inputs(module, own, where, x) for x in arguments])
    j = torch.cat([torch.stack([_units(module, d) for d in call]) for call in derivatives], dim=1)
    return a, j.reshape(*j.shape[:2], len(where), -1)


def _inputs(module: nn.Module, names: set[str], where: Tensor, x: Inputs) -> Tensor:
    """Inputs ã `(T, G, I)` of one call: what multiplies a unit's own weights and bias."""
    own = {name: value for name, value in _trainable(module).items() if name in names}
    blocks = _jacobian(lambda params: _units(module, _evaluate(module, x, params)), own)
    # (T, O_all, p): derivative of a unit by every parameter of the layer. Of those, its own.
    derivatives = torch.cat([block.flatten(2) for block in blocks.values()], dim=2)
    local = where.unique(return_inverse=True)[1].flatten(0, 1)  # (O_all, I)
    inputs = derivatives[:, torch.arange(len(local))[:, None], local]
    by_group = inputs.unflatten(1, where.shape[:2])  # (T, G, O, I)
    first = by_group[:, :, 0]
    torch.testing.assert_close(by_group, first[:, :, None].expand_as(by_group))
    return first


def _units(module: nn.Module, output: Tensor) -> Tensor:
    """Layer output to `(T, O_all)`: units last, all other axes are positions."""
    unit_axis = 1 if isinstance(module, CONVOLUTIONS) else -1
    return output.movedim(unit_axis, -1).flatten(0, -2)


def _weight_matrices(model: nn.Module) -> dict[str, Tensor]:
    """Layers with a weight `(unit, input)`: where their parameters lie, as `(G, O, I)`.

    Only weights that are trainable and of this layer alone count.
    """
    units: dict[str, dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
    parameters: dict[str, set[str]] = defaultdict(set)
    for i, entry in enumerate(_entries(model)):
        units[entry.block][entry.unit].append(i)
        parameters[entry.block].add(entry.parameter)
    found = {}
    for layer, module in model.named_modules():
        num_units = len(units[layer])
        groups = _groups(module, num_units)
        if groups and f"{layer}.weight".removeprefix(".") in parameters[layer]:
            matrix = torch.tensor([units[layer][unit] for unit in sorted(units[layer])])
            found[layer] = matrix.unflatten(0, (groups, -1))
    return found


def _groups(module: nn.Module, num_units: int) -> int:
    """How many weight matrices a layer holds; 0 if its weight is no matrix."""
    if isinstance(module, CONVOLUTIONS):
        return module.groups
    if isinstance(module, NORMS):
        return num_units
    return int(isinstance(module, (nn.Linear, *_hugging_face_linear())))


# ---- what a unit and a block is ---------------------------------------------------------------


def _row(_: nn.Module, index: tuple[int, ...]) -> Hashable:
    return index[0]


def _column(_: nn.Module, index: tuple[int, ...]) -> Hashable:
    return index[-1]


def _entry(_: nn.Module, index: tuple[int, ...]) -> Hashable:
    return index


def _output_channel(module: nn.Module, index: tuple[int, ...]) -> Hashable:
    """A transposed convolution stores `(in, out of the group, ...)`."""
    assert isinstance(module, TRANSPOSED)
    group = index[0] // (module.in_channels // module.groups)
    return group * (module.out_channels // module.groups) + index[1]


UNITS: tuple[tuple[tuple[type[nn.Module], ...], str, Unit], ...] = (
    ((nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), "weight|bias", _row),
    (TRANSPOSED, "weight", _output_channel),
    (TRANSPOSED, "bias", _row),
    (NORMS, "weight|bias", _entry),
    ((nn.Embedding,), "weight", _row),
    ((nn.MultiheadAttention,), "(?P<part>in_proj|[qkv]_proj)_(weight|bias)", _row),
    ((nn.RNNBase, nn.RNNCellBase), "(weight|bias)_(?P<part>.+)", _row),
)
"""Types of modules, their parameters that have units, and whose unit an entry is.

Parameters of a module are one block, or one for each `part` of their names.
"""


class _Entry(NamedTuple):
    """Where an entry of a parameter belongs."""

    parameter: str
    block: str
    unit: Hashable


def _entries(model: nn.Module, apart: Collection[str] = ()) -> Iterator[_Entry]:
    """The block of every trainable entry and its unit there, in the order of a flat vector."""
    owners: dict[int, list[tuple[str, nn.Module, str]]] = defaultdict(list)
    for path, module in model.named_modules():
        for local, p in module.named_parameters(recurse=False):
            owners[id(p)].append((path, module, local))
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        unit_of: Unit = _entry
        block, owner = name, model
        for path, module, local in () if name in apart else owners[id(p)]:
            for types, pattern, rule in (*UNITS, (_hugging_face_linear(), "weight|bias", _column)):
                if isinstance(module, types) and (match := re.fullmatch(pattern, local)):
                    unit_of, owner = rule, module
                    if len(owners[id(p)]) == 1:
                        part = match.groupdict().get("part")
                        block = ".".join(filter(None, (path, part)))
        for index in product(*map(range, p.shape)):
            yield _Entry(name, block, unit_of(owner, index))


def _hugging_face_linear() -> tuple[type[nn.Module], ...]:
    """Its type, if the package that defines it is in use; the weight is `(in, out)`."""
    package = sys.modules.get("transformers.pytorch_utils")
    return () if package is None else (package.Conv1D,)


def _same(labels: list[Hashable]) -> Tensor:
    """Which pairs of labels are equal, `(P, P)` bool."""
    numbers: dict[Hashable, int] = {}
    ids = torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels])
    return ids[:, None] == ids


# ---- models as functions ----------------------------------------------------------------------


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


def _jacobian(function: Callable[[Any], Tensor], at: Any) -> Any:
    """`torch.func.jacrev`, on operators that can be differentiated row by row."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            # A loop where an operator cannot be batched is slower, not wrong.
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            return jacrev(function)(at)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


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
    """A tuple (mean, variance) counts as one tensor `(N, 2, *K)`; of named outputs, the logits."""
    outputs = getattr(outputs, "logits", outputs)
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
