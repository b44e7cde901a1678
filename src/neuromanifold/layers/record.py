"""Records: what one block reports in one or several sweeps over a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from neuromanifold.layers._base import LayerRule
from neuromanifold.layers.parts import Part, Whole
from neuromanifold.linalg import Block, psd

__all__ = ["Call", "Port", "Record"]


@dataclass(frozen=True)
class Port:
    """A place where the data meet a block.

    Attributes:
        rule: reads inputs and cotangents.
        module: whose uses they are.
        groups: which groups of the block take part; None for all.
    """

    rule: LayerRule
    module: nn.Module
    groups: slice | None = None

    def groups_of(self, block: Block) -> slice:
        """The groups, by number."""
        return slice(0, block.groups) if self.groups is None else self.groups


@dataclass(frozen=True)
class Call:
    """One use of a block: what came in, and the cotangents at what came out.

    Attributes:
        port: where.
        x: input `(N·folded, ...)`; None when no weight is trainable.
        g: cotangents `(V, N·folded, ...)`.
        folded: how many rows of `x` belong to one sample.
    """

    port: Port
    x: Tensor | None
    g: Tensor
    folded: int

    def samples(self, start: int, stop: int) -> Call:
        """The part of this call that belongs to some samples."""
        part = slice(start * self.folded, stop * self.folded)
        return replace(self, x=None if self.x is None else self.x[part], g=self.g[:, part])

    def sweeps(self, start: int, stop: int) -> Call:
        """The part of this call that belongs to some sweeps."""
        return replace(self, g=self.g[start:stop])

    @property
    def numel(self) -> int:
        """Numbers per sample in the cotangents of all sweeps."""
        return self.folded * len(self.g) * max(math.prod(self.g.shape[2:]), 1)


class Record:
    """What one block reports in one or several sweeps (axis V) over a batch.

    The tensors are made when first asked for, so that a record can be split along N before a
    convolution unfolds its input.

    Attributes:
        block: whose record this is.
        ports: where the block is used.
        calls: its uses; none of a port that the batch did not use.
        num_sweeps: V.
        num_samples: N.
        first: whether this is the first record of its batch. The inputs of a layer are the same in
            every sweep, so statistics of inputs alone are counted only then.
        dtype: precision of the statistics, whatever the layer computed in.
        device: where they are.
        present: which positions of the batch are not padded, boolean `(N, T)`; None if all.
    """

    def __init__(
        self,
        block: Block,
        ports: tuple[Port, ...],
        calls: tuple[Call, ...],
        shape: tuple[int, int],
        *,
        first: bool,
        dtype: torch.dtype,
        device: torch.device,
        present: Tensor | None = None,
    ) -> None:
        self.block = block
        self.ports = ports
        self.calls = calls
        self.num_sweeps, self.num_samples = shape
        self.first = first
        self.dtype = dtype
        self.device = device
        self.present = present

    def samples(self, start: int, stop: int) -> Record:
        """The record of some samples."""
        calls = tuple(call.samples(start, stop) for call in self.calls)
        some = self._with(calls, (self.num_sweeps, stop - start), first=self.first)
        some.present = None if self.present is None else self.present[start:stop]
        return some

    def sweeps(self, start: int, stop: int) -> Record:
        """The record of some sweeps; the first of them counts the inputs."""
        calls = tuple(call.sweeps(start, stop) for call in self.calls)
        first = self.first and start == 0
        return self._with(calls, (stop - start, self.num_samples), first=first)

    def _with(self, calls: tuple[Call, ...], shape: tuple[int, int], *, first: bool) -> Record:
        return Record(
            self.block,
            self.ports,
            calls,
            shape,
            first=first,
            dtype=self.dtype,
            device=self.device,
            present=self.present,
        )

    def split(
        self, numel: int, *, whole: bool | None = None, across_sweeps: bool = True
    ) -> Iterator[Record]:
        """Parts of the record with about `numel` numbers each, along samples, then along sweeps.

        What is counted is the entries of inputs, of cotangents or of per-sample gradients,
        whichever are most; gradients if they are needed `whole`, and by default where squaring them
        needs them so.
        """
        used = [(port, calls) for port, calls in self._by_port if calls]
        if whole is None:
            whole = len(self.ports) > 1 or any(
                port.rule.sums_gradients(self.block, calls) for port, calls in used
            )
        largest = max((port.rule.numel(self.block, calls) for port, calls in used), default=1)
        if whole:
            largest = max(largest, self.block.num_parameters * self.num_sweeps)
        step = max(numel // largest, 1)
        together = self.num_sweeps
        if across_sweeps and numel < largest:  # one sample is a lot
            together = max(numel * self.num_sweeps // largest, 1)
        for start in range(0, self.num_samples, step):
            some = self
            if step < self.num_samples:
                some = self.samples(start, min(start + step, self.num_samples))
            if together == self.num_sweeps:
                yield some
                continue
            for sweep in range(0, self.num_sweeps, together):
                yield some.sweeps(sweep, min(sweep + together, self.num_sweeps))

    @property
    def _by_port(self) -> list[tuple[Port, tuple[Call, ...]]]:
        return [
            (port, tuple(call for call in self.calls if call.port is port)) for port in self.ports
        ]

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """What each place of use contributes; the gradient is their sum."""
        return tuple(self._part(port, calls) for port, calls in self._by_port)

    def _part(self, port: Port, calls: tuple[Call, ...]) -> Part:
        if calls:
            part = port.rule.part(self.block, calls, self.num_samples, self.dtype)
            if self.present is not None:
                part.padded = ~self.present
            return part
        shape = (self.num_sweeps, self.num_samples)
        zeros = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return port.rule.absent(self.block, port.groups_of(self.block), zeros)

    @property
    def single(self) -> Part | None:
        """The part that is the whole record, if there is one."""
        if len(self.parts) != 1:
            return None
        part = self.parts[0]
        return part if part.groups == slice(0, self.block.groups) else None

    def per_sample(self) -> Tensor:
        """Per-sample gradients `(V, G, N, O, I)`: memory for V·N copies of the block."""
        if self.single is not None:
            return self.single.per_sample()
        groups, *shape = self.block.shape
        out = torch.zeros(
            (self.num_sweeps, groups, self.num_samples, *shape),
            dtype=self.dtype,
            device=self.device,
        )
        for part in self.parts:
            out[:, part.groups] += part.per_sample()
        return out

    def squared(self) -> Tensor:
        """Sum over samples and sweeps of the squared per-sample gradients, `(G, O, I)`."""
        if self.single is not None:
            return self.single.squared()
        return self.per_sample().square().sum(dim=(0, 2))

    def unit_moments(self) -> Tensor:
        """`Σ p pᵀ` over samples and sweeps of each unit's gradient p, `(G, O, I, I)`."""
        if self.single is not None:
            return self.single.unit_moments()
        return Whole(self.per_sample(), slice(0, self.block.groups)).unit_moments()

    def block_moment(self) -> Tensor:
        """`Σ p pᵀ` over samples and sweeps of the block's gradient p, `(p, p)`."""
        p = self.per_sample().transpose(1, 2).flatten(0, 1).flatten(1)  # (V·N, G·O·I)
        return psd.second_moment(p[None])[0]
