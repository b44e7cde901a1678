"""Is a network where the theory of random networks wants it? Predictions next to measurements."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuromanifold._estimate import plain
from neuromanifold._fisher import fisher
from neuromanifold.capture import Data
from neuromanifold.errors import UnsupportedError
from neuromanifold.estimators import Estimator, Exact
from neuromanifold.likelihoods import Gaussian, Likelihood
from neuromanifold.meanfield.kernels import Kernel, kernel
from neuromanifold.meanfield.observation import (
    FoundLayer,
    Signals,
    found_layers,
    measured_signals,
    trainable,
)
from neuromanifold.meanfield.phases import edge_of_chaos, fixed_point
from neuromanifold.meanfield.recursions import Propagation, propagate
from neuromanifold.meanfield.statistics import SpectrumStatistics, spectrum_statistics
from neuromanifold.structures import Gram

__all__ = ["Check", "Compared", "LayerCheck", "Recommended", "check"]

TOLERATED = 1.0
"""Nats by which squared gradients may grow or shrink over all of the depth at the edge of chaos."""

LEFT = 0.1
"""Signals are alike when this part of `1 - correlation` is left, faded when it is of activity."""

FAR = 100
"""How many layers the fate of signals is followed."""


@dataclass(frozen=True)
class Compared:
    """One number, from theory and from the model.

    Attributes:
        predicted: by the theory, from the variances and the data.
        measured: on the model.
    """

    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured if self.measured else math.nan


@dataclass(frozen=True)
class LayerCheck:
    """A layer.

    Attributes:
        name: of the module.
        activation: behind it.
        fan_in: inputs of a unit.
        fan_out: units, or channels.
        weight_variance: `fan_in · mean(W²)`.
        bias_variance: `mean(b²)`.
        activity: mean square of its inputs.
        correlation: of the inputs of two samples, the mean over pairs; NaN for one sample.
        error: squared derivative of an output by its pre-activations, their sum.
        gain: by which squared errors grow from the layer above to this one; NaN for the last.
    """

    name: str
    activation: str
    fan_in: int
    fan_out: int
    weight_variance: float
    bias_variance: float
    activity: Compared
    correlation: Compared
    error: Compared
    gain: Compared


@dataclass(frozen=True)
class Recommended:
    """An initialisation at the edge of chaos, and the step that it allows.

    Attributes:
        weight_variance: times the fan-in: `nn.init.normal_(weight, std=(v / fan_in) ** 0.5)`.
        bias_variance: of the biases.
        learning_rate_bound: predicted 2/λ_max on these data.
    """

    weight_variance: float
    bias_variance: float
    learning_rate_bound: float


@dataclass(frozen=True)
class Check:
    """Where a network is, by the theory of random networks.

    Attributes:
        layers: predicted and measured, in the order of use.
        predicted: statistics of the Fisher spectrum.
        measured: the same, of the layers' parameters.
        phase: "ordered", "edge of chaos", "chaotic"; "no hidden layer".
        gain: χ at the fixed point of a deep network with the mean variances of the hidden layers:
            by which squared errors, and the distance of two like inputs, grow per layer.
        alike_after: after how many layers two signals have become alike; None if they do not.
        faded_after: after how many layers a tenth of the activity is left; None if it stays.
        recommended: an initialisation; None if it is fine, or if there is none.
        left_out: what the model does that is not in the theory.
        samples: on how many it was measured.
    """

    layers: tuple[LayerCheck, ...]
    predicted: SpectrumStatistics
    measured: SpectrumStatistics
    phase: str
    gain: float
    alike_after: int | None
    faded_after: int | None
    recommended: Recommended | None
    left_out: tuple[str, ...]
    samples: int

    @property
    def verdict(self) -> str:
        """Whether the network is where theory wants it, in one line."""
        if not self.left_out:
            return self._place
        parts = "1 part" if len(self.left_out) == 1 else f"{len(self.left_out)} parts"
        return f"{self._place} ({parts} of the model left out)"

    @property
    def _place(self) -> str:
        depth = len(self.layers) - 1
        if self.phase == "no hidden layer":
            return f"no hidden layer: nothing to check but the step, {self._step}"
        if self.phase == "edge of chaos":
            return f"at the edge of chaos: fine for {_layers(depth)}; {self._step}"
        said = self._said
        if self.recommended is None:
            return f"{self.phase} phase: {said}; no weight variance is at the edge of chaos"
        before = _typical([layer.weight_variance for layer in self.layers[:-1]])
        way = "raise" if self.recommended.weight_variance > before else "lower"
        return (
            f"{self.phase} phase: {said}; {way} weight variance from {before:.2f} to "
            f"{self.recommended.weight_variance:.2f}, learning rate below "
            f"{self.recommended.learning_rate_bound:.2g}"
        )

    @property
    def _said(self) -> str:
        """What goes wrong first."""
        change = f"squared gradients change {self.gain:.3g} times per layer"
        if self.phase == "chaotic":
            return f"inputs that are alike are torn apart, {change}"
        faded = self.faded_after or math.inf
        if self.alike_after is not None and self.alike_after <= faded:
            return f"signals of two inputs become alike within {_n(self.alike_after)}"
        if self.faded_after is not None:
            return f"signals fade to a tenth within {_n(self.faded_after)}"
        return change

    @property
    def _step(self) -> str:
        return f"learning rate below {self.measured.learning_rate_bound:.2g}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return plain(
            {
                "verdict": self.verdict,
                "phase": self.phase,
                "gain": self.gain,
                "alike_after": self.alike_after,
                "faded_after": self.faded_after,
                "layers": [asdict(layer) for layer in self.layers],
                "predicted": self.predicted.to_dict(),
                "measured": self.measured.to_dict(),
                "recommended": None if self.recommended is None else asdict(self.recommended),
                "left_out": list(self.left_out),
                "samples": self.samples,
            }
        )

    def __str__(self) -> str:
        head = [
            "layer",
            "activation",
            "fan-in",
            "σ_w²",
            "σ_b²",
            "activity",
            "correlation",
            "error",
            "gain",
        ]
        rows = [
            [
                layer.name or "(model)",
                layer.activation,
                str(layer.fan_in),
                f"{layer.weight_variance:.3g}",
                f"{layer.bias_variance:.3g}",
                *map(_pair, (layer.activity, layer.correlation, layer.error, layer.gain)),
            ]
            for layer in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in [head, *rows]]
        spectrum = [
            f"{name}: {_pair(Compared(getattr(self.predicted, key), getattr(self.measured, key)))}"
            for name, key in (
                ("mean eigenvalue", "mean"),
                ("second moment", "second_moment"),
                ("largest", "largest"),
                ("learning-rate bound", "learning_rate_bound"),
            )
        ]
        lines = [
            f"Predicted / measured on {self.samples} samples",
            "",
            *table,
            "",
            ", ".join(spectrum),
        ]
        if self.left_out:
            lines.append(f"Left out: {'; '.join(self.left_out)}")
        return "\n".join([*lines, self.verdict])


def check(
    model: nn.Module,
    data: Any,
    likelihood: Likelihood | None = None,
    *,
    samples: int = 64,
    estimator: Estimator | None = None,
    generator: torch.Generator | None = None,
) -> Check:
    """Compare a network with what theory predicts of a random one with its variances.

    Layers are found by running the model: linear and convolutional ones in the order of use, each
    with the first activation behind it, module or function. Variances are read off the parameters,
    activities and overlaps of the inputs off the data, so that they need not be standardised.
    Everything else is predicted: signals and errors in every layer, and the Fisher spectrum, whose
    measurement is exact. Meant for a network as it was initialised; a trained one is no longer
    random, and the table shows by how much.

    A convolution is predicted per channel, as if gradients at different positions were independent.
    What else the model does is ignored by the prediction and listed in `left_out`.

    Args:
        model: of linear or convolutional layers and activations. Its mode is left as it is.
        data: as for `nm.fisher`; the first batch is used.
        likelihood: what the outputs mean; `nm.Gaussian()` by default, the theory's own. Others
            enter the prediction by the mean Fisher matrix of the outputs.
        samples: how many samples of the batch are used at most.
        estimator: of the measured spectrum and errors; `nm.Exact()` by default, which sends one
            sweep back for each output.
        generator: source of the estimator's randomness.

    Returns:
        Table, statistics, verdict in a line, and a recommended initialisation.

    Raises:
        ValueError: If `samples` is not positive.
        UnsupportedError: If the model has none of these layers, or none with trained parameters.

    Example:
        >>> import torch, neuromanifold as nm
        >>> _ = torch.manual_seed(0)
        >>> parts = [m for _ in range(6) for m in (torch.nn.Linear(200, 200), torch.nn.Tanh())]
        >>> model = torch.nn.Sequential(*parts, torch.nn.Linear(200, 2))
        >>> found = nm.meanfield.check(model, torch.randn(10, 200))
        >>> found.phase, found.recommended.weight_variance > 1
        ('ordered', True)
    """
    if samples < 1:
        raise ValueError(f"samples is the number of samples to use, at least 1; got {samples}.")
    likelihood = Gaussian() if likelihood is None else likelihood
    estimator = Exact() if estimator is None else estimator
    batch, _ = Data(data, model).peek()
    batch = batch.samples(0, samples)
    layers, left_out = found_layers(model, batch)
    names = trainable(layers)
    if not names:
        raise UnsupportedError(
            "No parameter of a linear or convolutional layer is trained: requires_grad_(True)."
        )
    signals, output_fisher = measured_signals(
        model, likelihood, batch, layers, estimator, generator
    )
    silent = [layer.name for layer in layers if layer.name not in signals]
    left_out += [f"layer {name}, frozen or not read as a layer" for name in silent]
    layers = [layer for layer in layers if layer.name in signals]
    if not layers:
        raise UnsupportedError(
            f"No layer could be read as one with inputs and outputs: {', '.join(silent)}."
        )
    measured = [signals[layer.name] for layer in layers]
    kernels = [kernel("linear" if x.activation is None else x.activation) for x in layers]
    operator = fisher(
        model, likelihood, batch, Gram(), estimator=estimator, params=names, generator=generator
    )
    first = measured[0].overlap
    outputs = len(output_fisher)

    def predicted(weight: list[float], bias: list[float]) -> tuple[Propagation, SpectrumStatistics]:
        net = propagate(
            kernels,
            weight_variance=weight,
            bias_variance=bias,
            depth=len(layers),
            activity=first.diagonal(),
            overlap=first,
        )
        return net, spectrum_statistics(
            net,
            outputs=outputs,
            biased=[layer.bias is not None for layer in layers],
            fan_in=[layer.fan_in for layer in layers],
            num_parameters=operator.num_parameters,
            output_fisher=output_fisher,
        )

    network, statistics = predicted(
        [layer.weight_variance for layer in layers], [layer.bias_variance for layer in layers]
    )
    output_scale = float(output_fisher.trace()) / outputs
    compared = _compared(layers, network, measured, output_scale)
    hidden = _Hidden.of(layers, kernels)
    gain = math.nan if hidden is None else hidden.gain(network)
    phase = "no hidden layer" if hidden is None else _phase(gain, len(layers) - 1)
    alike = faded = recommended = None
    if hidden is not None and phase == "ordered":
        alike, faded = hidden.fate(network)
    if hidden is not None and phase != "edge of chaos":
        recommended = _recommended(hidden, layers, lambda w, b: predicted(w, b)[1])
    return Check(
        layers=tuple(compared),
        predicted=statistics,
        measured=SpectrumStatistics(
            mean=float(operator.trace()) / operator.num_parameters,
            second_moment=float(operator.norm()) ** 2 / operator.num_parameters,
            largest=float(operator.eigenvalues(1)[0]),
            samples=len(first),
            outputs=outputs,
            num_parameters=operator.num_parameters,
        ),
        phase=phase,
        gain=gain,
        alike_after=alike,
        faded_after=faded,
        recommended=recommended,
        left_out=tuple(left_out),
        samples=len(first),
    )


def _compared(
    layers: list[FoundLayer], network: Propagation, measured: list[Signals], output_scale: float
) -> list[LayerCheck]:
    found = []
    for i, (layer, signal) in enumerate(zip(layers, measured, strict=True)):
        gain = Compared(math.nan, math.nan)
        if i + 1 < len(layers):
            above = layers[i + 1].weight_variance
            gain = Compared(float(network.gain[i].mean()), above * layer.slope_square)
        found.append(
            LayerCheck(
                name=layer.name,
                activation=layer.activation_name,
                fan_in=layer.fan_in,
                fan_out=len(layer.weight),
                weight_variance=layer.weight_variance,
                bias_variance=layer.bias_variance,
                activity=Compared(
                    float(network.activity[i].mean()), float(signal.overlap.diagonal().mean())
                ),
                correlation=Compared(
                    _mean_pair(network.correlation[i]), _mean_pair(_correlations(signal.overlap))
                ),
                error=Compared(
                    float(network.error[i].mean()) * output_scale,
                    float(signal.error.diagonal().mean()),
                ),
                gain=gain,
            )
        )
    return found


def _correlations(overlap: Tensor) -> Tensor:
    scale = overlap.diagonal().clamp(min=0).sqrt()
    scale = scale[:, None] * scale
    return torch.where(scale > 0, overlap / scale, 0.0)


def _mean_pair(matrix: Tensor) -> float:
    """Mean over pairs of different samples; NaN if there is one sample."""
    num = len(matrix)
    return float(matrix.sum() - matrix.trace()) / (num * (num - 1)) if num > 1 else math.nan


def _typical(values: list[float]) -> float:
    return sum(values) / len(values)


def _phase(gain: float, hidden: int) -> str:
    """By what squared gradients grow over all hidden layers, once signals are at rest."""
    growth = hidden * math.log(max(gain, 1e-300))
    if abs(growth) <= TOLERATED:
        return "edge of chaos"
    return "chaotic" if growth > 0 else "ordered"


@dataclass(frozen=True)
class _Hidden:
    """What the hidden layers are like: their commonest activation and mean variances."""

    kernel: Kernel
    weight_variance: float
    bias_variance: float

    @classmethod
    def of(cls, layers: list[FoundLayer], kernels: list[Kernel]) -> _Hidden | None:
        """None if there are none."""
        if len(layers) < 2:
            return None
        names = [layer.activation_name for layer in layers]
        common = Counter(names[:-1]).most_common(1)[0][0]
        return cls(
            kernel=kernels[names.index(common)],
            weight_variance=_typical([layer.weight_variance for layer in layers[:-1]]),
            bias_variance=_typical([layer.bias_variance for layer in layers[:-1]]),
        )

    def gain(self, network: Propagation) -> float:
        """Where signals come to rest; the mean of the network's own layers if they do not."""
        start = float(network.variance[0].mean())
        if start > 0:
            at = fixed_point(self.kernel, self.weight_variance, self.bias_variance, start=start)
            if math.isfinite(float(at.gain)):
                return float(at.gain)
        gains = network.gain.flatten(1).mean(dim=1)
        return float(gains.log().mean().exp())

    def fate(self, network: Propagation) -> tuple[int | None, int | None]:
        """After how many such layers signals are alike, and faded; None if that takes very many."""
        samples = len(network.activity[0])
        pair = _mean_pair(network.overlap[0]) if samples > 1 else 0.0
        deep = propagate(
            self.kernel,
            weight_variance=self.weight_variance,
            bias_variance=self.bias_variance,
            depth=FAR,
            activity=float(network.activity[0].mean()),
            overlap=pair,
        )
        apart = 1 - deep.correlation
        alike = (apart <= LEFT * apart[0]).nonzero()[:, 0]
        faded = (deep.activity <= LEFT * deep.activity[0]).nonzero()[:, 0]
        return (
            int(alike[0]) if len(alike) and samples > 1 and float(apart[0]) > 0 else None,
            int(faded[0]) if len(faded) else None,
        )


def _recommended(
    hidden: _Hidden,
    layers: list[FoundLayer],
    predicted: Callable[[list[float], list[float]], SpectrumStatistics],
) -> Recommended | None:
    """The edge of chaos; the last layer stays as it is."""
    # Where no scale is preferred, any biases would make the activity grow without end.
    bias = 0.0 if hidden.kernel.homogeneous else hidden.bias_variance
    try:
        weight = float(edge_of_chaos(hidden.kernel, bias))
    except UnsupportedError:
        return None
    count, last = len(layers) - 1, layers[-1]
    statistics = predicted(
        [weight] * count + [last.weight_variance], [bias] * count + [last.bias_variance]
    )
    return Recommended(weight, bias, statistics.learning_rate_bound)


def _n(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _layers(hidden: int) -> str:
    return "1 hidden layer" if hidden == 1 else f"{hidden} hidden layers"


def _pair(numbers: Compared) -> str:
    if math.isnan(numbers.predicted):
        return ""
    return f"{numbers.predicted:.3g} / {numbers.measured:.3g}"
