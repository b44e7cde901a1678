"""What a natural-gradient optimizer sees while it trains, as numbers by name."""

from __future__ import annotations

import math
import time
from typing import Any, TypeAlias

import torch
from torch import Tensor

from neuromanifold._typing import Params
from neuromanifold._writing import writer
from neuromanifold.operators import BlockMatrix
from neuromanifold.optim.damping import LevenbergMarquardt
from neuromanifold.optim.exact import ExactNaturalGradient
from neuromanifold.optim.natural_gradient import NaturalGradient
from neuromanifold.optim.schedules import at_step

__all__ = ["Monitor", "scalars"]

Watched: TypeAlias = NaturalGradient | ExactNaturalGradient

ITERATIONS = 12
"""Of the power method: the eigenvalue is rarely off by more than a few percent then."""


def scalars(optimizer: Watched, moved: Params | None = None) -> dict[str, float]:
    """What the optimizer knows now.

    Copies from the device once; the eigenvalues cost as much as a dozen steps' products with the
    layers' matrices. `Monitor` does this every so many steps, and finds `moved` by itself.

    Args:
        optimizer: of any preset but `nm.optim.gram` for residuals.
        moved: by how much the last step moved parameters, by name.

    Returns:
        By name:

        * `damping`: nats/parameter².
        * `skipped`, `failed`: steps and measurements that were left out for NaN or infinity.
        * `curvature_seconds`: spent on measuring and inverting so far.
        * `renewed/rows`, `renewed/processes`, `renewed/residual`: of `projected_kfac` with
          inverses that follow each measurement, how often one was made anew between two inversions,
          because a measurement has so many rows that this is cheaper, or because some are in other
          processes, or because it was too far off.
        * `reduction_ratio`: of the loss over the predicted one, at the last comparison; if the
          damping adapts itself, once it did.
        * `trace/LAYER`, `top_eigenvalue/LAYER`: of the averaged Fisher matrix, nats/parameter²;
          the eigenvalue by a few power iterations, from below. Once measured.
        * `kl`: `½ δᵀ F δ` with that matrix for the step δ = `moved`, in nats per position (or
          sample), as `kl_max` is. If `moved` is given and something was measured.

        Of `nm.optim.gram` and `implicit`, which keep no matrix: `damping`, `skipped`, and `kl` of
        the last step, by the exact matrix of its batch.

    Raises:
        TypeError: If it is another kind of optimizer.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> opt = nm.optim.kfac(model, nm.Categorical(), damping=0.1)
        >>> model(torch.randn(32, 4)).sum().backward()
        >>> opt.step()
        >>> print(*sorted(scalars(opt)))
        curvature_seconds damping failed skipped top_eigenvalue/0 trace/0
    """
    if isinstance(optimizer, ExactNaturalGradient):
        return {
            "damping": at_step(optimizer.damping, optimizer.steps),
            "skipped": float(optimizer.skipped),
            "kl": optimizer.kl,
        }
    if isinstance(optimizer, NaturalGradient):
        return _of_averages(optimizer, moved)
    raise TypeError(
        f"These numbers are those of a natural-gradient optimizer, such as nm.optim.kfac "
        f"makes; got {type(optimizer).__name__}."
    )


def _of_averages(optimizer: NaturalGradient, moved: Params | None) -> dict[str, float]:
    pre = optimizer.preconditioner
    found = {
        "damping": at_step(pre.damping, pre.step),
        "skipped": float(optimizer.skipped),
        "failed": float(pre.failed),
        "curvature_seconds": pre.seconds,
        **{name: float(count) for name, count in pre.events.items()},
    }
    if isinstance(pre.damping, LevenbergMarquardt) and not math.isnan(pre.damping.ratio):
        found["reduction_ratio"] = pre.damping.ratio
    return found | _of_matrices(pre.measured(), moved)


@torch.no_grad()
def _of_matrices(matrices: list[BlockMatrix], moved: Params | None) -> dict[str, float]:
    if not matrices:
        return {}
    numbers: dict[str, Tensor] = {}
    kl = []
    for matrix in matrices:
        name = matrix.block.name or "(root)"
        diagonal = matrix.diagonal()
        numbers[f"trace/{name}"] = diagonal.sum()
        numbers[f"top_eigenvalue/{name}"] = _top_eigenvalue(matrix, diagonal)
        if moved is not None and all(part in moved for part in matrix.block.parameters):
            step = matrix.block.join(moved).to(diagonal.dtype)
            kl.append((step * matrix.matmul(step)).sum() / 2)
    if kl:
        numbers["kl"] = torch.stack(kl).sum()
    values = torch.stack([number.double() for number in numbers.values()]).tolist()
    return dict(zip(numbers, values, strict=True))


def _top_eigenvalue(matrix: BlockMatrix, diagonal: Tensor) -> Tensor:
    """Rayleigh quotient after a few power iterations; 0 for a zero matrix.

    The start has the size of the diagonal's root in each entry, and looks random without being so:
    fractional parts of multiples of the golden ratio. The plain root can be orthogonal to the top
    eigenvector, as it is for the logits of two classes.
    """
    count = torch.arange(1, diagonal.numel() + 1, dtype=torch.float64, device=diagonal.device)
    irregular = (count * (math.sqrt(5) - 1) / 2).frac() - 0.5
    x = diagonal.clamp(min=0).sqrt() * irregular.reshape(diagonal.shape).to(diagonal.dtype)
    x = x[None]  # (1, G, O, I)
    smallest = torch.finfo(diagonal.dtype).tiny
    for _ in range(ITERATIONS):
        x = matrix.matmul(x / x.norm().clamp(min=smallest))
    x = x / x.norm().clamp(min=smallest)
    return (x * matrix.matmul(x)).sum()


class Monitor:
    """Hands `scalars` to TensorBoard, or to any function, every few steps.

    In those steps it keeps a copy of the parameters to see how far they move. Numbers beside those
    of `scalars`:

    * `lr`: of the first group.
    * `curvature_share`: of the time since the last writing, what measuring and inverting curvature
      took, in [0, 1]; not of `nm.optim.gram`, which does it within the step.

    Args:
        optimizer: whose steps are watched, from now on.
        write: a `torch.utils.tensorboard.SummaryWriter`, a folder to write such events into, or a
            function `write(step, scalars)`.
        every: steps from one writing to the next; the first step is always written.
        prefix: of the names that TensorBoard shows.

    Raises:
        UnsupportedError: If a folder is given, and TensorBoard is not installed.
        TypeError: If `write` is nothing that can be written to.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x, y = torch.nn.Linear(4, 3), torch.randn(32, 4), torch.randint(3, (32,))
        >>> opt = nm.optim.kfac(model, nm.Categorical(), lr=0.1)
        >>> seen = {}
        >>> monitor = nm.optim.Monitor(opt, seen.__setitem__, every=2)
        >>> for _ in range(4):
        ...     opt.zero_grad()
        ...     torch.nn.functional.cross_entropy(model(x), y).backward()
        ...     opt.step()
        >>> list(seen), seen[4].get("kl") < 1
        ([1, 2, 4], True)
    """

    def __init__(
        self,
        optimizer: Watched,
        write: Any,
        *,
        every: int = 10,
        prefix: str = "fisher/",
    ) -> None:
        scalars(optimizer)  # refuses other kinds now
        if every < 1:
            raise ValueError(f"every is a number of steps, at least 1; got {every}.")
        self.optimizer = optimizer
        self.every = every
        self._write = writer(write, prefix)
        self.seconds = 0.0
        """Spent on watching."""
        self._before: Params = {}
        self._due = False
        self._restart()
        self._hooks = (
            optimizer.register_step_pre_hook(self._about_to_step),
            optimizer.register_step_post_hook(self._stepped),
        )

    def _restart(self) -> None:
        self._since = time.perf_counter(), self._spent

    @property
    def _spent(self) -> float | None:
        """Seconds on curvature; None if the optimizer does not say."""
        if isinstance(self.optimizer, NaturalGradient):
            return self.optimizer.preconditioner.seconds
        return None

    @property
    def _steps(self) -> int:
        """Done by the optimizer, also before it was watched."""
        if isinstance(self.optimizer, NaturalGradient):
            return self.optimizer.preconditioner.step
        return self.optimizer.steps

    def _about_to_step(self, *_: Any) -> None:
        step = self._steps + 1
        self._due = step == 1 or step % self.every == 0
        if self._due and isinstance(self.optimizer, NaturalGradient):
            began = time.perf_counter()
            model = self.optimizer.preconditioner.model
            self._before = {name: p.detach().clone() for name, p in model.named_parameters()}
            self.seconds += time.perf_counter() - began

    def _stepped(self, *_: Any) -> None:
        if not self._due:
            return
        now, (began, before) = time.perf_counter(), self._since
        found = {"lr": float(self.optimizer.param_groups[0]["lr"])}
        if before is not None and self._spent is not None:
            found["curvature_share"] = (self._spent - before) / (now - began)
        found |= scalars(self.optimizer, self._moved())
        self._write(self._steps, found)
        self.seconds += time.perf_counter() - now
        self._restart()

    def _moved(self) -> Params | None:
        """By how much parameters moved in this step."""
        if not isinstance(self.optimizer, NaturalGradient):
            return None
        before, self._before = self._before, {}
        model = self.optimizer.preconditioner.model
        return {name: p.detach() - before[name] for name, p in model.named_parameters()}

    def close(self) -> None:
        """Watch the optimizer no longer."""
        for hook in self._hooks:
            hook.remove()
