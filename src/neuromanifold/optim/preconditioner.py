"""Curvature that follows a model in training, and its damped inverse times gradients."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neuromanifold._fisher import requested
from neuromanifold._typing import Params
from neuromanifold.capture import Batch, Data, Forward, Plan, logits_of, plan, unwrap
from neuromanifold.distributed import sum_over_ranks
from neuromanifold.errors import CaptureError, NonFiniteError
from neuromanifold.estimators import Estimator, MonteCarlo
from neuromanifold.likelihoods import Likelihood
from neuromanifold.linalg import Block
from neuromanifold.operators import BlockMatrix
from neuromanifold.optim.averaging import curvature_of
from neuromanifold.optim.damping import LevenbergMarquardt, check_damping
from neuromanifold.optim.inverses import (
    Inverse,
    dampings,
    from_state,
    inverses,
    precondition,
    to_state,
)
from neuromanifold.optim.quadratic import fisher_products
from neuromanifold.optim.schedules import Number, Schedule, at_step
from neuromanifold.optim.watch import (
    Observer,
    as_batch,
    in_training,
    is_data_parallel,
    own_parameters,
    undisturbed,
)
from neuromanifold.structures import Kronecker, Reducer, Source, Structure

__all__ = ["Preconditioner"]


class Preconditioner:
    """Moving average of a Fisher matrix over training, and `(F + damping)⁻¹` times gradients.

    The curvature is measured in a pass of its own, on the inputs that the model is called with in
    training: before the forward pass of a step for which a measurement is due, in training mode,
    with gradients enabled. Nothing of that pass is left when training goes on: no graph, no hooks,
    no gradients, no change of buffers or random number generators. It runs the original module,
    whatever it is compiled to, and normalises batches with their running statistics, because with
    those of the batch a Fisher information per sample does not exist.

    Args:
        model: that is trained; wrappers for compilation and data parallelism are seen through.
        likelihood: what its outputs mean.
        structure: what is kept of the matrix, anything additive, or `nm.EigenKronecker()`.
        estimator: which vectors go back; one sampled label per input by default.
        damping: added to the matrix, in nats/parameter²; a number, or a function of the step.
        relative: added too, in units of the mean eigenvalue of each block, so that it follows the
            scale of the loss and the layer; a number, or a function of the step.
        per: what the loss is a mean over, and the matrix with it: positions, as in losses of
            torch, or samples. Both are the same where a sample has one position.
        schedule: how often curvature is measured and inverted.
        decay: of earlier measurements at each new one, in [0, 1).
        fraction: of each batch that curvature is measured on, in (0, 1].
        split: whether Kronecker factors are damped one by one, which makes steps cheaper.
        params: names or patterns of the parameters that follow the curvature; all trainable ones
            that a layer rule reads, by default.
        forward: `forward(model, inputs)`, if the model is not called the usual way.
        observe: "automatic", or "explicit": only by `observe(outputs, targets)` or `measure(data)`.
        reducer: sums over processes, as `nm.distributed.sum_over_ranks` does, which is used where
            the model is, or later becomes, distributed data parallel.
        generator: source of sampled labels; one with a seed of its own by default.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model = torch.nn.Linear(4, 3)
        >>> pre = nm.optim.Preconditioner(model, nm.Categorical(), damping=0.1)
        >>> outputs = model(torch.randn(32, 4))  # measures
        >>> step = pre.precondition({"weight": torch.ones(3, 4), "bias": torch.ones(3)})
        >>> step["weight"].shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        structure: Structure | None = None,
        *,
        estimator: Estimator | None = None,
        damping: Number = 5e-4,
        relative: Number = 0.0,
        per: Literal["position", "sample"] = "position",
        schedule: Schedule | None = None,
        decay: float = 0.8,
        fraction: float = 1.0,
        split: bool = True,
        params: Iterable[str] | None = None,
        forward: Forward | None = None,
        observe: Literal["automatic", "explicit"] = "automatic",
        reducer: Reducer | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_damping(damping)
        _check(relative=relative, per=per, decay=decay, fraction=fraction, observe=observe)
        self.model = unwrap(model)
        self.likelihood = likelihood
        self.structure = Kronecker() if structure is None else structure
        self.estimator = MonteCarlo(1) if estimator is None else estimator
        self.damping = damping
        self.relative = relative
        self.per = per
        self.schedule = Schedule() if schedule is None else schedule
        self.decay = decay
        self.fraction = fraction
        self.split = split
        self.params = params if params is None or isinstance(params, str) else list(params)
        self.forward = forward
        self.reducer = reducer
        device = next(self.model.parameters()).device
        if generator is None:
            generator = torch.Generator(device)
            generator.manual_seed(int(torch.randint(2**62, ())))
        self.generator = generator
        self.step = 0
        """Optimizer steps done."""
        self.failed = 0
        """Measurements that held NaN or infinity and were left out."""
        self.seconds = 0.0
        """Spent on curvature."""
        self.damped: dict[str, float] = {}
        """What was added to the matrix in the last inversion, by parameter."""
        self._curvature = curvature_of(self.structure, dict(self.model.named_parameters()))
        self._measured: int | None = None
        self._inverted: int | None = None
        self._bypassed: set[str] = set()
        self._expected = frozenset(self._followers())
        self._trainable = _trainable(self.model)
        self._thawed: list[bool] | None = _thawed(self.model)
        self._blocks: list[Block] = []
        self._missed = False
        self._set_inverses([])
        self._last: Batch | None = None
        self._explicit = observe == "explicit"
        self._watch(model)

    # ---- what it sees ----------------------------------------------------------------------

    def _watch(self, model: nn.Module) -> None:
        self._watched = model
        self._hook = model.register_forward_pre_hook(Observer(self._called), with_kwargs=True)

    def _called(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model is about to be called."""
        if not in_training(self.model):
            return
        if self.reducer is None and is_data_parallel(self._watched):
            self.reducer = sum_over_ranks
        self._last = as_batch(self.model, args, kwargs)
        if not self._explicit and self.is_due:
            self.measure(self._last)

    @property
    def is_due(self) -> bool:
        """Whether a measurement is due in this step."""
        return self._missed or self._due()[0] or self._thawed != _thawed(self.model)

    @property
    def missed(self) -> bool:
        """Whether the last measurement was left out, because it held NaN or infinity."""
        return self._missed

    def _due(self) -> tuple[bool, bool]:
        return self.schedule.due(statistics=self._measured, inverses=self._inverted, step=self.step)

    def observe(self, outputs: Any, targets: Tensor | None = None) -> None:
        """Measure on the batch that the model was just called with, if a measurement is due.

        What targets say of ignored positions holds for the line along the step too.

        Args:
            outputs: what the model returned; a check that this is the batch.
            targets: for `nm.Empirical()`, or to mark ignored positions.

        Raises:
            ValueError: If the outputs are of another batch.
        """
        if self._last is None:
            return
        batch = self._last
        rows = len(self.likelihood.canonical(logits_of(outputs)))
        if rows != batch.num_samples:
            raise ValueError(
                f"The outputs have {rows} rows, but the model was last called with "
                f"{batch.num_samples} samples. Call observe right after outputs = model(inputs)."
            )
        if targets is not None:
            self._last = batch = replace(batch, targets=targets)
        if self.is_due:
            self.measure(batch)

    def measure(self, data: Any) -> None:
        """Measure now, on any data that `nm.fisher` takes, and invert if that is due.

        A measurement with NaN or infinity, or in which no position counts, is left out, counted in
        `failed`, and warned of.
        """
        started = time.perf_counter()
        try:
            with undisturbed(self.model):
                self._measure(data)
            self._missed = False
        except NonFiniteError as error:
            self.failed += 1
            self._missed = True
            warnings.warn(f"A measurement of curvature was left out: {error}", stacklevel=2)
        finally:
            self.seconds += time.perf_counter() - started

    def _measure(self, data: Any) -> None:
        trainable, self._thawed = _trainable(self.model), _thawed(self.model)
        if self._trainable != trainable:
            self._trainable, self._inverted = trainable, None
            self._expected = frozenset(self._followers())
        if not self._expected:  # all parameters follow AdamW
            self._blocks, self._measured = [], self.step
            self._set_inverses([])
            return
        with self._asked(data) as (_, source):
            if self.fraction < 1:
                batch, _ = source.data.peek()
                size = math.ceil(self.fraction * batch.num_samples)
                source.data = Data([batch.samples(0, size)])
            self._curvature.measure(source, self.decay)
            if source.plan.generic:
                self._leave_out(source.plan)
            self._blocks, self._measured = source.plan.blocks, self.step
            if self._due()[1]:
                self.invert()
            else:
                self._set_inverses(self._curvature.followed(self._inverses))

    def _asked(self, data: Any) -> AbstractContextManager[tuple[Structure, Source]]:
        return requested(
            self.model,
            self.likelihood,
            data,
            estimator=self.estimator,
            params=sorted(self._expected),
            per=self.per,
            forward=self.forward,
            uncovered="generic",
            reducer=self.reducer,
            generator=self.generator,
        )

    def _followers(self) -> list[str]:
        """Names of parameters that follow the curvature: those that a layer rule reads."""
        with undisturbed(self.model):
            found = plan(self.model, self.params, "generic")
        return [name for name in found.parameters if name not in {*found.generic, *self._bypassed}]

    def _leave_out(self, measured: Plan) -> None:
        """Parameters whose module is bypassed, as was seen just now, do not follow any more."""
        self._bypassed.update(measured.generic)
        self._expected -= measured.generic.keys()
        reasons = ", ".join(f"{name} ({why})" for name, why in measured.generic.items())
        warnings.warn(f"These parameters follow AdamW: {reasons}.", stacklevel=2)

    def invert(self) -> None:
        """Make the damped inverse of what was measured so far."""
        matrices = self._curvature.matrices(self._blocks)
        added = dampings(
            matrices, at_step(self.damping, self.step), at_step(self.relative, self.step)
        )
        self._set_inverses(inverses(matrices, added, split=self.split))
        self._curvature.inverted(matrices, added, self._inverses)
        self._inverted = self.step
        self.damped = {
            name: value
            for block, value in zip(self._blocks, torch.stack(added).tolist(), strict=True)
            for name in block.parameters
        }

    def measured(self) -> list[BlockMatrix]:
        """The average of the measurements so far, one matrix for each block."""
        return self._curvature.averages_of(self._blocks)

    @property
    def events(self) -> dict[str, int]:
        """How often what happened to the curvature, beside `failed`, by name."""
        return self._curvature.events

    def _set_inverses(self, found: list[Inverse]) -> None:
        self._inverses = found
        self._covered = frozenset(n for inverse in found for n in inverse.block.parameters)

    # ---- what it does ----------------------------------------------------------------------

    def expects(self, name: str) -> bool:
        """Whether a parameter follows the curvature, once it is measured."""
        return name in self._expected

    @property
    def covered(self) -> frozenset[str]:
        """Names of the parameters that there is an inverse for."""
        return self._covered

    @torch.no_grad()
    def precondition(self, gradients: Params) -> Params:
        """`(F + damping)⁻¹` times gradients; those of parameters without curvature are left out.

        Args:
            gradients: by name. Of a layer, one that is missing counts as zero.
        """
        found: Params = {}
        for inverse in self._inverses:
            names = inverse.block.parameters
            present = {name: gradients[name] for name in names if name in gradients}
            if present:
                missing = [name for name in names if name not in present]
                zeros = {name: torch.zeros_like(self.model.get_parameter(name)) for name in missing}
                moved = precondition(inverse, {**present, **zeros})
                found.update({name: moved[name] for name in present})
        return found

    def fisher_products(self, directions: Sequence[Params]) -> Tensor:
        """`(R, R)` inner products `d_iᵀ F d_j`, with the exact Fisher matrix of the last batch.

        Raises:
            CaptureError: If the model was not called in training mode since the last step.
        """
        if self._last is None:
            raise CaptureError(
                "The Fisher matrix along the step needs the batch that the model was called with "
                "in training mode, and there was none since the last step."
            )
        with undisturbed(self.model), self._asked(self._last) as (_, source):
            return fisher_products(source, source.plan, directions)

    def advance(self) -> None:
        """A step was done."""
        self.step += 1
        self._last = None

    # ---- state -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Averages by block, inverses, clocks and the state of the generator."""
        damping = self.damping.state_dict() if isinstance(self.damping, LevenbergMarquardt) else {}
        return {
            "step": self.step,
            "failed": self.failed,
            "seconds": self.seconds,
            "measured": self._measured,
            "inverted": self._inverted,
            "damped": self.damped,
            "trainable": self._trainable,
            "bypassed": sorted(self._bypassed),
            "blocks": [block.to_dict() for block in self._blocks],
            "generator": self.generator.get_state(),
            "damping": damping,
            "curvature": self._curvature.state_dict(),
            "inverses": [to_state(inverse) for inverse in self._inverses],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, for the same model, structure and `per`."""
        device = next(self.model.parameters()).device
        self._curvature.load_state_dict(state["curvature"], device)
        self._set_inverses([from_state(entry, device) for entry in state["inverses"]])
        self.step, self.failed, self.seconds = state["step"], state["failed"], state["seconds"]
        self._measured, self._inverted = state["measured"], state["inverted"]
        self.damped = dict(state["damped"])
        self.generator.set_state(state["generator"].cpu())
        if isinstance(self.damping, LevenbergMarquardt) and state["damping"]:
            self.damping.load_state_dict(state["damping"])
        self._trainable, self._bypassed = list(state["trainable"]), set(state["bypassed"])
        same = self._trainable == _trainable(self.model)
        self._thawed = _thawed(self.model) if same else None  # measured anew
        self._blocks = [Block.from_dict(entry) for entry in state["blocks"]]
        self._expected = frozenset(self._followers())

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_hook"} | {"_last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._watch(self._watched)

    def close(self) -> None:
        """Watch the model no longer."""
        self._hook.remove()


def _trainable(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def _thawed(model: nn.Module) -> list[bool]:
    """What changes when a parameter is frozen or thawed; looked at before each forward pass."""
    return [p.requires_grad for p in own_parameters(model)]


def _check(*, relative: Number, per: str, decay: float, fraction: float, observe: str) -> None:
    for name, value, valid, expected in (
        ("relative", relative, callable(relative) or relative >= 0, "at least 0, or a function"),
        ("per", per, per in ("position", "sample"), '"position" or "sample"'),
        ("decay", decay, 0 <= decay < 1, "in [0, 1)"),
        ("fraction", fraction, 0 < fraction <= 1, "in (0, 1]"),
        ("observe", observe, observe in ("automatic", "explicit"), '"automatic" or "explicit"'),
    ):
        if not valid:
            raise ValueError(f"{name} must be {expected}, got {value!r}.")
