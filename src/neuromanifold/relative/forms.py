"""What closed forms of layers return: products, blocks and traces from a few numbers per sample.

Source: Sun and Nielsen, arXiv 1606.06069.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from neuromanifold.linalg import memory

__all__ = ["BatchNormMetric", "ComponentMetric", "LayerMetric", "TwoLayerMetric", "UnitMetric"]


class ComponentMetric(ABC):
    """A metric over the parameters `(O, I)` of one layer, symmetric and positive semi-definite."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """`(O, I)`: units, and parameters of each."""

    @abstractmethod
    def units(self) -> Tensor:
        """The block of each unit, `(O, I, I)`."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """`(O, I)`."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix, `(O·I, O·I)`.

        Raises:
            TooLargeError: If it would not fit into memory.
        """

    @abstractmethod
    def _matmul(self, rows: Tensor) -> Tensor:
        """The metric times vectors `(R, O, I)`."""

    def matmul(self, v: Tensor) -> Tensor:
        """The metric times a vector `(O, I)`, or each of several `(R, O, I)`.

        Raises:
            ValueError: If the shape is another one.
        """
        if v.ndim not in (2, 3) or v.shape[-2:] != self.shape:
            fan_out, fan_in = self.shape
            raise ValueError(
                f"This metric takes vectors of shape ({fan_out}, {fan_in}) or "
                f"(R, {fan_out}, {fan_in}), one row per unit with its bias last, got "
                f"{tuple(v.shape)}."
            )
        return self._matmul(v.reshape(-1, *self.shape)).reshape(v.shape)

    def trace(self) -> Tensor:
        """Sum of the diagonal, a scalar tensor in nats/parameter²."""
        return self.diagonal().sum()


@dataclass(frozen=True, eq=False)
class LayerMetric(ComponentMetric):
    """`(1/N) Σ_m M_m ⊗ x̃_m x̃_mᵀ` over M rows: samples, and their positions.

    `M_m = diag(w_m)`, or `diag(w_m) − w_m w_mᵀ` if centred, which the metric of a softmax is.
    Layers with groups have one such sum for each group; all others have G = 1.

    Attributes:
        inputs: x̃ `(G, M, I)`, a column of ones last if the layer has a bias.
        weights: w `(G, M, O/G)`.
        num_samples: N.
        centred: which of the two forms.
    """

    inputs: Tensor
    weights: Tensor
    num_samples: int
    centred: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """`(O, I)`."""
        groups, _, fan_out = self.weights.shape
        return groups * fan_out, self.inputs.shape[2]

    def respond(self, moved: Tensor) -> Tensor:
        """`M_m` times changes of the pre-activations, `(..., G, O/G, M)`."""
        weighted = self.weights.mT * moved
        if not self.centred:
            return weighted
        return weighted - self.weights.mT * weighted.sum(-2, keepdim=True)

    def units(self) -> Tensor:
        """The block of each unit, `(O, I, I)`."""
        return self._moments(self._unit_weights())

    def diagonal(self) -> Tensor:
        """`(O, I)`."""
        squares = self._unit_weights().mT @ self.inputs.square()
        return squares.flatten(0, 1) / self.num_samples

    def dense(self) -> Tensor:
        """The matrix, `(O·I, O·I)`: block diagonal over units, unless it is centred."""
        _require_dense(math.prod(self.shape), self.inputs)
        if not self.centred:
            return torch.block_diag(*self.units())
        mean = torch.einsum("gmo,gmi->mgoi", self.weights, self.inputs).flatten(1)
        return torch.block_diag(*self._moments(self.weights)) - mean.T @ mean / self.num_samples

    def _matmul(self, rows: Tensor) -> Tensor:
        groups = len(self.inputs)
        moved = rows.unflatten(1, (groups, -1)) @ self.inputs.mT  # (R, G, O/G, M)
        return (self.respond(moved) @ self.inputs).flatten(1, 2) / self.num_samples

    def _unit_weights(self) -> Tensor:
        """The diagonal of each M, `(G, M, O/G)`."""
        return self.weights * (1 - self.weights) if self.centred else self.weights

    def _moments(self, weights: Tensor) -> Tensor:
        """Second moments of the inputs, weighted for each unit, `(O, I, I)`."""
        out = self.inputs.new_empty(*self.shape, self.inputs.shape[2]).unflatten(
            0, (len(self.inputs), -1)
        )
        # A few units at a time: their weighted inputs may be larger than the moments.
        step = max(_TEMPORARY_NUMEL // max(self.inputs.numel(), 1), 1)
        for start in range(0, out.shape[1], step):
            some = slice(start, start + step)
            weighted = weights.mT[:, some, None] * self.inputs.mT[:, None]  # (G, o, I, M)
            out[:, some] = weighted @ self.inputs[:, None]
        return out.flatten(0, 1).div_(self.num_samples)


@dataclass(frozen=True, eq=False)
class UnitMetric(ComponentMetric):
    """One small matrix for each unit, `(O, I, I)`.

    Attributes:
        matrices: of all units.
    """

    matrices: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """`(O, I)`."""
        return self.matrices.shape[0], self.matrices.shape[1]

    def units(self) -> Tensor:
        """The matrices."""
        return self.matrices

    def diagonal(self) -> Tensor:
        """`(O, I)`."""
        return self.matrices.diagonal(dim1=1, dim2=2)

    def dense(self) -> Tensor:
        """The matrices along the diagonal, `(O·I, O·I)`."""
        _require_dense(math.prod(self.shape), self.matrices)
        return torch.block_diag(*self.matrices)

    def _matmul(self, rows: Tensor) -> Tensor:
        return (self.matrices @ rows[..., None]).squeeze(-1)


@dataclass(frozen=True, eq=False)
class BatchNormMetric(ComponentMetric):
    """Weights of a linear layer before a batch norm that uses the statistics of the batch.

    For each unit `g (1/N) X̃ᵀ M² X̃` with `M = I − 11ᵀ/N − ââᵀ/N`: what changes the mean or the
    scale of a pre-activation changes nothing. The bias is such a direction.

    Attributes:
        inputs: x̃ minus its mean over the batch, `(N, I)`.
        normalised: â, the pre-activations after normalisation, `(N, O)`.
        gains: g = γ²/(v + eps), `(O,)`.
    """

    inputs: Tensor
    normalised: Tensor
    gains: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """`(O, I)`."""
        return self.normalised.shape[1], self.inputs.shape[1]

    def units(self) -> Tensor:
        """The block of each unit, `(O, I, I)`."""
        covariance = self.inputs.T @ self.inputs / len(self.inputs)
        along = self._along()
        outer = along[:, :, None] * along[:, None]
        return self.gains[:, None, None] * (covariance - self._removed()[:, None, None] * outer)

    def diagonal(self) -> Tensor:
        """`(O, I)`."""
        variance = self.inputs.square().mean(0)
        return self.gains[:, None] * (variance - self._removed()[:, None] * self._along().square())

    def dense(self) -> Tensor:
        """The blocks along the diagonal, `(O·I, O·I)`: responses of units are independent."""
        _require_dense(math.prod(self.shape), self.inputs)
        return torch.block_diag(*self.units())

    def _matmul(self, rows: Tensor) -> Tensor:
        num_samples = len(self.inputs)
        moved = rows @ self.inputs.T  # (R, O, N)
        scale = (moved * self.normalised.T).mean(-1) * self._removed()
        moved = moved - self.normalised.T * scale[..., None]
        return moved @ self.inputs * (self.gains[:, None] / num_samples)

    def _along(self) -> Tensor:
        """`X̃ᵀ â / N`, `(O, I)`."""
        return self.normalised.T @ self.inputs / len(self.inputs)

    def _removed(self) -> Tensor:
        """M² takes away `(2 − ââ/N)` times the part along â, and `ââ/N` is `v/(v + eps)`."""
        return 2 - self.normalised.square().mean(0)


@dataclass(frozen=True, eq=False)
class TwoLayerMetric:
    """Two layers `h = f(W x̃)`, `c = C h̃` as one component, with the response of the upper one.

    Vectors are pairs: a change of W, `(H, I)`, and one of C, `(L, H)` with the bias last. The first
    H·I parameters are those of W.

    Attributes:
        inputs: x̃ `(N, I)`.
        slopes: f'(a) `(N, H)`.
        weight: C without its bias, `(L, H)`.
        above: the metric of C by itself; its response is that of the pair.
    """

    inputs: Tensor
    slopes: Tensor
    weight: Tensor
    above: LayerMetric

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of W and of C."""
        return (self.slopes.shape[1], self.inputs.shape[1]), self.above.shape

    def matmul(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The metric times one vector, or several with R as the first axis of both parts.

        Raises:
            ValueError: If the shapes are other ones.
        """
        shapes = self.shapes
        if (lower.shape[-2:], upper.shape[-2:]) != shapes or lower.shape[:-2] != upper.shape[:-2]:
            raise ValueError(
                f"This metric takes pairs of vectors of shapes {shapes[0]} for the lower layer and "
                f"{shapes[1]} for the upper one, both with or both without a first axis R, got "
                f"{tuple(lower.shape)} and {tuple(upper.shape)}."
            )
        hidden = self.above.inputs[0]
        moved = self.weight @ (self.slopes.T * (lower @ self.inputs.T)) + upper @ hidden.T
        back = self.above.respond(moved.unsqueeze(-3)).squeeze(-3) / len(self.inputs)
        return (self.slopes.T * (self.weight.T @ back)) @ self.inputs, back @ hidden

    def units(self) -> tuple[Tensor, Tensor]:
        """The block of each unit, of W `(H, I, I)` and of C."""
        return self._lower().units(), self.above.units()

    def diagonal(self) -> tuple[Tensor, Tensor]:
        """Of W `(H, I)` and of C."""
        return self._lower().diagonal(), self.above.diagonal()

    def trace(self) -> Tensor:
        """Sum of the diagonal, a scalar tensor in nats/parameter²."""
        return self._lower().trace() + self.above.trace()

    def dense(self) -> Tensor:
        """The matrix `(P, P)`, W first.

        Raises:
            TooLargeError: If it would not fit into memory.
        """
        (hidden, fan_in), above = self.shapes
        _require_dense(hidden * fan_in + math.prod(above), self.inputs)
        eye = torch.eye(above[0], dtype=self.weight.dtype, device=self.weight.device)
        jacobian = torch.cat(  # (N, P, L)
            [
                torch.einsum("lh,nh,ni->nhil", self.weight, self.slopes, self.inputs).flatten(1, 2),
                torch.einsum("kl,nh->nkhl", eye, self.above.inputs[0]).flatten(1, 2),
            ],
            dim=1,
        )
        metric = self.above.respond(jacobian.permute(1, 2, 0)[:, None])[:, 0]  # (P, L, N)
        return torch.einsum("npl,qln->pq", jacobian, metric) / len(self.inputs)

    def _lower(self) -> LayerMetric:
        """The metric of W between different units left out: that of independent units."""
        weights = self.above.weights[0] @ self.weight.square()
        if self.above.centred:
            weights = weights - (self.above.weights[0] @ self.weight).square()
        weights = self.slopes.square() * weights.clamp(min=0)
        return LayerMetric(self.inputs[None], weights[None], len(self.inputs))


def _require_dense(num_parameters: int, like: Tensor) -> None:
    memory.require(
        2 * num_parameters**2 * like.element_size(),  # the matrix, and a term of it
        like.device,
        what=f"A matrix over {num_parameters:,} parameters",
        instead="Use matmul(v), or units() for the block of each unit.",
    )


_TEMPORARY_NUMEL = 2**22
