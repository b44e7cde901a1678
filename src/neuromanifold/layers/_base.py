"""How a layer's gradient is made of what comes in and what goes back, and the rule registry.

The gradient of one sample and one sweep with respect to a weight matrix is `Σ_t g_t ã_tᵀ`, the sum
running over the positions at which the layer is used and `ã = (a, 1)` when there is a bias. A layer
rule says how to read `a` and `g` off a module; every contraction of the two is written once, in
`parts`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from neuromanifold.layers.parts import Factored, Part, Whole
from neuromanifold.linalg import Block

if TYPE_CHECKING:
    from neuromanifold.layers.record import Call

__all__ = [
    "CompositeRule",
    "ElementwiseRule",
    "LayerRule",
    "Piece",
    "Use",
    "WeightRule",
    "register",
    "rule_for",
]


class LayerRule(ABC):
    """How one type of module turns inputs and output gradients into the parts of a record.

    `rows` below is N times the number of times that the sample axis was folded into it.

    Attributes:
        name: what the coverage table calls this rule.
    """

    name: str

    @abstractmethod
    def block(self, module: nn.Module, name: str, trainable: frozenset[str]) -> Block:
        """The module's trainable parameters (local names) as a weight matrix per group.

        At most two slots: first the weight, then the bias.
        """

    @abstractmethod
    def part(
        self, block: Block, calls: tuple[Call, ...], num_samples: int, dtype: torch.dtype
    ) -> Part:
        """What the calls of one port contribute to the block's gradient."""

    @abstractmethod
    def absent(self, block: Block, groups: slice, zeros: Tensor) -> Part:
        """The part of a port that a batch does not use; `zeros` is `(V, N)`."""

    @abstractmethod
    def numel(self, block: Block, calls: tuple[Call, ...]) -> int:
        """Numbers per sample, over all sweeps, in the largest tensor that `part` makes."""

    @abstractmethod
    def sums_gradients(self, block: Block, calls: tuple[Call, ...]) -> bool:
        """Whether the gradients of each sample are formed to square them."""

    def pieces(self, module: nn.Module, name: str, trainable: frozenset[str]) -> list[Piece]:
        """One block, used where the module is called."""
        block = self.block(module, name, trainable)
        return [Piece(block, (Use("", self),))] if block.slots else []


class WeightRule(LayerRule):
    """A layer with weights: every use multiplies inputs `a` by a matrix, and adds a bias."""

    @abstractmethod
    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """Layer input `(rows, ...)` to `a (G, rows, T, I)`, without the bias column."""

    @abstractmethod
    def cotangents(self, module: nn.Module, g: Tensor) -> Tensor:
        """Output gradient `(V, rows, ...)` to `g (V, G, rows, T, O)`."""

    def part(
        self, block: Block, calls: tuple[Call, ...], num_samples: int, dtype: torch.dtype
    ) -> Factored:
        """Calls side by side along T."""
        module = calls[0].port.module
        a = [self.inputs(module, call.x) for call in calls if call.x is not None]
        g = [self.cotangents(module, call.g) for call in calls]
        return Factored(
            _join(a, num_samples, 1).to(dtype) if a else None,
            _join(g, num_samples, 2).to(dtype),
            block.biased,
            calls[0].port.groups_of(block),
        )

    def absent(self, block: Block, groups: slice, zeros: Tensor) -> Factored:
        """No position."""
        (sweeps, num_samples), count = zeros.shape, groups.stop - groups.start
        weights = block.fan_in - block.biased
        return Factored(
            zeros.new_zeros(count, num_samples, 0, weights) if weights else None,
            zeros.new_zeros(sweeps, count, num_samples, 0, block.fan_out),
            block.biased,
            groups,
        )

    def numel(self, block: Block, calls: tuple[Call, ...]) -> int:
        """Of inputs and cotangents."""
        groups = calls[0].port.groups_of(block)
        inputs = self._positions(block, calls) * (groups.stop - groups.start) * block.fan_in
        return max(inputs, sum(call.numel for call in calls))

    def sums_gradients(self, block: Block, calls: tuple[Call, ...]) -> bool:
        """Where a sample has several uses."""
        return self._positions(block, calls) > 1

    def _positions(self, block: Block, calls: tuple[Call, ...]) -> int:
        groups = calls[0].port.groups_of(block)
        cotangents = len(calls[0].g) * (groups.stop - groups.start) * block.fan_out
        return max(sum(call.numel for call in calls) // cotangents, 1)


class ElementwiseRule(LayerRule):
    """A layer with few parameters per unit, whose per-sample gradients are small enough to keep."""

    @abstractmethod
    def gradients(self, module: nn.Module, x: Tensor | None, g: Tensor, block: Block) -> Tensor:
        """Input `(rows, ...)` and output gradient `(V, rows, ...)` to `(V, G, rows, O, I)`.

        Summed over the positions inside a row; `x` is None when the block has a bias only.
        """

    def part(
        self, block: Block, calls: tuple[Call, ...], num_samples: int, dtype: torch.dtype
    ) -> Whole:
        """The sum over calls."""
        total: Tensor | None = None
        for call in calls:
            x = None if call.x is None else call.x.to(dtype)
            rows = self.gradients(call.port.module, x, call.g.to(dtype), block)
            if call.folded > 1:
                rows = rows.unflatten(2, (num_samples, call.folded)).sum(dim=3)
            total = rows if total is None else total + rows
        assert total is not None
        return Whole(total, calls[0].port.groups_of(block))

    def absent(self, block: Block, groups: slice, zeros: Tensor) -> Whole:
        """A gradient of zero."""
        (sweeps, num_samples), count = zeros.shape, groups.stop - groups.start
        shape = (sweeps, count, num_samples, block.fan_out, block.fan_in)
        return Whole(zeros.new_zeros(shape), groups)

    def numel(self, block: Block, calls: tuple[Call, ...]) -> int:
        """Of cotangents and of per-sample gradients."""
        sweeps = len(calls[0].g)
        return max(*(call.numel for call in calls), block.num_parameters * sweeps)

    def sums_gradients(self, block: Block, calls: tuple[Call, ...]) -> bool:
        """They are there."""
        return True


class CompositeRule(ABC):
    """A module that uses its parameters inside, where no hook sees them: attention, recurrence.

    While records are taken, the module runs by `forward` below, which computes the same from
    functions that it reports.

    Attributes:
        name: what the coverage table calls this rule.
    """

    name: str

    @abstractmethod
    def pieces(self, module: nn.Module, name: str, trainable: frozenset[str]) -> list[Piece]:
        """The module's trainable parameters (local names) as blocks, and where each is used."""

    @abstractmethod
    def forward(self, module: nn.Module, use: Reporter, *args: Any, **kwargs: Any) -> Any:
        """What `module.forward(*args, **kwargs)` returns.

        Every function of a trainable parameter is reported by `output = use(port, x, output)`: the
        port's name, the input (None if only a bias is added), and the output, whose gradient makes
        the cotangents. Each report stands for one entry of the parameter into autograd's graph.
        Where it cannot do what is asked for, it returns `type(module).forward(module, ...)`, and
        the parameters are read by the generic path.
        """


Reporter = Callable[[str, Tensor | None, Tensor], Tensor]


@dataclass(frozen=True)
class Use:
    """Where a block meets the data, before the module is known to a tape.

    Attributes:
        port: "" for the module's own input and output, else a name of a composite rule.
        rule: reads what is seen there.
        groups: which groups of the block; None for all.
    """

    port: str
    rule: LayerRule
    groups: slice | None = None


@dataclass(frozen=True)
class Piece:
    """A block and the places where it is used."""

    block: Block
    uses: tuple[Use, ...]


_RULES: dict[type[nn.Module], LayerRule | CompositeRule] = {}
_RULES_BY_NAME: dict[str, LayerRule | CompositeRule] = {}


def register(module_type: type[nn.Module] | str, rule: LayerRule | CompositeRule) -> None:
    """Use `rule` for modules of this type, and for subclasses that keep its `forward`.

    Args:
        module_type: the class, or its full name "package.module.Class" if the package should not be
            imported for it.
        rule: how to read it.
    """
    if isinstance(module_type, str):
        _RULES_BY_NAME[module_type] = rule
    else:
        _RULES[module_type] = rule


Recogniser: TypeAlias = Callable[[nn.Module], LayerRule | None]
"""The rule of a module whose class is not known, by what it computes; None if it is another."""

_RECOGNISERS: list[Recogniser] = []


def recognise(recogniser: Recogniser) -> Recogniser:
    """Ask `recogniser` about modules without a registered rule."""
    _RECOGNISERS.append(recogniser)
    return recogniser


def rule_for(module: nn.Module) -> LayerRule | CompositeRule | None:
    """The rule of a module, or None.

    A subclass counts as its base only while it inherits `forward`, and an object while nobody has
    put another `forward` on it: a changed forward is a changed layer. A weight that is computed (a
    parametrization) is no parameter of the module: no rule applies.
    """
    if "forward" in vars(module) or nn.utils.parametrize.is_parametrized(module):
        return None
    for module_type in type(module).__mro__:
        rule = _RULES.get(module_type) or _RULES_BY_NAME.get(
            f"{module_type.__module__}.{module_type.__qualname__}"
        )
        if rule is None:
            continue
        if type(module).forward is getattr(module_type, "forward", None):
            return rule
        break
    found = (recogniser(module) for recogniser in _RECOGNISERS)
    return next((rule for rule in found if rule is not None), None)


def _join(parts: Iterable[Tensor], num_samples: int, sample_axis: int) -> Tensor:
    """Rows `(..., N·folded, T, ·)` of every call to `(..., N, T_all, ·)`."""
    parts = [
        part
        if part.shape[sample_axis] == num_samples
        else part.unflatten(sample_axis, (num_samples, -1)).flatten(
            sample_axis + 1, sample_axis + 2
        )
        for part in parts
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=sample_axis + 1)
