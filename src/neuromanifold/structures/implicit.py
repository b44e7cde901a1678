"""Products `F v` from the model and the data, without keeping anything.

Source: Schraudolph, Neural Computation 14 (2002), fast curvature matrix-vector products.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointError

from neuromanifold._typing import Params
from neuromanifold.capture import (
    FEW,
    Batch,
    Tape,
    check_devices,
    differentiable_twice,
    require_function,
)
from neuromanifold.capture.curvature import OfParams
from neuromanifold.errors import UnsupportedError
from neuromanifold.estimators import Hessian
from neuromanifold.operators import FisherOperator, Origin
from neuromanifold.structures._base import Source, Structure, unsupported_reducer
from neuromanifold.structures.diagonal import Diagonal
from neuromanifold.structures.linearisation import Linearisation, pushed_once
from neuromanifold.structures.second_order import (
    INSTEAD,
    NOTE,
    Targets,
    of_model,
    second_order_product,
)

__all__ = ["Implicit", "ImplicitOperator"]

PLAIN = "products run attention by the plain mathematics kernel, whose derivatives exist twice"


LIGHT = 2**22
"""Parameters times samples up to which calls cost more than products: vectors go together."""


@dataclass(frozen=True, repr=False)
class Implicit(Structure):
    """Products only: one forward-mode and one reverse-mode pass over the data for each.

    With `nm.Hessian()`, it is one pass of forward mode over reverse mode, about twice as long.
    The operator keeps the model and the data; it sees the parameters as they are when a product is
    taken. Sampled labels are the same in every product.

    To measure is to run a few samples, which tell whether products are possible. The first product
    (or `F.num_samples`) sees all of the data, so what is wrong with the others is found then.

    Args:
        keep: let products that repeat, with data of one batch and parameters that have not changed,
            keep what a forward and a backward pass leave in memory, so that the model does not run
            again. Without, nothing is kept between products.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
        >>> F = nm.fisher(model, nm.Gaussian(), x, nm.Implicit(), estimator=nm.Exact())
        >>> (F @ torch.ones(8)).shape
        torch.Size([8])
    """

    keep: bool = True

    def build(self, source: Source) -> ImplicitOperator:
        """Check that data and model can be used again, and fix the randomness."""
        if source.reducer is not None:
            raise unsupported_reducer("Implicit()")
        source.require_repeatable("Implicit()")
        if source.estimator.random and source.data.shuffles:
            raise UnsupportedError(
                f"The loader shuffles, so each product of Implicit() would draw the labels of "
                f"{source.estimator!r} for other samples. Use shuffle=False, or nm.Exact()."
            )
        fresh = source.frozen_randomness()
        _require_products(source)
        return ImplicitOperator(self, replace(source, progress=None), fresh)


def _require_products(source: Source) -> None:
    """Try a few samples."""
    first, _ = source.data.peek()
    with contextlib.suppress(Exception):  # the model may insist on the size of the batch
        _require_function(source, first.samples(0, _few(first)))
        return
    _require_function(source, first)


def _few(batch: Batch) -> int:
    """How many samples: of texts, each token tells as much as a sample elsewhere."""
    lengths = [
        leaf.shape[1]
        for leaf in tree_leaves(batch.inputs)
        if isinstance(leaf, Tensor) and leaf.ndim == 2 and not leaf.is_floating_point()
    ]
    return max(FEW // max(lengths, default=1), 2)


def _require_function(source: Source, batch: Batch) -> None:
    canonical = source.likelihood.canonical
    instead = "Measure with nm.Gram(), which needs one pass only."
    if isinstance(source.estimator, Hessian):
        instead = f"Or {INSTEAD}, with nm.Gram(), which needs one pass only."
    with Tape(source.plan, source.forward, canonical) as tape:
        outputs, _ = source.outputs(tape, batch)
        require_function(source.plan, source.forward, canonical, batch, outputs, instead=instead)


class ImplicitOperator(FisherOperator):
    """`F v = (1/N) Σ_n J_nᵀ Σ_out(n) J_n v`, evaluated when asked."""

    def __init__(
        self, structure: Implicit, source: Source, fresh: Callable[[], torch.Generator]
    ) -> None:
        second_order = isinstance(source.estimator, Hessian)
        self._counted = False
        super().__init__(
            source.plan.layout,
            source.coverage(lambda _: ("Implicit", True, "")),
            source.origin(structure, (PLAIN, NOTE) if second_order else (PLAIN,)),
            dtype=source.dtype,
            device=source.device,
        )
        self._source = source
        self._fresh = fresh
        self._kept = _Kept() if structure.keep else None

    @property
    def origin(self) -> Origin:
        """Where the matrix comes from; the samples are counted if nobody has yet."""
        if not self._counted:
            source = self._start_count()
            with torch.no_grad():
                for batch in source.data:
                    outputs = of_model(source, batch)({})
                    source.count(outputs, source.targets(outputs, batch))
            self._counted = True
        return replace(self._origin, num_samples=self._source.num_samples)

    @origin.setter
    def origin(self, origin: Origin) -> None:
        self._origin = origin

    def _start_count(self) -> Source:
        self._source.num_samples = self._source.num_positions = 0
        return self._source

    def _matmat(self, rows: Tensor) -> Tensor:
        generator = self._fresh()
        source = self._source if self._counted else self._start_count()
        parameters = dict(source.plan.model.named_parameters())
        params = {name: parameters[name].detach() for name in self.layout.names}
        tangents = {
            name: rows[:, s].reshape(-1, *self.layout.shapes[name]).to(params[name].dtype)
            for name, s in self.layout.slices.items()
        }
        if isinstance(source.estimator, Hessian):
            product = second_order_product
        else:
            alone = source.data.num_batches == 1
            product = partial(_first_order_product, kept=self._kept if alone else None)
        total: Tensor | None = None
        for batch in source.data:
            check_devices(batch, self.device)
            pulled = product(source, batch, self._targets(batch), params, tangents, generator)
            pieces = [pulled[name].reshape(len(rows), -1) for name in self.layout.names]
            found = torch.cat(pieces, dim=1).to(rows.dtype)
            total = found if total is None else total.add_(found)
        assert total is not None  # data without a batch were refused when they were measured
        self._counted = True
        return total.div_(source.normaliser)

    def _targets(self, batch: Batch) -> Targets:
        counted = self._counted

        def targets(outputs: Tensor) -> Tensor | None:
            nonlocal counted
            found = self._source.targets(outputs, batch)
            if not counted:
                self._source.count(outputs, found)
                counted = True
            return found

        return targets

    def _diagonal(self) -> Tensor:
        again = replace(self._source, generator=self._fresh(), progress=None)
        return Diagonal().build(again)._diagonal()


class _Kept:
    """The linearisation at a batch, once products there repeat, while nothing changes."""

    def __init__(self) -> None:
        self._products = 0
        self._state: list[Tensor] = []
        self._modes: list[tuple[nn.Module, bool]] = []
        self._linear: Linearisation | None = None

    def linear(
        self, model: nn.Module, batch: Batch, make: Callable[[], Linearisation]
    ) -> Linearisation | None:
        """What is kept; None for the first product, and for the first after a change."""
        leaves = [*model.parameters(), *model.buffers(), *tree_leaves(batch.inputs)]
        state = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        modes = [(module, module.training) for module in model.modules()]
        changed = modes != self._modes or not _same(state, self._state)
        if self._linear is not None and changed:
            self._linear, self._products = None, 0
        self._products += 1
        if self._products > 1 and self._linear is None:
            self._linear = make()
            self._state = [leaf.detach().clone() for leaf in state]
            self._modes = modes
        return self._linear


def _same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def _first_order_product(
    source: Source,
    batch: Batch,
    targets: Targets,
    params: Params,
    tangents: Params,
    generator: torch.Generator,
    kept: _Kept | None,
) -> Params:
    """`Σ_n J_nᵀ Σ_out(n) J_n v` for R vectors."""
    model, of_params = source.plan.model, of_model(source, batch)
    num_vectors = len(next(iter(tangents.values())))
    before = generator.get_state() if num_vectors > 1 else None

    def at_outputs(outputs: Tensor, pushed: Tensor) -> Tensor:
        product = source.estimator.output_product(
            source.likelihood,
            outputs,
            targets(outputs),
            pushed,
            generator=generator,
        )
        return product.to(outputs.dtype)

    with torch.no_grad(), differentiable_twice(model), _explained():
        if before is not None and _light(batch, params):
            try:
                return _together(of_params, params, tangents, at_outputs)
            except RuntimeError:  # plain autograd takes some of what torch.func does not
                generator.set_state(before)
        make = partial(Linearisation, of_params, params)
        linear = None if kept is None else kept.linear(model, batch, make)
        if linear is None and num_vectors > 1:
            linear = make()
        pulled = []
        for i in range(num_vectors):
            if i > 0 and before is not None:
                generator.set_state(before)  # the same labels
            v = {name: value[i] for name, value in tangents.items()}
            pulled.append(_alone(of_params, params, v, linear, at_outputs))
    if num_vectors == 1:
        return {name: value[None] for name, value in pulled[0].items()}
    return {name: torch.stack([found[name] for found in pulled]) for name in params}


def _alone(
    of_params: OfParams,
    params: Params,
    v: Params,
    linear: Linearisation | None,
    at_outputs: Callable[[Tensor, Tensor], Tensor],
) -> Params:
    """For one vector."""
    if linear is None:
        try:
            outputs, pushed, pull = pushed_once(of_params, params, v)
            return pull(at_outputs(outputs, pushed[None])[0])
        except (NotImplementedError, CheckpointError):  # no forward mode
            linear = Linearisation(of_params, params)
    return linear.pull(at_outputs(linear.outputs, linear.push(v)[None])[0])


def _together(
    of_params: OfParams,
    params: Params,
    tangents: Params,
    at_outputs: Callable[[Tensor, Tensor], Tensor],
) -> Params:
    """For all vectors in one pass.

    Raises:
        RuntimeError: If torch.func cannot transform the model.
    """
    outputs, pull = vjp(of_params, params)[:2]
    pushed = vmap(lambda tangent: jvp(of_params, (params,), (tangent,))[1])(tangents)
    pulled: Params = vmap(pull)(at_outputs(outputs, pushed))[0]
    return pulled


def _light(batch: Batch, params: Params) -> bool:
    """Whether the model is so small that most of a pass goes to calls."""
    rows = [
        leaf.shape[0]
        for leaf in tree_leaves(batch.inputs)
        if isinstance(leaf, Tensor) and leaf.ndim
    ]
    return max(rows, default=1) * sum(value.numel() for value in params.values()) <= LIGHT


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Say what to do about what cannot be differentiated."""
    try:
        yield
    except NotImplementedError as error:
        raise UnsupportedError(
            f"The model uses an operator that can be differentiated only once ({error}), and "
            f"products of Implicit() need it twice. nm.Gram() has the same products from one pass."
        ) from error
