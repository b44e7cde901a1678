"""Everything the report shows, as a plain dict first: numbers, no pictures."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuromanifold._estimate import Estimate
from neuromanifold._fisher import fisher
from neuromanifold._progress import Progress, reporting
from neuromanifold.capture import Data, buffers_kept, call_model, logits_of, plan, unwrap
from neuromanifold.errors import TooLargeError, UnsupportedError
from neuromanifold.estimators import Estimator, Exact, MonteCarlo
from neuromanifold.likelihoods import Likelihood
from neuromanifold.linalg import memory
from neuromanifold.operators import FisherOperator
from neuromanifold.report.entries import summary
from neuromanifold.report.estimator_errors import estimator_errors
from neuromanifold.report.known import finite, stderr
from neuromanifold.report.own_metrics import own_metrics
from neuromanifold.report.structure_errors import Candidate, Error, is_part_of_it
from neuromanifold.structures import BlockDiagonal, Diagonal, Gram, Kronecker, Structure, UnitWise
from neuromanifold.structures._base import AdditiveStructure
from neuromanifold.structures.gram import GramOperator
from neuromanifold.variance import spectrum
from neuromanifold.variance.approximation_errors import (
    GROUPS,
    LeftOut,
    gradients,
    leave_groups_out,
)

__all__ = ["collect"]

MAX_EXACT_ROWS = 4096
"""Samples times columns up to which the analysis uses the exact Fisher of every sample."""

SAMPLED_ROWS = 512
"""How many gradients are sent back otherwise; one per sample if there are more samples."""

SAMPLED_ENTRIES = 10**8
"""Entries that all of these gradients have at most, as far as one per sample allows."""

LARGEST_COMPARED = 2 * 2**30
"""Bytes of the structures that are compared; to fill all memory is not worth an error bar."""

LARGEST_GRADIENTS = 2**26
"""Entries of the gradients of one block that are kept at once, to tell errors from them."""

LARGEST_DENSE = 4096
"""Parameters of a block up to which its own matrix is compared, as entries and not as products."""

MOST_PRODUCTS = 2**36
"""Multiplications that may be spent on the error bar of a structure: some seconds."""

STAGES = 7
NUM_LEADING = 20
NUM_DAMPINGS = 25


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
        A JSON-able dict: model, trace, spectrum, layers, diagonal, errors of approximations, the
        units' own metrics, estimators side by side, coverage. Numbers that could not be measured
        are None, and the notes say why. Beside numbers stands `stderr`, with their standard errors
        under the same names: to first order, because the samples are some of all and labels are
        drawn; None where that is not known, as for a single sample.

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

        estimator, num_columns = _choose_estimator(model, likelihood, data, notes)
        stage()
        measure = _Measure(model, likelihood, data, estimator, seed, notes)
        exact = measure(Gram())
        assert isinstance(exact, GramOperator)
        leading = spectrum.eigenvalues(exact, min(NUM_LEADING, exact.num_rows))
        values = _above_rounding(exact.eigenvalues())
        stage()
        structures = (Diagonal(), UnitWise(), Kronecker(), BlockDiagonal())
        matrices = {structure: measure.if_it_fits(structure) for structure in structures}
        candidates = {
            type(structure).__name__: Candidate(
                S,
                whole_blocks=isinstance(structure, BlockDiagonal),
                left_out=measure.left_out(structure, S, exact),
            )
            for structure, S in matrices.items()
            if S is not None
        }
        kinds = [type(structure).__name__ for structure in structures]
        stage()
        layers, diagonal = _blocks(model, exact, kinds, candidates)
        stage()
        whole = {kind: candidate.whole(exact) for kind, candidate in candidates.items()}
        stage()
        estimators = estimator_errors(
            model,
            likelihood,
            data,
            num_rows=exact.num_samples * num_columns,
            num_parameters=exact.num_parameters,
            generator=measure.generator(),
            notes=notes,
        )
        stage()
        units = own_metrics(
            model,
            likelihood,
            data,
            num_rows=exact.num_samples * num_columns,
            num_parameters=exact.num_parameters,
            notes=notes,
        )
        stage()

    trace, largest = float(exact.trace()), float(values[0])
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
        "max_learning_rate": finite(2 / largest) if largest > 0 else None,
        "stable_rank": trace / largest if largest > 0 else None,
        "participation_ratio": _number(_participation_ratio(exact)) if largest > 0 else None,
        "whole_errors": {kind: whole[kind].value if kind in whole else None for kind in kinds},
        "stderr": {
            **_headline_errors(exact, largest, stderr(leading)[0]),
            "whole_errors": {kind: whole[kind].stderr if kind in whole else None for kind in kinds},
        },
        "layers": layers,
        "diagonal": diagonal,
        "spectrum": _spectrum(exact, values, stderr(leading)),
        "effective_dimension": _effective_dimensions(exact, values),
        "own_metrics": units,
        "estimators": estimators,
        "coverage": exact.coverage.to_list(),
        "timing": {
            "seconds": time.perf_counter() - started,
            "estimators": None if estimators is None else estimators.pop("cost"),
        },
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
            generator=self.generator(),
        )

    def generator(self) -> torch.Generator:
        """One that draws the same labels as all others."""
        return torch.Generator().manual_seed(self.seed)

    def if_it_fits(self, structure: Structure) -> FisherOperator | None:
        """None, and a note, where the structure is too large for this model."""
        size = self._size(structure)
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

    def left_out(
        self, structure: AdditiveStructure, S: FisherOperator, exact: GramOperator
    ) -> LeftOut | None:
        """The structure without groups of samples, where its error bar needs that; or a note."""
        if is_part_of_it(S):
            return None
        products = sum(
            2 * GROUPS * exact.num_rows * size**1.5
            for size in _sizes(exact).values()
            if size > LARGEST_DENSE
        )
        too_many = any(size * exact.num_rows > LARGEST_GRADIENTS for size in _sizes(exact).values())
        too_large = (GROUPS + 1) * self._size(structure) > LARGEST_COMPARED
        if too_many or too_large or products > MOST_PRODUCTS:
            self.notes.append(
                f"The errors of {type(structure).__name__} have no error bars: those take "
                f"{GROUPS} more of it, and structures are compared up to "
                f"{memory.readable(LARGEST_COMPARED)} and some seconds."
            )
            return None
        return leave_groups_out(
            self.model,
            self.likelihood,
            self.data,
            structure,
            estimator=self.estimator,
            generator=self.generator(),
        )

    def _size(self, structure: Structure) -> int:
        """Bytes that it keeps of any data."""
        measured = plan(self.model, None, "generic")
        return structure.constant_numel(measured) * measured.dtype.itemsize


def _sizes(exact: FisherOperator) -> dict[str, int]:
    """Parameters of each block."""
    found: dict[str, int] = {}
    for entry in exact.coverage:
        size = math.prod(exact.layout.shapes[entry.parameter])
        found[entry.block] = found.get(entry.block, 0) + size
    return found


def _headline_errors(
    exact: GramOperator, largest: float, of_largest: float | None
) -> dict[str, float | None]:
    """Standard errors of the headline numbers; that of the effective dimension is at λmax/100."""
    found = {
        "trace": stderr(spectrum.trace(exact)),
        "frobenius": stderr(spectrum.norm(exact)),
        "largest_eigenvalue": of_largest,
    }
    if largest > 0:
        relative = None if of_largest is None else of_largest / largest
        found["max_learning_rate"] = None if relative is None else finite(2 / largest * relative)
        found["stable_rank"] = stderr(spectrum.stable_rank(exact))
        found["participation_ratio"] = stderr(_participation_ratio(exact))
        dimension = spectrum.effective_dimension(exact, damping=largest / 100)
        found["effective_dimension"] = stderr(dimension)
    return found


def _participation_ratio(exact: GramOperator) -> Estimate:
    """`(Σ λ)² / Σ λ²`, how many eigenvalues share the trace, with its standard error."""
    gram = exact.gram.double()
    gram = gram / gram.diagonal().max()  # squares of very little information would be zero
    own, squares = gram.diagonal(), gram.square().sum(dim=1)
    trace, squared = own.sum(), squares.sum()
    value = trace.square() / squared
    return spectrum.from_rows(exact, value, 2 * value * (own / trace - squares / squared))


def _choose_estimator(
    model: nn.Module, likelihood: Likelihood, data: Any, notes: list[str]
) -> tuple[Estimator, int]:
    """The exact Fisher if its Gram matrix stays small, else a few labels per sample.

    Returns:
        The estimator, and the columns of the output Fisher of a sample.
    """
    num_samples, columns, inexact = 0, 0, ""
    with torch.no_grad(), buffers_kept(model):
        for batch in Data(data, unwrap(model)):
            outputs = likelihood.canonical(logits_of(call_model(model, batch.inputs)))
            if len(outputs):  # else the measurement refuses it
                num_samples += len(outputs)
                columns = max(columns, likelihood.num_columns(outputs))
                inexact = inexact or _without_columns(likelihood, outputs)
    if num_samples * columns <= MAX_EXACT_ROWS and not inexact:
        return Exact(), columns
    num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = min(SAMPLED_ROWS, SAMPLED_ENTRIES // max(num_parameters, 1))
    draws = max(rows // num_samples, 1)
    note = inexact or (
        f"The exact matrix takes {num_samples * columns:,} gradients, {columns:,} for each of "
        f"{num_samples:,} samples."
    )
    note += (
        f" Here it is estimated by {draws} for each, with labels drawn from the model. This leaves "
        f"noise in all numbers: there are no more eigenvalues than gradients, the largest tend to "
        f"be too large, and approximations look worse than they are."
    )
    if not inexact and 2 * columns <= MAX_EXACT_ROWS:
        note += f" Up to {MAX_EXACT_ROWS // columns:,} samples are measured exactly."
    notes.append(note)
    return MonteCarlo(draws), columns


def _without_columns(likelihood: Likelihood, outputs: Tensor) -> str:
    """Why the output Fisher has no exact form; empty if it has one."""
    try:
        next(iter(likelihood.fisher_columns(outputs[:1])))
    except UnsupportedError as error:
        return str(error)
    return ""


def _blocks(
    model: nn.Module,
    exact: GramOperator,
    structures: list[str],
    candidates: dict[str, Candidate],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Per block: share of the trace, largest eigenvalue, errors of structures; and its entries."""
    kinds = _kinds(unwrap(model), exact)
    rules = {entry.block: entry.rule for entry in exact.coverage}
    whole = candidates.get("BlockDiagonal")
    layers: list[dict[str, Any]] = []
    entries: dict[str, dict[str, Any]] = {}
    for block, rule in rules.items():
        part = exact.block(block)
        assert isinstance(part, GramOperator)
        dense = rows = None
        if whole is not None and part.num_parameters <= LARGEST_DENSE:
            dense = whole.S.block(block).to_dense()
        if part.num_rows * part.num_parameters <= LARGEST_GRADIENTS:
            rows = gradients(part)
        seen = {kind: each.see(block, part, rows, dense) for kind, each in candidates.items()}
        layers.append(
            {
                "name": block,
                "type": kinds[block],
                "rule": rule,
                **_layer(part, exact, dense, seen, [k for k in structures if k != "BlockDiagonal"]),
                **_ratios(part, candidates.get("Kronecker"), block),
            }
        )
        for name, value in part.diagonal().items():
            entries[name] = summary(part, name, value, rows)
    return layers, [entries[name] for name in exact.layout.names]


def _layer(
    part: GramOperator,
    exact: GramOperator,
    dense: Tensor | None,
    seen: dict[str, Error],
    structures: list[str],
) -> dict[str, Any]:
    """Numbers of a block, and their standard errors."""
    size, trace, share = part.num_parameters, spectrum.trace(part), spectrum.share(part, exact)
    small = dense is not None and size <= part.num_rows
    largest = spectrum.largest_eigenvalue(part, dense if small else None)
    of_trace = stderr(trace)
    numbers = {
        "trace": (float(part.trace()), of_trace),
        "share": (_number(share), stderr(share)),
        "trace_per_parameter": (
            float(part.trace()) / size,
            None if of_trace is None else of_trace / size,
        ),
        "largest_eigenvalue": (_number(largest), stderr(largest)),
        **{
            f"{kind.lower()}_error": (seen[kind].value, seen[kind].stderr)
            if kind in seen
            else (None, None)
            for kind in structures
        },
    }
    return {
        "num_parameters": size,
        **{name: value for name, (value, _) in numbers.items()},
        "stderr": {name: error for name, (_, error) in numbers.items()},
    }


def _number(estimate: Estimate) -> float:
    assert isinstance(estimate.value, Tensor)
    return float(estimate.value)


def _ratios(part: GramOperator, kronecker: Candidate | None, block: str) -> dict[str, float | None]:
    """Trace and largest eigenvalue of the factors over those of the block itself."""
    names = "kronecker_trace_ratio", "kronecker_largest_ratio"
    if kronecker is None or float(part.trace()) == 0:
        return dict.fromkeys(names)
    S = kronecker.S.block(block)
    pairs = (S.trace(), part.trace()), (S.eigenvalues(1)[0], part.eigenvalues(1)[0])
    return {
        name: finite(float(factors) / float(exact))
        for name, (factors, exact) in zip(names, pairs, strict=True)
    }


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


def _above_rounding(values: Tensor) -> Tensor:
    """The eigenvalues that the precision can tell from zero; at least the largest."""
    cutoff = len(values) * torch.finfo(values.dtype).eps * values[0]
    return values[: max(int((values > cutoff).sum()), 1)]


def _spectrum(exact: GramOperator, values: Tensor, errors: list[float | None]) -> dict[str, Any]:
    nonzero = values[values > 0].tolist()
    leading = nonzero[:NUM_LEADING]
    return {
        "method": "Gram",
        "count": len(nonzero),
        "total_dimension": exact.num_parameters,
        "zeros": exact.num_parameters - len(nonzero),
        "leading": leading,
        "stderr": {"leading": errors[: len(leading)]},
        "eigenvalues": nonzero,
    }


def _effective_dimensions(exact: GramOperator, values: Tensor) -> list[dict[str, float | None]]:
    """`Σ λ/(λ + damping)` over dampings from far below to above the spectrum."""
    largest = float(values[0])
    if largest <= 0:
        return []
    exponents = torch.linspace(-8, 1, NUM_DAMPINGS, dtype=torch.float64)
    dampings = largest * 10**exponents
    errors = stderr(spectrum.effective_dimension(exact, damping=dampings))
    values = values.double()
    return [
        {
            "damping": float(damping),
            "value": float((values / (values + damping)).sum()),
            "stderr": error,
        }
        for damping, error in zip(dampings, errors, strict=True)
    ]
