"""The contract of a likelihood, and slow but right defaults for all of it but two methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from neuromanifold._typing import Outputs
from neuromanifold.errors import NonFiniteError, UnsupportedError

__all__ = [
    "ColumnCumulants",
    "Likelihood",
    "at_least_float32",
    "evenly",
    "rademacher",
    "random_device",
    "sum_event",
]


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision as float32, anything wider as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def sum_event(tensor: Tensor, event_ndim: int) -> Tensor:
    """Sum over the last `event_ndim` axes, which may be none."""
    return tensor.unsqueeze(-1).flatten(-event_ndim - 1).sum(-1)


def random_device(generator: torch.Generator | None, outputs: Tensor) -> torch.device:
    """Where to draw: on the generator's device, so that one seed means one result everywhere."""
    return outputs.device if generator is None else generator.device


def rademacher(shape: torch.Size, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Independent ±1 of the dtype and device of `outputs`."""
    device = random_device(generator, outputs)
    bits = torch.randint(2, shape, generator=generator, device=device)
    return bits.to(outputs).mul_(2).sub_(1)


def evenly(weights: Tensor, num: int, generator: torch.Generator | None) -> Tensor:
    """Draw `num` indices of the last axis, each in proportion to its weight, as evenly as can be.

    One uniform number per row places `num` equidistant points on the cumulative weights, so that an
    index of share w is drawn ⌊num w⌋ or ⌈num w⌉ times. Alone, each of the draws is distributed like
    an independent one. The indices are laid out in random order, since points that miss each other
    could meet alike entries in a periodic one: one order for all rows, because rows only have to be
    independent given it.

    Args:
        weights: `(..., C)`, not negative; not all zero.
        num: draws per row.
        generator: source of randomness.

    Returns:
        Indices `(num, ...)`.
    """
    device = random_device(generator, weights)
    *rows, size = weights.shape
    order = torch.randperm(size, generator=generator, device=device).to(weights.device)
    cumulative = weights[..., order].cumsum(-1)
    uniform = torch.rand((*rows, 1), generator=generator, dtype=weights.dtype, device=device)
    turns = torch.rand((*rows, num), generator=generator, device=device).argsort(-1)
    points = ((turns + uniform) / num).to(weights.device)
    # Rounding may make the last point 1: it belongs to the last index of positive weight.
    points = points.clamp(max=1 - torch.finfo(weights.dtype).eps)
    found = torch.searchsorted(cumulative, points * cumulative[..., -1:], right=True)
    return order[found].movedim(-1, 0)


@dataclass(frozen=True)
class ColumnCumulants:
    """`κ₄(j·score) = Σ_c a_c γ_c⁴ + b Σ_k (Σ_{c in k} γ_c²)²`, with `γ_c = j · s_c` along columns.

    Columns of one group k belong to one target; groups are independent.

    Attributes:
        quartic: `a (V, N)`, for V columns.
        group: of each column, `(V,)` integers from 0.
        num_groups: how many there are.
        squared: b.
        classes: whether columns are `√p_c (e_c − p)` for the classes c of a label, `a = 1 / p_c`,
            those of one label side by side. Then `√a_c γ_c` is what the score is if c is drawn.
    """

    quartic: Tensor
    group: Tensor
    num_groups: int
    squared: float
    classes: bool = False


class Likelihood(ABC):
    """What a network's output means: the distribution `p(y | outputs)`.

    `outputs` is one tensor whose axis 0 is the sample axis N. Log-probabilities are in nats, summed
    over positions and events: one number per sample. Scores, columns and signs are constants: they
    carry no autograd graph. They have the dtype of `outputs` and are computed in float32 at least.

    A subclass writes `distribution` and `fisher_columns`; everything else follows. Closed forms
    replace the defaults where they are faster.
    """

    target_values: ClassVar[str] = "values in the support of the distribution"
    """What a target may be, for messages."""

    @abstractmethod
    def distribution(self, outputs: Outputs) -> Distribution:
        """The distribution of the targets; its batch shape starts with N."""

    @abstractmethod
    def fisher_columns(self, outputs: Tensor) -> Iterator[Tensor]:
        """Columns `s_c`, each like `outputs`: `Σ_c s_c s_cᵀ` is the output Fisher per sample."""

    def canonical(self, outputs: Outputs) -> Tensor:
        """The outputs as one differentiable tensor `(N, ...)`.

        Raises:
            TypeError: If they are not one floating-point tensor.
            ValueError: If there is no sample axis.
        """
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"{self!r} takes one output tensor with the samples on axis 0, "
                f"got {_describe(outputs)}. Pass forward=... that returns the tensor."
            )
        if not outputs.is_floating_point():
            raise TypeError(
                f"{self!r} takes floating-point outputs, got {outputs.dtype}. "
                f"Return what the loss sees, not a prediction or a label."
            )
        if outputs.ndim == 0:
            raise ValueError(
                f"{self!r} takes outputs with the samples on axis 0, got a tensor without axes. "
                f"Return the outputs of every sample, not their loss."
            )
        return outputs

    def check(self, outputs: Outputs, targets: Tensor) -> None:
        """Refuse targets that do not fit: meant for the door, since it reads values.

        Raises:
            TypeError: If the outputs or targets are of the wrong type.
            ValueError: If a shape, device or value is wrong.
            NonFiniteError: If a target is NaN or infinite.
        """
        outputs = self.canonical(outputs).detach()
        distribution = self.distribution(outputs)
        self._check_layout(outputs, targets, distribution.batch_shape + distribution.event_shape)
        if not torch.isfinite(targets).all():
            raise NonFiniteError(
                f"The targets hold NaN or infinite values; {self!r} expects {self.target_values}. "
                f"Drop or repair these samples."
            )
        try:
            support = distribution.support
        except NotImplementedError:
            support = None  # The distribution does not say; its own log_prob will.
        if support is not None and not support.check(targets).all():
            raise ValueError(
                f"{self!r} expects targets that are {self.target_values}, got values in "
                f"[{targets.min().item():g}, {targets.max().item():g}]."
            )

    def log_prob(self, outputs: Outputs, targets: Tensor) -> Tensor:
        """Log-probability of every sample, `(N,)` nats, differentiable in the outputs."""
        log_prob = self.distribution(outputs).log_prob(targets)
        return sum_event(log_prob, log_prob.ndim - 1)

    def loss(self, outputs: Outputs, targets: Tensor) -> Tensor:
        """Mean over samples of the negative log-probability, `()` nats."""
        return -self.log_prob(outputs, targets).mean()

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`∂ log p(targets) / ∂ outputs` of every sample, like `outputs`."""
        leaf = self.canonical(outputs).detach().requires_grad_()
        with torch.enable_grad():
            total = self.log_prob(leaf, targets).sum()
        return torch.autograd.grad(total, leaf)[0]

    def sample(
        self, outputs: Outputs, num: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw `num` targets per sample from the model, `(num, *target shape)`."""
        outputs = self.canonical(outputs).detach()
        # torch.distributions draw from the global state: fork it, and seed the fork.
        seed = torch.randint(
            2**62, (), generator=generator, device=random_device(generator, outputs)
        )
        forked = [outputs.device] if outputs.is_cuda else []
        with torch.random.fork_rng(forked):
            torch.default_generator.manual_seed(int(seed))
            for device in forked:
                torch.cuda.default_generators[device.index].manual_seed(int(seed))
            return self.distribution(outputs).sample(torch.Size([num]))

    def even_scores(
        self,
        outputs: Tensor,
        num: int,
        *,
        weighted: bool = False,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Scores of `num` targets that cover the distribution more evenly than independent ones.

        Their mean outer product has the output Fisher as its expectation, like that of scores of
        independent targets, and varies less. Each has a random sign at each position: the draws of
        a position compensate one another, and without signs so would their sums over positions,
        which then would be alike in square.

        Args:
            outputs: the network's outputs.
            num: how many scores.
            weighted: draw a target y in proportion to what it adds to the trace of the output
                Fisher, `p_y ‖score_y‖²`, instead of `p_y`, and scale its score to make up for that.
            generator: source of randomness.

        Yields:
            Tensors like `outputs`.

        Raises:
            UnsupportedError: If the likelihood has no way to do that.
        """
        outputs = self.canonical(outputs).detach()
        support = self._finite_support(outputs)
        if support is None:
            raise self._no_even_scores(weighted)
        targets, p = support[0], support[1].T  # (S, N, *event), (N, S)
        weights = p
        if weighted:
            norms = [at_least_float32(self.score(outputs, y)).square() for y in targets]
            weights = p * torch.stack([sum_event(z, outputs.ndim - 1) for z in norms], dim=1)
            weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, p)
        share = weights / weights.sum(1, keepdim=True)
        scale = torch.where(share > 0, p / share, 0).sqrt()
        rows = torch.arange(len(outputs), device=outputs.device)
        for drawn in evenly(weights, num, generator):
            factor = scale[rows, drawn] * rademacher(drawn.shape, scale, generator)
            score = at_least_float32(self.score(outputs, targets[drawn, rows]))
            yield (score * factor.reshape(-1, *[1] * (outputs.ndim - 1))).to(outputs.dtype)

    def _no_even_scores(self, weighted: bool) -> UnsupportedError:
        kind = "weighted" if weighted else "stratified"
        return UnsupportedError(
            f"{self!r} has no list of possible targets, so that there are no {kind} labels. Use "
            f'nm.MonteCarlo(...) with labels="independent", or nm.RandomSigns(...).'
        )

    def num_columns(self, outputs: Outputs) -> int:
        """How many columns `fisher_columns` yields."""
        return sum(1 for _ in self.fisher_columns(self.canonical(outputs)))

    def fisher_diagonal(self, outputs: Tensor) -> Tensor:
        """Diagonal of the output Fisher of every sample, like `outputs`."""
        outputs = self.canonical(outputs)
        total = torch.zeros_like(at_least_float32(outputs))
        for column in self.fisher_columns(outputs):
            total += column.square()
        return total.to(outputs.dtype)

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """Output Fisher of every sample times `v`, which may have extra leading axes; like `v`."""
        outputs = self.canonical(outputs)
        event_ndim = outputs.ndim - 1
        product = torch.zeros_like(at_least_float32(v))
        for column in self.fisher_columns(outputs):
            along = sum_event(column * v, event_ndim)
            product += column * along.reshape(along.shape + (1,) * event_ndim)
        return product.to(v.dtype)

    def random_signs(
        self, outputs: Tensor, num: int, *, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """Draw `u = Σ_c ε_c s_c` with independent random signs, `num` times; each like `outputs`.

        The mean of `u uᵀ` over the signs is the output Fisher: one sweep stands for all columns.
        """
        outputs = self.canonical(outputs)
        total = outputs.new_zeros((num, *outputs.shape))
        shape = torch.Size((num, len(outputs)) + (1,) * (outputs.ndim - 1))
        for column in self.fisher_columns(outputs):
            total += rademacher(shape, outputs, generator) * column
        yield from total.unbind()

    def observed(self, outputs: Outputs, targets: Tensor | None) -> Tensor | None:
        """Which positions count, boolean `(N, *T)`; None if all do."""
        return None

    def observing(self, outputs: Outputs, observed: Tensor) -> Tensor | None:
        """Targets that only say which positions count, for data without any.

        Args:
            outputs: the network's outputs.
            observed: boolean `(N, T)`, False at padded positions.

        Returns:
            Stand-ins with an ignored target where `observed` is False; None if the outputs have no
            positions.

        Raises:
            UnsupportedError: If they have, but which of them count cannot be said.
        """
        shape = self.canonical(outputs).shape
        if shape[:2] != observed.shape:
            return None
        raise UnsupportedError(
            f"The attention mask marks padded positions, but {self!r} has no target to ignore. Cut "
            f"these outputs off the graph: forward=... that returns torch.where(mask, outputs, "
            f"outputs.detach()). Where every output counts, pass a pair (inputs, None)."
        )

    def mask_cotangent(self, u: Tensor, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """Zero `u`, which may have extra leading axes, at the positions that do not count."""
        return u

    def num_positions(self, outputs: Outputs, targets: Tensor | None) -> Tensor:
        """How many positions of the batch count, an integer `()`.

        One per sample, whatever the event shape, unless the likelihood has a position axis.
        """
        outputs = self.canonical(outputs)
        return torch.tensor(len(outputs), device=outputs.device)

    def score_fourth_moment(self, outputs: Tensor, j: Tensor) -> Tensor:
        """`E (j · score)⁴` over the model's own targets, `(N,)`.

        Args:
            outputs: the network's outputs.
            j: like `outputs`, or with extra leading axes, which the answer has too.

        Raises:
            UnsupportedError: If there is no closed form and the support cannot be listed.
        """
        outputs = self.canonical(outputs).detach()
        support = self._finite_support(outputs)
        if support is None:
            raise UnsupportedError(
                f"{self!r} has no closed form for the fourth moment of its score. Estimate it by "
                f"sampling: score(outputs, y) for the y of sample(outputs, num)."
            )
        moment: Tensor = torch.zeros((), device=outputs.device)
        for targets, probability in zip(*support, strict=True):
            score = at_least_float32(self.score(outputs, targets))
            moment = moment + probability * sum_event(j * score, outputs.ndim - 1) ** 4
        return moment

    def column_cumulants(self, outputs: Tensor) -> ColumnCumulants | None:
        """The fourth cumulant of `j · score` by components along the columns, for all j at once.

        Returns:
            None where there is no such form.
        """
        return None

    def _finite_support(self, outputs: Tensor) -> tuple[Tensor, Tensor] | None:
        """All S possible targets `(S, N, *event)` and their probabilities `(S, N)`, or None.

        Several positions have a joint support that is too large to list: None as well.
        """
        distribution = self.distribution(outputs)
        if len(distribution.batch_shape) > 1 or not distribution.has_enumerate_support:
            return None
        try:
            targets = distribution.enumerate_support()
        except NotImplementedError:  # the support differs between samples
            return None
        return targets, distribution.log_prob(targets).exp()

    def _check_layout(self, outputs: Tensor, targets: Tensor, expected: torch.Size) -> None:
        """Refuse targets that are no tensor, of another shape, or on another device."""
        if not isinstance(targets, Tensor):
            raise TypeError(f"{self!r} expects targets as a tensor, got {_describe(targets)}.")
        if targets.shape != expected:
            raise ValueError(
                f"{self!r} expects targets of shape {tuple(expected)} for outputs of shape "
                f"{tuple(outputs.shape)}, got {tuple(targets.shape)}. "
                f"Shapes are not broadcast: reshape the targets or the outputs."
            )
        if targets.device != outputs.device:
            raise ValueError(
                f"The outputs are on {outputs.device} and the targets on {targets.device}. "
                f"Move the targets: targets.to({str(outputs.device)!r})."
            )


def _describe(value: object) -> str:
    size = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    return f"{type(value).__name__}{size}"
