"""Everything the report shows, as a plain dict first: numbers, no pictures."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuromanifold import variance
from neuromanifold._estimate import Estimate
from neuromanifold._fisher import fisher
from neuromanifold._progress import Progress, reporting
from neuromanifold.capture import Data, buffers_kept, call_model, logits_of, plan, unwrap
from neuromanifold.errors import TooLargeError
from neuromanifold.estimators import Estimator, Exact, MonteCarlo
from neuromanifold.likelihoods import Likelihood
from neuromanifold.linalg import memory
from neuromanifold.operators import FisherOperator
from neuromanifold.structures import BlockDiagonal, Diagonal, Gram, Kronecker, Structure, UnitWise
from neuromanifold.structures.gram import GramOperator

__all__ = ["collect"]

MAX_EXACT_ROWS = 4096
"""Samples times columns up to which the analysis uses the exact Fisher of every sample."""

SAMPLED_ROWS = 512
"""How many gradients are sent back otherwise; one per sample if there are more samples."""

SAMPLED_ENTRIES = 10**8
"""Entries that all of these gradients have at most, as far as one per sample allows."""

LARGEST_COMPARED = 2 * 2**30
"""Bytes of the structures that are compared; to fill all memory is not worth an error bar."""

STAGES = 5
NUM_LEADING = 20
NUM_DAMPINGS = 25
NUM_BINS = 40
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def collect(
    model: nn.Module,
    likelihood: Likelihood,
    data: Any,
    *,
    name: str,
    generator: torch.Generator | None = None,
    progress: bool | Progress = False,
) -> dict[str, Any]:
    """Measure what the report shows about a model.

    The estimator is `Exact()` while samples times output columns stay within a few thousand, else
    a few labels per sample are drawn from the model; the notes say how many, and why.

    Args:
        model: any module, in the mode it should be measured in.
        likelihood: what its outputs mean.
        data: as for `nm.fisher`; read several times.
        name: title of the analysis.
        generator: randomness of sampled labels.
        progress: as for `nm.fisher`; counts stages.

    Returns:
        A JSON-able dict: model, trace, spectrum, layers, diagonal, errors of approximations,
        coverage. Numbers that could not be measured are None, and the notes say why.

    Raises:
        ValueError: As `nm.fisher`.
    """
    started = time.perf_counter()
    Data(data).require_repeatable("The analysis")
    was_training = model.training
    seed = int(torch.randint(2**62, (), generator=generator))
    notes: list[str] = []
    if was_training:
        notes.append(
            "The model was measured in training mode. Call model.eval() first if it has dropout "
            "or other layers that behave differently in training."
        )

    with reporting(progress, "measurements") as report:
        done = 0

        def stage() -> None:
            nonlocal done
            done += 1
            if report is not None:
                report(done, STAGES)

        estimator = _choose_estimator(model, likelihood, data, notes)
        stage()
        measure = _Measure(model, likelihood, data, estimator, seed, notes)
        exact = measure(Gram())
        assert isinstance(exact, GramOperator)
        values = _above_rounding(exact.eigenvalues())
        stage()
        candidates = {
            structure: measure.if_it_fits(structure)
            for structure in (Diagonal(), UnitWise(), Kronecker(), BlockDiagonal())
        }
        matrices = {type(structure).__name__: F for structure, F in candidates.items()}
        stage()
        overlaps = {kind: _overlaps(exact, F) for kind, F in matrices.items() if F is not None}
        stage()
        layers = _layers(model, exact, matrices, overlaps)
        whole = {
            kind: None
            if F is None
            else _error(exact, F, torch.stack([*overlaps[kind].values()]).sum())
            for kind, F in matrices.items()
        }
        stage()

    diagonal = exact.diagonal()
    trace, largest = float(exact.trace()), float(values[0])
    errors = _errors(exact, largest)
    return {
        "kind": "neuromanifold.analysis",
        "version": 1,
        "name": name,
        "model": {
            "class": type(unwrap(model)).__name__,
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "num_trainable": exact.num_parameters,
        },
        "likelihood": repr(likelihood),
        "estimator": repr(estimator),
        "num_samples": exact.num_samples,
        "num_rows": exact.num_rows,
        "dtype": str(exact.dtype).removeprefix("torch."),
        "training": None,
        "trace": trace,
        "frobenius": float(exact.norm()),
        "largest_eigenvalue": largest,
        "max_learning_rate": 2 / largest if largest > 0 else None,
        "stable_rank": trace / largest if largest > 0 else None,
        "stderr": errors,
        "layers": layers,
        "whole_errors": whole,
        "diagonal": [_summary(exact, parameter, value) for parameter, value in diagonal.items()],
        "spectrum": _spectrum(exact, values),
        "effective_dimension": _effective_dimensions(values),
        "coverage": exact.coverage.to_list(),
        "timing": {"seconds": time.perf_counter() - started},
        "notes": notes,
    }


@dataclass
class _Measure:
    """Fisher matrices of one model, all with the same data and the same sampled labels."""

    model: nn.Module
    likelihood: Likelihood
    data: Any
    estimator: Estimator
    seed: int
    notes: list[str]

    def __call__(self, structure: Structure) -> FisherOperator:
        return fisher(
            self.model,
            self.likelihood,
            self.data,
            structure,
            estimator=self.estimator,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def if_it_fits(self, structure: Structure) -> FisherOperator | None:
        """None, and a note, where the structure is too large for this model."""
        measured = plan(self.model, None, "generic")
        size = structure.constant_numel(measured) * measured.dtype.itemsize
        try:
            if size <= LARGEST_COMPARED:
                return self(structure)
            reason: object = (
                f"it would keep {memory.readable(size)}, and structures are compared up to "
                f"{memory.readable(LARGEST_COMPARED)}."
            )
        except TooLargeError as error:
            reason = error
        self.notes.append(f"{type(structure).__name__} was left out: {reason}")
        return None


def _errors(exact: GramOperator, largest: float) -> dict[str, float | None]:
    """Standard errors of the headline numbers: the samples are some of all, and labels are drawn.

    None where one sample says nothing of others.
    """
    found = {
        "trace": _finite(variance.trace(exact)),
        "largest_eigenvalue": _finite(variance.eigenvalues(exact)),
    }
    if largest > 0:
        top = found["largest_eigenvalue"]
        found["max_learning_rate"] = None if top is None else 2 / largest**2 * top
        dimension = variance.effective_dimension(exact, damping=largest / 100)
        found["effective_dimension"] = _finite(dimension)
    return found


def _finite(estimate: Estimate) -> float | None:
    stderr = estimate.stderr
    assert isinstance(stderr, Tensor)
    error = float(stderr)
    return error if math.isfinite(error) else None


def _choose_estimator(
    model: nn.Module, likelihood: Likelihood, data: Any, notes: list[str]
) -> Estimator:
    """The exact Fisher if its Gram matrix stays small, else a few labels per sample."""
    num_samples, columns = 0, 0
    with torch.no_grad(), buffers_kept(model):
        for batch in Data(data, unwrap(model)):
            outputs = likelihood.canonical(logits_of(call_model(model, batch.inputs)))
            num_samples += len(outputs)
            columns = max(columns, likelihood.num_columns(outputs))
    if num_samples * columns <= MAX_EXACT_ROWS:
        return Exact()
    num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = min(SAMPLED_ROWS, SAMPLED_ENTRIES // max(num_parameters, 1))
    draws = max(rows // num_samples, 1)
    note = (
        f"The exact matrix takes {num_samples * columns:,} gradients, {columns:,} for each of "
        f"{num_samples:,} samples. Here it is estimated by {draws} for each, with labels drawn "
        f"from the model. This leaves noise in all numbers: there are no "
        f"more eigenvalues than gradients, the largest tend to be too large, and approximations "
        f"look worse than they are."
    )
    if 2 * columns <= MAX_EXACT_ROWS:
        note += f" Up to {MAX_EXACT_ROWS // columns:,} samples are measured exactly."
    notes.append(note)
    return MonteCarlo(draws)


def _layers(
    model: nn.Module,
    exact: GramOperator,
    matrices: dict[str, FisherOperator | None],
    overlaps: dict[str, dict[str, Tensor]],
) -> list[dict[str, Any]]:
    """Per block: share of the trace, largest eigenvalue, and errors of approximations."""
    kinds = _kinds(unwrap(model), exact)
    whole_trace = float(exact.trace())
    rules = {entry.block: entry.rule for entry in exact.coverage}
    found = []
    for block, rule in rules.items():
        part = exact.block(block)
        assert isinstance(part, GramOperator)
        trace = float(part.trace())
        full = matrices["BlockDiagonal"]
        # Where the block is smaller than the number of rows, its own matrix is the cheaper one.
        small = full is not None and part.num_parameters <= exact.num_rows
        spectrum = (full.block(block) if small and full is not None else part).eigenvalues(1)
        kronecker = matrices["Kronecker"]
        found.append(
            {
                "name": block,
                "type": kinds[block],
                "rule": rule,
                "num_parameters": part.num_parameters,
                "trace": trace,
                "trace_stderr": _finite(variance.trace(part)),
                "share": trace / whole_trace if whole_trace > 0 else 0.0,
                "trace_per_parameter": trace / part.num_parameters,
                "largest_eigenvalue": float(spectrum[0]),
                **{
                    f"{kind.lower()}_error": None
                    if F is None
                    else _error(part, F.block(block), overlaps[kind][block])
                    for kind, F in matrices.items()
                    if kind != "BlockDiagonal"
                },
                "kronecker_trace_ratio": None
                if kronecker is None or trace == 0
                else float(kronecker.block(block).trace()) / trace,
            }
        )
    return found


def _kinds(model: nn.Module, exact: FisherOperator) -> dict[str, str]:
    """Per block, the classes of the modules that own its parameters; several if they are shared."""
    owners: dict[int, list[str]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(type(module).__name__)
    parameters = dict(model.named_parameters())
    found: dict[str, dict[str, None]] = {}
    for entry in exact.coverage:
        own = owners[id(parameters[entry.parameter])]
        found.setdefault(entry.block, {}).update(dict.fromkeys(own))
    return {block: " + ".join(names) for block, names in found.items()}


def _overlaps(exact: GramOperator, approximation: FisherOperator) -> dict[str, Tensor]:
    """The inner product `tr F S` of each block; blocks are all that S has."""
    found = {}
    for block in dict.fromkeys(entry.block for entry in exact.coverage):
        ours, its = exact.block(block), approximation.block(block)
        assert isinstance(ours, GramOperator)
        # What is exact is a part of F (its diagonal, its blocks), and F minus it orthogonal to it.
        kept_as_it_is = all(entry.exact for entry in its.coverage)
        found[block] = its.norm().double() ** 2 if kept_as_it_is else ours.overlap(its).double()
    return found


def _error(exact: GramOperator, approximation: FisherOperator, overlap: Tensor) -> float | None:
    """`‖F − S‖ / ‖F‖` in Frobenius norm, without forming either matrix."""
    norm = exact.norm().double()
    if norm == 0:
        return None
    squared = norm**2 - 2 * overlap + approximation.norm().double() ** 2
    return math.sqrt(max(float(squared), 0.0)) / float(norm)


def _summary(exact: FisherOperator, parameter: str, values: Tensor) -> dict[str, Any]:
    """Distribution of the diagonal over one parameter's entries."""
    values = values.flatten().double().cpu()
    positive = values[values > 0]
    histogram = None
    if len(positive):
        logs = positive.log10()
        low, high = float(logs.min()), float(logs.max())
        edges = torch.linspace(low, max(high, low + 1e-6), NUM_BINS + 1, dtype=torch.float64)
        counts = torch.histogram(logs, edges).hist
        histogram = {"log10_edges": edges.tolist(), "counts": [int(c) for c in counts]}
    return {
        "parameter": parameter,
        "layer": exact.coverage[parameter].block,
        "count": len(values),
        "mean": float(values.mean()),
        "min": float(values.min()),
        "max": float(values.max()),
        "quantiles": {str(q): _quantile(values, q) for q in QUANTILES},
        "zeros": int((values == 0).sum()),
        "histogram": histogram,
    }


def _quantile(values: Tensor, q: float) -> float:
    """By sorting: torch.quantile refuses large tensors."""
    return float(values.sort().values[min(int(q * len(values)), len(values) - 1)])


def _above_rounding(values: Tensor) -> Tensor:
    """The eigenvalues that the precision can tell from zero; at least the largest."""
    cutoff = len(values) * torch.finfo(values.dtype).eps * values[0]
    return values[: max(int((values > cutoff).sum()), 1)]


def _spectrum(exact: GramOperator, values: Tensor) -> dict[str, Any]:
    nonzero = values[values > 0].tolist()
    return {
        "method": "Gram",
        "count": len(nonzero),
        "total_dimension": exact.num_parameters,
        "zeros": exact.num_parameters - len(nonzero),
        "leading": nonzero[:NUM_LEADING],
        "eigenvalues": nonzero,
    }


def _effective_dimensions(values: Tensor) -> list[dict[str, float]]:
    """`Σ λ/(λ + damping)` over dampings from far below to above the spectrum."""
    largest = float(values[0])
    if largest <= 0:
        return []
    exponents = torch.linspace(-8, 1, NUM_DAMPINGS, dtype=torch.float64)
    dampings = largest * 10**exponents
    values = values.double()
    return [
        {"damping": float(damping), "value": float((values / (values + damping)).sum())}
        for damping in dampings
    ]
