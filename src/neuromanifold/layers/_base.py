"""How a layer's gradient is made: records of inputs `a` and cotangents `g`, and the rule registry.

The gradient of one sample and one sweep with respect to a weight matrix is `Σ_t g_t ã_tᵀ`, the sum
running over the positions at which the layer is used and `ã = (a, 1)` when there is a bias. A layer
rule says how to read `a` and `g` off a module; every contraction of the two is written here, once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from neuromanifold.linalg import Block, psd

__all__ = ["Call", "LayerRule", "Record", "register", "rule_for"]


_TEMPORARY_NUMEL = 2**24
"""Numbers in a temporary that a loop over units may make."""


class LayerRule(ABC):
    """How one type of module turns inputs and output gradients into records.

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
    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """Layer input `(rows, ...)` to `a (G, rows, T, I)`, without the bias column."""

    @abstractmethod
    def cotangents(self, module: nn.Module, g: Tensor) -> Tensor:
        """Output gradient `(V, rows, ...)` to `g (V, G, rows, T, O)`."""


_RULES: dict[type[nn.Module], LayerRule] = {}


def register(module_type: type[nn.Module], rule: LayerRule) -> None:
    """Use `rule` for modules of this type, and for subclasses that keep its `forward`."""
    _RULES[module_type] = rule


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule of a module, or None.

    A subclass counts only while it inherits `forward`, and an object while nobody has put another
    `forward` on it: a changed forward is a changed layer. A weight that is computed (a
    parametrization) is no parameter of the module: no rule applies.
    """
    if "forward" in vars(module):
        return None
    for module_type, rule in _RULES.items():
        if isinstance(module, module_type) and type(module).forward is module_type.forward:
            return None if nn.utils.parametrize.is_parametrized(module) else rule
    return None


@dataclass(frozen=True)
class Call:
    """One use of a block: what came in, the cotangents at what came out, and how to read both.

    Attributes:
        x: input `(N·folded, ...)`; None when no weight is trainable.
        g: cotangents `(V, N·folded, ...)`.
        folded: how many rows of `x` belong to one sample.
        inputs: `x` to `a (G, rows, T, I)`.
        cotangents: `g` to `g (V, G, rows, T, O)`.
    """

    x: Tensor | None
    g: Tensor
    folded: int
    inputs: Callable[[Tensor], Tensor]
    cotangents: Callable[[Tensor], Tensor]

    def samples(self, start: int, stop: int) -> Call:
        """The part of this call that belongs to some samples."""
        part = slice(start * self.folded, stop * self.folded)
        return replace(self, x=None if self.x is None else self.x[part], g=self.g[:, part])

    @classmethod
    def of_module(
        cls, rule: LayerRule, module: nn.Module, x: Tensor | None, g: Tensor, folded: int
    ) -> Call:
        """A call of a module that has a rule."""
        return cls(x, g, folded, partial(rule.inputs, module), partial(rule.cotangents, module))

    @classmethod
    def of_parameter(cls, gradients: Tensor) -> Call:
        """Per-sample gradients `(V, N, p)` of a parameter that no rule covers.

        Each entry counts as a unit with a bias and no inputs, so whatever a structure does with a
        bias is exact for it.
        """
        return cls(None, gradients, 1, lambda x: x, lambda g: g[:, None, :, None, :])


class Record:
    """What one block reports in one or several sweeps (axis V) over a batch.

    The tensors are made when first asked for, so that a record can be split along N before a
    convolution unfolds its input.

    Attributes:
        block: whose record this is.
        num_samples: N.
        first: whether this is the first record of its batch. The inputs of a layer are the same in
            every sweep, so statistics of `a` alone are counted only then.
        dtype: precision of `a` and `g`, whatever the layer computed in.
    """

    def __init__(
        self,
        block: Block,
        calls: tuple[Call, ...],
        num_samples: int,
        *,
        first: bool,
        dtype: torch.dtype,
    ) -> None:
        self.block = block
        self.num_samples = num_samples
        self.first = first
        self.dtype = dtype
        self._calls = calls

    def samples(self, start: int, stop: int) -> Record:
        """The record of some samples."""
        calls = tuple(call.samples(start, stop) for call in self._calls)
        return Record(self.block, calls, stop - start, first=self.first, dtype=self.dtype)

    def split(self, numel: int, *, whole: bool = False) -> Iterator[Record]:
        """Parts of the record with about `numel` numbers each, along the sample axis.

        What is counted is the entries of `a`, of `g` or of per-sample gradients, whichever are
        most; per-sample gradients only where they are made: with several positions, or if `whole`.
        """
        uses = sum(call.folded * max(math.prod(call.g.shape[2:]), 1) for call in self._calls)
        positions = max(uses // (self.block.groups * self.block.fan_out), 1)
        sweeps = self._calls[0].g.shape[0]
        largest = max(
            positions * self.block.groups * self.block.fan_in,
            positions * self.block.groups * self.block.fan_out * sweeps,
            self.block.num_parameters * sweeps if whole or positions > 1 else 0,
        )
        step = max(numel // largest, 1)
        if step >= self.num_samples:
            yield self
            return
        for start in range(0, self.num_samples, step):
            yield self.samples(start, min(start + step, self.num_samples))

    @cached_property
    def a(self) -> Tensor | None:
        """Inputs `(G, N, T, I)` without the bias column; None when no weight is trainable."""
        if self._calls[0].x is None:
            return None
        parts = [call.inputs(call.x) for call in self._calls if call.x is not None]
        return self._join(parts, sample_axis=1)

    @cached_property
    def g(self) -> Tensor:
        """Cotangents `(V, G, N, T, O)`."""
        parts = [call.cotangents(call.g) for call in self._calls]
        return self._join(parts, sample_axis=2)

    def _join(self, parts: list[Tensor], sample_axis: int) -> Tensor:
        """Rows `(..., N·folded, T, ·)` of every call to `(..., N, T_all, ·)`."""
        parts = [
            part
            if part.shape[sample_axis] == self.num_samples
            else part.unflatten(sample_axis, (self.num_samples, -1)).flatten(
                sample_axis + 1, sample_axis + 2
            )
            for part in parts
        ]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=sample_axis + 1)
        return joined.to(self.dtype)

    @property
    def num_positions(self) -> int:
        """T, uses of the layer per sample."""
        return self.g.shape[3]

    @cached_property
    def augmented(self) -> Tensor:
        """Inputs with the bias column, `ã (G, N, T, I)`."""
        if self.a is None:
            return self.g.new_ones(*self.g.shape[1:4], 1)
        if not self.block.biased:
            return self.a
        return torch.cat([self.a, self.a.new_ones(*self.a.shape[:3], 1)], dim=-1)

    def per_sample(self) -> Tensor:
        """Per-sample gradients `(V, G, N, O, I)`: memory for V·N copies of the block."""
        if self.num_positions == 1 and self.a is None:
            return self.g.transpose(-1, -2)
        return self.g.transpose(-1, -2) @ self.augmented

    def squared(self) -> Tensor:
        """Sum over samples and sweeps of the squared per-sample gradients, `(G, O, I)`."""
        if self.num_positions > 1:
            return self.per_sample().square().sum(dim=(0, 2))
        # One position: (Σ_t g_o a_i)² = g_o² a_i², so the sum over N is a matrix product.
        weights = self._squared_cotangents()  # (G, N, O)
        out = psd.aligned_empty(weights, *self.block.shape)
        if self.a is not None:
            inputs = self.a.squeeze(2)
            psd.product(weights.mT, inputs.square(), out[..., : inputs.shape[-1]])
        if self.block.biased:
            out[..., -1] = weights.sum(dim=1)
        return out

    def _squared_cotangents(self) -> Tensor:
        """Sum over sweeps of g² at a single position, `(G, N, O)`."""
        squares = self.g.squeeze(3).square()
        return squares[0] if len(squares) == 1 else squares.sum(dim=0)

    def unit_moments(self) -> Tensor:
        """`Σ p pᵀ` over samples and sweeps of each unit's gradient p, `(G, O, I, I)`."""
        if self.num_positions > 1:
            p = self.per_sample().permute(1, 3, 0, 2, 4).flatten(2, 3)  # (G, O, V·N, I)
            return psd.second_moment(p.flatten(0, 1)).unflatten(0, p.shape[:2])
        a = self.augmented.squeeze(2)  # (G, N, I)
        weights = self._squared_cotangents().mT  # (G, O, N)
        out = a.new_empty(*self.block.shape, self.block.fan_in)
        step = max(_TEMPORARY_NUMEL // a.numel(), 1)
        for start in range(0, self.block.fan_out, step):
            units = slice(start, start + step)
            weighted = a.mT[:, None] * weights[:, units, None, :]  # (G, o, I, N)
            out[:, units] = (weighted.flatten(1, 2) @ a).unflatten(1, (-1, a.shape[-1]))
        return out

    def block_moment(self) -> Tensor:
        """`Σ p pᵀ` over samples and sweeps of the block's gradient p, `(p, p)`."""
        p = self.per_sample().transpose(1, 2).flatten(0, 1).flatten(1)  # (V·N, G·O·I)
        return psd.second_moment(p[None])[0]

    def input_moment(self, *, reduce: bool) -> Tensor:
        """`Σ ã ãᵀ` over samples and positions, `(G, I, I)`; reduce: of its mean per sample."""
        if self.a is None:
            count = self.num_samples * (1 if reduce else self.num_positions)
            return self.g.new_full((self.block.groups, 1, 1), float(count))
        a = (self.a.mean(dim=2, keepdim=True) if reduce else self.a).flatten(1, 2)
        if not self.block.biased:
            return psd.second_moment(a)
        moment = psd.aligned_empty(a, self.block.groups, self.block.fan_in, self.block.fan_in)
        psd.second_moment(a, out=moment[:, :-1, :-1])
        moment[:, -1, :-1] = moment[:, :-1, -1] = a.sum(dim=1)
        moment[:, -1, -1] = a.shape[1]
        return moment

    def output_moment(self, *, reduce: bool) -> Tensor:
        """`Σ g gᵀ` over samples, sweeps, positions, `(G, O, O)`; reduce: of g summed per sample."""
        g = self.g.sum(dim=3, keepdim=True) if reduce else self.g
        g = g.transpose(0, 1).flatten(1, 3)  # (G, V·N·T, O)
        return psd.second_moment(g)
