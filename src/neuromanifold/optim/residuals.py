"""Natural gradients for residuals: equations that are to hold, as in physics-informed networks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from neuromanifold._typing import Params
from neuromanifold.errors import NonFiniteError
from neuromanifold.linalg import Layout, psd
from neuromanifold.optim.damping import LevenbergMarquardt, check_damping
from neuromanifold.optim.jacobian import (
    Closure,
    Jacobian,
    MixedRowsError,
    jacobian_by_passes,
    jacobian_by_rows,
)
from neuromanifold.optim.one_group import OneGroup
from neuromanifold.optim.schedules import Number, at_step

__all__ = ["GaussNewton"]

_LEAST = 1e4
"""Adaptive damping stays above this times the rounding of the Fisher matrix's trace."""
_MOST = 1e8
"""Nor does it rise above this where no step helps, as at the solution."""


class GaussNewton(OneGroup):
    """Exact natural gradient of `½ mean r²` for residuals r, with a search along each step.

    Under a Gaussian likelihood the Fisher matrix of N residuals with Jacobian J is `F = JᵀJ/N`.
    The step is

        δ = momentum · δ' − (F + damping)⁻¹ Jᵀ (r + momentum · J δ') / N

    with the last step δ' (SPRING: Goldshlager, Abrahamsen and Lin, arXiv 2401.10190), by a Cholesky
    factor of the smaller one of `J Jᵀ (N, N)` and `Jᵀ J (P, P)`. Then some lengths of it are tried,
    from lr downwards by halves; the best is kept, and a step that would increase the loss is not
    taken. Each try calls the closure.

    J costs a few backward passes where parameters are weights of linear layers, called by
    `nn.Linear` or `torch.nn.functional.linear`, each row of whose inputs enters one residual; a few
    other numbers, such as unknown coefficients of an equation, cost one pass each. All else costs
    one backward pass for each residual, and is warned of.

    Use float64: the residuals of a good solution are differences of large numbers.

    Args:
        params: of the model, and any other unknowns; one group.
        lr: the longest step that is tried; 1 is that of Gauss and Newton.
        momentum: weight of the last step, in [0, 1); for residuals that are drawn anew each step.
        damping: in nats/parameter², positive; a number, a function of the step, or, by default, one
            that begins at 1e-3, falls to a tenth where 1/4 or more of the longest step was best,
            and rises tenfold where 1/16 or less was (in the manner of Levenberg and Marquardt).
        tries: most lengths that are tried in a step; 0 takes the step as it is, unasked, which
            takes a damping that is given.
        maximize: not supported.
        differentiable: not supported.

    Attributes:
        loss: `½ mean r²` after the last step; NaN with `tries=0`.
        length: of the last step, in units of δ; 0 if it was not taken.

    Raises:
        ValueError: If a number makes no sense.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x, y = torch.nn.Linear(3, 1).double(), torch.randn(9, 3).double(), torch.ones(9)
        >>> opt = nm.optim.gram(model, damping=1e-9)
        >>> loss = opt.step(lambda: model(x)[:, 0] - y)  # ½ mean r² before the step
        >>> bool(opt.loss < loss)
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1.0,
        momentum: float = 0.0,
        damping: Number | None = None,
        tries: int = 10,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        if tries < 0 or (tries == 0 and damping is None):
            raise ValueError(
                f"tries must be at least 0, and at least 1 where no damping is given, got {tries}."
            )
        if isinstance(damping, LevenbergMarquardt):
            raise ValueError(
                "The damping of residuals follows the lengths of steps, not LevenbergMarquardt: "
                "leave it out, or give a number or a function of the step."
            )
        self._adaptive = damping is None
        damping = 1e-3 if damping is None else damping
        check_damping(damping)
        self.damping = damping
        self.tries = tries
        self.steps = 0
        self.loss = self.length = math.nan
        self._by_rows = True
        defaults = {"lr": lr, "momentum": momentum}
        super().__init__(params, defaults, maximize=maximize, differentiable=differentiable)

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        """One step.

        Args:
            closure: returns residuals `(N,)` with their graph, the same ones each time it is called
                in a step: draw random points outside of it. It needs no `zero_grad`.

        Returns:
            `½ mean r²` before the step, a scalar tensor; NaN if a residual is not finite.
        """
        params = self._trainable()
        layout = Layout({name: tuple(p.shape) for name, p in params.items()})
        try:
            jacobian = self._jacobian(closure, params, layout)
        except NonFiniteError:
            self.skipped += 1
            return next(iter(params.values())).new_full((), math.nan)
        before = _half_mean_square(jacobian.residuals)
        group = self.param_groups[0]
        last = layout.flatten({name: self._last_step(p) for name, p in params.items()})
        step, pushed = self._solve(jacobian, group["momentum"] * last)
        if not bool(torch.isfinite(step.sum())):
            self.skipped += 1
            return before
        if self.tries and float(jacobian.residuals @ pushed) >= 0:  # the last step leads uphill
            step, _ = self._solve(jacobian, torch.zeros_like(last))
        self._go(closure, float(before), params, layout.unflatten(step))
        self.steps += 1
        return before

    def _trainable(self) -> Params:
        params = self.param_groups[0]["params"]
        found = {str(i): p for i, p in enumerate(params) if p.requires_grad}
        if not found:
            raise ValueError("All parameters are frozen: there is nothing to solve for.")
        return found

    def _jacobian(self, closure: Closure, params: Params, layout: Layout) -> Jacobian:
        if self._by_rows:
            try:
                return jacobian_by_rows(closure, params, layout)
            except MixedRowsError as error:
                self._by_rows = False
                warnings.warn(
                    f"The Jacobian takes one backward pass for each residual, because {error}. It "
                    f"takes a few in all where parameters are weights of linear layers, and the "
                    f"model is called on one row of inputs for each residual, outside of "
                    f"torch.func.",
                    stacklevel=5,
                )
        return jacobian_by_passes(closure, params, layout)

    def _solve(self, jacobian: Jacobian, start: Tensor) -> tuple[Tensor, Tensor]:
        """The step `(P,)` from a start, and J times it `(N,)`."""
        matrix, n = jacobian.matrix, len(jacobian.residuals)
        target = jacobian.residuals + matrix @ start
        dual = n <= matrix.shape[1]
        gram = psd.second_moment((matrix.mT if dual else matrix)[None])[0] / n
        factor = self._factor(gram)
        if dual:
            found = matrix.mT @ torch.cholesky_solve(target[:, None], factor)[:, 0] / n
        else:
            found = torch.cholesky_solve((matrix.mT @ target)[:, None] / n, factor)[:, 0]
        step = start - found
        return step, matrix @ step

    def _factor(self, gram: Tensor) -> Tensor:
        """Cholesky factor of the damped matrix; adaptive damping stays where precision sees it."""
        if self._adaptive:
            rounding = torch.finfo(gram.dtype).eps * float(gram.diagonal().sum())
            self.damping = max(self._damping, _LEAST * rounding)
        return psd.cholesky(gram, self._damping)

    @property
    def _damping(self) -> float:
        return at_step(self.damping, self.steps)

    def _go(self, closure: Closure, before: float, params: Params, step: Params) -> None:
        """Along a step as far as is best, or nowhere; damping and memory follow."""
        longest = self.param_groups[0]["lr"]
        starts = {name: p.clone() for name, p in params.items()}

        def move(length: float) -> None:
            for name, p in params.items():
                p.copy_(starts[name])  # to the last bit, where nothing is added
                if length:
                    p.add_(step[name], alpha=length)

        def loss_at(length: float) -> float:
            move(length)
            with torch.enable_grad():
                residuals = closure().detach()
            loss = float(_half_mean_square(residuals))
            return loss if math.isfinite(loss) else math.inf

        length, loss = longest, math.nan
        if self.tries:
            try:
                tried = _tried(loss_at, before, longest, self.tries)
            except BaseException:
                move(0.0)
                raise
            length = min(tried, key=tried.__getitem__)
            loss = tried[length]
            if not loss < before:
                length, loss = 0.0, before
        move(length)
        part = length / longest if longest else 0.0
        for name, p in params.items():
            self.state[p]["last"] = part * step[name]
        if self._adaptive and longest:
            self.damping = min(self._damping * _change(part), _MOST)
        self.length, self.loss = length, loss

    def _own_state(self) -> dict[str, Any]:
        damping = self._damping if self._adaptive else None
        return {"steps": self.steps, "loss": self.loss, "length": self.length, "damping": damping}

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        self.steps, self.loss, self.length = state["steps"], state["loss"], state["length"]
        if self._adaptive and state["damping"] is not None:
            self.damping = state["damping"]

    def __getstate__(self) -> dict[str, Any]:
        names = ("damping", "tries", "steps", "skipped", "loss", "length", "_by_rows", "_adaptive")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}


def _tried(
    loss_at: Callable[[float], float], before: float, longest: float, tries: int
) -> dict[float, float]:
    """Losses by length, halved until the loss is below that before, and no lower any more."""
    tried: dict[float, float] = {}
    least = before
    for halvings in range(tries):
        loss = tried[longest / 2**halvings] = loss_at(longest / 2**halvings)
        if least < before and loss >= least:
            break
        least = min(least, loss)
    return tried


def _change(length: float) -> float:
    """Of adaptive damping, by the best length in units of the longest."""
    # Chosen among seven such rules on two Poisson problems: of the others, those that let damping
    # fall with shorter steps end in narrow valleys, those that ask for longer ones stay behind.
    return 0.1 if length >= 1 / 4 else 10.0 if length <= 1 / 16 else 1.0


def _half_mean_square(residuals: Tensor) -> Tensor:
    return residuals.square().mean() / 2
