"""An optimizer whose steps are natural gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neuromanifold._typing import Params
from neuromanifold.errors import CaptureError, listed
from neuromanifold.optim.adamw import adamw_step
from neuromanifold.optim.damping import LevenbergMarquardt
from neuromanifold.optim.preconditioner import Preconditioner
from neuromanifold.optim.quadratic import Quadratic

__all__ = ["NaturalGradient"]

Group = dict[str, Any]
Step = tuple[Tensor, Tensor]
"""A direction, and a number to multiply it by."""
Steps = dict[str, Step]

CURVATURE = "preconditioner"
"""Key of a state dict."""

_TINY = 1e-30


class NaturalGradient(torch.optim.Optimizer):
    """Steps along `(F + damping)⁻¹ g`, limited in the change of the model's distributions.

    With the natural gradient d, a step is `lr · d`. Where `½ dᵀ F d`, the KL divergence in nats per
    position that all of d would bring about, is over `kl_max`, d is shortened to that; a step then
    changes the distributions by `lr² · kl_max` at most. Momentum is the weighted mean of the
    directions of earlier steps, so that it obeys the same limit. Weight decay shrinks weights by
    `lr · weight_decay`, apart from the direction.

    Parameters that no layer rule reads, and those of groups with `curvature=False`, follow AdamW
    with `adamw_lr`, scaled as the schedule scales `lr`.

    A step with NaN or infinity in its gradients leaves weights, momentum and clocks as they are,
    and is counted in `skipped`; nothing is copied from the device to find that out.

    Args:
        params: of the model, as for any torch optimizer.
        preconditioner: holds the curvature.
        lr: of all of d; 1 is a Newton step.
        momentum: weight of earlier directions, in [0, 1).
        weight_decay: per unit of lr.
        kl_max: nats per position (or per sample, as the preconditioner's `per` says); None for no
            limit.
        adamw_lr: learning rate of parameters that follow AdamW, while lr is what it was at first.
        line: choose the lengths of d and of the last step that minimise the quadratic model of the
            loss, with the exact Fisher matrix of the batch, instead of lr and momentum. Two
            forward-mode passes.
        maximize: go uphill.
        differentiable: not supported.

    Raises:
        ValueError: If a number makes no sense, or a parameter is not of the model.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x, y = torch.nn.Linear(4, 3), torch.randn(32, 4), torch.randint(3, (32,))
        >>> pre = nm.optim.Preconditioner(model, nm.Categorical(), damping=0.1)
        >>> opt = nm.optim.NaturalGradient(model.parameters(), pre, lr=0.5)
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
        params: Iterable[Any],
        preconditioner: Preconditioner,
        *,
        lr: float = 0.15,
        momentum: float = 0.5,
        weight_decay: float = 0.0,
        kl_max: float | None = 1.0,
        adamw_lr: float = 1e-3,
        line: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        if differentiable:
            raise ValueError(
                "differentiable=True is not supported: the curvature is measured apart from the "
                "graph of the loss. Leave it out."
            )
        self.preconditioner = preconditioner
        self._names: dict[Tensor, str] = {}
        self.line = line
        self._skipped: Tensor | int = 0
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "kl_max": kl_max,
            "adamw_lr": adamw_lr,
            "maximize": maximize,
            "curvature": True,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; options that are left out have the values the optimizer was made with."""
        super().add_param_group(param_group)
        # Anew, because the model may have more layers now.
        self._names = {p: name for name, p in self.preconditioner.model.named_parameters()}
        group = self.param_groups[-1]
        try:
            self._check(group)
        except ValueError:
            self.param_groups.pop()
            raise
        group.setdefault("base_lr", group["lr"])

    def _check(self, group: Group) -> None:
        for name, valid, expected in (
            ("lr", group["lr"] >= 0, "at least 0"),
            ("momentum", 0 <= group["momentum"] < 1, "in [0, 1)"),
            ("weight_decay", group["weight_decay"] >= 0, "at least 0"),
            ("adamw_lr", group["adamw_lr"] >= 0, "at least 0"),
            ("kl_max", group["kl_max"] is None or group["kl_max"] > 0, "positive, or None"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {expected}, got {group[name]!r}.")
        foreign = sum(p not in self._names for p in group["params"])
        if foreign:
            raise ValueError(
                f"{foreign} of the {len(group['params'])} parameters are not of the model that the "
                f"preconditioner watches. Make the optimizer from model.parameters(), after the "
                f"model has all its layers."
            )

    @property
    def skipped(self) -> int:
        """Steps that were left out, because a gradient or the curvature held NaN or infinity."""
        return int(self._skipped)

    # ---- the step --------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: evaluates the loss again with gradients, and returns it.

        Raises:
            CaptureError: If a gradient has come but no curvature was measured.
            ValueError: If the damping adapts itself and there is no closure.
        """
        pre, damping = self.preconditioner, self.preconditioner.damping
        adapts = isinstance(damping, LevenbergMarquardt) and damping.is_due(pre.step)
        loss = None if closure is None else _evaluated(closure)
        if adapts and closure is None:
            raise ValueError(
                "Damping that adapts itself compares losses: pass optimizer.step(closure), where "
                "closure() sets the gradients to zero, calls backward() and returns the loss; or "
                "give damping a number."
            )
        gradients = self._gradients()
        natural, other, ready = self._shared_out(gradients)
        directions = pre.precondition(natural)
        inner = self._inner(natural, directions)
        fine = torch.isfinite(inner) & ready
        if other:
            norms = torch._foreach_norm(list(other.values()))
            fine = fine & torch.isfinite(torch.stack([norm.float() for norm in norms]).sum())
        self._skipped = self._skipped + (~fine).long()
        # A look at the processor's own memory costs nothing, and who asks for the quadratic model
        # waits for the device anyway.
        looks = fine.device.type == "cpu" or self.line or adapts
        if not looks or bool(fine):
            if not looks:
                directions = {name: torch.where(fine, d, 0) for name, d in directions.items()}
            steps = self._steps(natural, directions, inner, fine)
            predicted = self._predicted(natural, steps) if adapts else 0.0
            for group in self.param_groups:
                self._move(group, steps, fine)
                self._follow_adamw(group, other, fine)
            if adapts:
                self._adapt(closure, loss, predicted)
        pre.advance()
        return loss

    def _gradients(self) -> Params:
        found = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or not p.requires_grad:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(
                        f"The gradient of {self._names[p]!r} is sparse, which natural gradients "
                        f"do not take. Make the embedding with sparse=False."
                    )
                found[self._names[p]] = -p.grad if group["maximize"] else p.grad
        return found

    def _shared_out(self, gradients: Params) -> tuple[Params, Params, bool]:
        """Gradients that follow the curvature, all others, and whether there is a step to take."""
        pre = self.preconditioner
        without = {
            self._names[p]
            for group in self.param_groups
            if not group["curvature"]
            for p in group["params"]
        }
        other = {n: g for n, g in gradients.items() if n in without or not pre.expects(n)}
        natural = {n: g for n, g in gradients.items() if n not in other} if other else gradients
        missing = [name for name in natural if name not in pre.covered]
        # Some checkpointing tools take a step with zero gradients to fill the state.
        if missing and not pre.missed and any(bool(natural[name].any()) for name in missing):
            raise CaptureError(
                f"There are gradients of {listed(missing)}, but no curvature was measured for "
                f"them. It is measured when the model is called in training mode (model.train()) "
                f"with gradients enabled, before loss.backward(). If you call parts of the model, "
                f"or a compiled model that had run before, make the optimizer of what you call; "
                f"or measure by optimizer.preconditioner.measure(data)."
            )
        if not missing:
            return natural, other, True
        return {n: g for n, g in natural.items() if n in pre.covered}, other, not pre.missed

    def _inner(self, gradients: Params, directions: Params) -> Tensor:
        """`gᵀ d`, a scalar tensor."""
        if not directions:
            return torch.zeros((), device=self.param_groups[0]["params"][0].device)
        products = torch._foreach_mul(
            [gradients[name] for name in directions], [*directions.values()]
        )
        sums = [product.sum(dtype=_wide(product)) for product in products]
        return torch.stack(sums).sum()

    def _shortened(self, group: Group, inner: Tensor) -> Tensor:
        """What the natural gradient is multiplied by to stay inside the trust region.

        `dᵀ g = dᵀ (F + damping) d` is `dᵀ F d` at least.
        """
        if group["kl_max"] is None:
            return torch.ones_like(inner)
        limit = 2 * group["kl_max"]
        return (limit / inner.clamp(min=_TINY)).sqrt().clamp(max=1)

    def _steps(self, gradients: Params, directions: Params, inner: Tensor, fine: Tensor) -> Steps:
        """By how much each parameter is moved."""
        if self.line and directions:
            return self._minimising(gradients, directions)
        steps: Steps = {}
        for group in self.param_groups:
            named = {self._names[p]: p for p in group["params"] if self._names[p] in directions}
            if named:
                shortened = torch.where(fine, self._shortened(group, inner), 0)
                fresh = [directions[name] for name in named]
                averaged = self._averaged(group, list(named.values()), fresh, shortened, fine)
                steps.update(zip(named, averaged, strict=True))
        return steps

    def _minimising(self, gradients: Params, directions: Params) -> Steps:
        """The step that minimises the quadratic model in the span of this and the last direction.

        Source: Martens and Grosse, arXiv 1503.05671, §7.
        """
        named = {self._names[p]: p for p in self._names if self._names[p] in directions}
        fresh = {name: directions[name] for name in named}
        last = {name: self.state[p].get("direction") for name, p in named.items()}
        span = [fresh]
        if all(value is not None for value in last.values()):
            span.append({name: value for name, value in last.items() if value is not None})
        quadratic = self._quadratic({name: gradients[name] for name in named}, span)
        coefficients = quadratic.minimum(self.param_groups[0]["kl_max"])
        steps = {}
        for name, p in named.items():
            parts = [c * direction[name] for c, direction in zip(coefficients, span, strict=True)]
            self.state[p]["direction"] = step = torch.stack(parts).sum(dim=0).to(p.dtype)
            steps[name] = step, torch.ones_like(coefficients[0])
        return steps

    def _averaged(
        self,
        group: Group,
        params: list[Tensor],
        directions: list[Tensor],
        shortened: Tensor,
        fine: Tensor,
    ) -> list[Step]:
        """`−lr` times the weighted mean of these shortened directions and of earlier ones."""
        taken = fine.to(shortened)
        lr, momentum = group["lr"], group["momentum"]
        if momentum == 0:
            return [(direction, -lr * taken * shortened) for direction in directions]
        states = [self.state[p] for p in params]
        for state, p in zip(states, params, strict=True):
            if "direction" not in state:
                state["direction"] = torch.zeros_like(p)
                state["weight"] = torch.zeros((), device=p.device, dtype=_wide(p))
        means = [state["direction"] for state in states]
        weights = [state["weight"] for state in states]
        # The weights of t directions sum to 1 − momentumᵗ.
        fresh = (1 - momentum) * taken
        torch._foreach_mul_(means, 1 - fresh)
        torch._foreach_addcmul_(means, directions, [fresh * shortened] * len(means))
        torch._foreach_mul_(weights, 1 - fresh)
        torch._foreach_add_(weights, fresh)
        lengths = torch._foreach_clamp_min(weights, _TINY)
        torch._foreach_reciprocal_(lengths)
        torch._foreach_mul_(lengths, -lr * taken)
        return list(zip(means, lengths, strict=True))

    def _move(self, group: Group, steps: Steps, fine: Tensor) -> None:
        params = [p for p in group["params"] if self._names[p] in steps]
        if not params:
            return
        if group["weight_decay"]:
            decayed = group["lr"] * group["weight_decay"] * fine.to(_wide(params[0]))
            torch._foreach_mul_(params, 1 - decayed)
        directions, lengths = zip(*(steps[self._names[p]] for p in params), strict=True)
        torch._foreach_addcmul_(params, directions, lengths)

    def _follow_adamw(self, group: Group, gradients: Params, fine: Tensor) -> None:
        params = [p for p in group["params"] if self._names[p] in gradients]
        if params:
            ratio = group["lr"] / group["base_lr"] if group["base_lr"] else 1.0
            adamw_step(
                params,
                [gradients[self._names[p]] for p in params],
                [self.state[p] for p in params],
                lr=group["adamw_lr"] * ratio,
                weight_decay=group["weight_decay"],
                fine=fine,
            )

    def _quadratic(self, gradients: Params, directions: Sequence[Params]) -> Quadratic:
        """The loss along some directions, to second order, with the damping at the inversion."""
        pre = self.preconditioner
        rows = torch.stack([_flat(direction) for direction in directions])
        damped = [
            {name: value * pre.damped[name] for name, value in direction.items()}
            for direction in directions
        ]
        added = rows @ torch.stack([_flat(direction) for direction in damped]).T
        curvatures = pre.fisher_products(directions).to(rows) + added
        slopes = rows @ _flat({name: gradients[name] for name in directions[0]})
        return Quadratic(slopes, curvatures)

    def _predicted(self, gradients: Params, steps: Steps) -> float:
        """By how much the loss should fall."""
        whole = {name: length * direction for name, (direction, length) in steps.items()}
        quadratic = self._quadratic(gradients, [whole])
        return -float(quadratic(torch.ones_like(quadratic.slopes)))

    def _adapt(self, closure: Callable[[], Any] | None, loss: Any, predicted: float) -> None:
        damping = self.preconditioner.damping
        assert isinstance(damping, LevenbergMarquardt)
        assert closure is not None
        before = damping.value
        reduction = float(loss) - float(_evaluated(closure))
        damping.compare(reduction=reduction, predicted=predicted)
        if damping.value != before:
            self.preconditioner.invert()

    # ---- state -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """That of any optimizer, and of the preconditioner by name; plain tensors and numbers."""
        own = {"preconditioner": self.preconditioner.state_dict(), "skipped": self.skipped}
        return {**super().state_dict(), CURVATURE: own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`: training goes on as if it had not stopped.

        Without the preconditioner's part, which some checkpointing tools leave out, the curvature
        is measured anew.
        """
        super().load_state_dict({k: v for k, v in state_dict.items() if k != CURVATURE})
        self._restore_weights(state_dict)
        own = state_dict.get(CURVATURE)
        if own is None:
            warnings.warn(
                "The state dict holds no curvature: it is measured anew, from the next step on.",
                stacklevel=2,
            )
            return
        self.preconditioner.load_state_dict(own["preconditioner"])
        self._skipped = own["skipped"]

    def _restore_weights(self, state_dict: Mapping[str, Any]) -> None:
        """In their own precision: torch has cast them to that of the parameters."""
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        present = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, present, strict=True):
            weight = state_dict["state"].get(index, {}).get("weight")
            if weight is not None:
                self.state[p]["weight"] = weight.to(p.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        own = {"preconditioner": self.preconditioner, "_names": self._names, "line": self.line}
        return {**super().__getstate__(), **own, "_skipped": self.skipped}


def _evaluated(closure: Callable[[], Any]) -> Any:
    with torch.enable_grad():
        return closure()


def _flat(params: Params) -> Tensor:
    flat = torch.cat([value.flatten() for value in params.values()])
    return flat.to(_wide(flat))


def _wide(tensor: Tensor) -> torch.dtype:
    """Of numbers that are kept or summed: float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)
