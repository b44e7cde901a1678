"""Wake-sleep algorithms for Helmholtz machines, with plain or natural gradients.

Sources: Hinton, Dayan, Frey and Neal (1995); Bornschein and Bengio (2015); Bornschein, Shabanian,
Fischer and Bengio (2016); natural gradients: Várady, Volpi, Malagò and Ay, Neural Networks 155
(2022), papers.md §5.3. There, importance weights of the wake pass multiplied rows of the sleep
pass, and were divided by their number twice. Here the rows of a Fisher matrix are samples of the
distribution that its expectation is over, and their weights sum to 1.
"""

from __future__ import annotations

import math
import sys
from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, get_args

import torch
from torch import Tensor

from neuromanifold.belief.machines import HelmholtzMachine
from neuromanifold.belief.networks import LayeredNetwork
from neuromanifold.belief.solves import Blocks, Rows, SolverSize, UnitSolver

__all__ = ["BidirectionalHelmholtz", "ReweightedWakeSleep", "WakeSleep"]

Number: TypeAlias = float | Callable[[int], float]
"""A constant, or a function of the number of steps done."""


class Training(ABC):
    """What the three algorithms share: wake pass, sleep pass, directions, and state.

    A step draws `samples` states of the hidden units from the recognition network q for each row
    of data (wake), the same number of states from the generative network p (sleep), and ascends

    * in p, the log joint probability of the wake states, with importance weights `(p/q)^power`;
    * in q, the log-probability of hidden units of the wake states, with the same weights minus
      their mean, and of the sleep states.

    With `natural=True` each unit's gradient is solved for with the Fisher matrix of the unit, since
    units do not interact (papers.md §5.2): `(1 + α) (F + αI)⁻¹ g`. Expectations are over sleep
    states for p, and over data and wake states for q.

    Args:
        machine: what is trained, in place.
        lr: learning rate, or a function from the number of steps done to it. Not with `optimizer`,
            which has its own.
        samples: K, of hidden units for each row of data.
        natural: whether to take natural gradients.
        damping: α, in nats per parameter²; 0 for pseudo-inverses, which few samples do not have.
        period: steps that the statistics of natural gradients are kept for.
        blocks: what is kept of each unit's Fisher matrix: "exact" is all of it; "shared" has one
            basis for all units of a layer, and each unit's own eigenvalues in it; "diagonal" is its
            diagonal. "auto" is exact from 4 rows per input on, and else shared, which is then no
            further from the natural gradient and much cheaper.
        rows: how many of a step's K N states the statistics are of; all by default.
        kl_max: the KL divergence that a step may change a network by, in nats, to leading order;
            longer steps are shortened, for p and q apart. For natural gradients with `lr`.
        generator: source of samples; one with a seed of its own by default.
        optimizer: over parameters of the machine; gets directions as gradients of a loss, in place
            of a step along them.

    Raises:
        ValueError: If an argument is out of range, or not one of `lr` and `optimizer` is given.
    """

    power: ClassVar[float]
    """Of the importance weights p/q."""
    wake_share: ClassVar[float]
    """Of the wake states in the gradient of q."""
    sleep_share: ClassVar[float]
    """Of the sleep states in the gradient of q."""

    def __init__(
        self,
        machine: HelmholtzMachine,
        lr: Number | None = None,
        samples: int = 10,
        *,
        natural: bool = True,
        damping: float = 0.1,
        period: int = 100,
        blocks: Blocks = "auto",
        rows: int | None = None,
        kl_max: float | None = None,
        generator: torch.Generator | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        if (lr is None) == (optimizer is None):
            raise ValueError(
                f"Give either lr or an optimizer, which has a learning rate of its own; got "
                f"lr={lr!r} and optimizer={optimizer!r}."
            )
        if samples < 1 or period < 1 or (rows is not None and rows < 1):
            raise ValueError(
                f"samples, period and rows are at least 1, got samples={samples}, period={period} "
                f"and rows={rows}."
            )
        if self.wake_share and samples < 2:
            raise ValueError(
                f"{type(self).__name__} compares the samples of a row with each other: give at "
                f"least 2, got samples={samples}."
            )
        if blocks not in get_args(Blocks):
            raise ValueError(f"blocks is one of {get_args(Blocks)}, got {blocks!r}.")
        if not damping >= 0:
            raise ValueError(f"damping must be >= 0 nats/parameter², got {damping}.")
        if kl_max is not None and (not kl_max > 0 or not natural or lr is None):
            raise ValueError(
                f"kl_max is > 0 nats, for natural=True and steps of length lr; got "
                f"kl_max={kl_max}, natural={natural}, lr={lr!r}."
            )
        if generator is None:
            generator = torch.Generator(machine.generative.device)
            generator.manual_seed(int(torch.randint(2**62, ())))
        self.machine = machine
        self.lr = lr
        self.samples = samples
        self.natural = natural
        self.damping = damping
        self.period = period
        self.blocks: Blocks = blocks
        self.rows = rows
        self.kl_max = kl_max
        self.generator = generator
        self.optimizer = optimizer
        self.steps = 0
        self._nets = {"generative": machine.generative, "recognition": machine.recognition}
        self._frozen: dict[str, dict[int, _Frozen]] = {name: {} for name in self._nets}

    def step(self, v: Tensor) -> dict[str, Tensor]:
        """Change both networks a little, to the good of this batch.

        Args:
            v: visible values `(N, n_v)`, coded as the machine's.

        Returns:
            Scalars, before the step: `log_weight`, the mean of `log p(v, h) − log q(h | v)`, nats;
            `log_likelihood`, the estimate of `log p(v)` from these samples, nats, too low on
            average (for `BidirectionalHelmholtz`, that of its own objective); `ess`, how many of
            the samples count. Of natural steps without an optimizer also `kl_generative` and
            `kl_recognition`, what the step changes the networks by, nats, to leading order in the
            metric of the frozen statistics. All stay on the device.

        Raises:
            ValueError: If the values have another shape.
        """
        p = self.machine.generative
        if v.ndim != 2 or v.shape[1] != p.sizes[-1] or not len(v):
            raise ValueError(
                f"A batch has the shape (N, {p.sizes[-1]}) with N >= 1, got {tuple(v.shape)}."
            )
        with torch.no_grad():
            return self._step(v.to(p.device, p.dtype))

    def _step(self, v: Tensor) -> dict[str, Tensor]:
        p, q = self._nets["generative"], self._nets["recognition"]
        num, refresh = self.samples * len(v), self.natural and self.steps % self.period == 0
        hidden: list[Tensor | None] = [None] * (len(p.sizes) - 1)

        tiled = v.repeat(self.samples, 1)  # sample-major, (K N, n_v)
        wake_q = _Pass.run(q, [*hidden, tiled], num, self.generator, distinct=len(v))
        wake_p = _Pass.run(p, list(wake_q.layers), num)
        log_weights = (wake_p.log_prob() - wake_q.log_prob()).view(self.samples, -1)  # (K, N)
        weights = (self.power * log_weights).softmax(0)
        ascents = {"generative": [(wake_p, weights.flatten() / len(v))]}
        ascents["recognition"] = []
        if self.wake_share:
            # Samples of q have score 0 on average: the mean weight brings nothing but noise.
            baselined = (weights - 1 / self.samples) * (self.wake_share / len(v))
            ascents["recognition"].append((wake_q, baselined.flatten()))

        if self.sleep_share or refresh:
            sleep_p = _Pass.run(p, [*hidden, None], num, self.generator)
            if self.sleep_share:
                sleep_q = _Pass.run(q, list(sleep_p.layers), num)
                share = weights.new_full((num,), self.sleep_share / num)
                ascents["recognition"].append((sleep_q, share))
            if refresh:
                for name, states in (("generative", sleep_p), ("recognition", wake_q)):
                    self._frozen[name] = {}  # gone before the new ones are made: half the memory
                    self._frozen[name] = {
                        layer: self._freeze(states.fisher_rows(layer, self.rows))
                        for layer in states.net.modelled
                    }

        found = self._scalars(log_weights, weights)
        for name, passes in ascents.items():
            kl = self._ascend(name, passes)
            if kl is not None:
                found[f"kl_{name}"] = kl
        if self.optimizer is not None:
            self.optimizer.step()
        self.steps += 1
        return found

    def _scalars(self, log_weights: Tensor, weights: Tensor) -> dict[str, Tensor]:
        power = self.power or 1.0
        mean = (power * log_weights).logsumexp(0) - math.log(self.samples)
        return {
            "log_weight": log_weights.mean(),
            "log_likelihood": mean.mean() / power,
            "ess": weights.square().sum(0).reciprocal().mean(),
        }

    def _ascend(self, name: str, passes: list[tuple[_Pass, Tensor]]) -> Tensor | None:
        """Step along the direction of one network, or hand it to the optimizer; KL of the step."""
        net = self._nets[name]
        directions, squared = {}, []
        for layer in net.modelled:
            parts = [one.gradient(layer, weights) for one, weights in passes]
            gradient = parts[0] if len(parts) == 1 else parts[0] + parts[1]
            if self.natural:
                solver = self._frozen[name][layer].solver
                directions[layer] = solver.solve(gradient)
                if self.optimizer is None:
                    squared.append(solver.squared_length(gradient, directions[layer]))
            else:
                directions[layer] = gradient
        if self.optimizer is not None:
            for key, part in _split(net, directions):
                net.get_parameter(key).grad = -part
            return None
        assert self.lr is not None
        lr = float(self.lr(self.steps) if callable(self.lr) else self.lr)
        kl = torch.stack(squared).sum() * (lr**2 / 2) if squared else None
        if kl is not None and self.kl_max is not None:
            shorter = (self.kl_max / kl).clamp(max=1)
            kl = kl * shorter
            directions = {layer: d * shorter.sqrt() for layer, d in directions.items()}
        for key, part in _split(net, directions):
            net.get_parameter(key).add_(part, alpha=lr)
        return kl

    def _freeze(self, rows: Rows) -> _Frozen:
        return _Frozen(rows, rows.solver(damping=self.damping, blocks=self.blocks))

    def statistics_bytes(self, batch_size: int) -> int:
        """Memory that frozen statistics will take for batches of this size, before any is made.

        Example:
            >>> machine = HelmholtzMachine([10, 20, 30])
            >>> WakeSleep(machine, lr=0.1).statistics_bytes(32)
            251852
        """
        if not self.natural:
            return 0
        numbers, most = 0, self.rows or sys.maxsize
        for net in self._nets.values():
            for layer in net.modelled:
                repeats = 1 if _sees_data_alone(net, layer) else self.samples
                num = min(repeats * batch_size, most)
                inputs = 1 + sum(net.sizes[parent] for parent in net.parents[layer])
                classes = net.units[layer].group(net.sizes[layer])
                size = SolverSize(num, inputs, net.sizes[layer] // classes, classes)
                numbers += num * (inputs + net.sizes[layer] * classes)
                numbers += size.numbers(damping=self.damping, blocks=self.blocks)
        return numbers * self.machine.generative.dtype.itemsize

    def state_dict(self) -> dict[str, Any]:
        """All that resuming takes, bit for bit, but the parameters of the machine.

        Inverses are made again from their rows, which are much smaller.
        """
        return {
            "steps": self.steps,
            "generator": self.generator.get_state(),
            "rows": {
                name: {
                    str(layer): {"inputs": one.rows.inputs, "curvature": one.rows.curvature}
                    for layer, one in frozen.items()
                }
                for name, frozen in self._frozen.items()
            },
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; load the machine's own first.

        Raises:
            ValueError: If only one of the state and this object has an optimizer.
        """
        if (state["optimizer"] is None) != (self.optimizer is None):
            raise ValueError(
                "The state was saved with an optimizer or without one, and this object is the "
                "other way. Build it with the same arguments."
            )
        self.steps = state["steps"]
        self.generator.set_state(state["generator"].cpu())
        for name, net in self._nets.items():
            self._frozen[name] = {
                int(layer): self._freeze(
                    Rows(**{key: value.to(net.device) for key, value in rows.items()})
                )
                for layer, rows in state["rows"][name].items()
            }
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])


class WakeSleep(Training):
    """Wake-sleep: p learns from wake states of equal weight, q from sleep states.

    Arguments are those of `Training`. With natural gradients this is natural wake-sleep.

    Example:
        >>> from neuromanifold.belief.datasets import lines
        >>> generator = torch.Generator().manual_seed(0)
        >>> machine = HelmholtzMachine([1, 6, 9], generator=generator)
        >>> training = WakeSleep(machine, lr=0.1, damping=0.1, generator=generator)
        >>> sorted(training.step(lines().draw(32, generator=generator)))
        ['ess', 'kl_generative', 'kl_recognition', 'log_likelihood', 'log_weight']
    """

    power = 0.0
    wake_share = 0.0
    sleep_share = 1.0


class ReweightedWakeSleep(Training):
    """Reweighted wake-sleep: wake states have importance weights, and q learns from both passes.

    Arguments are those of `Training`. With natural gradients this is natural reweighted wake-sleep.

    Example:
        >>> from neuromanifold.belief.datasets import lines
        >>> generator = torch.Generator().manual_seed(0)
        >>> machine = HelmholtzMachine([1, 6, 9], generator=generator)
        >>> training = ReweightedWakeSleep(machine, lr=0.3, damping=0.1, generator=generator)
        >>> data = lines()
        >>> def kl():
        ...     return data.kl(machine.generative.exact_log_likelihood(data.states))
        >>> before = kl()
        >>> for _ in range(100):
        ...     scalars = training.step(data.draw(32, generator=generator))
        >>> bool(kl() < before / 2)
        True
    """

    power = 1.0
    wake_share = 0.5
    sleep_share = 0.5


class BidirectionalHelmholtz(Training):
    """Bidirectional Helmholtz machine: weights `(p/q)^½`, and no sleep states in the gradients.

    The objective is `log p*(v) = 2 log Σ_h √(p(v, h) q(h | v))` up to its normaliser, a lower bound
    of log p(v). Arguments are those of `Training`.

    Example:
        >>> machine = HelmholtzMachine([2, 6, 9])
        >>> training = BidirectionalHelmholtz(machine, lr=lambda step: 0.1 / (1 + step / 1000))
        >>> float(training.step(torch.zeros(8, 9))["ess"]) <= 10
        True
    """

    power = 0.5
    wake_share = 1.0
    sleep_share = 0.0


@dataclass(frozen=True)
class _Frozen:
    """The rows that the statistics of a layer are of, and what solves with them."""

    rows: Rows
    solver: UnitSolver


@dataclass(frozen=True)
class _Pass:
    """Values of all layers, and the logits that a network has for those that it models."""

    net: LayeredNetwork
    layers: list[Tensor]
    logits: dict[int, Tensor]
    distinct: int
    """Rows of the last layer that are not copies of earlier ones."""

    @classmethod
    def run(
        cls,
        net: LayeredNetwork,
        layers: list[Tensor | None],
        num: int,
        generator: torch.Generator | None = None,
        *,
        distinct: int | None = None,
    ) -> _Pass:
        """Evaluate a network, drawing layers that have no values yet."""
        logits = {}
        for layer in net.parents:
            logits[layer] = net.logits(layers, layer).expand(num, -1)
            if layers[layer] is None:
                layers[layer] = net.units[layer].sample(logits[layer], generator)
        found = [values for values in layers if values is not None]
        return cls(net, found, logits, distinct or num)

    def log_prob(self) -> Tensor:
        """Of all layers that are modelled, nats, `(num,)`."""
        parts = [
            self.net.units[layer].log_prob(logits, self.layers[layer])
            for layer, logits in self.logits.items()
        ]
        return torch.stack(parts).sum(0)

    def gradient(self, layer: int, weights: Tensor) -> Tensor:
        """Of the weighted sum of log-probabilities, for the joint weights of a layer, `(O, I)`."""
        score = self.net.units[layer].score(self.logits[layer], self.layers[layer])
        return (score * weights[:, None]).mT @ self.net.inputs(self.layers, layer)

    def fisher_rows(self, layer: int, most: int | None) -> Rows:
        """Of equal weight. Samples of the same data come last, so that the first differ most."""
        if _sees_data_alone(self.net, layer):
            most = min(self.distinct, most or self.distinct)
        covariance = self.net.units[layer].covariance(self.logits[layer][:most])
        inputs = self.net.inputs([values[:most] for values in self.layers], layer)
        return Rows(inputs, covariance / len(covariance))


def _sees_data_alone(net: LayeredNetwork, layer: int) -> bool:
    """Whether rows of a layer's statistics repeat with those of the visible values."""
    return net.parents[layer] == (len(net.sizes) - 1,)


def _split(net: LayeredNetwork, matrices: dict[int, Tensor]) -> list[tuple[str, Tensor]]:
    """By name of the parameter."""
    return [item for layer, matrix in matrices.items() for item in net.split(layer, matrix).items()]
