"""Fisher matrices made of second derivatives at sampled labels (papers.md §3.2, type 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from neuromanifold._typing import Params
from neuromanifold.capture import Batch, Tape, functional_model, require_function
from neuromanifold.capture.curvature import (
    OfParams,
    along_entries,
    curvature_matrix,
    curved,
    irregular,
    products,
    require_few,
    shifted,
    swapped_one,
    twice,
    unit_matrices,
    used_once,
)
from neuromanifold.capture.generic import differ
from neuromanifold.errors import UnsupportedError
from neuromanifold.estimators import Exact, Hessian
from neuromanifold.estimators.hessian import Surprise
from neuromanifold.layers import Record
from neuromanifold.linalg import Block
from neuromanifold.operators import BlockOperator, IndefiniteOperator, Matrices
from neuromanifold.structures._base import (
    RECORD_NUMEL,
    AdditiveStructure,
    Source,
    Statistics,
    Structure,
    accumulate,
    require_finite,
)

__all__ = [
    "INSTEAD",
    "NOTE",
    "Labelled",
    "Targets",
    "of_model",
    "second_order_blocks",
    "second_order_matrix",
    "second_order_product",
]

INSTEAD = "use nm.MonteCarlo(), which is made of first derivatives"
NOTE = "made of second derivatives: the Fisher matrix on average over labels, maybe indefinite"


Targets = Callable[[Tensor], Tensor | None]
"""A batch's targets, given the outputs for it."""


@dataclass(frozen=True)
class Labelled:
    """A batch and the labels that were drawn for it.

    Attributes:
        source: the measurement.
        tape: where the batch was run.
        of_params: the outputs as a function of parameters.
        surprise: `−log p` of the labels, `(N,)` nats, as a function of the outputs.
        outputs: `(N, *K)`, detached.
        targets: of the data, or None; they mark ignored positions.
    """

    source: Source
    tape: Tape
    of_params: OfParams
    surprise: Surprise
    outputs: Tensor
    targets: Tensor | None

    def parameters(self, block: Block) -> Params:
        """Those of a block."""
        parameters = self.source.plan.parameters
        return {name: parameters[name].detach() for name in block.parameters}

    def slope(self) -> Tensor:
        """Derivative of the surprise in the outputs, like these."""
        found: Tensor = grad(self._total_at_outputs)(self.outputs)
        return found

    def output_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """Its second derivative at some outputs times `v (R, N, *K)`."""
        slope = grad(self._total_at_outputs)
        found: Tensor = vmap(lambda u: jvp(slope, (outputs,), (u,))[1])(v)
        return found

    def _total_at_outputs(self, outputs: Tensor) -> Tensor:
        return self.surprise(outputs).sum()

    def _total_at_params(self, params: Params) -> Tensor:
        return self.surprise(self.of_params(params)).sum()

    def label_free(self) -> bool:
        """Whether the second derivative in the outputs is the output Fisher, whatever the labels.

        Along one vector without regularities, both agree only if they are the same. In double
        precision, so that no label hides behind the rounding of a sample with more information.
        """
        likelihood, outputs = self.source.likelihood, self.outputs.double()
        v = irregular(outputs)
        try:
            expected = likelihood.fisher_product(outputs, v)
            found = self.output_product(outputs, v[None])[0]
        except (UnsupportedError, RuntimeError):  # no closed form, or single precision only
            return False
        expected = likelihood.mask_cotangent(expected, outputs, self.targets)
        return not differ(found, expected, torch.finfo(outputs.dtype).eps)

    def whole_matrix(self) -> Tensor:
        """Second derivatives of the surprise of all samples, `(P, P)`."""
        return self._matrix(Block.whole(self.source.plan.layout))

    def block_matrix(self, record: Record) -> Tensor:
        """Those in the block of a record, `(p, p)`."""
        layer = used_once(self.source.plan, record)
        if layer is None:
            return self._matrix(record.block)
        return self._layer_matrix(record.block.fan_out, *layer)

    def _matrix(self, block: Block) -> Tensor:
        together = self._together(4 * block.num_parameters)
        layout = self.source.plan.layout
        matrix = curvature_matrix(
            self._total_at_params, self.parameters(block), block, layout, together
        )
        return matrix.to(self.source.dtype)

    def _layer_matrix(self, fan_out: int, module: nn.Module, inputs: Tensor) -> Tensor:
        """Of a linear layer with inputs `ã (N, I)` that each sample uses once."""

        def number(shift: Tensor) -> Tensor:
            return self.surprise(shifted(self.of_params, module, shift)).sum()

        inputs = inputs.to(self.source.dtype)
        fan_in = inputs.shape[1]
        at = inputs.new_zeros(len(inputs), fan_out)
        matrix = inputs.new_zeros(fan_out, fan_in, fan_out * fan_in)
        for some, found in unit_matrices(number, at, self._together(4 * at.numel())):
            samples = max(RECORD_NUMEL // (len(found) * matrix[0, 0].numel()), 1)
            for a, c in zip(inputs.split(samples), found.split(samples, dim=1), strict=True):
                right = c[..., None] * a[:, None]  # (R, N, O, I)
                matrix[some] += a.T @ right.flatten(2)
        matrix = matrix.flatten(0, 1)
        return (matrix + matrix.T).div_(2)

    def block_diagonal(self, record: Record) -> Tensor:
        """Their diagonal in the block of a record, `(G, O, I)`."""
        block, source = record.block, self.source
        layer = used_once(source.plan, record)
        if layer is not None:
            module, inputs = layer
            unit = partial(shifted, self.of_params, module)
            along = self._along_entries(unit, inputs.new_zeros(block.fan_out))
            return (along @ inputs.square().to(source.dtype))[None]
        require_few(block, INSTEAD)
        own = source.plan.layout.restrict(block.parameters)
        rows = torch.zeros(1, own.num_parameters, dtype=source.dtype, device=source.device)
        for name, at in self.parameters(block).items():
            one = partial(swapped_one, self.of_params, name)
            rows[0, own.slices[name]] = self._along_entries(one, at).sum(dim=1)
        return block.read(rows, own)[0]

    def _along_entries(self, function: Callable[[Any], Tensor], at: Tensor) -> Tensor:
        """Second derivatives of each sample's surprise, `(entries, N)`.

        With h the outputs, `∂²ℓ = (∂h)ᵀ (∂²ℓ/∂h²) (∂h) + (∂ℓ/∂h) · ∂²h`.
        """
        slope, together = self.slope(), self._together(3 * at.numel())
        found = [
            (first * self.output_product(self.outputs, first) + slope * second)
            .flatten(2)
            .sum(dim=2)
            for first, second in along_entries(function, at, together)
        ]
        return torch.cat(found).to(self.source.dtype)

    def _together(self, numel: int) -> int:
        """How many directions are followed at once, if each brings so many numbers of its own."""
        numel += 4 * (self.tape.sweep_numel + self.outputs.numel())
        return self.source.sweeps_together(numel)


def of_model(source: Source, batch: Batch) -> OfParams:
    """The outputs for a batch as a function of parameters."""
    model = functional_model(source.plan, source.forward, source.likelihood.canonical)
    return lambda params: model(params, batch.inputs)


def _labelled_batches(source: Source) -> Iterator[Labelled]:
    """Pass over the data once, and draw labels for each batch."""
    estimator, likelihood = source.estimator, source.likelihood
    assert isinstance(estimator, Hessian)
    source.num_samples = source.num_positions = 0
    with Tape(source.plan, source.forward, likelihood.canonical) as tape:
        for done, batch in enumerate(source.data, start=1):
            outputs, targets = source.outputs(tape, batch)
            if done == 1:
                require_function(
                    source.plan,
                    source.forward,
                    likelihood.canonical,
                    batch,
                    outputs,
                    instead=f"Or {INSTEAD} in one pass.",
                )
            surprise = estimator.surprise(likelihood, outputs, targets, generator=source.generator)
            of_params = of_model(source, batch)
            yield Labelled(source, tape, of_params, surprise, outputs, targets)
            if source.progress is not None:
                source.progress(done, source.data.num_batches)


# ---- products --------------------------------------------------------------------------------


def second_order_product(
    source: Source,
    batch: Batch,
    targets: Targets,
    params: Params,
    tangents: Params,
    generator: torch.Generator,
) -> Params:
    """Second derivatives of the surprise of a batch's labels times R vectors."""
    estimator, of_params = source.estimator, of_model(source, batch)
    assert isinstance(estimator, Hessian)
    with twice(source.plan.model, params, INSTEAD):
        outputs = of_params(params)
        likelihood = source.likelihood
        surprise = estimator.surprise(likelihood, outputs, targets(outputs), generator=generator)
        return products(lambda moved: surprise(of_params(moved)).sum(), params, tangents)


# ---- the whole matrix ------------------------------------------------------------------------


def second_order_matrix(structure: Structure, source: Source) -> IndefiniteOperator:
    """All second derivatives, by products with unit vectors."""
    structure.require_fits(source)
    layout = source.plan.layout
    p = layout.num_parameters
    whole = Block.whole(layout)
    total = torch.zeros(p, p, dtype=source.dtype, device=source.device)
    for labelled in _labelled_batches(source):
        with twice(source.plan.model, layout.names, INSTEAD):
            total += labelled.whole_matrix()
    source.reduce([total])
    require_finite({name: {"": total[s]} for name, s in layout.slices.items()})
    matrix = Matrices(whole, total[None].div_(source.normaliser))
    coverage = source.coverage(lambda _: (type(structure).__name__, True, ""))
    origin = source.origin(structure, (NOTE,))
    return IndefiniteOperator(BlockOperator(layout, [matrix], coverage, origin))


# ---- structures that are sums over samples, block by block -----------------------------------

OfSurprise = Callable[[Labelled, Record], Statistics]
"""What a structure keeps of the second derivatives in the block of a record."""


def second_order_blocks(
    structure: AdditiveStructure, source: Source, of_surprise: OfSurprise
) -> IndefiniteOperator:
    """Measure an additive structure by second derivatives.

    Where the outputs are linear in a block's parameters, and the labels drop out of the second
    derivative in the outputs, the matrix is that of `nm.Exact()` and made in the same way.
    """
    structure.require_fits(source)
    sums: dict[str, Statistics] = {}
    found = [
        _of_batch(structure, labelled, of_surprise, sums) for labelled in _labelled_batches(source)
    ]
    linear = set.intersection(*found)
    blocks = source.plan.blocks  # an order that is the same in all processes
    source.reduce([tensor for block in blocks for tensor in sums[block.name].values()])
    require_finite(sums)

    def represent(block: Block) -> tuple[str, bool, str]:
        note = "labels drop out: as by nm.Exact()" if block.name in linear else ""
        return type(structure).__name__, True, note

    matrices = [structure.assemble(block, sums[block.name], source.normaliser) for block in blocks]
    origin = source.origin(structure, (NOTE,))
    return IndefiniteOperator(
        BlockOperator(source.plan.layout, matrices, source.coverage(represent), origin)
    )


def _of_batch(
    structure: AdditiveStructure,
    labelled: Labelled,
    of_surprise: OfSurprise,
    sums: dict[str, Statistics],
) -> set[str]:
    """Add the statistics of a batch; returns the blocks for which the labels drop out."""
    source, tape, outputs = labelled.source, labelled.tape, labelled.outputs
    exact = Exact()
    with twice(source.plan.model, source.plan.layout.names, INSTEAD):
        slope = labelled.slope()
        label_free = (
            labelled.label_free()
            # Else the second derivatives are fewer than the columns of the output Fisher.
            and exact.num_sweeps(source.likelihood, outputs) <= source.plan.layout.num_parameters
        )
    linear = set()
    for record in tape.records(slope[None]):
        block = record.block
        with twice(source.plan.model, block.parameters, INSTEAD):
            of_params, parameters = labelled.of_params, labelled.parameters(block)
            if not curved(of_params, parameters, tape.eps, INSTEAD) and label_free:
                linear.add(block.name)
            else:
                accumulate(sums.setdefault(block.name, {}), of_surprise(labelled, record))
    if not linear:
        return linear
    columns = exact.cotangents(source.likelihood, outputs, labelled.targets)
    while chunk := list(islice(columns, source.sweeps_together(tape.sweep_numel))):
        for record in tape.records(torch.stack(chunk)):
            if record.block.name in linear:
                for part in structure.split(record):
                    statistics = structure.statistics(part)
                    accumulate(sums.setdefault(record.block.name, {}), statistics)
    return linear
