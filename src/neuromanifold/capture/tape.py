"""The tape: one forward pass with hooks, then sweeps of cotangents that leave a record per layer.

A forward hook keeps each layer's input and the gradient edge of its output; a sweep asks autograd
for the gradients at those edges. No weight gradient is computed and no `p.grad` is touched
(docs/decisions/0001-capture.md).
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from neuromanifold.capture.data import Batch, Forward, call_model, logits_of
from neuromanifold.capture.generic import buffers_kept, per_sample_gradients, runs_alone
from neuromanifold.capture.graph import Graph
from neuromanifold.capture.layout import Plan, Site
from neuromanifold.errors import CaptureError
from neuromanifold.layers import Call, Record

__all__ = ["Tape"]

Arrangement = Literal["first", "second", "minor"]
"""Where the samples are in a layer's input: axis 0 (possibly with positions folded in behind the
samples), axis 1, or axis 0 with positions folded in front of the samples."""

_VERIFIED: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], dict[str, Arrangement]]] = (
    WeakKeyDictionary()
)
"""Arrangements already checked, per model and shapes: the check costs two sweeps."""


@dataclass
class _Use:
    """One call of a module during the forward pass."""

    x: Tensor | None
    version: int
    edge: GradientEdge
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Tape:
    """Runs batches through a planned model and turns cotangents at its outputs into records.

    Use as a context manager: the hooks exist only inside it.

    Args:
        plan: who reports; parameters whose module is bypassed move to the generic path in the
            first batch.
        forward: how the model is called.
        canonical: brings what the model returns to one tensor `(N, ...)`.
    """

    def __init__(self, plan: Plan, forward: Forward, canonical: Callable[[Any], Tensor]) -> None:
        self.plan = plan
        self._forward = forward
        self._canonical = canonical
        self._uses: dict[str, list[_Use]] = {}
        self._unseen: set[str] = set()
        self._arrangements: dict[str, Arrangement] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._settled = False
        self._by_samples = True
        self._listening = False
        # What is known of a model holds for its own forward only.
        shared = forward is call_model
        self._verified = _VERIFIED.setdefault(plan.model, {}) if shared else {}

    def __enter__(self) -> Tape:
        for name, site in self.plan.sites.items():
            # Before the user's own hooks, which may replace the layer's output.
            self._handles.append(
                site.module.register_forward_hook(
                    self._hook(name, site), with_kwargs=True, prepend=True
                )
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._uses.clear()

    def run(self, batch: Batch) -> Tensor:
        """Forward pass of a batch: outputs `(N, ...)`, attached to the graph that sweeps follow.

        Raises:
            CaptureError: If a module cannot be seen (compiled, or checkpointed reentrantly), or the
                samples cannot be told apart in its input.
        """
        self._uses = {name: [] for name in self.plan.sites}
        self._unseen = set()
        self._batch = batch
        kept = buffers_kept(self.plan.model)
        with torch.enable_grad(), kept, _separate_casts(), _listening_to_hooks(self):
            outputs = self._canonical(logits_of(self._forward(self.plan.model, batch.inputs)))
            if outputs.is_leaf and outputs.requires_grad:  # a parameter itself: give it a graph
                outputs = outputs.view_as(outputs)
        if outputs.shape[0] == 0:
            raise ValueError(
                f"The batch has no samples: the outputs have shape {tuple(outputs.shape)}. Leave "
                f"empty batches out."
            )
        if not outputs.requires_grad:
            raise CaptureError(
                "The outputs do not depend on any measured parameter by a differentiable path. "
                "Does the model run under torch.no_grad(), or detach its outputs?"
            )
        self._outputs = outputs
        self._first_records = True
        dtypes = {use.dtype for uses in self._uses.values() for use in uses} | {outputs.dtype}
        self._eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        graph = Graph.of(outputs)
        self._account_for_every_use(graph)
        self._find_samples(graph)
        if self.plan.generic and not self._settled:
            self._by_samples = runs_alone(
                self.plan, self._forward, self._canonical, batch, outputs, self._eps
            )
        self._settled = True
        return outputs

    def records(self, cotangents: Tensor) -> Iterator[Record]:
        """Send cotangents `(V, *outputs.shape)` back; yields one record per block.

        The records of a batch must be asked for before the next batch is run.
        """
        uses = [(name, use) for name in self.plan.sites for use in self._uses[name]]
        gradients = self._sweep([use for _, use in uses], cotangents)
        calls: dict[str, list[Call]] = {name: [] for name in self.plan.sites}
        for i, (name, use) in enumerate(uses):
            g, gradients[i] = gradients[i], None
            if g is None:  # the output of this call does not reach the model's outputs
                g = torch.zeros((len(cotangents), *use.shape), dtype=use.dtype, device=use.device)
            calls[name].append(self._call(name, use, g))
        generic = (
            per_sample_gradients(
                self.plan,
                self._forward,
                self._canonical,
                self._batch,
                self._outputs,
                cotangents,
                by_samples=self._by_samples,
                eps=self._eps,
            )
            if self.plan.generic
            else {}
        )
        num_samples, dtype = self._outputs.shape[0], self.plan.dtype
        first, self._first_records = self._first_records, False
        for block in self.plan.blocks:
            if block.name in self.plan.sites:
                called = calls.pop(block.name) or [self._silent(block.name, cotangents)]
            else:
                called = [Call.of_parameter(generic.pop(block.name))]
            yield Record(block, tuple(called), num_samples, first=first, dtype=dtype)

    @property
    def sweep_numel(self) -> int:
        """Numbers that one sweep of the current batch keeps alive at once."""
        captured = sum(math.prod(use.shape) for uses in self._uses.values() for use in uses)
        layout = self.plan.layout
        generic = sum(math.prod(layout.shapes[name]) for name in self.plan.generic)
        return captured + self._outputs.shape[0] * generic

    # ---- the forward pass ------------------------------------------------------------------

    def _hook(self, name: str, site: Site) -> Callable[..., None]:
        needs_input = site.block.fan_in > site.block.biased

        def hook(_: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            # A recomputation inside a backward pass (activation checkpointing) is no second use.
            if not self._listening or torch._C._current_graph_task_id() != -1:
                return
            if not torch.is_grad_enabled():
                self._unseen.add(name)
            if name not in self._uses or not output.requires_grad:
                return
            x = (args[0] if args else next(iter(kwargs.values()))).detach() if needs_input else None
            version = 0 if x is None else x._version
            edge = get_gradient_edge(_before_views(output))
            use = _Use(x, version, edge, output.shape, output.dtype, output.device)
            self._uses[name].append(use)

        # Compiled parts are not to compile the hook too. Nothing is compiled before this import,
        # which takes long.
        return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook

    def _account_for_every_use(self, graph: Graph) -> None:
        """Compare how often each parameter enters the graph with how often its module reported.

        A report counts if its edge is part of the graph: an output that was thrown away, or whose
        history an in-place operation rewrote, tells nothing.
        """
        parameters = self.plan.parameters
        for name, site in list(self.plan.sites.items()):
            calls = sum(use.edge.node in graph.nodes for use in self._uses[name])
            used = max(graph.uses[id(parameters[p])] for p in site.block.parameters)
            if used == 0 and name in self._unseen:
                raise CaptureError(
                    f"Module {name!r} ran with gradients switched off, so that its parameters seem "
                    f"to have no influence. In activation checkpointing, use "
                    f"checkpoint(..., use_reentrant=False); under torch.no_grad(), say that they "
                    f"are constants by requires_grad_(False), or leave them out by params=..."
                )
            if used <= calls:
                continue
            how = "bypassed" if calls == 0 else "also used outside"
            if self._settled:
                raise CaptureError(
                    f"Module {name!r} is {how} in this batch but was not in the first one, so its "
                    f"parameters cannot be read the same way throughout. Measure such a model with "
                    f"params=... without {list(site.block.parameters)}."
                )
            self.plan.give_up(name, f"its {type(site.module).__name__} is {how}")
            del self._uses[name]

    # ---- which rows belong to which sample -------------------------------------------------

    def _find_samples(self, graph: Graph) -> None:
        num_samples = self._outputs.shape[0]
        key = (
            self._outputs.shape,
            # Layers may treat samples apart in evaluation, and mix them in training.
            tuple(module.training for module in self.plan.model.modules()),
            tuple(
                (
                    name,
                    use.shape,
                    None if use.x is None else use.x.shape,
                    use.edge.node in graph.nodes,
                )
                for name, uses in self._uses.items()
                for use in uses
            ),
        )
        found = None if graph.reorders else self._verified.get(key)
        if found is None:
            found, conclusive = self._verify_arrangements(num_samples)
            if conclusive:
                self._verified[key] = found
        for name in list(self.plan.sites):
            if name in found or not self._uses[name]:
                continue
            if self._settled:
                raise CaptureError(
                    f"The samples of this batch cannot be told apart in the input of {name!r}, "
                    f"although those of the first batch could. Does the model mix samples, or "
                    f"reorder them by their values? Measure it with params=... without "
                    f"{list(self.plan.sites[name].block.parameters)}."
                )
            self.plan.give_up(name, "its input rows do not belong to one sample each")
            del self._uses[name]
        self._arrangements = found

    def _verify_arrangements(self, num_samples: int) -> tuple[dict[str, Arrangement], bool]:
        """Find which rows of each layer belong to which sample.

        Two cotangents go back, the second a multiple of the first with a factor for each sample.
        Gradients are linear in the cotangent, so rows that depend on one sample alone come back
        multiplied by its factor.

        Returns:
            Per layer that has one, its arrangement; and whether that holds for other values too.
            It need not where a gradient is zero, which every arrangement fits: behind weights that
            start at zero, the gradient comes with training.
        """
        factors = _factors(num_samples).to(self._outputs)
        per_sample = math.prod(self._outputs.shape[1:])
        plain = torch.linspace(1, 2, per_sample).cos().to(self._outputs).expand(num_samples, -1)
        cotangents = torch.stack([plain, factors[:, None] * plain])
        uses = [(name, use) for name, uses in self._uses.items() for use in uses]
        gradients = self._sweep(
            [use for _, use in uses], cotangents.reshape(2, *self._outputs.shape)
        )
        candidates: dict[str, list[Arrangement]] = {}
        for (name, use), g in zip(uses, gradients, strict=True):
            before = candidates.get(name, ["first", "second", "minor"])
            candidates[name] = [a for a in before if _fits(use, g, factors, a)]
        found = {name: fitting[0] for name, fitting in candidates.items() if fitting}
        return found, all(g is None or bool(g.any()) for g in gradients)

    def _call(self, name: str, use: _Use, g: Tensor) -> Call:
        """A use with its samples brought to the front: rows `(N·folded, ...)`."""
        site, arrangement = self.plan.sites[name], self._arrangements[name]
        if use.x is not None and use.x._version != use.version:
            raise CaptureError(
                f"The input of {name!r} was changed in place after the layer had used it, so its "
                f"gradient cannot be formed (a backward pass fails too). Make that operation "
                f"out-of-place."
            )
        num_samples = self._outputs.shape[0]
        x = None if use.x is None else _samples_first(use.x, num_samples, arrangement, 0)
        g = _samples_first(g, num_samples, arrangement, 1)
        return Call.of_module(site.rule, site.module, x, g, g.shape[1] // num_samples)

    def _silent(self, name: str, cotangents: Tensor) -> Call:
        """What a module reports that was not called: nothing reaches it, its gradient is zero."""
        site, num_samples = self.plan.sites[name], self._outputs.shape[0]
        groups, fan_out, fan_in = site.block.shape
        weights = fan_in - site.block.biased
        x = cotangents.new_zeros(num_samples, weights) if weights else None
        return Call(
            x,
            cotangents.new_zeros(len(cotangents), num_samples, groups * fan_out),
            1,
            lambda x: x[None, :, None, :].expand(groups, -1, -1, -1),
            lambda g: g.unflatten(2, (groups, 1, fan_out)).transpose(1, 2),
        )

    # ---- the sweep -------------------------------------------------------------------------

    def _sweep(self, uses: list[_Use], cotangents: Tensor) -> list[Tensor | None]:
        """Gradients `(V, *output.shape)` at the output of each use; None where nothing arrives.

        One backward pass per cotangent: batching them through vmap takes as long and needs more
        memory. What pays is to reduce the sweeps together afterwards, which they are.
        """
        if not uses:
            return []
        edges = [use.edge for use in uses]
        sweeps = [
            torch.autograd.grad(self._outputs, edges, u, retain_graph=True, allow_unused=True)
            for u in cotangents
        ]
        found: list[Tensor | None] = []
        for use, gs in zip(uses, zip(*sweeps, strict=True), strict=True):
            if gs[0] is None:
                found.append(None)
            else:
                g = gs[0][None] if len(gs) == 1 else torch.stack(gs)
                found.append(g.reshape(len(gs), *use.shape))  # an edge may be that of a view's base
        return found


@contextlib.contextmanager
def _listening_to_hooks(tape: Tape) -> Iterator[None]:
    tape._listening = True
    try:
        yield
    finally:
        tape._listening = False


@contextlib.contextmanager
def _separate_casts() -> Iterator[None]:
    """Let autocast cast a weight at each use, so that uses can be counted in the graph."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def _before_views(output: Tensor) -> Tensor:
    """The tensor that a layer computed, where it returns a view of all of it.

    A linear layer with a bias reshapes the result for inputs with positions. An in-place operation
    on a view rewrites the history of the view, and keeps that of its base.
    """
    base = output._base
    if base is None or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output


def _samples_first(x: Tensor, num_samples: int, arrangement: Arrangement, axis: int) -> Tensor:
    """Bring `(..., rows, ...)` with rows at `axis` to samples major."""
    if arrangement == "second":
        return x.transpose(axis, axis + 1)
    if arrangement == "minor":
        return (
            x.unflatten(axis, (-1, num_samples)).transpose(axis, axis + 1).flatten(axis, axis + 1)
        )
    return x


def _factors(num: int) -> Tensor:
    """Numbers ±2^k in no order, different as long as there are some: products with them are exact.

    Example:
        >>> _factors(4).unique().numel()
        4
    """
    generator = torch.Generator().manual_seed(0)
    shuffled = [torch.randperm(18, generator=generator) for _ in range(0, num, 18)]
    choice = torch.cat(shuffled)[:num]
    return (1 - 2 * (choice % 2)) * 2.0 ** (choice // 2 - 4)


def _fits(use: _Use, g: Tensor | None, factors: Tensor, arrangement: Arrangement) -> bool:
    """Whether, under an arrangement, the second gradient is the first one times the factors."""
    num_samples = len(factors)
    for shape in (use.shape, use.shape if use.x is None else use.x.shape):
        if arrangement == "second":
            if len(shape) < 3 or shape[1] != num_samples:
                return False
        elif len(shape) < 2 or shape[0] % num_samples or shape[0] == 0:
            return False
    if g is None:
        return arrangement == "first"
    rows = _samples_first(g, num_samples, arrangement, 1).unflatten(1, (num_samples, -1)).flatten(2)
    expected = factors[:, None].to(rows) * rows[0]
    tolerance = torch.finfo(rows.dtype).eps ** 0.5 * expected.abs().amax(dim=1)
    return bool(((rows[1] - expected).abs().amax(dim=1) <= tolerance).all())
