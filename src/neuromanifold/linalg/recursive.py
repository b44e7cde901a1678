"""The inverse of a moving average of moments, kept up to date by low-rank corrections.

Source: papers.md §4.5; the matrix inversion lemma of recursive least squares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from neuromanifold.linalg import psd

__all__ = ["RecursiveInverse"]


class RecursiveInverse:
    """`Q ≈ (M + D)⁻¹` for `M ← α M + XᵀX`, r rows X at a time, in `O(k² r)`, with D about λ.

    To forget old moments is to forget the damping that was added to them. A few rows more in each
    correction restore it, for c of the k directions: `√((1 − α) λ k / c) e_t`, with t going around
    all of them. On average the damping stays λ; that of a single direction rises and falls, by a
    third at most, since c is as large as it takes to go around in `1 / (2 (1 − α))` corrections.

    Args:
        moment: M to begin with, `(G, k, k)`.
        damping: λ `(G,)`.

    Attributes:
        added: the damping that each direction has now, the diagonal of D, `(G, k)`.

    Example:
        >>> x = torch.randn(1, 4, 3, dtype=torch.float64)
        >>> damping = torch.tensor([0.1], dtype=torch.float64)
        >>> Q = RecursiveInverse(torch.zeros(1, 3, 3, dtype=torch.float64), damping)
        >>> Q.update(x, keep=0.9)
        >>> Q.residual(x.mT @ x, generator=torch.Generator().manual_seed(0)) < 0.4
        tensor([True])
    """

    def __init__(self, moment: Tensor, damping: Tensor) -> None:
        self.damping = damping
        self.turn = 0
        """First direction whose damping is restored next."""
        self.renew(moment)

    def renew(self, moment: Tensor) -> None:
        """Make the inverse from M itself."""
        self.matrix = psd.inverse(moment, self.damping[:, None])
        self.added = self.damping[:, None].repeat(1, moment.shape[-1])

    def restored(self, keep: float) -> int:
        """In how many directions, c, a correction restores the damping."""
        width = self.matrix.shape[-1]
        return min(math.ceil(2 * (1 - keep) * width), width)

    def update(self, rows: Tensor, keep: float, *, restore: bool = True) -> None:
        """Let M decay, and add the second moment of some rows.

        Args:
            rows: X `(G, r, k)`.
            keep: α, in (0, 1].
            restore: whether the damping is restored.
        """
        self.added = keep * self.added
        if restore:
            rows = torch.cat([rows, self._restoring(keep)], dim=1)
        old = self.matrix / keep
        image = rows @ old  # (G, r, k)
        small = image @ rows.mT
        small.diagonal(dim1=-2, dim2=-1).add_(1)
        # Half of the correction on either side keeps Q symmetric to the bit but for the product.
        # Where rounding has grown so much that there is no root, the residual will tell.
        root, _ = torch.linalg.cholesky_ex(small)
        half = torch.linalg.solve_triangular(root, image, upper=False)
        new = old - half.mT @ half
        self.matrix = (new + new.mT) / 2

    def _restoring(self, keep: float) -> Tensor:
        """Rows `(G, c, k)`, whose squares are added to the damping."""
        width, count = self.matrix.shape[-1], self.restored(keep)
        turns = torch.arange(self.turn, self.turn + count, device=self.damping.device) % width
        self.turn = (self.turn + count) % width
        units = torch.eye(width, dtype=self.matrix.dtype, device=self.matrix.device)[turns]
        each = (1 - keep) * width / max(count, 1) * self.damping
        self.added[:, turns] += each[:, None]
        return each.sqrt()[:, None, None] * units

    def residual(self, moment: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`‖Q (M + D) v − v‖ / ‖v‖` for a random v, `(G,)`."""
        device = moment.device if generator is None else generator.device
        shape = (*moment.shape[:2], 1)
        v = torch.randn(shape, generator=generator, dtype=moment.dtype, device=device)
        v = v.to(moment.device)
        image = self.matrix @ (moment @ v + self.added[..., None] * v)
        norms = (torch.linalg.vector_norm(w.flatten(1), dim=1) for w in (image - v, v))
        above, below = norms
        return above / below

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, by name."""
        return {
            "matrix": self.matrix,
            "damping": self.damping,
            "added": self.added,
            "turn": self.turn,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> RecursiveInverse:
        """The inverse of `state_dict`."""
        found = cls.__new__(cls)
        found.matrix, found.damping, found.added = (
            state[name].to(device, copy=True) for name in ("matrix", "damping", "added")
        )
        found.turn = int(state["turn"])
        return found
