"""What the layers of a model are, and what signals they carry on some data.

One pass follows each layer's output to the next layer, and finds its activation on the way, called
as a module or as a function. A second one measures inputs and back-propagated errors by the records
that Fisher matrices are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from neuromanifold._fisher import requested
from neuromanifold.capture import (
    ACTIVATIONS,
    Batch,
    buffers_kept,
    call_model,
    function_name,
    logits_of,
)
from neuromanifold.errors import UnsupportedError
from neuromanifold.estimators import Estimator
from neuromanifold.layers import Factored
from neuromanifold.likelihoods import Likelihood
from neuromanifold.meanfield.kernels import Activation, derivative, kernel
from neuromanifold.structures import Gram

__all__ = ["FoundLayer", "Signals", "found_layers", "measured_signals", "trainable"]

# fmt: off
_KEEPING = frozenset([
    "alias", "clone", "contiguous", "detach", "double", "expand_as", "flatten", "float", "permute",
    "ravel", "reshape", "squeeze", "to", "transpose", "type", "unflatten", "unsqueeze", "view",
    "view_as",
])
"""Names of functions that change no number."""
# fmt: on


@dataclass
class FoundLayer:
    """A linear or convolutional layer, in the order of use.

    Attributes:
        name: of the module.
        module: the layer.
        activation: behind it, with its arguments; None if its output is used as it is.
        activation_name: of that.
        enters: what lies between the layer before and this one and is not in the theory.
        slope_square: measured `mean φ'(u)²`; 1 without an activation.
    """

    name: str
    module: nn.Module
    activation: Activation | None = None
    activation_name: str = "linear"
    enters: list[str] = field(default_factory=list)
    slope_square: float = 1.0

    @property
    def weight(self) -> Tensor:
        """`(fan_out, fan_in)`, a convolution's kernels as rows."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().flatten(1)

    @property
    def bias(self) -> Tensor | None:
        """`(fan_out,)`."""
        bias = self.module.bias
        return bias.detach() if isinstance(bias, Tensor) else None

    @property
    def fan_in(self) -> int:
        """Inputs of a unit."""
        return self.weight.shape[1]

    @property
    def weight_variance(self) -> float:
        """`fan_in · mean(W²)`."""
        return self.fan_in * float(self.weight.square().mean())

    @property
    def bias_variance(self) -> float:
        """`mean(b²)`; 0 without biases."""
        return 0.0 if self.bias is None else float(self.bias.square().mean())


@dataclass
class _Path:
    """Where a tensor comes from: the last layer, and what happened since."""

    layer: FoundLayer
    passed: tuple[str, ...] = ()


class _Follow(TorchFunctionMode):
    """Follows outputs of layers to the inputs of others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[FoundLayer] = []
        self.repeated: list[str] = []
        self._paths: dict[int, tuple[Tensor, _Path]] = {}
        """By identity of a tensor, which is kept alive."""
        self._inside: list[tuple[str, nn.Module]] = []
        """Modules without parts that run now."""

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Of a module without parts, before it runs."""
        self._inside.append((name, module))
        if not isinstance(module, (nn.Linear, _ConvNd)):
            return
        if any(layer.module is module for layer in self.layers):
            self.repeated.append(name)
            return
        path = self._path_of(args)
        self.layers.append(FoundLayer(name, module, enters=list(path.passed) if path else []))

    def leave(self, module: nn.Module, output: Any) -> None:
        """The same, after it ran."""
        self._inside.pop()
        if isinstance(output, Tensor) and isinstance(module, (nn.Linear, _ConvNd)):
            layer = next(layer for layer in self.layers if layer.module is module)
            self._paths[id(output)] = (output, _Path(layer))

    def path_of_output(self, output: Any) -> _Path | None:
        """Of what the model returns."""
        return self._path_of((output,))

    def _path_of(self, args: tuple[Any, ...]) -> _Path | None:
        found = [self._paths[id(a)][1] for a in args if id(a) in self._paths]
        if not found:
            return None
        # Where branches meet, the later layer is the one before; all that happened counts.
        last = max(found, key=lambda path: self.layers.index(path.layer))
        passed = dict.fromkeys(step for path in found for step in path.passed)
        return _Path(last.layer, tuple(passed))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        inside = self._inside[-1] if self._inside else None
        if inside is not None and isinstance(inside[1], (nn.Linear, _ConvNd)):
            return func(*args, **kwargs)
        path = self._path_of(args)
        name = function_name(func)
        bends = path is not None and name in ACTIVATIONS and path.layer.activation is None
        before = args[0].detach().clone() if bends else None
        result = func(*args, **kwargs)
        if path is None or not isinstance(result, Tensor):
            return result
        if before is not None:
            options = {key: value for key, value in kwargs.items() if key != "inplace"}
            activation = _as_called(name, func, args[1:], options)
            layer = path.layer
            layer.activation, layer.activation_name = activation, name
            with torch._C.DisableTorchFunction():
                slope = derivative(kernel(activation).function)(before)
                layer.slope_square = float(slope.square().mean())
        elif not self._keeps(name, inside):
            what = name if inside is None else f"{inside[0]} ({type(inside[1]).__name__})"
            if what not in path.passed:
                path = _Path(path.layer, (*path.passed, what))
        self._paths[id(result)] = (result, path)
        return result

    def _keeps(self, name: str, inside: tuple[str, nn.Module] | None) -> bool:
        resting = inside is not None and not inside[1].training and "dropout" in name
        return name in _KEEPING or resting


def _as_called(
    name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Activation:
    """An activation with the arguments that it got after the tensor."""
    if name == "leaky_relu":  # has a closed form for each slope
        return nn.LeakyReLU(*args, **kwargs)

    def called(u: Tensor) -> Tensor:
        result: Tensor = func(u, *args, **kwargs)
        return result

    called.__name__ = name
    # By its name it is known in advance, if it was called with its defaults.
    probe = torch.linspace(-4, 4, 33)
    plain = getattr(nn.functional, name, None) or getattr(torch, name)
    with torch._C.DisableTorchFunction():
        same = torch.equal(called(probe.clone()), plain(probe.clone()))
    return name if same else called


def found_layers(model: nn.Module, batch: Batch) -> tuple[list[FoundLayer], list[str]]:
    """The layers of a model in the order of use, and what is not in the theory.

    Raises:
        UnsupportedError: If there is no linear or convolutional layer.
    """
    follow = _Follow()
    with torch.no_grad(), buffers_kept(model), _watched(model, follow), follow:
        output = call_model(model, batch.inputs)
    if not follow.layers:
        raise UnsupportedError(
            f"{type(model).__name__} uses no nn.Linear and no convolution, which the theory is "
            f"about. Give a model made of those and of activations."
        )
    left_out = [f"{what}, before {layer.name}" for layer in follow.layers for what in layer.enters]
    last = follow.path_of_output(output)
    if last is not None:
        left_out += [f"{what}, at the outputs" for what in last.passed]
    left_out += [f"{name}, used again" for name in dict.fromkeys(follow.repeated)]
    known = {id(p) for layer in follow.layers for p in layer.module.parameters()}
    others = [name for name, p in model.named_parameters() if id(p) not in known]
    left_out += [f"parameter {name}" for name in others]
    return follow.layers, left_out


@contextmanager
def _watched(model: nn.Module, follow: _Follow) -> Iterator[None]:
    """Tells about every module without parts when it is called."""

    def before(name: str) -> Callable[..., None]:
        return lambda module, args: follow.enter(name, module, args)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if next(module.children(), None) is None:
                first = module.register_forward_pre_hook(before(name))
                last = module.register_forward_hook(lambda m, _, output: follow.leave(m, output))
                stack.callback(first.remove)
                stack.callback(last.remove)
        yield


@dataclass(frozen=True)
class Signals:
    """What was measured at a layer on T samples, sums over the batch in float64.

    Attributes:
        overlap: of the inputs, `(T, T)`: `x_s · x_t / n`, mean over positions.
        error: at the outputs, `(T, T)`: `Σ_i ∂f/∂u_i(s) ∂f/∂u_i(t)`, positions summed and outputs
            averaged.
    """

    overlap: Tensor
    error: Tensor


def measured_signals(
    model: nn.Module,
    likelihood: Likelihood,
    batch: Batch,
    layers: list[FoundLayer],
    estimator: Estimator,
    generator: torch.Generator | None,
) -> tuple[dict[str, Signals], Tensor]:
    """Signals by layer name, and the mean Fisher matrix of the outputs `(C, C)`."""
    found: dict[str, Signals] = {}
    request = requested(
        model,
        likelihood,
        batch,
        Gram(),
        estimator=estimator,
        params=trainable(layers),
        forward=None,
        uncovered="generic",
        generator=generator,
    )
    with torch.no_grad():
        outputs = likelihood.canonical(_outputs(model, batch))
        columns = torch.stack([c.flatten(1) for c in likelihood.fisher_columns(outputs)]).double()
        output_fisher = torch.einsum("vni,vnj->ij", columns, columns) / columns.shape[1]
    with request as (_, source):
        for records in source.sweeps():
            for record in records:
                part = record.single
                if not isinstance(part, Factored) or part.a is None:
                    continue
                error = _cross(part.g) / len(output_fisher)
                name = record.block.name
                if name in found:
                    found[name] = Signals(found[name].overlap, found[name].error + error)
                else:
                    groups, _, positions, width = part.a.shape
                    overlap = _cross(part.a[None]) / (groups * positions * width)
                    found[name] = Signals(_bounded(overlap), error)
    return found, output_fisher


def trainable(layers: list[FoundLayer]) -> list[str]:
    """Names of the layers' parameters that are trained."""
    return [
        f"{layer.name}.{local}" if layer.name else local
        for layer in layers
        for local, p in layer.module.named_parameters()
        if p.requires_grad
    ]


def _outputs(model: nn.Module, batch: Batch) -> Tensor:
    with buffers_kept(model):
        outputs: Tensor = logits_of(call_model(model, batch.inputs))
    return outputs


def _bounded(overlap: Tensor) -> Tensor:
    """Without the rounding by which inputs that are one and the same overlap more than they can."""
    root = (overlap.diagonal()[:, None] * overlap.diagonal()).sqrt()
    return torch.minimum(torch.maximum(overlap, -root), root)


def _cross(x: Tensor) -> Tensor:
    """`Σ x_s x_t` over all but the samples, `(V, G, N, ...)` to `(N, N)`."""
    rows = x.double().movedim(2, 0).flatten(1)
    return rows @ rows.T
