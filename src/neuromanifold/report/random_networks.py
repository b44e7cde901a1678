"""From a random network, or one of the user's, to plain numbers: theory next to measurement."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from neuromanifold._estimate import plain
from neuromanifold._fisher import fisher
from neuromanifold._progress import reporting
from neuromanifold.capture import Data, unwrap
from neuromanifold.estimators import Exact
from neuromanifold.likelihoods import Gaussian, Likelihood
from neuromanifold.meanfield.checks import Check, check
from neuromanifold.meanfield.initialisation import Variances
from neuromanifold.meanfield.kernels import Activation, Kernel, kernel
from neuromanifold.meanfield.observation import found_layers, measured_signals
from neuromanifold.meanfield.phases import fixed_point, phase_diagram
from neuromanifold.meanfield.statistics import SpectrumStatistics
from neuromanifold.structures import Gram

__all__ = ["KIND", "VERSION", "study_model", "study_random"]

KIND, VERSION = "neuromanifold.meanfield", 1

CELLS = (36, 18)
"""Of the phase diagram: weight variances, bias variances."""

LEAST_ROOM = (1.5, 0.3)
"""The phase diagram shows at least so large weight and bias variances."""

SIGNALS = ("activity", "correlation", "error", "gain")
"""What layers are compared by."""

Measured = tuple[list[dict[str, float]], SpectrumStatistics]
"""Of one network: signals of each layer, and the spectrum."""

SPECTRUM = ("mean", "second_moment", "largest", "learning_rate_bound")
"""What spectra are compared by."""


def study_random(
    activation: Activation,
    variances: Variances,
    *,
    samples: int,
    seeds: Sequence[int],
    progress: bool = False,
) -> dict[str, Any]:
    """Draw random networks, and compare them with what theory says of all of them.

    Inputs are standard normal, and the same for all networks; weights and biases are normal. The
    likelihood is Gaussian with unit variance, and numbers are float64.

    Args:
        activation: as for `nm.meanfield.propagate`, behind each layer but the last.
        variances: of weights and biases, with the widths of input and layers.
        samples: inputs.
        seeds: one for each network; the first also draws the inputs.
        progress: show a bar on stderr.

    Returns:
        Plain data: layers and spectrum predicted and measured, with standard errors over networks,
        verdict, recommendation and phase diagram; for `neuromanifold.report.render_meanfield`.

    Raises:
        ValueError: If there are no seeds or no samples.
    """
    if samples < 1 or not seeds:
        raise ValueError(
            f"At least one sample and one network are needed, got {samples} and {len(seeds)}."
        )
    phi = kernel(activation)
    # Not the numbers of a network's weights; torch reads 32 bits of a seed.
    inputs = _normal((samples, variances.widths[0]), _generator(seeds[0] + 2**31))
    found = []
    with reporting(progress, "networks") as report:
        # The prediction reads the variances off a network: one that has them to the digit.
        theory = check(_Network(phi, variances, seeds[0], exact=True), inputs)
        for number, seed in enumerate(seeds, 1):
            found.append(_measured(_Network(phi, variances, seed), inputs))
            if report is not None:
                report(number, len(seeds))
    depth = len(variances.weight)
    return _document(
        theory,
        found,
        name=f"{phi.name}, {depth} {'layer' if depth == 1 else 'layers'}",
        hidden=phi,
        likelihood="Gaussian()",
        seeds=list(seeds),
    )


def study_model(
    model: nn.Module, likelihood: Likelihood, data: Any, *, samples: int
) -> dict[str, Any]:
    """The same of one network as it is: `nm.meanfield.check`, and its place in the phase diagram.

    Args:
        model: of linear or convolutional layers and activations.
        likelihood: what its outputs mean.
        data: as for `nm.fisher`; the first batch is used.
        samples: of the batch, at most.

    Raises:
        UnsupportedError: If theory has nothing to say about such a model.
    """
    found = check(model, data, likelihood, samples=samples)
    batch, _ = Data(data, model).peek()
    layers, _ = found_layers(model, batch.samples(0, 1))
    names = [layer.activation_name for layer in layers[:-1]]
    hidden = None
    if names:
        layer = layers[names.index(Counter(names).most_common(1)[0][0])]
        hidden = kernel("linear" if layer.activation is None else layer.activation)
    layer_by_layer = [
        {signal: getattr(layer, signal).measured for signal in SIGNALS} for layer in found.layers
    ]
    return _document(
        found,
        [(layer_by_layer, found.measured)],
        name=type(unwrap(model)).__name__,
        hidden=hidden,
        likelihood=repr(likelihood),
        seeds=None,
    )


def _measured(network: nn.Module, inputs: Tensor) -> Measured:
    """What `check` measures, without its predictions."""
    likelihood, estimator = Gaussian(), Exact()
    batch, _ = Data(inputs, network).peek()
    layers, _ = found_layers(network, batch)
    signals, output_fisher = measured_signals(network, likelihood, batch, layers, estimator, None)
    num, found = len(inputs), []
    for layer, above in zip(layers, [*layers[1:], None], strict=True):
        signal = signals[layer.name]
        scale = signal.overlap.diagonal().sqrt()
        correlations = signal.overlap / (scale[:, None] * scale)
        gain = math.nan if above is None else above.weight_variance * layer.slope_square
        found.append(
            {
                "activity": float(signal.overlap.diagonal().mean()),
                "correlation": float(correlations.sum() - num) / (num * (num - 1))
                if num > 1
                else math.nan,
                "error": float(signal.error.diagonal().mean()),
                "gain": gain,
            }
        )
    operator = fisher(network, likelihood, batch, Gram(), estimator=estimator)
    return found, SpectrumStatistics(
        mean=float(operator.trace()) / operator.num_parameters,
        second_moment=float(operator.norm()) ** 2 / operator.num_parameters,
        largest=float(operator.eigenvalues(1)[0]),
        samples=num,
        outputs=len(output_fisher),
        num_parameters=operator.num_parameters,
    )


class _Network(nn.Module):
    """Layers of normal weights and biases, an activation behind all but the last.

    Args:
        exact: whether each layer's mean squares are scaled to the variances.
    """

    def __init__(
        self, phi: Kernel, variances: Variances, seed: int, *, exact: bool = False
    ) -> None:
        super().__init__()
        self._phi = phi.function
        generator = _generator(seed)
        self.layers = nn.ModuleList()
        for (ins, outs), weight, bias in zip(
            pairwise(variances.widths), variances.weight, variances.bias, strict=True
        ):
            layer = nn.Linear(ins, outs, device="meta")
            layer.weight = nn.Parameter(_scaled((outs, ins), weight / ins, generator, exact))
            layer.bias = nn.Parameter(_scaled((outs,), bias, generator, exact))
            self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = self._phi(layer(x))
        outputs: Tensor = last(x)
        return outputs


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _scaled(
    shape: tuple[int, ...], variance: float, generator: torch.Generator, exact: bool
) -> Tensor:
    drawn = _normal(shape, generator)
    if exact:
        drawn /= drawn.square().mean().sqrt()
    return variance**0.5 * drawn


def _document(
    theory: Check,
    found: Sequence[Measured],
    *,
    name: str,
    hidden: Kernel | None,
    likelihood: str,
    seeds: list[int] | None,
) -> dict[str, Any]:
    measured = replace(
        theory.measured,
        mean=fmean(spectrum.mean for _, spectrum in found),
        second_moment=fmean(spectrum.second_moment for _, spectrum in found),
        largest=fmean(spectrum.largest for _, spectrum in found),
    )
    weight = bias = None
    if len(theory.layers) > 1:
        weight = fmean(layer.weight_variance for layer in theory.layers[:-1])
        bias = fmean(layer.bias_variance for layer in theory.layers[:-1])
    recommended = _recommended(theory, weight, bias)
    document = {
        "kind": KIND,
        "version": VERSION,
        "name": name,
        "seeds": seeds,
        "likelihood": likelihood,
        "samples": theory.samples,
        "outputs": theory.predicted.outputs,
        "num_parameters": theory.predicted.num_parameters,
        "activation": None if hidden is None else hidden.name,
        "weight_variance": weight,
        "bias_variance": bias,
        "phase": theory.phase,
        "gain": theory.gain,
        "verdict": replace(theory, measured=measured).verdict,
        "recommended": recommended,
        "layers": [
            {
                "name": layer.name if seeds is None else str(number + 1),
                "activation": layer.activation,
                "fan_in": layer.fan_in,
                "fan_out": layer.fan_out,
                "weight_variance": layer.weight_variance,
                "bias_variance": layer.bias_variance,
            }
            | {
                signal: _compared(
                    getattr(layer, signal).predicted,
                    [layers[number][signal] for layers, _ in found],
                )
                for signal in SIGNALS
            }
            for number, layer in enumerate(theory.layers)
        ],
        "spectrum": {
            key: _compared(getattr(theory.predicted, key), values) | {"networks": values}
            for key in SPECTRUM
            for values in [[getattr(spectrum, key) for _, spectrum in found]]
        },
        "fixed_point": None,
        "diagram": None,
        "left_out": list(theory.left_out),
    }
    if hidden is not None and weight is not None and bias is not None:
        start = _start(theory)
        document["fixed_point"] = fixed_point(hidden, weight, bias, start=start).to_dict()
        document["diagram"] = _diagram(hidden, weight, bias, recommended, start)
    found_plain: dict[str, Any] = plain(document)
    return found_plain


def _start(theory: Check) -> float:
    """Variance of the first layer's pre-activations, from which signals start."""
    first = theory.layers[0]
    return max(first.weight_variance * first.activity.predicted + first.bias_variance, 2.0**-60)


def _compared(predicted: float, values: Sequence[float]) -> dict[str, float | None]:
    mean = fmean(values)
    several = len(values) > 1 and math.isfinite(mean)
    spread = stdev(values) if several else None
    return {
        "predicted": predicted,
        "measured": mean,
        "stderr": None if spread is None else spread / math.sqrt(len(values)),
        "scatter": None if spread is None or mean == 0 else spread / abs(mean),
    }


def _recommended(theory: Check, weight: float | None, bias: float | None) -> dict[str, Any] | None:
    """What to begin with; what there is, at the edge of chaos. None if nothing is known."""
    if theory.recommended is not None:
        return {
            "weight_variance": theory.recommended.weight_variance,
            "bias_variance": theory.recommended.bias_variance,
            "learning_rate_bound": theory.recommended.learning_rate_bound,
            "changed": True,
        }
    if theory.phase != "edge of chaos":
        return None
    return {
        "weight_variance": weight,
        "bias_variance": bias,
        "learning_rate_bound": theory.predicted.learning_rate_bound,
        "changed": False,
    }


def _diagram(
    phi: Kernel, weight: float, bias: float, recommended: dict[str, Any] | None, start: float
) -> dict[str, Any]:
    """Gains at the centres of cells, and the edge of chaos between them."""
    wanted = weight if recommended is None else recommended["weight_variance"]
    room = (
        max(LEAST_ROOM[0], 1.6 * weight, 2 * wanted),
        max(LEAST_ROOM[1], 1.6 * bias),
    )
    centres = [
        (torch.arange(cells, dtype=torch.float64) + 0.5) * most / cells
        for cells, most in zip(CELLS, room, strict=True)
    ]
    points = fixed_point(phi, centres[0], centres[1][:, None], start=start)
    # Closer where the edge bends most, at small biases.
    sides = room[1] * torch.linspace(0, 1, CELLS[1] + 1, dtype=torch.float64) ** 2
    return {
        "weight_variance": centres[0],
        "bias_variance": centres[1],
        "gain": points.gain,
        "room": room,
        "edge": {
            "bias_variance": sides,
            "weight_variance": phase_diagram(phi, [weight], sides).edge,
        },
    }
