"""The tape: one forward pass with hooks, then sweeps of cotangents that leave a record per layer.

A forward hook keeps each layer's input and the gradient edge of its output; a sweep asks autograd
for the gradients at those edges. No weight gradient is computed and no `p.grad` is touched
(docs/decisions/0001-capture.md).
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from neuromanifold.capture.arrangement import (
    ARRANGEMENTS,
    NO_REPEATS,
    Arrangement,
    Known,
    Repeats,
    Use,
    factors_of,
    find,
    given,
    known_of,
    remember,
    samples_first,
    shapes_fit,
)
from neuromanifold.capture.data import Batch, Forward, call_model, logits_of
from neuromanifold.capture.generic import (
    buffers_kept,
    differ,
    per_sample_gradients,
    runs_alone,
)
from neuromanifold.capture.graph import Graph
from neuromanifold.capture.kernels import plain_gradients
from neuromanifold.capture.layout import Place, Plan
from neuromanifold.errors import CaptureError
from neuromanifold.layers import Call, Record, Reporter, record_of_parameter

__all__ = ["Tape", "is_measured"]

_MEASURED_BY: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""The thread that has hooks on a model."""


def is_measured(model: nn.Module) -> bool:
    """Whether a tape has hooks on a model now."""
    return model in _MEASURED_BY


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
        self._uses: dict[Place, list[Use]] = {}
        self._unseen: set[Place] = set()
        self._arrangements: dict[Place, Arrangement] = {}
        self._hidden: list[tuple[dict[str, Any], Any]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._settled = False
        self._by_samples = True
        self._listening = False
        self._num_samples = 0
        self.on_the_way: Callable[[Tensor], Tensor] | None = None
        """What the gradient at the output of each layer is turned into before it goes further."""
        self._sweeping = False
        # What is known of a model holds for its own forward only.
        shared = forward is call_model
        self._known = known_of(plan.model) if shared else Known()
        self._repeats = NO_REPEATS
        measured = {id(p) for p in plan.parameters.values()}
        self._own = {
            place: [
                (port.module, local, p)
                for local, p in port.module._parameters.items()
                if p is not None and id(p) in measured
            ]
            for site in plan.sites.values()
            for place, port in site.ports.items()
        }

    def __enter__(self) -> Self:
        thread = threading.get_ident()
        self._nested = self.plan.model in _MEASURED_BY
        if _MEASURED_BY.setdefault(self.plan.model, thread) != thread:
            raise CaptureError(
                "The model is being measured by another thread, whose hooks are on it. Measure one "
                "after the other, or copy.deepcopy(model) for each thread."
            )
        for name, port in self.plan.places:
            if port == "":
                # Before the user's own hooks, which may replace the layer's output.
                self._handles.append(
                    self.plan.model.get_submodule(name).register_forward_hook(
                        self._hook((name, port)), with_kwargs=True, prepend=True
                    )
                )
        for name, rule in self.plan.composites.items():
            module = self.plan.model.get_submodule(name)
            # An attribute of the object hides the method of its class until it is deleted. There is
            # one already while another tape on the same model is open.
            self._hidden.append((vars(module), vars(module).get("forward")))
            vars(module)["forward"] = partial(rule.forward, module, self._reporter(name))
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
        for attributes, before in self._hidden:
            if before is None:
                del attributes["forward"]
            else:
                attributes["forward"] = before
        self._hidden.clear()
        if not self._nested:
            del _MEASURED_BY[self.plan.model]

    def run(self, batch: Batch) -> Tensor:
        """Forward pass of a batch: outputs `(N, ...)`, attached to the graph that sweeps follow.

        Raises:
            CaptureError: If a module cannot be seen (compiled, or checkpointed reentrantly), or the
                samples cannot be told apart in its input.
        """
        self._batch = batch
        self._observe()
        if self._outputs.shape[0] == 0:
            raise ValueError(
                f"The batch has no samples: the outputs have shape {tuple(self._outputs.shape)}. "
                f"Leave empty batches out."
            )
        if not self._outputs.requires_grad:
            raise CaptureError(
                "The outputs do not depend on any measured parameter by a differentiable path. "
                "Does the model run under torch.no_grad(), or detach its outputs?"
            )
        self._first_records = True
        dtypes = {use.dtype for uses in self._uses.values() for use in uses}
        self._eps = max(torch.finfo(dtype).eps for dtype in dtypes | {self._outputs.dtype})
        graph = Graph.of(self._outputs)
        self._account_for_every_use(graph)
        self._find_samples(graph)
        if self.plan.generic and not self._settled:
            self._by_samples = runs_alone(
                self.plan, self._forward, self._canonical, batch, self._outputs, self._eps
            )
        self._settled = True
        return self._outputs

    def _observe(self) -> None:
        """Run the batch, with hooks on."""
        self._given = given(self.plan.model, self._batch.inputs)
        self._repeats = self._known.repeats.get(self._given, NO_REPEATS)
        self._random = _random_states(self.plan.device)
        self._outputs = self._run()
        self._num_samples = self._outputs.shape[0]

    def _run(self) -> Tensor:
        self._uses = {place: [] for place in self.plan.places}
        self._unseen = set()
        model = self.plan.model
        with (
            torch.enable_grad(),
            buffers_kept(model),
            plain_gradients(model),
            _separate_casts(),
            _listening_to_hooks(self),
        ):
            outputs = self._canonical(logits_of(self._forward(model, self._batch.inputs)))
            if outputs.is_leaf and outputs.requires_grad:  # a parameter itself: give it a graph
                outputs = outputs.view_as(outputs)
        return outputs

    def records(self, cotangents: Tensor) -> Iterator[Record]:
        """Send cotangents `(V, *outputs.shape)` back; yields one record per block.

        The records of a batch must be asked for before the next batch is run.
        """
        uses = [(place, use) for place, uses in self._uses.items() for use in uses]
        self._sweeping = True
        try:
            gradients = self._sweep([use for _, use in uses], cotangents)
        finally:
            self._sweeping = False
        seen: dict[Place, list[tuple[Tensor | None, Tensor]]] = {p: [] for p in self._uses}
        for i, (place, use) in enumerate(uses):
            g, gradients[i] = gradients[i], None
            if g is not None:  # else the output of this call does not reach the model's outputs
                seen[place].append(self._samples_first(place, use, g))
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
        first, self._first_records = self._first_records, False
        shape = (len(cotangents), self._num_samples)
        dtype, device = self.plan.dtype, cotangents.device
        sites = [self.plan.sites.get(block.name) for block in self.plan.blocks]
        last = {place: site for site in sites if site is not None for place in site.ports}
        for block, site in zip(self.plan.blocks, sites, strict=True):
            if site is None:
                values = generic.pop(block.name)
                yield record_of_parameter(block, values, first=first, dtype=dtype)
                continue
            calls: tuple[Call, ...] = ()
            for place, port in site.ports.items():
                # Forgotten with the last record that needs them.
                found = seen.pop(place) if last[place] is site else seen[place]
                calls += tuple(
                    Call(port, x if site.needs_input else None, g, g.shape[1] // shape[1])
                    for x, g in found
                )
            ports = tuple(site.ports.values())
            record = Record(
                block,
                ports,
                calls,
                shape,
                first=first,
                dtype=dtype,
                device=device,
                present=self._batch.present,
            )
            del calls, found
            yield record
            del record

    @property
    def eps(self) -> float:
        """Relative rounding of the least precise layer of the current batch."""
        return self._eps

    @property
    def sweep_numel(self) -> int:
        """Numbers that one sweep of the current batch keeps alive at once."""
        captured = sum(math.prod(use.shape) for uses in self._uses.values() for use in uses)
        layout = self.plan.layout
        generic = sum(math.prod(layout.shapes[name]) for name in self.plan.generic)
        return captured + self._outputs.shape[0] * generic

    # ---- the forward pass ------------------------------------------------------------------

    def _hook(self, place: Place) -> Callable[..., Tensor | None]:
        """Of a module whose output is the layer's."""

        def hook(_: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Tensor | None:
            # A recomputation in a backward pass (activation checkpointing) is no second use, but
            # has to give the same.
            again = torch._C._current_graph_task_id() != -1
            if not (self._listening or again):
                return None
            x = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
            x, output = self._repeats(place, x, output)
            if not again:
                self._report(place, x, output)
            return output

        # Compiled parts are not to compile the hook too. Nothing is compiled before this import,
        # which takes long.
        return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook

    def _reporter(self, name: str) -> Reporter:
        """Of a module that runs by its rule."""

        def use(port: str, x: Tensor | None, output: Tensor) -> Tensor:
            if self._listening and torch._C._current_graph_task_id() == -1:
                self._report((name, port), x, output)
            return output

        return use

    def _report(self, place: Place, x: Tensor | None, output: Tensor) -> None:
        if not torch.is_grad_enabled():
            self._unseen.add(place)
        if place not in self._uses or not output.requires_grad:
            return
        if not all(
            _is_in_use(p, module._parameters.get(name)) for module, name, p in self._own[place]
        ):
            return  # torch.func.functional_call, for one, puts something else in their place
        x = x.detach() if x is not None and self.plan.places[place] else None
        version = 0 if x is None else x._version
        edge = get_gradient_edge(_before_views(output))
        use = Use(x, version, edge, output.shape, output.dtype, output.device)
        self._uses[place].append(use)
        if self.on_the_way is not None:
            output.register_hook(self._turned)

    def _turned(self, gradient: Tensor) -> Tensor | None:
        # Not where samples are told apart, by comparing two sweeps.
        if not self._sweeping or self.on_the_way is None:
            return None
        return self.on_the_way(gradient)

    def _account_for_every_use(self, graph: Graph) -> None:
        """Compare how often each parameter enters the graph with how often its module reported.

        A report counts if its edge is part of the graph: an output that was thrown away, or whose
        history an in-place operation rewrote, tells nothing.
        """
        parameters = self.plan.parameters
        for name, site in list(self.plan.sites.items()):
            uses = [use for place in site.ports for use in self._uses[place]]
            calls = sum(use.edge.node in graph.nodes for use in uses)
            used = max(graph.uses[id(parameters[p])] for p in site.block.parameters)
            unseen = [place[0] for place in site.ports if place in self._unseen]
            if used == 0 and unseen:
                raise CaptureError(
                    f"Module {unseen[0]!r} ran with gradients switched off, so that its parameters "
                    f"seem to have no influence. In activation checkpointing, use "
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
            kind = type(next(iter(site.ports.values())).module).__name__
            self._give_up(name, f"its {kind} is {how}")

    def _give_up(self, name: str, reason: str) -> None:
        self.plan.give_up(name, reason)
        self._uses = {place: self._uses[place] for place in self.plan.places}

    # ---- which rows belong to which sample -------------------------------------------------

    def _find_samples(self, graph: Graph) -> None:
        key = self._observed(graph)
        found = None if graph.reorders else self._known.arrangements.get(key)
        if found is None:
            hopeless = [place for place in self._uses if not self._may_have_samples(place)]
            if hopeless and self._find_repeats(hopeless):
                return
            found, conclusive = self._verify_arrangements()
            missing = self._missing(found)
            if missing and self._find_repeats(missing):
                return
            if conclusive:
                remember(self._known.arrangements, key, found)
        for name in self._missing_sites(found):
            parameters = list(self.plan.sites[name].block.parameters)
            if self._settled:
                raise CaptureError(
                    f"The samples of this batch cannot be told apart in the input of {name!r}, "
                    f"although those of the first batch could. Does the model mix samples, or "
                    f"reorder them by their values? Measure it with params=... without "
                    f"{parameters}."
                )
            self._give_up(name, "its input rows do not belong to one sample each")
        self._arrangements = found

    def _observed(self, graph: Graph) -> tuple[Any, ...]:
        """What the arrangement of samples depends on."""
        uses = tuple(
            (
                place,
                use.shape,
                None if use.x is None else use.x.shape,
                use.edge.node in graph.nodes,
            )
            for place, uses in self._uses.items()
            for use in uses
        )
        return (self._given, self._outputs.shape, uses)

    def _may_have_samples(self, place: Place) -> bool:
        """Whether some arrangement fits the shapes of all uses."""
        return any(
            all(shapes_fit(use, self._num_samples, arrangement) for use in self._uses[place])
            for arrangement in ARRANGEMENTS
        )

    def _missing(self, found: dict[Place, Arrangement]) -> list[Place]:
        return [place for place, uses in self._uses.items() if uses and place not in found]

    def _missing_sites(self, found: dict[Place, Arrangement]) -> list[str]:
        missing = set(self._missing(found))
        return [name for name, site in self.plan.sites.items() if missing & site.ports.keys()]

    def _find_repeats(self, missing: list[Place]) -> bool:
        """Try whether outputs without samples are the same for every sample, as of positions.

        They are repeated for each sample where the module returns them; if the model still gives
        the same outputs, the gradient of each copy is that of its sample.
        """
        rows = {p: {use.shape[0] for use in self._uses[p]} for p in missing if p[1] == ""}
        if not rows or self._repeats is not NO_REPEATS:
            return False
        outputs, uses = self._outputs, self._uses
        places = {place: lengths == {self._num_samples} for place, lengths in rows.items()}
        ambiguous = any(1 in lengths for lengths in rows.values())
        for keep_ones in (False, True) if ambiguous else (False,):
            self._repeats = Repeats(self._num_samples, places, keep_ones)
            try:
                if self._repeats_change_nothing(outputs):
                    return True
            except Exception:  # the model does not take them with a sample axis
                continue
        self._outputs, self._uses, self._repeats = outputs, uses, NO_REPEATS
        return False

    def _repeats_change_nothing(self, outputs: Tensor) -> bool:
        """Whether the model gives the same outputs with its present repeats, samples told apart."""
        with _replayed(self._random, self.plan.device):  # with the same dropout masks
            self._outputs = self._run()
        if differ(self._outputs, outputs, self._eps):
            return False
        found, conclusive = self._verify_arrangements()
        if self._missing(found):
            return False
        remember(self._known.repeats, self._given, self._repeats)
        if conclusive:
            key = self._observed(Graph.of(self._outputs))
            remember(self._known.arrangements, key, found)
        self._arrangements = found
        return True

    def _verify_arrangements(self) -> tuple[dict[Place, Arrangement], bool]:
        """Per place that has one, its arrangement; and whether that holds for other values too."""
        num_samples = self._num_samples
        factors = factors_of(num_samples).to(self._outputs)
        per_sample = math.prod(self._outputs.shape[1:])
        plain = torch.linspace(1, 2, per_sample).cos().to(self._outputs).expand(num_samples, -1)
        cotangents = torch.stack([plain, factors[:, None] * plain])
        uses = [(place, use) for place, uses in self._uses.items() for use in uses]
        cotangents = cotangents.reshape(2, *self._outputs.shape)
        return find(uses, self._sweep([use for _, use in uses], cotangents), factors)

    def _samples_first(self, place: Place, use: Use, g: Tensor) -> tuple[Tensor | None, Tensor]:
        """Input and cotangents with samples brought to the front: rows `(N·folded, ...)`."""
        if use.x is not None and use.x._version != use.version:
            raise CaptureError(
                f"The input of {place[0]!r} was changed in place after the layer had used it, so "
                f"its gradient cannot be formed (a backward pass fails too). Make that operation "
                f"out-of-place."
            )
        num_samples, arrangement = self._num_samples, self._arrangements[place]
        x = None if use.x is None else samples_first(use.x, num_samples, arrangement, 0)
        return x, samples_first(g, num_samples, arrangement, 1)

    # ---- the sweep -------------------------------------------------------------------------

    def _sweep(self, uses: list[Use], cotangents: Tensor) -> list[Tensor | None]:
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


def _is_in_use(p: nn.Parameter, present: Tensor | None) -> bool:
    """Whether a module computes with its parameter p, or with the whole of a sharded one."""
    whole = hasattr(p, "full_tensor") and isinstance(present, nn.Parameter)
    return (present is p or whole) and present is not None and present.requires_grad


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


def _random_states(device: torch.device) -> list[Tensor]:
    """Of the generators that a model on a device draws from: the CPU's, and the device's own."""
    own = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state(device)]
    return [torch.get_rng_state(), *own]


@contextlib.contextmanager
def _replayed(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Let a model draw again what it drew before, and leave the generators where they are."""
    forked = [] if device.type == "cpu" else [device]
    kind = device.type if forked else "cuda"
    with torch.random.fork_rng(forked, device_type=kind):
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.get_device_module(device).set_rng_state(state, device)
        yield


def _before_views(output: Tensor) -> Tensor:
    """The tensor that a layer computed, where it returns a view of all of it.

    A linear layer with a bias reshapes the result for inputs with positions. An in-place operation
    on a view rewrites the history of the view, and keeps that of its base.
    """
    base = output._base
    if base is None or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output
