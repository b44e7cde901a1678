"""The exact natural gradient of each batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from neuromanifold._fisher import fisher
from neuromanifold._typing import Params
from neuromanifold.capture import Batch, Forward, unwrap
from neuromanifold.errors import CaptureError, NonFiniteError, UnsupportedError
from neuromanifold.estimators import Estimator, MonteCarlo
from neuromanifold.likelihoods import Likelihood
from neuromanifold.linalg import psd
from neuromanifold.operators import FisherOperator
from neuromanifold.optim.damping import check_damping
from neuromanifold.optim.one_group import OneGroup
from neuromanifold.optim.residuals import GaussNewton
from neuromanifold.optim.schedules import Number, at_step
from neuromanifold.optim.watch import Observer, as_batch, in_training, is_data_parallel, undisturbed
from neuromanifold.structures import Gram, Structure
from neuromanifold.structures.gram import GramOperator

__all__ = ["ExactNaturalGradient", "gram"]


class ExactNaturalGradient(OneGroup):
    """Steps by the whole Fisher matrix of the batch, for any number of parameters.

    The step is

        δ = momentum · δ' − (F + damping)⁻¹ (g + momentum · F δ')

    with the last step δ' (SPRING: Goldshlager, Abrahamsen and Lin, arXiv 2401.10190): where this
    batch says nothing, what earlier ones said is kept. F is that of the inputs that the model was
    called with since the step before, in training mode with gradients enabled, several calls
    included. It is solved in the space of samples, at a cost of `(samples × sweeps)³`, or in that
    of parameters if they are fewer. Batches are normalised with their running statistics while F
    is measured.

    Where `½ δᵀ F δ`, the KL divergence in nats per position that δ would bring about, is over
    `kl_max`, it is shortened to that. A step with NaN or infinity is left out, and counted.

    Args:
        model: that is trained; all its parameters with a gradient move.
        likelihood: what its outputs mean.
        lr: of all of δ.
        momentum: weight of the last step, in [0, 1).
        damping: in nats/parameter², positive; a number, or a function of the step. With sampled
            labels it must not be small: where F of the batch vanishes but the gradient does not,
            the step is g/damping. With `nm.Exact()` the gradient lies where F does not vanish.
        kl_max: nats per position (or per sample, as `per` says); None for no limit.
        weight_decay: weights shrink by `lr · weight_decay`.
        estimator: which vectors go back; one sampled label per input by default. `nm.Exact()` for
            few classes.
        per: what the loss is a mean over, and the matrix with it, as in `nm.optim.Preconditioner`.
        forward: `forward(model, inputs)`, if the model is not called the usual way.
        generator: source of sampled labels; one with a seed of its own by default.
        maximize: not supported.
        differentiable: not supported.

    Attributes:
        kl: of the last step, as the quadratic model has it, in the unit of `kl_max`.

    Raises:
        ValueError: If a number makes no sense.
        UnsupportedError: When a model is called that is distributed over processes.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x, y = torch.nn.Linear(4, 3), torch.randn(32, 4), torch.randint(3, (32,))
        >>> opt = nm.optim.gram(model, nm.Categorical(), lr=0.5)
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     loss = torch.nn.functional.cross_entropy(model(x), y)
        ...     loss.backward()
        ...     opt.step()
        >>> opt.skipped
        0
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        lr: float = 0.5,
        momentum: float = 0.9,
        damping: Number = 0.1,
        kl_max: float | None = 1e-2,
        weight_decay: float = 0.0,
        estimator: Estimator | None = None,
        per: Literal["position", "sample"] = "position",
        forward: Forward | None = None,
        generator: torch.Generator | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        check_damping(damping)
        if not (kl_max is None or kl_max > 0):
            raise ValueError(f"kl_max must be positive, or None, got {kl_max!r}.")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {weight_decay!r}.")
        self.model = unwrap(model)
        self.likelihood = likelihood
        self.damping = damping
        self.estimator = MonteCarlo(1) if estimator is None else estimator
        self.per = per
        self.forward = forward
        if generator is None:
            generator = torch.Generator(next(self.model.parameters()).device)
            generator.manual_seed(int(torch.randint(2**62, ())))
        self.generator = generator
        self.steps = 0
        self.kl = 0.0
        self._batches: list[Batch] = []
        defaults = {"lr": lr, "momentum": momentum, "kl_max": kl_max, "weight_decay": weight_decay}
        super().__init__(
            self.model.parameters(), defaults, maximize=maximize, differentiable=differentiable
        )
        self._watch(model)

    def _watch(self, model: nn.Module) -> None:
        self._watched = model
        self._hook = model.register_forward_pre_hook(Observer(self._called), with_kwargs=True)

    def _called(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model is about to be called."""
        if not in_training(self.model):
            return
        if is_data_parallel(self._watched):
            raise UnsupportedError(
                "The exact Fisher matrix of a batch that lies on several processes is not "
                "supported. Use nm.optim.kfac, which sums over processes."
            )
        self._batches.append(as_batch(self.model, args, kwargs))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: evaluates the loss again with gradients, and returns it.

        Raises:
            CaptureError: If a gradient has come, but the model was not called in training mode.
        """
        loss = None
        if closure is not None:
            self._batches.clear()
            with torch.enable_grad():
                loss = closure()
        gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        batches, self._batches = self._batches, []
        if not batches:
            self._require_no(gradients)
        elif gradients:
            try:
                with undisturbed(self.model):
                    self._move(gradients, batches)
            except NonFiniteError:
                self.skipped += 1
        self.steps += 1
        return loss

    def _require_no(self, gradients: Params) -> None:
        # Some checkpointing tools take a step with zero gradients to fill the state.
        if any(bool(g.any()) for g in gradients.values()):
            raise CaptureError(
                "There are gradients, but the model was not called since the last step. Its batch "
                "is seen when the model itself is called in training mode (model.train()) with "
                "gradients enabled. If you call parts of the model, or compiled it after making "
                "the optimizer, pass what you call."
            )

    def _measured(self, batches: list[Batch], names: list[str]) -> FisherOperator:
        """The matrix of some parameters; products with it, and its solve, are all that is used."""
        return self._fisher(batches, names, Gram(), self.estimator)

    def _fisher(
        self, batches: list[Batch], names: list[str], structure: Structure, estimator: Estimator
    ) -> FisherOperator:
        return fisher(
            self.model,
            self.likelihood,
            batches,
            structure,
            estimator=estimator,
            params=names,
            per=self.per,
            forward=self.forward,
            generator=self.generator,
        )

    def _solved(self, matrix: FisherOperator, v: Tensor, damping: float) -> Tensor:
        """`(F + damping)⁻¹ v`, by samples or by parameters, whichever are fewer."""
        assert isinstance(matrix, GramOperator)
        if matrix.num_rows < matrix.num_parameters:
            return matrix.solve(v, damping=damping)
        factor = psd.cholesky(matrix.to_dense(), damping)
        return torch.cholesky_solve(v[:, None], factor)[:, 0]

    def _move(self, gradients: Params, batches: list[Batch]) -> None:
        matrix = self._measured(batches, list(gradients))
        group, named = self.param_groups[0], dict(self.model.named_parameters())
        layout = matrix.layout
        params = {name: named[name] for name in layout.names}
        last = layout.flatten({name: self._last_step(p) for name, p in params.items()})
        start = group["momentum"] * last.to(matrix.dtype)
        slope = layout.flatten(gradients).to(matrix.dtype) + matrix @ start
        step = start - self._solved(matrix, slope, at_step(self.damping, self.steps))
        kl = float(matrix.inner(step, step)) / 2
        if not math.isfinite(kl):
            raise NonFiniteError("The step holds NaN or infinity.")
        limit = group["kl_max"]
        scale = 1.0 if limit is None or kl <= limit else math.sqrt(limit / kl)
        self.kl = kl * (scale * group["lr"]) ** 2
        for name, moved in layout.unflatten(step).items():
            p = params[name]
            self.state[p]["last"] = moved.to(p.dtype)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(self.state[p]["last"], alpha=group["lr"] * scale)

    # ---- state -----------------------------------------------------------------------------

    def _own_state(self) -> dict[str, Any]:
        return {"steps": self.steps, "kl": self.kl, "generator": self.generator.get_state()}

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        self.steps, self.kl = state["steps"], state["kl"]
        self.generator.set_state(state["generator"].cpu())

    def __getstate__(self) -> dict[str, Any]:
        names = (
            *("model", "likelihood", "damping", "estimator", "per", "forward", "generator"),
            *("steps", "kl", "skipped", "_watched"),
        )
        own = {name: getattr(self, name) for name in names}
        return {**super().__getstate__(), **own, "_batches": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_watched" not in state:  # not a copy, but a part of load_state_dict
            return
        self._watch(self._watched)


@overload
def gram(model: nn.Module, likelihood: Likelihood, **options: Any) -> ExactNaturalGradient: ...


@overload
def gram(model: nn.Module, likelihood: None = None, **options: Any) -> GaussNewton: ...


def gram(
    model: nn.Module, likelihood: Likelihood | None = None, **options: Any
) -> ExactNaturalGradient | GaussNewton:
    """The exact natural gradient of each batch: any number of parameters, some thousand samples.

    Costs one solve as wide as the batch has samples, and memory for their records.

    Args:
        model: that is trained.
        likelihood: what its outputs mean; without one, `opt.step(closure)` takes the residuals
            that the closure returns.
        **options: see `nm.optim.ExactNaturalGradient`; without a likelihood, see
            `nm.optim.GaussNewton`.

    Source: Goldshlager, Abrahamsen and Lin, arXiv 2401.10190.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x, y = torch.nn.Linear(3, 1).double(), torch.randn(9, 3).double(), torch.ones(9)
        >>> opt = nm.optim.gram(model)
        >>> for _ in range(30):
        ...     loss = opt.step(lambda: model(x)[:, 0] - y)
        >>> opt.loss < 1e-12
        True
    """
    if likelihood is None:
        return GaussNewton(model.parameters(), **options)
    return ExactNaturalGradient(model, likelihood, **options)
