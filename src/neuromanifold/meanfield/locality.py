"""How block-diagonal a Fisher matrix is, unit by unit and layer by layer.

In a random network the block of two different units is small, of order 1/√n for n units if the
number of outputs grows with n, and does not vanish if it does not (papers.md §2.3). Small entries
are no small effect: there are n² such blocks, and the largest eigenvalue lives in them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuromanifold._estimate import plain
from neuromanifold._fisher import requested
from neuromanifold.estimators import Estimator, Exact
from neuromanifold.layers.parts import TEMPORARY_NUMEL
from neuromanifold.likelihoods import Gaussian, Likelihood
from neuromanifold.linalg import memory, psd
from neuromanifold.operators import FisherOperator
from neuromanifold.structures import Gram
from neuromanifold.structures.rows import FactoredRows, Rows, rows_of

__all__ = ["OffBlock", "off_block"]


@dataclass(frozen=True)
class OffBlock:
    """Off-block against block entries of a Fisher matrix, for L layers of U units each.

    Attributes:
        layers: their names.
        num_units: U of each.
        ratios: `(L, L)`: root mean square of `‖F_ij‖` over pairs of different units i, j, in units
            of the root mean square of their own blocks' norms; on the diagonal, of units of the
            same layer. NaN for a layer of one unit.
        by_unit: for each layer `(U, 2)`: the same of one unit, against others of its layer and
            against units of other layers; zero where a unit's own block is.
        largest: largest eigenvalue of the whole matrix, in nats/parameter².
        largest_of_layers: of each layer's block, `(L,)`.
        largest_of_units: largest over the units of each layer, `(L,)`.
        off_block_share: of the squared Frobenius norm, what is outside the unit blocks.
    """

    layers: tuple[str, ...]
    num_units: tuple[int, ...]
    ratios: Tensor
    by_unit: tuple[Tensor, ...]
    largest: Tensor
    largest_of_layers: Tensor
    largest_of_units: Tensor
    off_block_share: Tensor

    @property
    def same_layer(self) -> float:
        """Root mean square over hidden layers of the ratio of units of the same layer.

        The last layer does not count where there are others: its blocks tell of the likelihood,
        and are exactly zero between the outputs of a `nm.Gaussian()`.
        """
        count = max(len(self.layers) - 1, 1)
        return _root_mean_square(self.ratios.diagonal()[:count])

    @property
    def cross_layer(self) -> float:
        """Root mean square over pairs of hidden layers; of all layers if one or two are hidden."""
        count = len(self.layers) if len(self.layers) < 3 else len(self.layers) - 1
        upper = torch.ones(count, count, device=self.ratios.device).triu(1).bool()
        return _root_mean_square(self.ratios[:count, :count][upper])

    @property
    def spectral_effect(self) -> float:
        """How many times the largest eigenvalue is that of the largest unit block."""
        return float(self.largest / self.largest_of_units.max())

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return plain(
            {
                "layers": list(self.layers),
                "num_units": list(self.num_units),
                "ratios": self.ratios,
                "same_layer": self.same_layer,
                "cross_layer": self.cross_layer,
                "largest": self.largest,
                "largest_of_layers": self.largest_of_layers,
                "largest_of_units": self.largest_of_units,
                "spectral_effect": self.spectral_effect,
                "off_block_share": self.off_block_share,
            }
        )

    def __str__(self) -> str:
        width = max(5, *(len(name) for name in self.layers))
        head = f"{'layer':<{width}}  units  same layer  other layers  λ_max layer  λ_max unit"
        lines = [
            f"{name:<{width}}  {units:5d}  {_shown(self.ratios[i, i]):>10}  "
            f"{_shown(self._with_others(i)):>12}  {self.largest_of_layers[i]:11.4g}  "
            f"{self.largest_of_units[i]:10.4g}"
            for i, (name, units) in enumerate(zip(self.layers, self.num_units, strict=True))
        ]
        last = (
            f"{float(self.off_block_share):.1%} of ‖F‖² is outside the unit blocks; λ_max of all "
            f"is {float(self.largest):.4g}, {self.spectral_effect:.3g} times that of the largest "
            f"unit block: a step size for one is none for the other."
        )
        return "\n".join([head, *lines, last])

    def _with_others(self, layer: int) -> float:
        others = [i for i in range(len(self.layers)) if i != layer]
        return _root_mean_square(self.ratios[layer, others])


def _root_mean_square(ratios: Tensor) -> float:
    return float(ratios[~ratios.isnan()].square().mean().sqrt())


def _shown(ratio: Tensor | float) -> str:
    return "-" if float(ratio) != float(ratio) else f"{float(ratio):.3f}"


def off_block(
    subject: FisherOperator | nn.Module,
    data: Any = None,
    likelihood: Likelihood | None = None,
    *,
    estimator: Estimator | None = None,
    params: Any = None,
    generator: torch.Generator | None = None,
) -> OffBlock:
    """Measure how far a Fisher matrix is from a block of its own for each unit.

    A unit owns the parameters with its index along the first axis of a layer's weight and bias. Of
    a model, all of it follows from products of per-sample gradients, `Σ_ij ‖F_ij‖² = ⟨K, K'⟩` for
    the dual matrices K, K' of two layers: for R samples times sweeps it takes about `R² (U + I)`
    per layer, and no matrix of P by P numbers.

    Args:
        subject: a model; or a Fisher matrix small enough to be written out.
        data: of a model, as for `nm.fisher`.
        likelihood: of a model; `nm.Gaussian()` by default, the theory's own.
        estimator: of a model; `nm.Exact()` by default.
        params: of a model: names or patterns of the parameters; all trainable ones by default.
        generator: source of the estimator's randomness.

    Returns:
        Ratios, and the largest eigenvalues of units, layers and all.

    Raises:
        ValueError: If there are no data for a model.
        TooLargeError: If the matrix, or the dual one of all samples and sweeps, would not fit.

    Example:
        >>> import torch, neuromanifold as nm
        >>> _ = torch.manual_seed(0)
        >>> hidden, readout = torch.nn.Linear(9, 16), torch.nn.Linear(16, 9)
        >>> model = torch.nn.Sequential(hidden, torch.nn.Tanh(), readout)
        >>> found = nm.meanfield.off_block(model, torch.randn(20, 9))
        >>> found.num_units, found.spectral_effect > 1
        ((16, 9), True)
    """
    if isinstance(subject, FisherOperator):
        return _measured(_units_of_matrix(subject))
    if data is None:
        raise ValueError("off_block of a model needs data: off_block(model, data), or a matrix.")
    request = requested(
        subject,
        Gaussian() if likelihood is None else likelihood,
        data,
        Gram(),
        estimator=Exact() if estimator is None else estimator,
        params=params,
        forward=None,
        uncovered="generic",
        generator=generator,
    )
    chunks: list[list[Rows]] = []
    with request as (_, source):
        for records in source.sweeps():
            chunks.append([rows_of(record) for record in records])
            num_rows = sum(chunk[0].num_rows for chunk in chunks)
            memory.require(
                3 * num_rows * num_rows * source.dtype.itemsize,
                source.device,
                what=f"The dual matrices of {num_rows} samples times sweeps",
                instead="Use fewer samples, or estimator=nm.MonteCarlo(1).",
            )
        names = [block.name for block in source.plan.blocks]
        blocks = zip(*chunks, strict=True)
        scale = source.normaliser**-0.5
        return _measured({n: _joined(b, scale) for n, b in zip(names, blocks, strict=True)})


class _Units(ABC):
    """Gradients of the units of one layer, `p (R, U, I)`: `F_ij = Σ_r p_ri p_rjᵀ`."""

    num: int

    @abstractmethod
    def quadratic(self, matrix: Tensor | None) -> Tensor:
        """`Σ_rs (p_ri · p_si) M_rs` for each unit i, `(U,)`; M is the unit's own Gram if None."""

    @abstractmethod
    def gram(self) -> Tensor:
        """`Σ_i p_ri · p_si`, `(R, R)`."""

    @abstractmethod
    def traces(self) -> Tensor:
        """Of the blocks, `(U,)`."""

    @abstractmethod
    def blocks(self, some: Tensor) -> Tensor:
        """Matrices with the non-zero eigenvalues of some units' blocks, `(some, n, n)`."""


class _Factored(_Units):
    """`p_ri = g_ri ã_r` of a layer that is used once per sample."""

    def __init__(self, a: Tensor, g: Tensor) -> None:
        self._a = a  # (R, I)
        self._g = g  # (R, U)
        self._inputs = a @ a.T
        self.num = g.shape[1]

    def quadratic(self, matrix: Tensor | None) -> Tensor:
        if matrix is None:
            squares = self._g.square()
            return (squares * (self._inputs.square() @ squares)).sum(dim=0)
        return (self._g * ((self._inputs * matrix) @ self._g)).sum(dim=0)

    def gram(self) -> Tensor:
        return self._inputs * (self._g @ self._g.T)

    def traces(self) -> Tensor:
        return (self._inputs.diagonal()[:, None] * self._g.square()).sum(dim=0)

    def blocks(self, some: Tensor) -> Tensor:
        g = self._g.T[some]  # (some, R)
        if len(self._a) <= self._a.shape[1]:
            return g[:, :, None] * self._inputs * g[:, None, :]
        p = g[:, :, None] * self._a
        return p.mT @ p


class _Whole(_Units):
    """Gradients as they are."""

    def __init__(self, p: Tensor) -> None:
        self._p = p.transpose(0, 1)  # (U, R, I)
        self.num = p.shape[1]

    def quadratic(self, matrix: Tensor | None) -> Tensor:
        _, num_rows, fan_in = self._p.shape
        if matrix is not None:
            return ((matrix @ self._p) * self._p).sum(dim=(1, 2))
        step = max(TEMPORARY_NUMEL // min(num_rows, fan_in) ** 2, 1)
        indices = torch.arange(self.num, device=self._p.device).split(step)
        return torch.cat([self.blocks(some).square().sum(dim=(1, 2)) for some in indices])

    def gram(self) -> Tensor:
        p = self._p.transpose(0, 1).flatten(1)
        return p @ p.T

    def traces(self) -> Tensor:
        return self._p.square().sum(dim=(1, 2))

    def blocks(self, some: Tensor) -> Tensor:
        p = self._p[some]
        return p @ p.mT if p.shape[1] <= p.shape[2] else p.mT @ p


def _joined(chunks: tuple[Rows, ...], scale: float) -> _Units:
    """The units of a layer from its rows in every chunk."""
    if all(isinstance(c, FactoredRows) and c.g.shape[1] == c.g.shape[3] == 1 for c in chunks):
        inputs, cotangents = zip(*(_factors(chunk) for chunk in chunks), strict=True)
        return _Factored(torch.cat(inputs), torch.cat(cotangents) * scale)
    p = torch.cat([chunk.per_sample() for chunk in chunks])  # (R, G, O, I)
    return _Whole(p.flatten(1, 2) * scale)


def _factors(rows: Rows) -> tuple[Tensor, Tensor]:
    """`ã (V·N, I)` and `g (V·N, O)`."""
    assert isinstance(rows, FactoredRows)
    a = rows.a[0, :, 0]
    if rows.biased:
        a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
    return a.repeat(len(rows.g), 1), rows.g[:, 0, :, 0].flatten(0, 1)


def _units_of_matrix(fisher: FisherOperator) -> dict[str, _Units]:
    """The same from a matrix, whose root has the columns in the place of gradients."""
    values, vectors = psd.eigh(fisher.to_dense())
    root = (vectors * psd.square_root(values)).T  # (P, P): F = rootᵀ root
    parts: dict[str, list[Tensor]] = {}
    layout = fisher.layout
    for name, shape in layout.shapes.items():
        columns = root[:, layout.slices[name]]
        fan_out = shape[0] if shape else 1
        module = name.rpartition(".")[0] or name
        parts.setdefault(module, []).append(columns.unflatten(1, (fan_out, -1)))
    found: dict[str, _Units] = {}
    for module, columns_of in parts.items():
        alike = len({part.shape[1] for part in columns_of}) == 1
        if alike:
            found[module] = _Whole(torch.cat(columns_of, dim=2))
        else:  # parameters of one module whose first axes are different units
            found |= {f"{module}[{i}]": _Whole(part) for i, part in enumerate(columns_of)}
    return found


def _measured(layers: dict[str, _Units]) -> OffBlock:
    grams = [units.gram() for units in layers.values()]
    own = [units.quadratic(None) for units in layers.values()]
    num = torch.tensor([units.num for units in layers.values()]).to(grams[0])
    mean_own = torch.stack([squares.mean() for squares in own])
    total = torch.stack([torch.stack([(k * other).sum() for other in grams]) for k in grams])
    pairs = num[:, None] * num
    within = torch.diag_embed(num * mean_own)
    others = (total - within).clamp(min=0) / (pairs - torch.diag_embed(num))
    ratios = (others / (mean_own[:, None] * mean_own).sqrt()).sqrt()
    ratios.diagonal()[num == 1] = torch.nan
    whole = torch.stack(grams).sum(dim=0)
    return OffBlock(
        layers=tuple(layers),
        num_units=tuple(units.num for units in layers.values()),
        ratios=ratios,
        by_unit=tuple(
            _by_unit(units, gram, whole - gram, squares, int(num.sum()) - units.num)
            for units, gram, squares in zip(layers.values(), grams, own, strict=True)
        ),
        largest=psd.eigenvalues(whole)[-1],
        largest_of_layers=torch.stack([psd.eigenvalues(gram)[-1] for gram in grams]),
        largest_of_units=torch.stack(
            [_largest(units, squares) for units, squares in zip(layers.values(), own, strict=True)]
        ),
        off_block_share=1 - within.sum() / total.sum(),
    )


def _by_unit(units: _Units, gram: Tensor, rest: Tensor, own: Tensor, others: int) -> Tensor:
    """Ratios of each unit with those of its layer, and with those of other layers, `(U, 2)`."""
    same = (units.quadratic(gram) - own) / max(units.num - 1, 1)
    cross = units.quadratic(rest) / max(others, 1)
    ratios = torch.stack([same, cross], dim=1).clamp(min=0) / own[:, None]
    return torch.where(own[:, None] > 0, ratios, 0).sqrt()


def _largest(units: _Units, squares: Tensor) -> Tensor:
    """The largest eigenvalue of the blocks of a layer's units.

    `‖F‖²/tr F ≤ λ_max ≤ ‖F‖` leaves few of the units to be looked at.
    """
    traces = units.traces()
    at_least = torch.where(traces > 0, squares / traces, 0).max()
    rounding = 1 - 100 * torch.finfo(squares.dtype).eps
    candidates = (squares.sqrt() >= at_least * rounding).nonzero()[:, 0]
    size = units.blocks(candidates[:1]).shape[-1]
    parts = candidates.split(max(TEMPORARY_NUMEL // size**2, 1))
    return torch.stack([psd.eigenvalues(units.blocks(some))[:, -1].max() for some in parts]).max()
