"""A structure for each layer: chosen by patterns, or by a budget of memory."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from neuromanifold.capture import Plan
from neuromanifold.capture import plan as plan_of
from neuromanifold.errors import TooLargeError, UnsupportedError
from neuromanifold.layers import Record
from neuromanifold.linalg import Block, memory
from neuromanifold.operators import BlockMatrix, BlockOperator, Coverage, FisherOperator
from neuromanifold.operators.direct_sum import direct_sum
from neuromanifold.structures._base import (
    AdditiveStructure,
    Source,
    Statistics,
    Structure,
)
from neuromanifold.structures.dense import BlockDiagonal, Dense
from neuromanifold.structures.diagonal import Diagonal
from neuromanifold.structures.kronecker import Kronecker
from neuromanifold.structures.passes import sources_of_passes

__all__ = ["auto", "per_layer"]


def per_layer(choices: Mapping[str, Any]) -> Structure:
    """The structure that a mapping from patterns to structures describes.

    A pattern (shell-style, case counts) names modules or parameters. A module stands for everything
    inside it. The parameters that a layer rule reads together, such as a weight and its bias, are
    one block: a pattern takes a block if it matches the block's name, or all of its parameters. The
    first pattern, in the order of the mapping, takes it. A structure that is one matrix over the
    whole model elsewhere (`nm.Dense`, `nm.Gram`) is one over all blocks that its pattern takes.

    Args:
        choices: e.g. `{"*.attn.*": nm.Kronecker(), "head": nm.Dense(), "*": nm.Diagonal()}`.

    Returns:
        An additive structure if all choices are additive.

    Raises:
        TypeError: If a key is no text, or a value no structure.
        ValueError: If there is no choice.
    """
    patterns = _Patterns(_checked(choices))
    if all(_is_shared(choice) for choice in patterns.choices.values()):
        return PerBlock(repr(patterns), patterns.additive, patterns.assign)
    return _Mixed(patterns)


def _checked(choices: Mapping[Any, Any]) -> dict[str, Structure]:
    example = '{"*.attn.*": nm.Kronecker(), "*": nm.Diagonal()}'
    if not choices:
        raise ValueError(f"The structure is an empty mapping; give patterns, e.g. {example}.")
    for pattern, choice in choices.items():
        if not isinstance(pattern, str):
            raise TypeError(
                f"The structure's patterns are texts, e.g. {example}; got the key {pattern!r}."
            )
        if isinstance(choice, Mapping):
            raise TypeError(
                f"The structure for {pattern!r} is a mapping again. One mapping is enough: write "
                f"the inner patterns out in full, before the wider ones, e.g. {example}."
            )
        if isinstance(choice, Auto):
            raise TypeError(
                f"The structure for {pattern!r} is {choice!r}, which shares a budget out over the "
                f"whole model. Use it alone, or name a structure for the pattern, e.g. {example}."
            )
        if not isinstance(choice, Structure):
            given = f"class {choice.__name__}" if isinstance(choice, type) else repr(choice)
            raise TypeError(
                f"The structure for {pattern!r} is the object nm.Kronecker() or the like; "
                f"got {given}."
            )
    return dict(choices)


def _is_shared(structure: Structure) -> bool:
    """Whether the structure can share a pass over the data with others."""
    return isinstance(structure, AdditiveStructure) and not structure.own_sweeps


@dataclass(frozen=True, repr=False)
class _Patterns:
    """Which pattern, and so which structure, a block belongs to."""

    choices: dict[str, Structure]

    def __repr__(self) -> str:
        return repr(self.choices)

    def assign(self, plan: Plan) -> dict[str, list[Block]]:
        """Blocks by pattern.

        Raises:
            ValueError: If a block is left without a pattern, or a pattern without a block.
        """
        taken: dict[str, list[Block]] = {pattern: [] for pattern in self.choices}
        for block in plan.blocks:
            taken[self.pattern(block)].append(block)
        for pattern, own in taken.items():
            if not own and pattern != "*":  # what is left over may be nothing
                self._refuse_idle(pattern, plan)
        return {pattern: own for pattern, own in taken.items() if own}

    def pattern(self, block: Block) -> str:
        """The first pattern that takes a block."""
        for pattern in self.choices:
            matched = _matched(block, pattern)
            if len(matched) == len(block.parameters):
                return pattern
            if matched:
                others = [name for name in block.parameters if name not in matched]
                raise ValueError(
                    f"The structure's pattern {pattern!r} matches {matched}, but not {others}, "
                    f"which are one block with it and need the same structure. Match the block "
                    f"{block.name!r}."
                )
        raise ValueError(
            f"No pattern of the structure matches the block {block.name!r} with the parameters "
            f'{list(block.parameters)}; there are {list(self.choices)}. Add a last entry "*", e.g. '
            f'"*": nm.Diagonal(), or leave the parameters out by params=...'
        )

    def additive(self, block: Block) -> AdditiveStructure:
        """The structure of a block, where all are additive."""
        choice = self.choices[self.pattern(block)]
        assert isinstance(choice, AdditiveStructure)
        return choice

    def _refuse_idle(self, pattern: str, plan: Plan) -> None:
        matched = [block for block in plan.blocks if _matched(block, pattern)]
        if matched:
            before = list(dict.fromkeys(self.pattern(block) for block in matched))
            raise ValueError(
                f"The structure's pattern {pattern!r} comes too late: all it matches, "
                f"{[block.name for block in matched]}, is taken by {before} before it. Put it "
                f"first, or leave it out."
            )
        shared = [
            f"{other!r} is {name!r} under another name: match that. "
            for other, name in _other_names(plan).items()
            if _names(pattern, other)
        ]
        raise ValueError(
            f"The structure's pattern {pattern!r} matches no measured module or parameter. "
            f"{''.join(shared)}There are the blocks {[block.name for block in plan.blocks]} with "
            f"the parameters {list(plan.layout.names)}."
        )


def _matched(block: Block, pattern: str) -> list[str]:
    """The parameters of a block that a pattern names: one by one, by a module, or by the block."""
    names = list(block.parameters)
    if fnmatchcase(block.name, pattern):
        return names
    return [name for name in names if _names(pattern, name)]


def _names(pattern: str, parameter: str) -> bool:
    """Whether a pattern matches a parameter or a module around it."""
    parts = parameter.split(".")
    return any(fnmatchcase(".".join(parts[:n]), pattern) for n in range(len(parts), 0, -1))


def _other_names(plan: Plan) -> dict[str, str]:
    """Further names of parameters that modules share, and the one that is measured."""
    name_of = {p: name for name, p in plan.model.named_parameters()}
    everywhere = plan.model.named_parameters(remove_duplicate=False)
    return {other: name_of[p] for other, p in everywhere if other != name_of[p]}


class PerBlock(AdditiveStructure):
    """Additive structures, one for each block, in one pass over the data.

    Args:
        name: how it is written.
        choose: the structure of a block.
        check: is given the plan before the data are read.
    """

    def __init__(
        self,
        name: str,
        choose: Callable[[Block], AdditiveStructure],
        check: Callable[[Plan], object] | None = None,
    ) -> None:
        self._name = name
        self._choose = choose
        self._check = check
        self._chosen: dict[str, AdditiveStructure] = {}

    def __repr__(self) -> str:
        return self._name

    def at(self, parameters: Mapping[str, Tensor]) -> PerBlock:
        """As the structures of the blocks are."""
        return PerBlock(self._name, lambda block: self._of(block).at(parameters), self._check)

    def build(self, source: Source) -> BlockOperator:
        """Check the choices against the model, and measure."""
        if self._check is not None:
            self._check(source.plan)
        # By parameter: a block may turn out, in the first batch, to be several smaller ones.
        self._chosen = {
            name: choice
            for block in source.plan.blocks
            for choice in [self._choose(block)]
            for name in block.parameters
        }
        return super().build(source)

    def _of(self, block: Block) -> AdditiveStructure:
        return self._chosen.get(block.slots[0].parameter) or self._choose(block)

    def split(self, record: Record) -> Iterator[Record]:
        """As the block's structure does."""
        return self._of(record.block).split(record)

    def statistics(self, record: Record) -> Statistics:
        """Those of the block's structure."""
        return self._of(record.block).statistics(record)

    def assemble(self, block: Block, statistics: Statistics, normaliser: float) -> BlockMatrix:
        """That of the block's structure."""
        return self._of(block).assemble(block, statistics, normaliser)

    def symmetric(self, block: Block) -> tuple[str, ...]:
        """Those of the block's structure."""
        return self._of(block).symmetric(block)

    def numel(self, block: Block) -> int:
        """That of the block's structure."""
        return self._of(block).numel(block)

    def represent(self, block: Block) -> tuple[str, bool, str]:
        """As the block's structure does."""
        return self._of(block).represent(block)


class _Mixed(Structure):
    """Structures by pattern, of which some need a pass of their own over the data."""

    def __init__(self, patterns: _Patterns) -> None:
        self._patterns = patterns

    def __repr__(self) -> str:
        return repr(self._patterns)

    def build(self, source: Source) -> FisherOperator:
        """One pass for all additive structures together, and one for each other pattern.

        Sampled labels are the same in all passes, if the data come in the same order.
        """
        passes = self._passes(source.plan)
        if len(passes) > 1:
            source.require_repeatable(f"The structure {self!r}")
        parts = []
        for (structure, names), one in zip(
            passes, sources_of_passes(source, len(passes)), strict=True
        ):
            one.plan = _restricted(source.plan, names)
            parts.append(structure.build(one))
        source.num_samples = parts[-1].num_samples
        return direct_sum(parts, source.plan.layout, source.origin(self))

    def constant_numel(self, plan: Plan) -> int:
        """The sum over passes, whose results are kept together."""
        return sum(
            structure.constant_numel(_restricted(plan, names))
            for structure, names in self._passes(plan)
        )

    def _passes(self, plan: Plan) -> list[tuple[Structure, list[str]]]:
        """Structures, and the parameters that each is measured of."""
        passes: list[tuple[Structure, list[str]]] = []
        together: list[str] = []
        for pattern, blocks in self._patterns.assign(plan).items():
            structure = self._patterns.choices[pattern]
            names = [name for block in blocks for name in block.parameters]
            if _is_shared(structure):
                together += names
            else:
                passes.append((structure, names))
        if together:
            passes.append((PerBlock(repr(self), self._patterns.additive), together))
        return passes


def _restricted(whole: Plan, names: Iterable[str]) -> Plan:
    """The plan of some of the parameters."""
    return plan_of(whole.model, map(glob.escape, names), whole.uncovered)


SHARE = 4
"""Without `max_bytes`, a structure may fill the free memory divided by this: what solves with it
needs the matrices' decompositions, and the batches their room."""


def auto(max_bytes: int | str | None = None) -> Structure:
    """The richest structure that fits into a budget, layer by layer.

    `nm.Dense()` of the whole model, if that fits. Otherwise each layer starts as `nm.Diagonal()`,
    or as `nm.Kronecker()` where that is smaller (an embedding); then layers are raised to
    `nm.Kronecker()`, and after that to `nm.BlockDiagonal()`, those that cost least first, as long
    as the budget lasts. The same model and budget give the same choice. `F.coverage` says per
    parameter what was chosen, and what the next richer one would have needed.

    The budget is for the numbers that are kept. Time is not looked at: to invert a full matrix of p
    parameters takes about p³ operations, so give a budget that you have the patience for.

    Args:
        max_bytes: e.g. `2**30` or "512 MiB"; a quarter of the free memory if not given.

    Raises:
        ValueError: If `max_bytes` is no size.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model = torch.nn.Sequential(torch.nn.Linear(50, 20), torch.nn.Linear(20, 2))
        >>> F = nm.fisher(model, nm.Gaussian(), torch.randn(8, 50), nm.auto("32 KiB"))
        >>> for entry in F.coverage:
        ...     print(entry.parameter, entry.structure)
        0.weight Kronecker
        0.bias Kronecker
        1.weight BlockDiagonal
        1.bias BlockDiagonal
    """
    if max_bytes is not None:
        memory.parse(max_bytes)
    return Auto(max_bytes)


LEVELS: tuple[AdditiveStructure, ...] = (Diagonal(), Kronecker(), BlockDiagonal())
"""From the poorest to the richest."""


@dataclass(frozen=True, repr=False)
class Auto(Structure):
    """What `auto` returns.

    Attributes:
        max_bytes: the budget as it was given.
    """

    max_bytes: int | str | None

    def __repr__(self) -> str:
        return "auto()" if self.max_bytes is None else f"auto({self.max_bytes!r})"

    def build(self, source: Source) -> FisherOperator:
        """Share the budget out, measure, and write into the coverage why."""
        if self.max_bytes is None and source.reducer is not None:
            raise UnsupportedError(
                "auto() looks at the free memory, which differs between processes, while all of "
                'them must choose the same. Give the budget of each: nm.auto("2 GiB").'
            )
        structure, reasons = self._choice(source.plan)
        F = structure.build(source)
        F.coverage = Coverage(
            tuple(
                replace(entry, note="; ".join(filter(None, (entry.note, reasons[entry.parameter]))))
                for entry in F.coverage
            )
        )
        F.origin = source.origin(self, F.origin.notes)
        return F

    def constant_numel(self, plan: Plan) -> int:
        """Of what it would choose."""
        return self._choice(plan)[0].constant_numel(plan)

    def _choice(self, plan: Plan) -> tuple[Structure, dict[str, str]]:
        """What fits, and per parameter why nothing richer does."""
        itemsize, parameters = plan.dtype.itemsize, plan.layout.num_parameters
        budget = (
            memory.available(plan.device) // SHARE
            if self.max_bytes is None
            else memory.parse(self.max_bytes)
        )
        whole = itemsize * parameters**2
        if whole <= budget:
            reason = f"auto: {memory.readable(whole)} of the {memory.readable(budget)} budget"
            return Dense(), dict.fromkeys(plan.layout.names, reason)
        ladders = [_Ladder(block, itemsize) for block in plan.blocks]
        left = _share_out(ladders, budget, parameters)
        # Blocks of which the first batch makes several smaller ones keep their structure, in which
        # these need no more bytes (but for a diagonal factor: their diagonal may be more).
        ladder_of = {name: ladder for ladder in ladders for name in ladder.block.parameters}
        structure = PerBlock(repr(self), lambda block: ladder_of[block.parameters[0]].level)
        return structure, {
            name: ladder.reason(whole, left, budget) for name, ladder in ladder_of.items()
        }


class _Ladder:
    """The structures that a block can have, poorest first, and the one it has."""

    def __init__(self, block: Block, itemsize: int) -> None:
        self.block = block
        self._rungs: list[tuple[AdditiveStructure, int]] = []
        for level in LEVELS:
            size = itemsize * level.numel(block)
            if self._rungs and level.represent(block)[0] == type(LEVELS[0]).__name__:
                continue  # a block without inputs is its diagonal under another name
            while self._rungs and size <= self._rungs[-1][1]:
                self._rungs.pop()  # poorer, and no smaller
            self._rungs.append((level, size))
        self._at = 0

    @property
    def level(self) -> AdditiveStructure:
        """The structure it has."""
        return self._rungs[self._at][0]

    @property
    def size(self) -> int:
        """Its bytes."""
        return self._rungs[self._at][1]

    @property
    def _above(self) -> tuple[AdditiveStructure, int] | None:
        return self._rungs[self._at + 1] if self._at + 1 < len(self._rungs) else None

    def cost(self, level: AdditiveStructure) -> int | None:
        """Bytes to be raised to a level, None if that is not the next one."""
        above = self._above
        return above[1] - self.size if above is not None and above[0] is level else None

    def climb(self) -> None:
        """Take the next level."""
        self._at += 1

    def reason(self, whole: int, left: int, budget: int) -> str:
        """Why it has no richer structure."""
        if self._above is None:
            return (
                f"auto: Dense would need {memory.readable(whole)} of the "
                f"{memory.readable(budget)} budget"
            )
        richer, size = self._above
        return (
            f"auto: {type(richer).__name__} would need {memory.readable(size)}, the "
            f"{memory.readable(budget)} budget has {memory.readable(left + self.size)} for it"
        )


def _share_out(ladders: list[_Ladder], budget: int, parameters: int) -> int:
    """Raise blocks as far as the budget allows; returns the bytes left.

    Raises:
        TooLargeError: If the poorest structures do not fit.
    """
    least = sum(ladder.size for ladder in ladders)
    if least > budget:
        raise TooLargeError(
            f"nm.auto() has a budget of {memory.readable(budget)}, but the least it can keep of "
            f"{parameters} parameters, about their diagonal, needs {memory.readable(least)}. Give "
            f"a larger max_bytes, or measure a part of the model by params=[...].",
            bytes_needed=least,
            bytes_available=budget,
        )
    left = budget - least
    for level in LEVELS[1:]:
        costs = [
            (cost, i)
            for i, ladder in enumerate(ladders)
            if (cost := ladder.cost(level)) is not None
        ]
        for cost, i in sorted(costs):
            if cost > left:  # and so are all that follow
                break
            ladders[i].climb()
            left -= cost
    return left
