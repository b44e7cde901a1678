"""Products `F v` from the model and the data, without keeping anything.

Source: Schraudolph, Neural Computation 14 (2002), fast curvature matrix-vector products.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from neuromanifold._typing import Params
from neuromanifold.capture import (
    Batch,
    Tape,
    check_devices,
    differentiable_twice,
    require_function,
)
from neuromanifold.errors import UnsupportedError
from neuromanifold.estimators import Hessian
from neuromanifold.operators import FisherOperator
from neuromanifold.structures._base import Source, Structure, unsupported_reducer
from neuromanifold.structures.diagonal import Diagonal
from neuromanifold.structures.second_order import INSTEAD, NOTE, of_model, second_order_product

__all__ = ["Implicit", "ImplicitOperator"]

PLAIN = "products run attention by the plain mathematics kernel, whose derivatives exist twice"


class Implicit(Structure):
    """Products only: one forward-mode and one reverse-mode pass over the data for each.

    With `nm.Hessian()`, it is one pass of forward mode over reverse mode, about twice as long.
    Needs no memory beyond a backward pass. The operator keeps the model and the data; it sees the
    parameters as they are when a product is taken. Sampled labels are the same in every product.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
        >>> F = nm.fisher(model, nm.Gaussian(), x, nm.Implicit(), estimator=nm.Exact())
        >>> (F @ torch.ones(8)).shape
        torch.Size([8])
    """

    def build(self, source: Source) -> ImplicitOperator:
        """Check that data and model can be used again, count samples, and fix the randomness."""
        if source.reducer is not None:
            raise unsupported_reducer("Implicit()")
        source.require_repeatable("Implicit()")
        if source.estimator.random and source.data.shuffles:
            raise UnsupportedError(
                f"The loader shuffles, so each product of Implicit() would draw the labels of "
                f"{source.estimator!r} for other samples. Use shuffle=False, or nm.Exact()."
            )
        fresh = source.frozen_randomness()
        instead = "Measure with nm.Gram(), which needs one pass only."
        if isinstance(source.estimator, Hessian):
            instead = f"Or {INSTEAD}, with nm.Gram(), which needs one pass only."
        with Tape(source.plan, source.forward, source.likelihood.canonical) as tape:
            for done, batch in enumerate(source.data, start=1):
                outputs, _ = source.outputs(tape, batch)
                if done == 1:
                    canonical = source.likelihood.canonical
                    require_function(
                        source.plan,
                        source.forward,
                        canonical,
                        batch,
                        outputs,
                        instead=instead,
                    )
                if source.progress is not None:
                    source.progress(done, source.data.num_batches)
        return ImplicitOperator(self, source, fresh)


class ImplicitOperator(FisherOperator):
    """`F v = (1/N) Σ_n J_nᵀ Σ_out(n) J_n v`, evaluated when asked."""

    def __init__(
        self, structure: Implicit, source: Source, fresh: Callable[[], torch.Generator]
    ) -> None:
        second_order = isinstance(source.estimator, Hessian)
        super().__init__(
            source.plan.layout,
            source.coverage(lambda _: ("Implicit", True, "")),
            source.origin(structure, (PLAIN, NOTE) if second_order else (PLAIN,)),
            dtype=source.dtype,
            device=source.device,
        )
        self._source = source
        self._fresh = fresh
        self._normaliser = source.normaliser

    def _matmat(self, rows: Tensor) -> Tensor:
        source, generator = self._source, self._fresh()
        parameters = dict(source.plan.model.named_parameters())
        params = {name: parameters[name].detach() for name in self.layout.names}
        tangents = {
            name: rows[:, s].reshape(-1, *self.layout.shapes[name]).to(params[name].dtype)
            for name, s in self.layout.slices.items()
        }
        second_order = isinstance(source.estimator, Hessian)
        product = second_order_product if second_order else _first_order_product
        total = torch.zeros_like(rows, memory_format=torch.contiguous_format)
        for batch in source.data:
            check_devices(batch, self.device)
            pulled = product(source, batch, params, tangents, generator)
            for name, s in self.layout.slices.items():
                total[:, s] += pulled[name].reshape(len(total), -1)
        return total / self._normaliser

    def _diagonal(self) -> Tensor:
        again = replace(self._source, generator=self._fresh(), progress=None)
        return Diagonal().build(again)._diagonal()


def _first_order_product(
    source: Source, batch: Batch, params: Params, tangents: Params, generator: torch.Generator
) -> Params:
    """`Σ_n J_nᵀ Σ_out(n) J_n v` for R vectors."""
    of_params = of_model(source, batch)
    with torch.no_grad(), differentiable_twice(), _explained():
        outputs, pull = vjp(of_params, params)[:2]
        try:
            pushed = _push(of_params, params, tangents)
        except NotImplementedError:  # an operator without forward mode
            pushed = _push_by_transposing(pull, outputs, tangents)
        product = source.estimator.output_product(
            source.likelihood,
            outputs,
            source.targets(outputs, batch),
            pushed,
            generator=generator,
        )
        pulled: Params = vmap(pull)(product.to(outputs.dtype))[0]
    return pulled


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Say what to do about what torch.func cannot transform."""
    try:
        yield
    except RuntimeError as error:
        if "saved tensor hooks" in str(error):
            what = "uses activation checkpointing"
        elif "data pointer" in str(error):
            what = "packs sequences, or calls another function of raw memory"
        else:
            raise
        raise UnsupportedError(
            f"The model {what}, which torch.func cannot differentiate for products of Implicit(). "
            f"nm.Gram() has the same products from one pass."
        ) from error


def _push(
    of_params: Callable[[Params], Tensor], params: Params, tangents: dict[str, Tensor]
) -> Tensor:
    """`J v` for R tangents: `(R, *outputs.shape)`."""
    return vmap(lambda tangent: jvp(of_params, (params,), (tangent,))[1])(tangents)


def _push_by_transposing(
    pull: Callable[[Tensor], tuple[Params]], outputs: Tensor, tangents: dict[str, Tensor]
) -> Tensor:
    """`J v` as the transpose of `u ↦ Jᵀ u`, by reverse mode alone."""
    try:
        transposed = vjp(pull, torch.zeros_like(outputs))[1]
        return vmap(lambda tangent: transposed((tangent,))[0])(tangents)
    except NotImplementedError as error:
        raise UnsupportedError(
            f"The model uses an operator that can be differentiated only once ({error}), and "
            f"products of Implicit() need it twice. nm.Gram() has the same products from one pass."
        ) from error
