"""What the uses of a block say about its gradient: pairs of vectors, or the gradients themselves.

The gradient of one sample and one sweep is `Σ_t o_t i_tᵀ` over the positions t at which the layer
is used. A `Part` holds one such sum; its two `Side`s hold the vectors `o_t` and `i_t`. For a linear
layer `i` is the input and `o` the cotangent. For an embedding `o` is the token, as a one-hot vector
that is never formed, and `i` the cotangent: its units are the rows of its weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from neuromanifold.linalg import psd

__all__ = [
    "Factored",
    "Indexed",
    "Inputs",
    "OneHot",
    "Part",
    "Side",
    "Vectors",
    "Whole",
    "as_rows",
    "count_uses",
]


TEMPORARY_NUMEL = 2**24
"""Numbers in a temporary that a loop may make."""

_CACHED_NUMEL = {True: 2**18, False: 2**22}
"""Numbers in a temporary that stays in the cache: of a processor (True), of an accelerator."""
_MANY_UNITS = 32
"""From which on second moments of units are faster as weighted sums of pairs of inputs."""
_STRIP = 16
"""Columns of these at a time: fewer make narrow products, more waste the symmetry."""


class Side(ABC):
    """The vectors of one side of a sum over positions, `n` numbers each.

    Attributes:
        once: whether they are the same in every sweep, as inputs are, so that their statistics are
            counted in the first sweep of a batch only.
    """

    once: bool

    @abstractmethod
    def moment(self, *, reduce: bool) -> Tensor:
        """`Σ x xᵀ` over samples, sweeps, positions: `(G, n, n)`, or `(G, n)` if it is diagonal.

        With `reduce`, of one vector per sample: the mean over positions if `once`, else the sum.
        """

    @abstractmethod
    def squares(self, *, reduce: bool) -> Tensor:
        """The diagonal of the moment, `(G, n)`."""

    @abstractmethod
    def rows(self, *, reduce: bool) -> Tensor:
        """The vectors x that the moment is a sum over, `(G, R, n)`."""


class Vectors(Side):
    """Cotangents `x (V, G, N, T, n)`."""

    once = False

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def moment(self, *, reduce: bool) -> Tensor:
        """`(G, n, n)`."""
        return psd.second_moment(self.rows(reduce=reduce))

    def squares(self, *, reduce: bool) -> Tensor:
        """`(G, n)`."""
        return self.rows(reduce=reduce).square().sum(dim=1)

    def rows(self, *, reduce: bool) -> Tensor:
        """`(G, V·N·T, n)`."""
        x = self.x.sum(dim=3, keepdim=True) if reduce else self.x
        return as_rows(x.transpose(0, 1))


class Inputs(Side):
    """Layer inputs `a (G, N, T, I)`, and ones in a last column if there is a bias.

    Args:
        a: the inputs.
        biased: whether there is a bias.
        used: which positions are uses, boolean `(N, T)`; None for all.
    """

    once = True

    def __init__(self, a: Tensor, biased: bool, used: Tensor | None) -> None:
        self.a = a if used is None else a * used[..., None]
        self.biased = biased
        self.used = used

    def moment(self, *, reduce: bool) -> Tensor:
        """`(G, I, I)`."""
        a = self._rows(reduce)
        if not self.biased:
            return psd.second_moment(a)
        width = a.shape[-1] + 1
        moment = psd.aligned_empty(a, len(a), width, width)
        psd.second_moment(a, out=moment[:, :-1, :-1])
        moment[:, -1, :-1] = moment[:, :-1, -1] = a.sum(dim=1)
        moment[:, -1, -1] = self._num_rows(reduce)
        return moment

    def squares(self, *, reduce: bool) -> Tensor:
        """`(G, I)`."""
        squares = self._rows(reduce).square().sum(dim=1)
        if not self.biased:
            return squares
        ones = squares.new_empty(len(squares), 1)
        ones[:] = self._num_rows(reduce)
        return torch.cat([squares, ones], dim=1)

    def rows(self, *, reduce: bool) -> Tensor:
        """`(G, N·T, I)`; rows that are no uses are zero."""
        a = self._rows(reduce)
        if not self.biased:
            return a
        ones = a.new_ones(a.shape[1]) if self.used is None else self._used_rows(reduce).to(a)
        return torch.cat([a, ones[None, :, None].expand(len(a), -1, 1)], dim=-1)

    def _used_rows(self, reduce: bool) -> Tensor:
        assert self.used is not None
        return self.used.any(dim=1) if reduce else self.used.flatten()

    def _rows(self, reduce: bool) -> Tensor:
        if not reduce:
            return as_rows(self.a)
        return self.a.sum(dim=2) / _per_sample(self.used, self.a.shape[2])

    def _num_rows(self, reduce: bool) -> Tensor | int:
        return count_uses(self.used, self.a.shape[1:3], reduce=reduce)


class OneHot(Side):
    """Unit vectors of length `width`, by the index of their entry, `(N, T)`; −1 for zero."""

    once = True

    def __init__(self, indices: Tensor, width: int, like: Tensor, used: Tensor | None) -> None:
        self.indices = indices if used is None else torch.where(used, indices, -1)
        self.width = width
        self.used = used
        self._like = like

    def moment(self, *, reduce: bool) -> Tensor:
        """Counts `(1, width)`; reduce: `(1, width, width)`, of each sample's frequencies."""
        if not reduce:
            return self.squares(reduce=False)
        return psd.second_moment(self._frequencies()[None])

    def squares(self, *, reduce: bool) -> Tensor:
        """`(1, width)`."""
        if reduce:
            return self._frequencies().square().sum(dim=0, keepdim=True)
        counts = self._like.new_zeros(1, self.width)
        seen = (self.indices >= 0).to(counts).flatten()[None]
        return counts.index_add_(1, self.indices.clamp(min=0).flatten(), seen)

    def _frequencies(self) -> Tensor:
        """Of each entry in each sample, `(N, width)`."""
        seen = (self.indices >= 0).to(self._like)
        out = seen.new_zeros(len(self.indices), self.width)
        out.scatter_add_(1, self.indices.clamp(min=0), seen)
        return out / _per_sample(self.used, self.indices.shape[1])

    def rows(self, *, reduce: bool) -> Tensor:
        """`(1, N·T, width)`: formed after all, for who needs them."""
        if reduce:
            return self._frequencies()[None]
        indices = self.indices.flatten()
        out = self._like.new_zeros(len(indices), self.width)
        out.scatter_(1, indices.clamp(min=0)[:, None], (indices >= 0).to(out)[:, None])
        return out[None]


def as_rows(x: Tensor) -> Tensor:
    """`(G, ..., n)` to `(G, R, n)`, in memory as it is: vectors first, or one entry of all of them.

    Those of convolutions lie so that positions are last, and are not turned around.
    """
    return x.flatten(1, -2) if x.stride(-1) == 1 else x.movedim(-1, 1).flatten(2).mT


def count_uses(used: Tensor | None, shape: Sequence[int], *, reduce: bool) -> Tensor | int:
    """Uses among `(N, T)` positions; reduce: samples with a use."""
    if used is None:
        return shape[0] * (1 if reduce else shape[1])
    return (used.any(dim=1) if reduce else used).sum()


def _per_sample(used: Tensor | None, positions: int) -> Tensor | int:
    """Uses in each sample, `(N, 1)` where they differ, at least one."""
    if used is None:
        return max(positions, 1)
    return used.sum(dim=1, keepdim=True).clamp(min=1)


class Part(ABC):
    """The contribution of one place of use to the gradients of some groups of a block.

    Attributes:
        groups: which groups; shapes below have `G` of them.
    """

    groups: slice
    sides: tuple[Side, Side] | None = None
    """Outputs and inputs of the sum, where there is one."""
    padded: Tensor | None = None
    """Which positions of the batch are padded, boolean `(N, T)`; None if none is known to be."""

    @cached_property
    def used(self) -> Tensor | None:
        """Which positions are uses, boolean `(N, T)`; None for all.

        Those are none that are padded and get no gradient. A layer with other positions than the
        batch has, such as one behind a pooling, keeps all.
        """
        touched = None if self.padded is None else self.touched()
        if touched is None or self.padded is None or touched.shape != self.padded.shape:
            return None
        return touched | ~self.padded

    def touched(self) -> Tensor | None:
        """Which positions get a gradient, boolean `(N, T)`; None if there are none."""
        return None

    @property
    @abstractmethod
    def num_positions(self) -> int:
        """T, uses per sample."""

    @abstractmethod
    def per_sample(self) -> Tensor:
        """Per-sample gradients `(V, G, N, O, I)`: memory for V·N copies of the groups."""

    def apart(self) -> Part:
        """With the positions of a sample as samples of their own."""
        return self

    def squared(self) -> Tensor:
        """Sum over samples and sweeps of the squared per-sample gradients, `(G, O, I)`."""
        return self.per_sample().square().sum(dim=(0, 2))

    def unit_moments(self) -> Tensor:
        """`Σ p pᵀ` over samples and sweeps of each unit's gradient p, `(G, O, I, I)`."""
        p = self.per_sample().permute(1, 3, 0, 2, 4).flatten(2, 3)  # (G, O, V·N, I)
        return psd.second_moment(p.flatten(0, 1)).unflatten(0, p.shape[:2])


class Factored(Part):
    """Inputs and cotangents of a layer with weights.

    Attributes:
        a: inputs `(G, N, T, I)` without the bias column; None when no weight is trainable.
        g: cotangents `(V, G, N, T, O)`.
        biased: whether a bias column follows.
    """

    def __init__(self, a: Tensor | None, g: Tensor, biased: bool, groups: slice) -> None:
        self.a = a
        self.g = g
        self.biased = biased
        self.groups = groups

    @property
    def sides(self) -> tuple[Side, Side] | None:  # type: ignore[override]
        """Cotangents and inputs."""
        if self.a is None:
            return None
        return Vectors(self.g), Inputs(self.a, self.biased, self.used)

    def touched(self) -> Tensor:
        """Where cotangents are not zero."""
        return (self.g != 0).any(dim=4).any(dim=0).any(dim=0)

    @property
    def num_positions(self) -> int:
        """T."""
        return self.g.shape[3]

    def apart(self) -> Factored:
        """Positions along N."""
        a = None if self.a is None else self.a.flatten(1, 2)[:, :, None]
        return Factored(a, self.g.flatten(2, 3)[:, :, :, None], self.biased, self.groups)

    @cached_property
    def augmented(self) -> Tensor:
        """Inputs with the bias column, `ã (G, N, T, I)`."""
        if self.a is None:
            return self.g.new_ones(*self.g.shape[1:4], 1)
        if not self.biased:
            return self.a
        return torch.cat([self.a, self.a.new_ones(*self.a.shape[:3], 1)], dim=-1)

    def per_sample(self) -> Tensor:
        """`Σ_t g_t ã_tᵀ`."""
        if self.num_positions == 1 and self.a is None:
            return self.g.transpose(-1, -2)
        a = self.augmented
        if self.num_positions == 1 or len(self.g) == 1:
            return self.g.transpose(-1, -2) @ a
        out = self.g.new_empty(*self.g.shape[:3], self.g.shape[4], a.shape[3])
        for own, g in zip(out, self.g, strict=True):  # all at once would copy inputs V times
            torch.matmul(g.transpose(-1, -2), a, out=own)
        return out

    def squared(self) -> Tensor:
        """A matrix product at one position: `(Σ_t g_o a_i)² = g_o² a_i²`."""
        alone = self.num_positions == 1
        weights = self._squared_cotangents() if alone else self.g.mT  # (G, N, O), (V, G, N, O, T)
        width = 0 if self.a is None else self.a.shape[-1]
        groups, fan_out = self.g.shape[1], self.g.shape[4]
        out = psd.aligned_empty(self.g, groups, fan_out, width + self.biased)
        if self.a is not None and alone:
            psd.product(weights.mT, self.a.squeeze(2).square(), out[..., :width])
        elif self.a is not None:
            _sum_squares(weights, self.a, out[..., :width])
        if self.biased:
            # Apart: a column more makes a width for which BLAS is slower, such as 129.
            of_bias = weights if alone else self.g.sum(dim=3).square_().sum(dim=0)
            out[..., -1] = of_bias.sum(dim=1)
        return out

    def _squared_cotangents(self) -> Tensor:
        """Sum over sweeps of g² at a single position, `(G, N, O)`."""
        squares = self.g.squeeze(3).square()
        return squares[0] if len(squares) == 1 else squares.sum(dim=0)

    def unit_moments(self) -> Tensor:
        """At one position, inputs weighted by squared cotangents."""
        if self.num_positions != 1:
            return super().unit_moments()
        return _weighted_moments(self.augmented.squeeze(2), self._squared_cotangents().mT)


def _sum_squares(g: Tensor, a: Tensor, out: Tensor) -> None:
    """`Σ (g a)²` over sweeps and samples of `g (V, G, N, O, T)` and `a (G, N, T, I)`: `(G, O, I)`.

    Some products at a time, in one place that stays in the cache.
    """
    num_samples = a.shape[1]
    step = max(_CACHED_NUMEL[a.device.type == "cpu"] // out.numel(), 1)
    products = out.new_empty(len(out), min(step, num_samples), *out.shape[1:])
    out.zero_()
    for start in range(0, num_samples, step):
        some = slice(start, start + step)
        for sweep in g:
            p = torch.matmul(sweep[:, some], a[:, some], out=products[:, : num_samples - start])
            if step == 1:
                out.addcmul_(p[:, 0], p[:, 0])
            else:
                out += p.square_().sum(dim=1)


def _weighted_moments(a: Tensor, weights: Tensor) -> Tensor:
    """`Σ_n w_on a_n a_nᵀ` for inputs `(G, N, I)` and weights `(G, O, N)`: `(G, O, I, I)`."""
    num_units, (num_samples, width) = weights.shape[1], a.shape[1:]
    out = a.new_empty(*weights.shape[:2], width, width)
    if num_units < _MANY_UNITS:
        step = max(TEMPORARY_NUMEL // a.numel(), 1)
        for start in range(0, num_units, step):
            units = slice(start, start + step)
            weighted = a.mT[:, None] * weights[:, units, None, :]  # (G, o, I, N)
            out[:, units] = (weighted.flatten(1, 2) @ a).unflatten(1, (-1, width))
        return out
    # Products of pairs of inputs are the same for all units, and half of the pairs are enough.
    step = max(min(_STRIP, TEMPORARY_NUMEL // (num_samples * width)), 1)
    for start in range(0, width, step):
        stop = min(start + step, width)
        pairs = a[..., start:stop, None] * a[..., None, start:]
        strip = (weights @ pairs.flatten(2)).unflatten(2, pairs.shape[2:])
        out[..., start:stop, start:] = strip
        out[..., stop:, start:stop] = strip[..., stop - start :].mT
    return out


class Indexed(Part):
    """Rows of a table that were looked up, and the cotangents at what was found.

    Attributes:
        indices: `(N, T)`, the row at each position; −1 where there is no gradient.
        g: cotangents `(V, N, T, D)`.
        num_rows: of the table; units of the block, whose fan-in is D.
    """

    groups = slice(0, 1)

    def __init__(self, indices: Tensor, g: Tensor, num_rows: int) -> None:
        self.indices = indices
        self.g = torch.where((indices >= 0)[..., None], g, 0)
        self.num_rows = num_rows

    @property
    def sides(self) -> tuple[Side, Side]:  # type: ignore[override]
        """Tokens and cotangents."""
        tokens = OneHot(self.indices, self.num_rows, self.g, self.used)
        return tokens, Vectors(self.g[:, None])

    def touched(self) -> Tensor:
        """Where cotangents are not zero."""
        return (self.g != 0).any(dim=3).any(dim=0)

    def apart(self) -> Indexed:
        """Positions along N."""
        return Indexed(self.indices.reshape(-1, 1), self.g.flatten(1, 2)[:, :, None], self.num_rows)

    @property
    def num_positions(self) -> int:
        """T."""
        return self.indices.shape[1]

    def per_sample(self) -> Tensor:
        """The table is zero but for the rows that were looked up."""
        sweeps, num_samples, _, width = self.g.shape
        out = self.g.new_zeros(sweeps, num_samples, self.num_rows, width)
        rows = self.indices.clamp(min=0)[None, :, :, None].expand_as(self.g)
        return out.scatter_add_(2, rows, self.g)[:, None]

    def squared(self) -> Tensor:
        """Without the zeros."""
        rows, sums = self._combined
        out = sums.new_zeros(1, self.num_rows, sums.shape[-1])
        return out.index_add_(1, rows, sums.square().sum(dim=0, keepdim=True))

    def unit_moments(self) -> Tensor:
        """Without the zeros."""
        rows, sums = self._combined
        width = sums.shape[-1]
        out = sums.new_zeros(self.num_rows, width, width)
        step = max(TEMPORARY_NUMEL // width**2, 1)
        for start in range(0, len(rows), step):
            p = sums[:, start : start + step]
            out.index_add_(0, rows[start : start + step], torch.einsum("vsi,vsj->sij", p, p))
        return out[None]

    @cached_property
    def _combined(self) -> tuple[Tensor, Tensor]:
        """Distinct pairs of sample and row: the row `(S,)` and its gradient `(V, S, D)`.

        S is N·T, whatever repeats: entries without a pair are zero and belong to row 0, so that no
        size depends on values.
        """
        num_samples = len(self.indices)
        rows = self.indices.clamp(min=0)
        samples = torch.arange(num_samples, device=rows.device)[:, None]
        pairs, order = (samples * self.num_rows + rows).flatten().sort()
        starts = torch.ones_like(pairs)
        starts[1:] = pairs[1:] != pairs[:-1]
        pair = starts.cumsum(0) - 1
        sums = torch.zeros_like(self.g).flatten(1, 2)
        sums.index_add_(1, pair, self.g.flatten(1, 2).index_select(1, order))
        found = torch.zeros_like(pairs).scatter_(0, pair, pairs % self.num_rows)
        return found, sums


class Whole(Part):
    """Per-sample gradients as they are, `(V, G, N, O, I)`: layers with few parameters per unit."""

    def __init__(self, gradients: Tensor, groups: slice) -> None:
        self._gradients = gradients
        self.groups = groups

    @property
    def num_positions(self) -> int:
        """Summed over already."""
        return 1

    def per_sample(self) -> Tensor:
        """The gradients."""
        return self._gradients

    def unit_moments(self) -> Tensor:
        """Entry by entry: the matrices are small."""
        p = self._gradients
        return torch.einsum("vgnoi,vgnoj->goij", p, p)
