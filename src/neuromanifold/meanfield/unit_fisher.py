"""The Fisher information of units with Gaussian inputs: explicit matrix, inverse, natural gradient.

Source: Amari, Karakida and Oizumi, arXiv 1808.07172; papers.md §2.4.

In other words than there: a unit `u = w·x + b` sees its inputs `x ~ N(m, S)` reweighted by the
information ψ(u) that it has about `u`. The reweighted inputs have mass a₀, mean `x̄ = m + t c` and
covariance `S + (V − 1) c cᵀ`, where t and V are mean and variance of `TiltedGaussian`,
`c = S w/σ` and `σ² = wᵀ S w`. The Fisher matrix is the second moment of `(x, 1)` under them,

    B a₀ [S + (V − 1) c cᵀ + x̄ x̄ᵀ,  x̄]
         [x̄ᵀ,                        1]

so S plus rank 2, once the bias is eliminated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neuromanifold.errors import NotPositiveDefiniteError
from neuromanifold.linalg import memory
from neuromanifold.meanfield.covariances import (
    Covariance,
    DiagonalCovariance,
    FullCovariance,
    StandardCovariance,
)
from neuromanifold.meanfield.integrals import TiltedGaussian, gaussian_integrals
from neuromanifold.meanfield.kernels import Activation

__all__ = ["UnitFisher", "unit_fisher"]


def unit_fisher(
    activation: Activation,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None = None,
    covariance: Tensor | None = None,
    *,
    error: float | Tensor = 1.0,
) -> UnitFisher:
    """The Fisher information of one unit, or of each unit of a layer, with Gaussian inputs.

    The squared back-propagated error is taken to be independent of the inputs (papers.md §2.4:
    4 % of the matrix in the first layer of a tanh network, nothing in its last hidden layer).

    Args:
        activation: name, function, module or kernel, see `gaussian_integrals`.
        weight: `(n,)` of one unit, or `(O, n)` of a layer.
        bias: `()` or `(O,)`; None for units without one.
        mean: of the inputs, `(n,)`; None is zero.
        covariance: of the inputs: None is the identity, `(n,)` are variances of uncorrelated
            inputs, `(n, n)` is the matrix. Positive semi-definite, which is not checked.
        error: B, the mean square of the error back-propagated to the output of the unit (after its
            activation), in nats per squared unit of output; a number, or `(O,)`.

    Raises:
        ValueError: If a shape or dtype does not fit, or the activation is unknown.

    Example:
        >>> G = unit_fisher("tanh", torch.ones(4, 3) / 3, torch.zeros(4))
        >>> step_w, step_b = G.solve(torch.ones(4, 3), torch.ones(4), damping=1e-3)
        >>> step_w.shape, step_b.shape
        (torch.Size([4, 3]), torch.Size([4]))
    """
    _require_shapes(weight, bias, mean, covariance)
    shared = _covariance(weight.shape[-1], covariance)
    image = shared.times(weight)  # S w, (*U, n)
    scale = _dot(weight, image).clamp(min=0).sqrt()  # (*U)
    location = weight.new_zeros(weight.shape[:-1]) if bias is None else bias
    if mean is not None:
        location = location + weight @ mean
    tilted = gaussian_integrals(activation, location, scale)
    # The square of a scale below the floor is lost to underflow. Such a unit is constant: no
    # direction of its inputs is seen differently from the others.
    info = torch.finfo(weight.dtype)
    seen = scale > (info.tiny / info.eps) ** 0.5
    inverse = torch.where(seen, 1 / scale, 0)[..., None]
    tilted = TiltedGaussian(
        tilted.mass, torch.where(seen, tilted.mean, 0), torch.where(seen, tilted.variance, 1)
    )
    direction = weight * inverse
    return UnitFisher(
        tilted=tilted,
        amount=tilted.mass * _error(error, weight),
        direction=direction,
        correlation=direction if image is weight else image * inverse,
        mean=mean,
        covariance=shared,
        has_bias=bias is not None,
    )


@dataclass(frozen=True, eq=False)
class UnitFisher:
    """The Fisher matrix of each of U units over its n weights and its bias, in nats/parameter².

    `*U` is `()` for one unit and `(O,)` for a layer. Vectors come as weights `(..., *U, n)` and
    biases `(..., *U)`, None for units without one. O(n) per unit for inputs of diagonal covariance;
    for a full one O(n²), after one factorisation that all units share.

    Attributes:
        tilted: mass, mean and variance of the reweighted pre-activations, each `(*U)`.
        amount: B a₀, `(*U)`.
        direction: w/σ, `(*U, n)`.
        correlation: c = S w/σ, covariance of the inputs with the standardised pre-activation.
        mean: of the inputs, `(n,)`, or None if zero.
        covariance: S.
        has_bias: whether the last coordinate is a bias.
    """

    tilted: TiltedGaussian
    amount: Tensor
    direction: Tensor
    correlation: Tensor
    mean: Tensor | None
    covariance: Covariance
    has_bias: bool

    @property
    def input_mean(self) -> Tensor:
        """x̄, mean of the reweighted inputs, `(*U, n)`."""
        shifted = self.tilted.mean[..., None] * self.correlation
        return shifted if self.mean is None else shifted + self.mean

    def along_mean(self, v: Tensor) -> Tensor:
        """`x̄ᵀ v` for vectors `(..., *U, n)`, without forming x̄."""
        along = self.tilted.mean * _dot(self.correlation, v)
        return along if self.mean is None else along + v @ self.mean

    def minus_mean(self, v: Tensor, share: Tensor) -> Tensor:
        """`v − share · x̄`, `(..., *U, n)`, without forming x̄."""
        out = torch.addcmul(v, (share * self.tilted.mean)[..., None], self.correlation, value=-1)
        return out if self.mean is None else out.addcmul_(share[..., None], self.mean, value=-1)

    def matmul(self, v_w: Tensor, v_b: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The matrix of each unit times a vector.

        Args:
            v_w: weights `(..., *U, n)`.
            v_b: biases `(..., *U)`.

        Example:
            >>> G = unit_fisher("linear", torch.ones(2), torch.tensor(0.0))
            >>> G.matmul(torch.tensor([1.0, 2.0]), torch.tensor(3.0))
            (tensor([1., 2.]), tensor(3.))
        """
        self._require_vector(v_w, v_b)
        response = self.along_mean(v_w)
        if v_b is not None:
            response = response + v_b
        along = (self.tilted.variance - 1) * _dot(self.correlation, v_w)
        out = torch.addcmul(self.covariance.times(v_w), along[..., None], self.correlation)
        out = self.minus_mean(out, -response).mul_(self.amount[..., None])
        return out, self.amount * response if self.has_bias else None

    def solve(
        self, g_w: Tensor, g_b: Tensor | None = None, *, damping: float = 0.0
    ) -> tuple[Tensor, Tensor | None]:
        """`(F + damping·I)⁻¹ g` for each unit: the natural gradient, exact.

        Args:
            g_w: weights `(..., *U, n)`.
            g_b: biases `(..., *U)`.
            damping: in nats/parameter², not negative.

        Raises:
            NotPositiveDefiniteError: If a matrix is singular and there is no damping: units that
                are never active, inputs that never vary.
            ValueError: If a shape does not fit, or the damping is negative.

        Example:
            >>> G = unit_fisher("relu", torch.ones(2), torch.tensor(0.0))
            >>> step_w, step_b = G.solve(*G.matmul(torch.ones(2), torch.tensor(1.0)))
            >>> torch.testing.assert_close(step_w, torch.ones(2))
        """
        self._require_vector(g_w, g_b)
        return self._inverse(damping).apply(g_w, g_b)

    def logdet(self, *, damping: float = 0.0) -> Tensor:
        """`ln det(F + damping·I)` of each unit, `(*U)`.

        Raises:
            NotPositiveDefiniteError: As `solve` does.
        """
        return self._inverse(damping).logdet()

    def trace(self) -> Tensor:
        """Of each unit, `(*U)`."""
        squares = (self.tilted.variance - 1) * self.correlation.square().sum(-1)
        squares = squares + self.input_mean.square().sum(-1) + self.covariance.trace()
        return self.amount * (squares + self.has_bias)

    def dense(self) -> Tensor:
        """The matrix of each unit, bias last, `(*U, n + 1, n + 1)`.

        Raises:
            TooLargeError: If they would not fit into memory.
        """
        self._require_memory()
        c, centre = self.correlation, self.input_mean
        bend = (self.tilted.variance - 1)[..., None, None] * c[..., :, None] * c[..., None, :]
        moment = self.covariance.dense(c) + bend + centre[..., :, None] * centre[..., None, :]
        if self.has_bias:
            one = torch.ones_like(centre[..., :1, None])
            top = torch.cat([moment, centre[..., :, None]], dim=-1)
            bottom = torch.cat([centre[..., None, :], one], dim=-1)
            moment = torch.cat([top, bottom], dim=-2)
        return self.amount[..., None, None] * moment

    def inverse(self, *, damping: float = 0.0) -> Tensor:
        """The inverse of each unit's matrix plus `damping·I`, `(*U, n + 1, n + 1)`.

        Raises:
            NotPositiveDefiniteError: As `solve` does.
            TooLargeError: If they would not fit into memory.
        """
        self._require_memory()
        *units, n = self.direction.shape
        size = n + self.has_bias
        axes = torch.eye(size, dtype=self.direction.dtype, device=self.direction.device)
        axes = axes.reshape(size, *[1] * len(units), size).expand(size, *units, size)
        step_w, step_b = self._inverse(damping).apply(
            axes[..., :n], axes[..., n] if self.has_bias else None
        )
        columns = step_w if step_b is None else torch.cat([step_w, step_b[..., None]], dim=-1)
        return columns.movedim(0, -1)

    def _inverse(self, damping: float) -> _Inverse:
        if not damping >= 0:
            raise ValueError(f"damping must be >= 0 nats/parameter², got {damping}.")
        if damping == 0:
            self.covariance.require_invertible()
            volume = torch.minimum(self.amount, self.tilted.variance)
            if not bool((volume > 0).all()):
                dead = int((~(volume > 0)).sum())
                raise NotPositiveDefiniteError(
                    f"{dead} of {volume.numel()} units carry no information about their "
                    f"parameters (never active, or no error reaches them), so their matrices are "
                    f"singular. Use a damping > 0 nats/parameter²."
                )
        return _Inverse.of(self, damping)

    def _require_vector(self, w: Tensor, b: Tensor | None) -> None:
        shape = self.direction.shape
        fits = w.shape[w.ndim - len(shape) :] == shape and (b is not None) == self.has_bias
        if not fits or (b is not None and b.shape != w.shape[:-1]):
            biases = f"and biases (..., {', '.join(map(str, shape[:-1]))})" * self.has_bias
            raise ValueError(
                f"These units take weights (..., {', '.join(map(str, shape))}) "
                f"{biases or 'and no biases'}, got {tuple(w.shape)} and "
                f"{None if b is None else tuple(b.shape)}."
            )

    def _require_memory(self) -> None:
        *units, n = self.direction.shape
        memory.require(
            3 * max([1, *units]) * (n + 1) ** 2 * self.direction.element_size(),
            self.direction.device,
            what=f"One matrix over {n + 1:,} parameters for each unit",
            instead="Use matmul(...) and solve(...), which form no matrix.",
        )


@dataclass(frozen=True, eq=False)
class _Inverse:
    """`(F + λI)⁻¹` by eliminating the bias and adding rank-1 terms to `K = aS + λI`.

    The Schur complement of the bias is `K + a(V − 1) c cᵀ + β x̄ x̄ᵀ` with a = B a₀ and
    β = aλ/(a + λ); without a bias β = a. Sherman-Morrison for the first term, then the second,
    which is Woodbury's formula of rank 2 with all pivots positive. Both are one term if the inputs
    have no mean: then `x̄ = t c`.

    Attributes:
        fisher: F.
        damping: λ.
        along: K⁻¹c, `(*U, n)`.
        bend: the number before `c cᵀ`, divided by the pivot, `(*U)`.
        pivot: one plus the number before `c cᵀ` times `cᵀK⁻¹c`, `(*U)`.
        second: the term of x̄, if there is one.
    """

    fisher: UnitFisher
    damping: float
    along: Tensor
    bend: Tensor
    pivot: Tensor
    second: _SecondTerm | None = None

    @classmethod
    def of(cls, fisher: UnitFisher, damping: float) -> _Inverse:
        a, variance = fisher.amount, fisher.tilted.variance
        if damping == 0:
            along = fisher.direction / a[..., None]
        else:
            along = fisher.covariance.solve(fisher.correlation, a, damping)
        beta = a
        if fisher.has_bias:
            beta = torch.zeros_like(a) if damping == 0 else a * damping / (a + damping)
        parallel = fisher.mean is None
        extra = beta * fisher.tilted.mean.square() if parallel else 0
        # 1 = a cᵀK⁻¹c + λ (w/σ)ᵀK⁻¹c: with that the pivot is a sum of positive terms, where
        # 1 + (V − 1)a cᵀK⁻¹c would cancel for small V. A unit that sees no direction has V = 1.
        pivot = (a * variance + extra) * _dot(fisher.correlation, along)
        pivot = pivot + damping * _dot(fisher.direction, along)
        pivot = torch.where(pivot > 0, pivot, 1)
        first = cls(fisher, damping, along, (a * (variance - 1) + extra) / pivot, pivot)
        if parallel or (fisher.has_bias and damping == 0):
            return first
        vector = first._rank_one(fisher.input_mean)
        second_pivot = 1 + beta * fisher.along_mean(vector)
        return replace(first, second=_SecondTerm(vector, beta / second_pivot, second_pivot))

    def apply(self, g_w: Tensor, g_b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The solution, in the shapes of the right-hand side."""
        if g_b is None:
            return self._schur(g_w), None
        a = self.fisher.amount
        corner = a + self.damping
        step_w = self._schur(self.fisher.minus_mean(g_w, a / corner * g_b))
        return step_w, (g_b - a * self.fisher.along_mean(step_w)) / corner

    def logdet(self) -> Tensor:
        """`ln det(F + λI)`, `(*U)`."""
        a = self.fisher.amount
        total = self.fisher.covariance.logdet(a, self.damping) + torch.log(self.pivot)
        if self.second is not None:
            total = total + torch.log(self.second.pivot)
        return total + torch.log(a + self.damping) if self.fisher.has_bias else total

    def _rank_one(self, y: Tensor) -> Tensor:
        """The inverse of K and the first term, times y."""
        out = self.fisher.covariance.solve(y, self.fisher.amount, self.damping)
        return out.addcmul_((self.bend * _dot(self.along, y))[..., None], self.along, value=-1)

    def _schur(self, y: Tensor) -> Tensor:
        """The inverse of K and both terms, times y."""
        out = self._rank_one(y)
        if self.second is None:
            return out
        share = self.second.bend * _dot(self.second.vector, y)
        return out.addcmul_(share[..., None], self.second.vector, value=-1)


@dataclass(frozen=True, eq=False)
class _SecondTerm:
    """`β x̄ x̄ᵀ`, after the first: the inverse so far times x̄, β/pivot, and the pivot."""

    vector: Tensor
    bend: Tensor
    pivot: Tensor


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """`Σ_i x_i y_i` along the last axis."""
    return torch.linalg.vecdot(x, y)


def _covariance(n: int, covariance: Tensor | None) -> Covariance:
    if covariance is None:
        return StandardCovariance(n)
    return DiagonalCovariance(covariance) if covariance.ndim == 1 else FullCovariance(covariance)


def _error(error: float | Tensor, weight: Tensor) -> Tensor:
    error = torch.as_tensor(error, dtype=weight.dtype, device=weight.device)
    if error.shape not in ((), weight.shape[:-1]):
        raise ValueError(
            f"error is one number or one per unit, {tuple(weight.shape[:-1])}, got "
            f"{tuple(error.shape)}."
        )
    return error


def _require_shapes(
    weight: Tensor, bias: Tensor | None, mean: Tensor | None, covariance: Tensor | None
) -> None:
    if weight.ndim not in (1, 2) or not weight.is_floating_point():
        raise ValueError(
            f"weight is a floating-point tensor (n,) or (O, n), got {tuple(weight.shape)} of "
            f"{weight.dtype}."
        )
    n = weight.shape[-1]
    for name, given, shapes in (
        ("bias", bias, [tuple(weight.shape[:-1])]),
        ("mean", mean, [(n,)]),
        ("covariance", covariance, [(n,), (n, n)]),
    ):
        if given is None:
            continue
        if tuple(given.shape) not in shapes or given.dtype != weight.dtype:
            raise ValueError(
                f"With weights {tuple(weight.shape)} of {weight.dtype}, {name} has the shape "
                f"{' or '.join(map(str, shapes))} and the same dtype; got {tuple(given.shape)} of "
                f"{given.dtype}."
            )
