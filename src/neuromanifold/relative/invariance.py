"""Whether a component's metric is its own: checks that a user runs on his component.

A relative Fisher matrix must not depend on what surrounds the component, nor on the coordinates
that it is written in (Sun and Nielsen, arXiv 1606.06069; papers.md §1.1).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from neuromanifold._estimate import plain
from neuromanifold._fisher import fisher
from neuromanifold._typing import Params
from neuromanifold.capture import Batch, Data, buffers_kept, call_model, logits_of
from neuromanifold.errors import UnsupportedError
from neuromanifold.estimators import Exact
from neuromanifold.likelihoods import Gaussian, Likelihood
from neuromanifold.operators import FisherOperator
from neuromanifold.relative.coordinates import (
    Change,
    Use,
    input_changed,
    observed,
    units_permuted,
    with_parameters,
)
from neuromanifold.structures import Gram

__all__ = ["Check", "Invariance", "check_invariance"]

DIRECTIONS = 16
"""Random parameter changes whose lengths and angles are compared."""

UNIT = 2.54
"""What an output is multiplied by in another unit: as from inches to centimetres."""


@dataclass(frozen=True)
class Check:
    """What became of the metric when something changed that must not matter.

    Attributes:
        name: what was changed.
        deviation: relative, of the inner products of random parameter changes; None if the check
            is not applicable.
        tolerance: what rounding may make of it.
        note: how it was changed, or why the check is not applicable.
    """

    name: str
    deviation: float | None
    tolerance: float
    note: str

    @property
    def passed(self) -> bool | None:
        """Whether the metric stayed the same; None if the check is not applicable."""
        return None if self.deviation is None else self.deviation <= self.tolerance


@dataclass(frozen=True)
class Invariance:
    """The checks of a component; `print` shows a table.

    Attributes:
        checks: surroundings, coordinates of the input, unit and order of the outputs.
        full_blocks_apart: how far the component's blocks of the full Fisher matrices of two random
            networks are from each other, relative, where the relative ones are the same.
    """

    checks: tuple[Check, ...]
    full_blocks_apart: float

    @property
    def passed(self) -> bool:
        """Whether no check failed, and at least one was applicable."""
        verdicts = {check.passed for check in self.checks}
        return False not in verdicts and True in verdicts

    def __getitem__(self, name: str) -> Check:
        """The check of that name.

        Raises:
            KeyError: If there is none; the message lists them.
        """
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"no check {name!r}; there are {[check.name for check in self.checks]}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; what is not finite is None."""
        checks = [{**asdict(check), "passed": check.passed} for check in self.checks]
        found = {"passed": self.passed, "full_blocks_apart": self.full_blocks_apart}
        return plain({**found, "checks": checks})

    def __str__(self) -> str:
        words = {True: "passed", False: "FAILED", None: "not applicable"}
        lines = [("changed", "", "deviation", "tolerance", "")]
        lines += [
            (
                check.name,
                words[check.passed],
                "–" if check.deviation is None else f"{check.deviation:.1e}",
                f"{check.tolerance:.1e}",
                check.note,
            )
            for check in self.checks
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def check_invariance(
    component: nn.Module,
    inputs: Any,
    response: Likelihood,
    *,
    generator: torch.Generator | None = None,
) -> Invariance:
    """Check on your own component that its metric depends on nothing but itself and its inputs.

    * surroundings: inside two random networks that hand it the same inputs, and make outputs of
      different shapes of what it returns, the relative Fisher matrix is the same. The blocks of
      the networks' full Fisher matrices are not; the note says how far apart they are.
    * input coordinates: with `x → M x + c` at the input, and the layers that read it changed so
      that the function stays the same, the metric transforms as a tensor, `G = Tᵀ G′ T`.
    * unit of the outputs: with `y → 2.54 y`, and the response's variance in the new unit.
    * order of the units: with the units of the last layer, and so the outputs, in another order.

    Compared are inner products `uᵀ G v` of random parameter changes, by products with the exact
    metric, which is never formed. All samples' records are kept, those of `nm.Gram()` with
    `nm.Exact()`, so give few samples. The component itself is left as it is.

    Args:
        component: any module. A random one (dropout in training mode) is refused.
        inputs: what it is given: data as `nm.fisher` takes them. They are kept.
        response: what its outputs mean, e.g. `nm.Gaussian()`.
        generator: source of the changes, and of the random networks.

    Returns:
        One entry per check, with what rounding allows; a check that makes no sense for the
        component says why.

    Raises:
        UnsupportedError: If two calls of the component give different outputs, if the metric is
            zero, or if the response has no exact Fisher information.
        TooLargeError: If the records of so many samples would not fit into memory.
        ValueError: As for `nm.fisher`.

    Example:
        >>> import torch, neuromanifold as nm
        >>> unit = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh()).double()
        >>> x = torch.randn(8, 3, dtype=torch.float64)
        >>> found = nm.relative.check_invariance(unit, x, nm.Gaussian())
        >>> found.passed, found["input coordinates"].deviation < 1e-12
        (True, True)
    """
    if not isinstance(component, nn.Module):
        raise TypeError(f"component is a torch.nn.Module, got {type(component).__name__}.")
    given = _Given(component, list(Data(inputs, component)), response, generator)
    before = given.products(given.metric)
    if not bool(before.norm() > 0):
        raise UnsupportedError(
            "The metric is zero: no parameter has an influence on the response, so there is "
            "nothing to compare. Give other inputs, or look for dead activations."
        )
    surroundings, apart = _surroundings(given, before)
    others = (_input_coordinates, _unit_of_outputs, _order_of_units)
    return Invariance((surroundings, *(check(given, before) for check in others)), apart)


def _unchanged(params: Params) -> Params:
    return params


class _Given:
    """The component, and what its metric is compared with.

    Attributes:
        response: what outputs mean.
        batches: all of them.
        metric: of the component as it is.
        shapes: of its trainable parameters, by name.
        changes: of these, random.
        tolerance: relative, of inner products.
        outputs: of the first batch.
        uses: of matrix layers in the first batch.
    """

    def __init__(
        self,
        component: nn.Module,
        batches: list[Batch],
        response: Likelihood,
        generator: torch.Generator | None,
    ) -> None:
        self.component, self.batches, self.response = component, batches, response
        self._generator = generator
        self.metric = self.metric_of(component, response, batches)
        self.shapes = self.metric.layout.shapes
        with observed(component) as self.uses:
            self.outputs = self.run(component, batches[0].inputs)
        if not self.same(self.run(component, batches[0].inputs), self.outputs):
            raise UnsupportedError(
                "Two calls of the component with the same inputs gave different outputs, so it has "
                "no metric of its own. Call component.eval() to switch dropout off."
            )
        self.changes: list[Params] = [
            {name: self.draw(*shape).to(self.metric.device) for name, shape in self.shapes.items()}
            for _ in range(DIRECTIONS)
        ]
        # Rounding errors of sums grow like the root of their number of terms; 100 is for the
        # depth, and for M, which has a condition number of 4 and enters twice.
        terms = self.metric.num_samples + self.metric.num_parameters
        self.tolerance = 100 * self._eps * math.sqrt(terms)

    @property
    def _eps(self) -> float:
        """Of the least precise parameter or output."""
        tensors = [*self.component.parameters(), self.outputs]
        return max(torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point())

    def draw(self, *sizes: int) -> Tensor:
        """Standard normal numbers in float64, on the CPU."""
        device = "cpu" if self._generator is None else self._generator.device
        return torch.randn(
            sizes, generator=self._generator, dtype=torch.float64, device=device
        ).cpu()

    def run(self, component: nn.Module, inputs: Any) -> Tensor:
        """Outputs of a component, detached."""
        with torch.no_grad(), buffers_kept(component):
            return self.response.canonical(logits_of(call_model(component, inputs)))

    def same(self, one: Tensor, other: Tensor) -> bool:
        """Whether outputs are equal but for rounding."""
        allowed = 1000 * self._eps * other.double().norm()
        return bool((one.double() - other.double()).norm() <= allowed)

    @staticmethod
    def metric_of(
        component: nn.Module, response: Likelihood, batches: list[Batch], **options: Any
    ) -> FisherOperator:
        """The exact metric, by products."""
        return fisher(component, response, batches, Gram(), estimator=Exact(), **options)

    def products(
        self,
        metric: FisherOperator,
        *,
        prefix: str = "",
        transform: Callable[[Params], Params] = _unchanged,
    ) -> Tensor:
        """`uᵀ G v` of all pairs of changes, `(R, R)` in float64, R the number of directions.

        Args:
            metric: G, which may be in other coordinates.
            prefix: of its parameters' names.
            transform: from the component's coordinates to those of the metric.
        """
        still = {
            name: torch.zeros_like(p, dtype=torch.float64)
            for name, p in self.component.named_parameters()
        }
        moved = []
        for change in self.changes:
            params = transform({**still, **change})
            named = {f"{prefix}{name}": params[name] for name in change}
            moved.append(metric.layout.flatten(named))
        V = torch.stack(moved, dim=1)
        return V.T @ metric.matmat(V.to(metric.dtype)).double()


def _deviation(after: Tensor, before: Tensor) -> float:
    return float((after - before).norm() / before.norm())


class _Host(nn.Module):
    """A network around a component: returns what the component returns, and what is made of it."""

    def __init__(
        self, component: nn.Module, canonical: Callable[[Any], Tensor], head: nn.Module
    ) -> None:
        super().__init__()
        self.component = component
        self.canonical = canonical
        self.head = head

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        outputs = self.canonical(logits_of(self.component(*args, **kwargs)))
        features = outputs if outputs.ndim > 1 else outputs[:, None]
        return outputs, self.head(features)


def _surroundings(given: _Given, before: Tensor) -> tuple[Check, float]:
    """The metric inside two networks, read at the component's outputs; how full blocks differ."""
    size = given.outputs.shape[-1] if given.outputs.ndim > 1 else 1
    shallow = nn.Sequential(nn.Linear(size, 3))
    deep = nn.Sequential(nn.Linear(size, 8), nn.Tanh(), nn.Linear(8, 5))
    unlabelled = [replace(batch, targets=None, observed=None) for batch in given.batches]
    own, full = [], []
    for head in (shallow, deep):
        head.to(given.outputs)
        with torch.no_grad():
            for p in head.parameters():
                p.copy_(given.draw(*p.shape) / math.sqrt(p.shape[-1]))
        host = _Host(given.component, given.response.canonical, head)
        names = [f"component.{name}" for name in given.shapes]
        own.append(
            given.metric_of(
                host,
                given.response,
                given.batches,
                params=names,
                forward=lambda host, inputs: call_model(host, inputs)[0],
            )
        )
        full.append(
            given.metric_of(
                host,
                Gaussian(),
                unlabelled,
                params=names,
                forward=lambda host, inputs: call_model(host, inputs)[1],
            )
        )
    relative = [given.products(metric, prefix="component.") for metric in own]
    blocks = [given.products(metric, prefix="component.") for metric in full]
    apart = _deviation(blocks[1], blocks[0])
    deviation = max(_deviation(found, before) for found in relative)
    note = f"two random networks, whose full Fisher blocks differ by {apart:.2g}"
    return Check("surroundings", deviation, given.tolerance, note), apart


def _input_coordinates(given: _Given, before: Tensor) -> Check:
    """`x → M x + c` at the layers that read the component's input."""
    name = "input coordinates"
    leaves = tree_leaves(given.batches[0].inputs)
    readers = [use for use in given.uses if any(use.x is leaf for leaf in leaves)]
    if not readers:
        why = "the input is not read by linear or convolutional layers"
        return Check(name, None, given.tolerance, why)
    first = readers[0]
    alike = [use for use in readers if use.x is first.x and _features(use) == _features(first)]
    change = input_changed(given.component, alike, given.draw)
    place = next(i for i, leaf in enumerate(leaves) if leaf is first.x)
    batches = [_with_leaf(batch, place, change.data) for batch in given.batches]
    other = _changed(given, change)
    if not given.same(given.run(other, batches[0].inputs), given.outputs):
        where = ", ".join(use.name for use in alike)
        why = f"no change of {where} makes up for it: the input is read elsewhere, too"
        return Check(name, None, given.tolerance, why)
    metric = given.metric_of(other, given.response, batches)
    after = given.products(metric, transform=change.parameters)
    return Check(name, _deviation(after, before), given.tolerance, change.words)


def _unit_of_outputs(given: _Given, before: Tensor) -> Check:
    """`y → 2.54 y`, and the response in the new unit."""
    name = "unit of the outputs"
    response = _in_other_unit(given.response, UNIT)
    if response is None:
        why = f"the outputs of {given.response!r} have no unit"
        return Check(name, None, given.tolerance, why)

    def scaled(component: nn.Module, inputs: Any) -> Tensor:
        return UNIT * given.response.canonical(logits_of(call_model(component, inputs)))

    metric = given.metric_of(given.component, response, given.batches, forward=scaled)
    note = f"y → {UNIT} y, with {response!r}"
    return Check(name, _deviation(given.products(metric), before), given.tolerance, note)


def _order_of_units(given: _Given, before: Tensor) -> Check:
    """The units of the last layer, and so the outputs, in another order."""
    name = "order of the units"

    def not_applicable(why: str) -> Check:
        return Check(name, None, given.tolerance, why)

    if not given.uses:
        return not_applicable("there is no linear or convolutional layer")
    last = given.uses[-1]
    size, outputs = len(last.layer.weight), given.outputs
    if outputs.ndim < 2 or outputs.shape[last.axis] != size or size == 1:
        return not_applicable(f"the outputs are not the units of {last.name}, the last layer")
    change = units_permuted(given.component, last, given.draw)
    other = _changed(given, change)
    permuted = change.data(outputs)
    if not given.same(given.run(other, given.batches[0].inputs), permuted):
        why = f"the units of {last.name}, the last layer, differ by more than their weights"
        return not_applicable(why)
    v = given.draw(*outputs.shape).to(outputs)
    product = given.response.fisher_product(outputs, v)
    if not given.same(
        given.response.fisher_product(permuted, change.data(v)), change.data(product)
    ):
        return not_applicable(f"{given.response!r} tells its outputs apart")
    metric = given.metric_of(other, given.response, given.batches)
    after = given.products(metric, transform=change.parameters)
    return Check(name, _deviation(after, before), given.tolerance, change.words)


def _features(use: Use) -> tuple[int, ...]:
    """What layers that read the same features have in common."""
    return use.axis, use.groups, use.layer.weight.shape[1]


def _with_leaf(batch: Batch, place: int, function: Callable[[Tensor], Tensor]) -> Batch:
    """With a function of one of the tensors that the inputs are made of, by number."""
    leaves, spec = tree_flatten(batch.inputs)
    leaves[place] = function(leaves[place])
    return replace(batch, inputs=tree_unflatten(leaves, spec))


def _changed(given: _Given, change: Change) -> nn.Module:
    """The component in other coordinates."""
    parameters = {name: p.detach() for name, p in given.component.named_parameters()}
    return with_parameters(given.component, change.parameters(parameters))


def _in_other_unit(response: Likelihood, factor: float) -> Likelihood | None:
    """What a response is for outputs that are a number of times as large; None if they are pure."""
    powers = {"variance": 2, "support": 1}
    fields = {name: power for name, power in powers.items() if hasattr(response, name)}
    if not (dataclasses.is_dataclass(response) and fields):
        return None
    new = {}
    for name, power in fields.items():
        value = getattr(response, name)
        scale = factor**power
        new[name] = tuple(scale * v for v in value) if isinstance(value, tuple) else scale * value
    return dataclasses.replace(response, **new)
