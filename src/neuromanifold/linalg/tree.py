"""Parameter vectors and their views as weight matrices: names, shapes, offsets, nothing else.

Three kinds of vector are accepted everywhere: `Params` (a dict from name to tensor), flat `(P,)`
and flat `(P, R)`. Inside the library a set of R vectors is always `rows (R, P)`, and the part of it
that belongs to one layer is `(R, G, O, I)`: G groups, fan-out O, fan-in I with the bias as last
column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from neuromanifold._typing import Params
from neuromanifold.errors import listed

__all__ = ["Block", "Layout", "Slot", "Vector"]

Vector: TypeAlias = Params | Tensor

_IN_ORDER = tuple(range(16))


@dataclass(frozen=True, eq=False)
class Layout:
    """Names and shapes of the parameters, in the order in which they are flattened.

    Two layouts are equal if flat vectors mean the same in both: the order counts.

    Example:
        >>> layout = Layout({"weight": (2, 3), "bias": (2,)})
        >>> layout.num_parameters
        8
        >>> layout.unflatten(torch.arange(8.0))["bias"]
        tensor([6., 7.])
    """

    shapes: Mapping[str, tuple[int, ...]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self._entries == other._entries

    def __hash__(self) -> int:
        return hash(self._entries)

    @property
    def _entries(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return tuple((name, tuple(shape)) for name, shape in self.shapes.items())

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names in flattening order."""
        return tuple(self.shapes)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each parameter lies in a flat vector."""
        ends, start = {}, 0
        for name, shape in self.shapes.items():
            ends[name] = slice(start, start := start + math.prod(shape))
        return ends

    @cached_property
    def num_parameters(self) -> int:
        """P, the length of a flat vector."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def flatten(self, params: Params) -> Tensor:
        """Concatenate a parameter dict into a flat `(P,)` tensor.

        Raises:
            ValueError: If names or shapes differ from the layout's.
            TypeError: If an entry is no tensor.
        """
        missing = [name for name in self.shapes if name not in params]
        extra = [name for name in params if name not in self.shapes]
        if missing or extra:
            raise ValueError(
                f"The parameter dict does not match this Fisher matrix: missing {listed(missing)}, "
                f"unknown {listed(extra)}. Expected exactly the keys that were measured, "
                f"F.layout.names: {listed(self.shapes)}."
            )
        for name, shape in self.shapes.items():
            if not isinstance(params[name], Tensor):
                raise TypeError(
                    f"{name!r} is no tensor but {type(params[name]).__name__}. A parameter that "
                    f"the loss does not depend on has no gradient: give zeros instead."
                )
            if tuple(params[name].shape) != tuple(shape):
                raise ValueError(
                    f"{name!r} has shape {tuple(params[name].shape)}, expected {tuple(shape)}."
                )
        return torch.cat([params[name].reshape(-1) for name in self.shapes])

    def unflatten(self, flat: Tensor) -> Params:
        """Split a flat `(P,)` tensor into a parameter dict of views."""
        return {name: flat[s].reshape(self.shapes[name]) for name, s in self.slices.items()}

    def rows(self, v: Vector) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """Bring any kind of vector to rows `(R, P)`.

        Returns:
            The rows, and a function that brings rows `(R, P)` back to the kind that came in.

        Raises:
            ValueError: If the vector does not fit the layout.
            TypeError: If it is neither a dict nor a tensor.
        """
        if isinstance(v, Mapping):
            return self.flatten(v)[None], lambda rows: self.unflatten(rows[0])
        if not isinstance(v, Tensor):
            raise TypeError(
                f"A vector is a dict of tensors, a flat (P,) or a flat (P, R) tensor; "
                f"got {type(v).__name__}."
            )
        if v.ndim not in (1, 2) or v.shape[0] != self.num_parameters:
            raise ValueError(
                f"A flat vector here has shape ({self.num_parameters},) or "
                f"({self.num_parameters}, R); got {tuple(v.shape)}."
            )
        if v.ndim == 1:
            return v[None], lambda rows: rows[0]
        return v.T, lambda rows: rows.T

    def restrict(self, names: Iterable[str]) -> Layout:
        """The layout of some of the parameters, in this layout's order.

        Raises:
            ValueError: If a name does not exist, or none is given.
        """
        wanted = [names] if isinstance(names, str) else list(names)
        if not wanted:
            raise ValueError(f"Give at least one parameter name. There are: {listed(self.shapes)}.")
        unknown = [name for name in wanted if name not in self.shapes]
        if unknown:
            raise ValueError(
                f"No parameters named {listed(unknown)}. "
                f"There are: {listed(self.shapes, near=unknown[0])}."
            )
        return Layout({name: shape for name, shape in self.shapes.items() if name in wanted})


@dataclass(frozen=True)
class Slot:
    """One parameter as some columns `(G, O, columns)` of a block.

    Attributes:
        parameter: its name.
        columns: how many fan-in columns it fills.
        view: the shape it is reshaped to, and
        order: the permutation of that view which puts group and fan-out axes first.
    """

    parameter: str
    columns: int
    view: tuple[int, ...]
    order: tuple[int, ...]

    def ordered(self, parameter: Tensor) -> Tensor:
        """With group and fan-out axes first."""
        if self._is_plain:
            return parameter
        return parameter.reshape(self.view).permute(self.order)

    def restored(self, columns: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `ordered`, from columns that belong to it."""
        if self._is_plain:
            return columns.reshape(shape)
        permuted = columns.reshape([self.view[i] for i in self.order])
        inverse = [self.order.index(i) for i in range(len(self.view))]
        return permuted.permute(inverse).reshape(shape)

    @property
    def _is_plain(self) -> bool:
        return self.order == _IN_ORDER[: len(self.order)]

    @classmethod
    def plain(cls, parameter: str, groups: int, fan_out: int, columns: int) -> Slot:
        """A parameter stored as `(G·O, columns)`, like the weight of Linear and of convolutions."""
        return cls(parameter, columns, (groups, fan_out, columns), (0, 1, 2))


@dataclass(frozen=True)
class Block:
    """The parameters of one layer as one weight matrix per group, `(G, O, I)`.

    Attributes:
        name: the module that owns the parameters.
        groups: G.
        fan_out: O, units of one group.
        slots: parameters, side by side along the fan-in axis.
        biased: whether the last fan-in column is a bias, that is, multiplies an input of one.
        lookup: whether at each position one unit alone is used, as in an embedding.
    """

    name: str
    groups: int
    fan_out: int
    slots: tuple[Slot, ...]
    biased: bool = False
    lookup: bool = False

    @property
    def fan_in(self) -> int:
        """I, columns of all slots together."""
        return sum(slot.columns for slot in self.slots)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(G, O, I)`."""
        return (self.groups, self.fan_out, self.fan_in)

    @property
    def num_parameters(self) -> int:
        """G·O·I."""
        return math.prod(self.shape)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters, in column order."""
        return tuple(slot.parameter for slot in self.slots)

    def read(self, rows: Tensor, layout: Layout) -> Tensor:
        """The block's part of rows `(R, P)`, as `(R, G, O, I)`."""
        parts = self.read_slots(rows, layout)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def write(self, value: Tensor, rows: Tensor, layout: Layout) -> None:
        """Store `(R, G, O, I)` into the block's part of rows `(R, P)`."""
        self.write_slots(value.split([slot.columns for slot in self.slots], dim=-1), rows, layout)

    def read_slots(self, rows: Tensor, layout: Layout) -> list[Tensor]:
        """The same slot by slot, each `(R, G, O, columns)`: views where the layout allows."""
        parts = []
        for slot in self.slots:
            part = rows[:, layout.slices[slot.parameter]].reshape(-1, *slot.view)
            part = part.permute(0, *(1 + i for i in slot.order))
            parts.append(part.reshape(-1, self.groups, self.fan_out, slot.columns))
        return parts

    def write_slots(self, parts: Sequence[Tensor], rows: Tensor, layout: Layout) -> None:
        """The inverse of `read_slots`."""
        for slot, part in zip(self.slots, parts, strict=True):
            own = rows[:, layout.slices[slot.parameter]].unflatten(1, slot.view)
            own = own.permute(0, *(1 + i for i in slot.order))
            own.copy_(part.reshape(own.shape))

    def join(self, params: Params) -> Tensor:
        """The block's parameters, by name, as one `(1, G, O, I)`."""
        parts = self.columns(params)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def columns(self, params: Params) -> list[Tensor]:
        """The block's parameters, by name, each `(1, G, O, columns)`: views where possible."""
        shape = (1, self.groups, self.fan_out)
        return [
            slot.ordered(params[slot.parameter]).reshape(*shape, slot.columns)
            for slot in self.slots
        ]

    def divide(self, value: Tensor, like: Params) -> Params:
        """The inverse of `join`: `(1, G, O, I)` by name, in the shapes of `like`."""
        parts = [value]
        if len(self.slots) > 1:
            parts = list(value.split_with_sizes([slot.columns for slot in self.slots], dim=-1))
        return {
            slot.parameter: slot.restored(part, like[slot.parameter].shape)
            for slot, part in zip(self.slots, parts, strict=True)
        }

    def restrict(self, names: Iterable[str]) -> tuple[Block, list[int]] | None:
        """The block with some of its parameters, and the fan-in columns that stay."""
        keep: list[Slot] = []
        columns: list[int] = []
        start = 0
        for slot in self.slots:
            if slot.parameter in names:
                keep.append(slot)
                columns += range(start, start + slot.columns)
            start += slot.columns
        if not keep:
            return None
        biased = self.biased and self.slots[-1] in keep
        return replace(self, slots=tuple(keep), biased=biased), columns

    def renamed(self, parameters: Iterable[str]) -> Block:
        """With other names of the parameters, in column order."""
        named = zip(self.slots, parameters, strict=True)
        return replace(self, slots=tuple(replace(slot, parameter=name) for slot, name in named))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Block:
        """The inverse of `to_dict`, also after a passage through JSON."""
        slots = tuple(
            Slot(s["parameter"], s["columns"], tuple(s["view"]), tuple(s["order"]))
            for s in entry["slots"]
        )
        return cls(**{**entry, "slots": slots})

    @classmethod
    def of_layer(
        cls, name: str, groups: int, fan_out: int, fan_in: int, trainable: Collection[str]
    ) -> Block:
        """A layer with `weight (G·O, fan_in, ...)` and `bias (G·O,)`, those of them that train."""
        prefix = f"{name}." if name else ""
        slots = tuple(
            Slot.plain(prefix + local, groups, fan_out, columns)
            for local, columns in (("weight", fan_in), ("bias", 1))
            if local in trainable
        )
        return cls(name, groups, fan_out, slots, biased="bias" in trainable)

    @classmethod
    def whole(cls, layout: Layout) -> Block:
        """All parameters as the fan-in of one imaginary unit: `(1, 1, P)`, flattening order."""
        slots = tuple(
            Slot.plain(name, 1, 1, math.prod(shape)) for name, shape in layout.shapes.items()
        )
        return cls("", 1, 1, slots)

    @classmethod
    def vector(cls, name: str, layout: Layout) -> Block:
        """One parameter as a column of units without inputs: `(1, p, 1)`, like a bias."""
        size = math.prod(layout.shapes[name])
        return cls(name, 1, size, (Slot.plain(name, 1, size, 1),), biased=True)
