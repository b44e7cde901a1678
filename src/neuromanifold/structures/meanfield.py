"""A diagonal plus rank two for each unit, as if its inputs were Gaussian.

Source: Amari, Karakida and Oizumi, arXiv 1808.07172; papers.md §2.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from neuromanifold.layers import Factored, Part, Record
from neuromanifold.layers.parts import Inputs
from neuromanifold.linalg import Block, psd
from neuromanifold.operators import BlockMatrix, Matrices
from neuromanifold.structures._base import AdditiveStructure, Statistics, accumulate
from neuromanifold.structures.diagonal import DiagonalMatrix

__all__ = ["MeanField", "MeanFieldMatrix"]

Form = Literal["MeanField", "UnitWise", "Diagonal"]


@dataclass(frozen=True)
class MeanField(AdditiveStructure):
    """Each unit's matrix from moments of its inputs x and of its pre-activation u = w·x + b alone.

    If the inputs are Gaussian with mean m and covariance S, then, with g the signal that goes back
    to the unit, v the standardised u, `c = Cov(x, u)/σ_u = S w/σ_u` and `α_k = E[g² v^k]`,

        E[g² x xᵀ] = α_0 (S − c cᵀ + m mᵀ) + α_1 (m cᵀ + c mᵀ) + α_2 c cᵀ
        E[g² x] = α_0 m + α_1 c,   E[g²] = α_0

    This is exact where g depends on the inputs through u alone, as in the last layers of a wide
    random network. A unit costs three numbers besides m and S, which all units of a layer share;
    products and solves with a diagonal S cost O(1) per weight.

    The activation function need not be known: α is measured, together with what comes back.
    Positions of a sample are taken for samples, as `nm.Kronecker()` does. Layers with one weight
    per unit have their exact 2×2 blocks; parameters without inputs, and embeddings, their diagonal.

    Args:
        covariance: of the inputs, "diagonal" or "full". Full, a layer takes one matrix `(I, I)`,
            and a solve two matrix products.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
        >>> F = nm.fisher(model, nm.Gaussian(), x, nm.MeanField("full"), estimator=nm.Exact())
        >>> exact = nm.fisher(model, nm.Gaussian(), x, nm.UnitWise(), estimator=nm.Exact())
        >>> torch.allclose(F.to_dense(), exact.to_dense(), atol=1e-6)  # g does not depend on x
        True
    """

    covariance: Literal["diagonal", "full"] = "diagonal"
    parameters: Mapping[str, Tensor] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.covariance not in ("diagonal", "full"):
            raise ValueError(f'covariance is "diagonal" or "full", got {self.covariance!r}.')

    def at(self, parameters: Mapping[str, Tensor]) -> MeanField:
        """With the weights that pre-activations are made of."""
        here = replace(self)
        object.__setattr__(here, "parameters", parameters)
        return here

    def form(self, block: Block) -> Form:
        """What a block is kept as."""
        if block.lookup or block.fan_in == block.biased:
            return "Diagonal"
        return "UnitWise" if block.fan_in <= 2 else "MeanField"

    def statistics(self, record: Record) -> Statistics:
        """Moments of inputs, of pre-activations, and of signals with pre-activations."""
        form = self.form(record.block)
        if form == "Diagonal":
            return {"squares": record.squared()}
        if form == "UnitWise":
            return {"moments": record.unit_moments()}
        weight = self._weight(record.block).to(record.dtype)
        sums: Statistics = {}
        for part in record.parts:
            found = self._of_part(part.apart(), weight[part.groups], first=record.first)
            accumulate(sums, {k: _among(v, part.groups, len(weight)) for k, v in found.items()})
        return sums

    def _of_part(self, part: Part, weight: Tensor, *, first: bool) -> Statistics:
        assert isinstance(part, Factored)
        assert part.a is not None
        a, g = part.a.squeeze(2), part.g.squeeze(3)  # (G, N, I), (V, G, N, O)
        bias = weight[..., -1:].mT if part.biased else 0
        u = a @ weight[..., : a.shape[-1]].mT + bias  # (G, N, O)
        signal = g.square().sum(dim=0)
        by_u = signal * u
        found = {
            "signals": torch.stack(
                [signal.sum(dim=1), by_u.sum(dim=1), (by_u * u).sum(dim=1)], dim=1
            )
        }
        if first:
            inputs = Inputs(part.a, False, part.used)
            full = self.covariance == "full"
            found["inputs"] = inputs.a.sum(dim=(1, 2))
            found["moment"] = inputs.moment(reduce=False) if full else inputs.squares(reduce=False)
            found["units"] = torch.stack([u.sum(dim=1), u.square().sum(dim=1)], dim=1)
            found["uses"] = u.new_full((len(u),), u.shape[1])
        return found

    def assemble(self, block: Block, statistics: Statistics, normaliser: float) -> BlockMatrix:
        """From the moments, with the weights as they are now."""
        if "squares" in statistics:
            return DiagonalMatrix(block, statistics["squares"].div_(normaliser))
        if "moments" in statistics:
            return Matrices(block, statistics["moments"].flatten(0, 1).div_(normaliser))
        uses = statistics["uses"].clamp(min=1)
        mean = statistics["inputs"] / uses[:, None]
        u, uu = (statistics["units"] / uses[:, None, None]).unbind(dim=1)
        signal, by_u, by_uu = (statistics["signals"] / normaliser).unbind(dim=1)
        spread = (uu - u.square()).clamp(min=0).sqrt()
        varies = spread > _ROUNDING * torch.finfo(u.dtype).eps ** 0.5 * uu.sqrt()
        scale = torch.where(varies, spread, 1)
        first = torch.where(varies, (by_u - u * signal) / scale, 0)
        second = (by_uu - 2 * u * by_u + u.square() * signal) / scale.square()
        # Rounding: a variance is not negative (Cauchy-Schwarz).
        least = torch.where(signal > 0, first.square() / torch.where(signal > 0, signal, 1), 0)
        second = torch.where(varies, torch.maximum(second, least), signal)
        signals = torch.stack([signal, first, second], dim=1)
        weight = self._weight(block)[..., : mean.shape[-1]].to(mean.dtype)
        moment = statistics["moment"]
        if self.covariance == "diagonal":
            variance = (moment / uses[:, None] - mean.square()).clamp(min=0)
            return MeanFieldMatrix(block, mean, variance, weight.clone(), signals)
        covariance = moment / uses[:, None, None] - mean[:, :, None] * mean[:, None, :]
        variance, basis = psd.eigh(covariance)
        mean = (mean[:, None] @ basis).squeeze(1)
        return MeanFieldMatrix(block, mean, variance, weight @ basis, signals, basis)

    def _weight(self, block: Block) -> Tensor:
        """`(G, O, I)`, bias last."""
        if self.parameters is None:
            raise ValueError(
                "nm.MeanField() needs the weights of the model: use structure.at(parameters)."
            )
        return block.join({n: self.parameters[n].detach() for n in block.parameters})[0]

    def symmetric(self, block: Block) -> tuple[str, ...]:
        """Moments of inputs, and the blocks of units."""
        return "moment", "moments"

    def numel(self, block: Block) -> int:
        """The weights, and some numbers per unit and input."""
        form, (groups, fan_out, fan_in) = self.form(block), block.shape
        if form == "Diagonal":
            return block.num_parameters
        if form == "UnitWise":
            return block.num_parameters * fan_in
        inputs = fan_in**2 if self.covariance == "full" else 2 * fan_in
        return block.num_parameters + groups * (inputs + 5 * fan_out)

    def represent(self, block: Block) -> tuple[str, bool, str]:
        """Exact for one weight per unit."""
        form = self.form(block)
        note = "as if inputs were Gaussian" if form == "MeanField" else ""
        return form, form != "MeanField", note


_ROUNDING = 4
"""Of a pre-activation that does not vary: what is left of its variance, as a root."""


def _among(value: Tensor, where: slice, groups: int) -> Tensor:
    """With zeros for the other groups."""
    if len(value) == groups:
        return value
    out = value.new_zeros(groups, *value.shape[1:])
    out[where] = value
    return out


def _two_by_two(first: Tensor, cross: Tensor, last: Tensor) -> Tensor:
    """Symmetric matrices `(..., 2, 2)`."""
    return torch.stack([first, cross, cross, last], dim=-1).unflatten(-1, (2, 2))


class MeanFieldMatrix(BlockMatrix):
    """`diag(α_0 s, 0) + [m̃, c̃] K [m̃, c̃]ᵀ` for each unit, in a basis that all units share.

    With `m̃ = (m, 1)`, `c̃ = (c, 0)`, `c = s ∘ w/√(Σ s w²)`, `K = [[α_0, α_1], [α_1, α_2 − α_0]]`.
    Without a bias the last entries are left out.

    Args:
        block: whose matrix this is.
        mean: of inputs, m `(G, I)`, in the basis.
        variance: of inputs, s `(G, I)`.
        weight: w `(G, O, I)`, in the basis.
        signals: α `(G, 3, O)`.
        basis: eigenvectors of the covariance `(G, I, I)` as columns; None for unit vectors.
    """

    kind = "meanfield"

    def __init__(
        self,
        block: Block,
        mean: Tensor,
        variance: Tensor,
        weight: Tensor,
        signals: Tensor,
        basis: Tensor | None = None,
    ) -> None:
        super().__init__(block)
        self.mean = mean
        self.variance = variance
        self.weight = weight
        self.signals = signals
        self.basis = basis

    def matmul(self, x: Tensor) -> Tensor:
        """O(1) per weight, and the change of basis."""
        xw, xb = self.split(x)
        alpha, beta, gamma = self.alphas
        along_m = self._along_mean(xw) + xb
        along_c = (xw * self.direction).sum(dim=-1, keepdim=True)
        of_m = alpha * along_m + beta * along_c
        of_c = beta * along_m + (gamma - alpha) * along_c
        out = alpha * self.variance[:, None] * xw
        out += of_m * self.mean[:, None] + of_c * self.direction
        return self.joined(out, of_m)

    def solve(self, x: Tensor, damping: float | Tensor) -> Tensor:
        """O(1) per weight, and the change of basis.

        The bias is eliminated by hand, so that nothing is divided by the damping alone; what is
        left is a diagonal plus rank two.
        """
        return self.solver(damping)(x.clone())

    def solver(self, damping: float | Tensor) -> MeanFieldInverse:
        """What solves with one damping have in common."""
        return MeanFieldInverse(self, damping)

    def function(self, function: psd.Function, x: Tensor) -> Tensor:
        """By an eigendecomposition for each unit, I³, computed once."""
        values, vectors = self._eigh
        columns = x.flatten(1, 2)[..., None]  # (R, G·O, I, 1)
        moved = function(values)[..., None] * (vectors.mT @ columns)
        return (vectors @ moved).reshape(x.shape)

    def eigenvalues(self) -> Tensor:
        """Of each unit."""
        return self._eigh[0].flatten()

    def diagonal(self) -> Tensor:
        """Of products, entry by entry."""
        alpha, beta, gamma = self.alphas
        m, c = self.mean[:, None], self.direction
        if self.basis is not None:
            m, c = m @ self.basis.mT, c @ self.basis.mT
            spread = (self.basis.square() @ self.variance[..., None]).mT
        else:
            spread = self.variance[:, None]
        weights = alpha * (spread + m.square()) + 2 * beta * m * c + (gamma - alpha) * c.square()
        return torch.cat([weights, alpha], dim=-1) if self.block.biased else weights

    def norm(self) -> Tensor:
        """Unit by unit: of a diagonal plus rank two."""
        alpha, beta, gamma = (a.squeeze(-1) for a in self.alphas)
        m, s, c = self.mean[:, None], self.variance[:, None], self.direction
        mm = (m.square().sum(dim=-1) + self.block.biased).expand_as(alpha)
        mc, cc = (m * c).sum(dim=-1), c.square().sum(dim=-1)
        smm, smc, scc = ((s * p).sum(dim=-1) for p in (m.square(), m * c, c.square()))
        k = _two_by_two(alpha, beta, gamma - alpha)
        gram, within = _two_by_two(mm, mc, cc), _two_by_two(smm.expand_as(mc), smc, scc)
        product = k @ gram
        squared = (product @ product).diagonal(dim1=-2, dim2=-1).sum(-1)
        squared = squared + 2 * alpha * (k * within).sum(dim=(-2, -1))
        squared = squared + alpha.square() * s.square().sum(dim=-1)
        return squared.clamp(min=0).sum().sqrt()

    def tensors(self) -> dict[str, Tensor]:
        """What the units are made of."""
        found = {
            "mean": self.mean,
            "variance": self.variance,
            "weight": self.weight,
            "signals": self.signals,
        }
        return found if self.basis is None else {**found, "basis": self.basis}

    def scaled(self, factor: float) -> MeanFieldMatrix:
        """The multiple goes into the signals."""
        signals = self.signals * factor
        return MeanFieldMatrix(
            self.block, self.mean, self.variance, self.weight, signals, self.basis
        )

    def with_weight(self, weight: Tensor) -> MeanFieldMatrix:
        """The same inputs and signals at another weight."""
        return MeanFieldMatrix(
            self.block, self.mean, self.variance, weight, self.signals, self.basis
        )

    def restrict(self, block: Block, columns: list[int]) -> BlockMatrix:
        """The principal parts of the units' matrices, which are no longer of this form."""
        keep = torch.tensor(columns, device=self.mean.device)
        return Matrices(block, self.units()[:, keep[:, None], keep])

    def units(self) -> Tensor:
        """The matrices `(G·O, I, I)`."""
        groups, fan_out, fan_in = self.block.shape
        eye = torch.eye(fan_in, dtype=self.mean.dtype, device=self.mean.device)
        rows = eye[:, None, None].expand(fan_in, groups, fan_out, fan_in)
        return self.matmul(rows).flatten(1, 2).transpose(0, 1)

    def dense(self) -> Tensor:
        """The units along the diagonal."""
        return torch.block_diag(*self.units())

    @property
    def direction(self) -> Tensor:
        """The vectors c `(G, O, I)`: how inputs and pre-activations vary together."""
        direction, spread = self.unscaled_direction()
        return direction / spread

    def unscaled_direction(self) -> tuple[Tensor, Tensor]:
        """The vectors c, times a number for each unit, and that number `(G, O, 1)`."""
        weight = self.weight.to(self.variance.dtype, copy=True)
        return weight.mul_(self.variance[:, None]), self._spread

    @cached_property
    def _spread(self) -> Tensor:
        """Of the pre-activation, as the inputs are kept; 1 where it does not vary."""
        weight = self.weight.to(self.variance.dtype)
        spread = (self.variance[:, None] * weight.square()).sum(dim=-1, keepdim=True).sqrt()
        return torch.where(spread > 0, spread, 1)

    @cached_property
    def _eigh(self) -> tuple[Tensor, Tensor]:
        return psd.eigh(self.units())

    @property
    def alphas(self) -> tuple[Tensor, ...]:
        """Each `(G, O, 1)`."""
        return tuple(a[..., None] for a in self.signals.unbind(dim=1))

    def _along_mean(self, x: Tensor) -> Tensor:
        """`mᵀ x`, `(..., G, O, 1)`."""
        return x @ self.mean[..., None]

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors `(R, G, O, I)` into weights, in the basis, and bias (zero if there is none)."""
        width = self.mean.shape[-1]
        xw, xb = x[..., :width], x[..., width:]
        if not self.block.biased:
            xb = x.new_zeros(())
        return (xw if self.basis is None else xw @ self.basis), xb

    def joined(self, xw: Tensor, xb: Tensor) -> Tensor:
        """The inverse."""
        if self.basis is not None:
            xw = xw @ self.basis.mT
        return torch.cat([xw, xb], dim=-1) if self.block.biased else xw


class MeanFieldInverse:
    """`(G + damping)⁻¹`, with what does not depend on the vector worked out.

    The bias is eliminated by hand, so that nothing is divided by the damping alone; what is left is
    a diagonal `d = α_0 s + λ` plus rank two.
    """

    def __init__(self, matrix: MeanFieldMatrix, damping: float | Tensor) -> None:
        self.matrix = matrix
        alpha, beta, gamma = matrix.alphas
        self._damping = torch.as_tensor(damping, dtype=alpha.dtype, device=alpha.device)
        self._variance = matrix.variance[:, None].clamp(min=torch.finfo(alpha.dtype).tiny)
        m, c, d = matrix.mean[:, None], matrix.direction, self._diagonal()
        mm = d.reciprocal() @ m.square().mT
        mc = (c * m / d).sum(dim=-1, keepdim=True)
        cc = (c.square() / d).sum(dim=-1, keepdim=True)
        if matrix.block.biased:
            # Schur complement of the bias's entry h = α_0 + λ: K − k kᵀ/h for k = (α_0, α_1),
            # without the cancellation.
            h = alpha + self._damping
            share = self._damping / h
            k = alpha * share, beta * share, gamma - alpha - beta.square() / h
            self._of_bias = alpha / h, beta / h, 1 / h
        else:
            k = alpha, beta, gamma - alpha
        # (1 + K U)⁻¹ K for the 2×2 matrix U of inner products; symmetric, as K and U are.
        determinant = k[0] * k[2] - k[1].square()
        bottom = 1 + k[0] * mm + 2 * k[1] * mc + k[2] * cc
        bottom = bottom + determinant * (mm * cc - mc.square())
        self._gram = mm, mc, cc
        self._middle = (
            (k[0] + determinant * cc) / bottom,
            (k[1] - determinant * mc) / bottom,
            (k[2] + determinant * mm) / bottom,
        )

    def _diagonal(self) -> Tensor:
        """The diagonal `(G, O, I)`."""
        return torch.addcmul(self._damping, self.matrix.alphas[0], self._variance)

    def __call__(self, x: Tensor) -> Tensor:
        """Times vectors `(R, G, O, I)`, which are written over."""
        matrix = self.matrix
        xw, xb = matrix.split(x)
        d, (c, spread) = self._diagonal(), matrix.unscaled_direction()
        y = xw.div_(d)
        along_m = y @ matrix.mean[..., None]
        along_c = (y * c).sum(dim=-1, keepdim=True) / spread
        if matrix.block.biased:  # the gradient without what the bias explains
            shift_m, shift_c = self._of_bias[0] * xb, self._of_bias[1] * xb
            along_m, along_c = self._minus(along_m, along_c, shift_m, shift_c)
        first, second, third = self._middle
        of_m = first * along_m + second * along_c
        of_c = second * along_m + third * along_c
        if matrix.block.biased:
            # mᵀ and cᵀ of the solution, which determine the bias
            of_bias_m, of_bias_c, inverse = self._of_bias
            left_m, left_c = self._minus(along_m, along_c, of_m, of_c)
            xb = inverse * xb - of_bias_m * left_m - of_bias_c * left_c
            of_m, of_c = of_m + shift_m, of_c + shift_c
        moved = (of_m * matrix.mean[:, None]).addcmul_(of_c / spread, c)
        y.addcdiv_(moved, d, value=-1)
        if matrix.basis is not None:
            x[..., : y.shape[-1]] = y @ matrix.basis.mT
        if matrix.block.biased:
            x[..., -1:] = xb
        return x

    def _minus(
        self, along_m: Tensor, along_c: Tensor, of_m: Tensor, of_c: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Inner products with m and c, once `d⁻¹ (of_m m + of_c c)` is taken off."""
        mm, mc, cc = self._gram
        return along_m - of_m * mm - of_c * mc, along_c - of_m * mc - of_c * cc
