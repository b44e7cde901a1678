"""Class labels from logits, at one or many positions per sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Distribution, Independent

from neuromanifold._typing import Outputs
from neuromanifold.errors import UnsupportedError
from neuromanifold.likelihoods._base import (
    ColumnCumulants,
    Likelihood,
    at_least_float32,
    evenly,
    rademacher,
    random_device,
    sum_event,
)

__all__ = ["Categorical"]


@dataclass(frozen=True, eq=False)
class Categorical(Likelihood):
    """Softmax classification: logits `(N, *T, C)`, integer targets `(N, *T)`.

    The T positions of a sample are independent and their log-probabilities add up. The output
    Fisher of a position is `diag(p) − p pᵀ`, with the columns `√p_c (e_c − p)`.

    Args:
        ignore_index: target of the positions that do not count; it must not be a class.
        class_axis: axis of the C classes; 1 for the layout `(N, C, *T)` of torch's own loss.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 0.0, 0.0]])
        >>> round(Categorical().loss(logits, torch.tensor([2])).exp().item(), 4)
        3.0
        >>> Categorical().num_columns(logits)
        3
    """

    ignore_index: int = -100
    class_axis: int = -1

    def canonical(self, outputs: Outputs) -> Tensor:
        """The logits, once their layout is known to make sense."""
        outputs = super().canonical(outputs)
        if outputs.ndim < 2 or self._class_axis(outputs) not in range(1 - outputs.ndim, 0):
            raise ValueError(
                f"{self!r} takes logits with a class axis after the sample axis, (N, *T, C) for "
                f"class_axis=-1 or (N, C, *T) for class_axis=1, got shape {tuple(outputs.shape)}."
            )
        num_classes = outputs.shape[self._class_axis(outputs)]
        if num_classes < 2:
            raise ValueError(
                f"{self!r} takes the logits of two classes or more, got shape "
                f"{tuple(outputs.shape)}. Use Bernoulli() for one logit per yes-or-no label."
            )
        if 0 <= self.ignore_index < num_classes:
            raise UnsupportedError(
                f"ignore_index={self.ignore_index} is also one of the {num_classes} classes, so a "
                f"label drawn from the model could not be told from a position to ignore. Mark "
                f"these positions by -100: targets.masked_fill(targets == {self.ignore_index}, "
                f"-100), with Categorical(class_axis={self.class_axis})."
            )
        return outputs

    def check(self, outputs: Outputs, targets: Tensor) -> None:
        """Refuse targets that are no class labels of these logits: reads values."""
        outputs = self.canonical(outputs)
        num_classes = outputs.shape[self._class_axis(outputs)]
        positions = self._classes_last(outputs).shape[:-1]
        if isinstance(targets, Tensor) and positions != targets.shape == outputs[:, 0].shape:
            raise ValueError(
                f"{self!r} expects targets of shape {tuple(positions)} for logits of shape "
                f"{tuple(outputs.shape)}, got {tuple(targets.shape)}, as if the classes were on "
                f"axis 1. If they are, use Categorical(class_axis=1)."
            )
        self._check_layout(outputs, targets, positions)
        if targets.is_floating_point() or targets.dtype == torch.bool:
            raise TypeError(
                f"{self!r} expects integer class labels, got {targets.dtype}. "
                f"Class probabilities are not supported: give the label of each position."
            )
        labels = targets[targets != self.ignore_index]
        if labels.numel() and (labels.min() < 0 or labels.max() >= num_classes):
            raise ValueError(
                f"{self!r} expects labels from 0 to {num_classes - 1} (or {self.ignore_index} for "
                f"positions to ignore), got labels from {labels.min().item()} to "
                f"{labels.max().item()}."
            )

    def distribution(self, outputs: Outputs) -> Distribution:
        """Independent categorical labels; positions to ignore are not left out."""
        logits = self._classes_last(at_least_float32(self.canonical(outputs)))
        return Independent(TorchCategorical(logits=logits, validate_args=False), logits.ndim - 2)

    def log_prob(self, outputs: Outputs, targets: Tensor) -> Tensor:
        """Log-probability of the labels at the positions that count, `(N,)` nats."""
        logits = self._classes_last(at_least_float32(self.canonical(outputs)))
        observed = targets != self.ignore_index
        labels = torch.where(observed, targets, 0).long()
        log_p = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return sum_event(log_p.masked_fill(~observed, 0), log_p.ndim - 1)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`e_y − p` at the positions that count, zero elsewhere."""
        p = self._probabilities(outputs)
        observed = (targets != self.ignore_index).unsqueeze(-1)
        labels = torch.where(observed, targets.unsqueeze(-1), 0).long()
        score = (-p).scatter_add_(-1, labels, torch.ones_like(p[..., :1]))
        return self._back(score.masked_fill_(~observed, 0), outputs)

    def sample(
        self, outputs: Outputs, num: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Labels at all positions, `(num, N, *T)`."""
        # Inverse of the cumulative distribution: five times faster than torch.multinomial.
        cumulative = self._probabilities(self.canonical(outputs)).cumsum(-1)
        u = torch.rand(
            (*cumulative.shape[:-1], num),
            generator=generator,
            dtype=cumulative.dtype,
            device=random_device(generator, cumulative),
        ).to(cumulative.device)
        # u < 1, so the scaled u stays below the last entry and a class of probability 0 never wins.
        labels = torch.searchsorted(cumulative, u * cumulative[..., -1:], right=True)
        return labels.movedim(-1, 0)

    def even_scores(
        self,
        outputs: Tensor,
        num: int,
        *,
        weighted: bool = False,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Each position for itself: `±√(p_y / q_y) (e_y − p)` for labels y drawn evenly from q."""
        p = self._probabilities(outputs)
        q = p
        if weighted:
            # ‖e_c − p‖²; in float32 that of a sure label is rounding, and any q is unbiased.
            norms = (1 - p).square() + (p.square().sum(-1, keepdim=True) - p.square())
            q = p * norms.clamp(min=torch.finfo(p.dtype).eps)
            q = q / q.sum(-1, keepdim=True)
        scale = torch.where(q > 0, p / q, 0).sqrt()
        for labels in evenly(q, num, generator).unsqueeze(-1):
            factor = scale.gather(-1, labels)
            factor = factor * rademacher(factor.shape, factor, generator)
            score = (-p).scatter_add_(-1, labels, torch.ones_like(factor))
            yield self._back(factor * score, outputs)

    def fisher_columns(self, outputs: Tensor) -> Iterator[Tensor]:
        """`√p_c (e_c − p)` at one position at a time: T·C columns."""
        p = self._probabilities(outputs)
        *_, num_classes = p.shape
        at_position = p.reshape(len(p), -1, num_classes)  # (N, T, C)
        for t in range(at_position.shape[1]):
            for c in range(num_classes):
                column = torch.zeros_like(at_position)
                column[:, t] = -at_position[:, t]
                column[:, t, c] += 1
                column[:, t] *= at_position[:, t, c, None].sqrt()
                yield self._back(column.reshape(p.shape), outputs)

    def num_columns(self, outputs: Outputs) -> int:
        """T·C."""
        return self.canonical(outputs)[0].numel()

    def fisher_diagonal(self, outputs: Tensor) -> Tensor:
        """`p (1 − p)` at every position."""
        p = self._probabilities(outputs)
        return self._back(p * (1 - p), outputs)

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """`p ∘ v − p (p · v)` at every position."""
        p = self._probabilities(outputs)
        v_last = v.movedim(self._class_axis(outputs), -1)
        product = p * (v_last - (p * v_last).sum(-1, keepdim=True))
        return product.movedim(-1, self._class_axis(outputs)).to(v.dtype)

    def random_signs(
        self, outputs: Tensor, num: int, *, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """`√p ∘ ε − p (√p · ε)` with signs ε `(N, *T, C)`: one sweep for all T·C columns."""
        p = self._probabilities(outputs)
        root = p.sqrt()
        for _ in range(num):
            signed = root * rademacher(p.shape, p, generator)
            yield self._back(signed - p * signed.sum(-1, keepdim=True), outputs)

    def observed(self, outputs: Outputs, targets: Tensor | None) -> Tensor | None:
        """Which positions have a label, boolean `(N, *T)`; None without targets."""
        return None if targets is None else targets != self.ignore_index

    def observing(self, outputs: Outputs, observed: Tensor) -> Tensor | None:
        """Class 0 at the positions that count, and the ignored one elsewhere."""
        positions = self._classes_last(self.canonical(outputs)).shape[:-1]
        if len(positions) == 1:
            return None
        if positions != observed.shape:
            raise UnsupportedError(
                f"The attention mask has shape {tuple(observed.shape)}, but the logits have "
                f"positions {tuple(positions)}, so it is not known which of them are padded. Give "
                f"targets with {self.ignore_index} at the padded positions."
            )
        return torch.where(observed, 0, self.ignore_index)

    def mask_cotangent(self, u: Tensor, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """Zero `u`, like the logits or with extra leading axes, at the positions to ignore."""
        if targets is None:
            return u
        ignored = targets == self.ignore_index
        return u.masked_fill(ignored.unsqueeze(self._class_axis(outputs)), 0)

    def num_positions(self, outputs: Outputs, targets: Tensor | None) -> Tensor:
        """How many positions count, an integer `()`: all N·T if there are no targets."""
        if targets is not None:
            return (targets != self.ignore_index).sum()
        outputs = self.canonical(outputs)
        num_classes = outputs.shape[self._class_axis(outputs)]
        return torch.tensor(outputs.numel() // num_classes, device=outputs.device)

    def score_fourth_moment(self, outputs: Tensor, j: Tensor) -> Tensor:
        """`E (j · score)⁴`, `(N,)`: positions are independent, so their cumulants add up.

        A position to ignore has no part in it where `j` is zero there (see `mask_cotangent`).
        """
        p = self._probabilities(outputs)
        j = at_least_float32(j).movedim(self._class_axis(outputs), -1)
        centred = j - (p * j).sum(-1, keepdim=True)
        second = (p * centred**2).sum(-1)
        fourth_cumulant = (p * centred**4).sum(-1) - 3 * second**2
        positions = p.ndim - 2
        return sum_event(fourth_cumulant, positions) + 3 * sum_event(second, positions) ** 2

    def column_cumulants(self, outputs: Tensor) -> ColumnCumulants:
        """Along `√p_c (e_c − p)` at position t: `Σ_c γ_c⁴ / p_c − 3 (Σ_c γ_c²)²`."""
        p = self._probabilities(outputs).flatten(1)  # (N, T·C)
        num_classes = outputs.shape[self._class_axis(outputs)]
        # A class without probability has no column either; below `tiny`, 1 / p is infinite.
        quartic = torch.where(p >= torch.finfo(p.dtype).tiny, 1 / p, 0).T
        group = torch.arange(len(quartic), device=p.device) // num_classes
        num_labels = len(quartic) // num_classes
        return ColumnCumulants(quartic, group, num_labels, -3.0, classes=True)

    def _class_axis(self, outputs: Tensor) -> int:
        """The class axis counted from the end, so that extra leading axes do not move it."""
        return self.class_axis - outputs.ndim if self.class_axis >= 0 else self.class_axis

    def _classes_last(self, tensor: Tensor) -> Tensor:
        return tensor.movedim(self._class_axis(tensor), -1)

    def _probabilities(self, outputs: Tensor) -> Tensor:
        """Softmax `(N, *T, C)`, without a graph."""
        return self._classes_last(at_least_float32(self.canonical(outputs).detach())).softmax(-1)

    def _back(self, u: Tensor, outputs: Tensor) -> Tensor:
        """From `(N, *T, C)` to the layout and dtype of the outputs."""
        return u.movedim(-1, self._class_axis(outputs)).to(outputs.dtype)
