"""The front door: `fisher(model, likelihood, data, structure)`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from neuromanifold._progress import reporting
from neuromanifold.capture import Data, Forward, call_model, plan
from neuromanifold.estimators import Estimator, MonteCarlo
from neuromanifold.likelihoods import Likelihood
from neuromanifold.linalg import memory
from neuromanifold.operators import FisherOperator
from neuromanifold.operators.storage import load
from neuromanifold.structures import Kronecker, Progress, Reducer, Source, Structure, per_layer
from neuromanifold.structures.cost import within

__all__ = ["fisher", "load", "requested"]


def fisher(
    model: nn.Module,
    likelihood: Likelihood,
    data: Any,
    structure: Structure | Mapping[str, Structure] | None = None,
    *,
    estimator: Estimator | None = None,
    params: Iterable[str] | None = None,
    per: Literal["sample", "position"] = "sample",
    forward: Forward | None = None,
    uncovered: Literal["generic", "error"] = "generic",
    reducer: Reducer | None = None,
    generator: torch.Generator | None = None,
    progress: bool | Progress = False,
    max_bytes: int | str | None = None,
) -> FisherOperator:
    r"""Measure the Fisher information matrix of a model.

    `F = (1/N) Σ_n J_nᵀ Σ_n J_n`, in nats/parameter²: J the Jacobian of the outputs, Σ the Fisher
    matrix of the likelihood at the outputs. A sample is a row of the batch; inside a sample,
    positions (tokens, pixels) and output entries are summed.

    Args:
        model: any module. Its mode is left as it is: call `model.eval()` for the usual case.
            Neither its parameters nor their `.grad` are touched.
        likelihood: what its outputs mean, e.g. `nm.Categorical()` for logits.
        data: a tensor of inputs, a tuple `(inputs, targets)`, a mapping of keyword arguments, or an
            iterable of those such as a DataLoader. Targets are needed by `nm.Empirical()` only;
            elsewhere they mark ignored positions.
        structure: what is kept of the matrix; `nm.Kronecker()` by default. A mapping from patterns
            of module or parameter names gives each layer its own; the first match counts.
        estimator: which vectors are sent back; `nm.MonteCarlo(1)`, one sampled label, by default.
        params: names or shell-style patterns of the parameters to measure; all trainable ones by
            default.
        per: divide by the number of samples, or by that of observed positions.
        forward: `forward(model, inputs) -> outputs`, if the model is not called the usual way.
        uncovered: what to do about parameters without a layer rule: "generic" reads them by
            per-sample gradients, "error" refuses.
        reducer: sums a list of tensors over processes in place, as `nm.distributed.sum_over_ranks`
            does.
        generator: source of the estimator's randomness; the same seed gives the same answer.
        progress: True shows a progress bar on stderr; a function is told `(done, total)`.
        max_bytes: e.g. "2 GiB": cut batches so that tensors take no more than this, over what is
            allocated already. The size is found by trials on the first batch.

    Returns:
        The matrix as an operator: products, solves, spectrum, samples, file.

    Raises:
        ValueError: If an argument makes no sense; the message says what to do.
        CaptureError: If a layer cannot be observed.
        UncoveredParameterError: If a parameter has no rule and `uncovered="error"`.
        UnsupportedError: If the model has no Fisher information per sample.
        TooLargeError: If the structure would not fit into memory.
        NonFiniteError: If outputs or statistics hold NaN or infinity.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(4, 3), torch.randn(32, 4)
        >>> F = nm.fisher(model, nm.Categorical(), x, nm.Diagonal())
        >>> F.num_samples, F.num_parameters
        (32, 15)
    """
    request = requested(
        model,
        likelihood,
        data,
        structure,
        estimator=estimator,
        params=params,
        per=per,
        forward=forward,
        uncovered=uncovered,
        reducer=reducer,
        generator=generator,
        progress=progress,
    )
    with request as (structure, source):
        if max_bytes is not None:
            source = within(structure, source, memory.parse(max_bytes))
        return structure.build(source)


@contextmanager
def requested(
    model: nn.Module,
    likelihood: Likelihood,
    data: Any,
    structure: Structure | Mapping[str, Structure] | None = None,
    *,
    estimator: Estimator | None,
    params: Iterable[str] | None,
    per: Literal["sample", "position"] = "sample",
    forward: Forward | None,
    uncovered: Literal["generic", "error"],
    reducer: Reducer | None = None,
    generator: torch.Generator | None = None,
    progress: bool | Progress = False,
) -> Iterator[tuple[Structure, Source]]:
    """What was asked for, checked; inside it, torch is set up to measure."""
    structure = Kronecker() if structure is None else structure
    if isinstance(structure, Mapping):
        structure = per_layer(structure)
    estimator = MonteCarlo(1) if estimator is None else estimator
    _check_kinds(model, likelihood, structure, estimator)
    if per not in ("sample", "position"):
        raise ValueError(f'per is "sample" or "position", got {per!r}.')
    measured = plan(model, params, uncovered)
    device = measured.device
    if device.type == "meta":
        raise ValueError(
            "The model is on the meta device, where parameters have no values. Give it values "
            "first: model.to_empty(device=...), then model.load_state_dict(...)."
        )
    forward = _under_present_autocast(call_model if forward is None else forward, device)
    with (
        reporting(progress) as report,
        torch.inference_mode(False),
        torch.no_grad(),  # the tape enables gradients where it needs them
        torch.autocast(device.type, enabled=False),  # statistics are summed in full precision
    ):
        source = Source(
            plan=measured,
            data=Data(data, measured.model),
            likelihood=likelihood,
            estimator=estimator,
            forward=forward,
            per=per,
            generator=generator,
            reducer=reducer,
            progress=report,
        )
        yield structure, source


def _check_kinds(model: Any, likelihood: Any, structure: Any, estimator: Any) -> None:
    for name, value, kind, example in (
        ("model", model, nn.Module, "a torch.nn.Module"),
        ("likelihood", likelihood, Likelihood, "nm.Categorical() or nm.from_loss(loss)"),
        ("structure", structure, Structure, "nm.Kronecker() or nm.Diagonal()"),
        ("estimator", estimator, Estimator, "nm.MonteCarlo(1) or nm.Exact()"),
    ):
        if isinstance(value, kind):
            continue
        if isinstance(value, type):
            raise TypeError(
                f"{name} is the class {value.__name__}; pass an object, e.g. {example}."
            )
        if isinstance(value, nn.modules.loss._Loss):
            raise TypeError(
                f"{name} is a loss, {type(value).__name__}; pass nm.from_loss(loss) instead."
            )
        raise TypeError(f"{name} is e.g. {example}; got {type(value).__name__}.")


def _under_present_autocast(forward: Forward, device: torch.device) -> Forward:
    """Run the model as the caller would have here: under autocast, if it is on."""
    enabled = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type)

    def wrapped(model: nn.Module, inputs: Any) -> Any:
        with torch.autocast(device.type, dtype=dtype, enabled=enabled):
            return forward(model, inputs)

    return wrapped if enabled else forward
