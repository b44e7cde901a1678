"""Two ways to catch the gradient at a layer's output, compared in time and peak memory.

Run `python -m benchmarks.capture` (15 to 30 minutes); decision 0001 reads the result. The question
is which mechanism does less work, so what is compared is CPU time on one thread, which does not
depend on what else the machine is doing.

* probe: a forward hook adds one scalar leaf to the layer output, and a tensor hook on the sum
  delivers the gradient while the sweep is under way; the record is reduced and freed on the spot.
* edge: a forward hook stores `get_gradient_edge(output)`, and a sweep differentiates with respect
  to all edges; its gradients are alive together until they are reduced.

With several cotangents an edge can also deliver all of a layer's gradients at once: `edge stacked`
collects them from one sweep after the other, `edge batched` from a single vectorised sweep.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

from benchmarks.harness import RETURN_FREED, interleave, peak_memory, quartiles, write_results
from benchmarks.workloads import WORKLOADS, Batch, forward_backward

ROUNDS = 9
COLUMNS = 10

Cotangents = Callable[[Tensor], Tensor]
"""From logits (N, *T, C) to what is sent back (V, N, *T, C)."""

Deliver = Callable[[nn.Module, Tensor, Tensor], None]
"""Takes a layer, its input (N, ...) and its output gradients (V, N, ...)."""


# --- what is sent back ---------------------------------------------------------------------------


def sampled_score(logits: Tensor) -> Tensor:
    """The score of one label per position, drawn from the model: (1, N, *T, C)."""
    labels = torch.distributions.Categorical(logits=logits).sample()
    return (functional.one_hot(labels, logits.shape[-1]) - logits.softmax(-1)).unsqueeze(0)


def exact_columns(logits: Tensor) -> Tensor:
    """The first columns √p_c (e_c − p) of the output Fisher's root: (COLUMNS, N, *T, C)."""
    p = logits.softmax(-1)
    identity = torch.eye(logits.shape[-1], dtype=logits.dtype)
    return torch.stack([(identity[c] - p) * p[..., c, None].sqrt() for c in range(COLUMNS)])


# --- how the gradient is caught ------------------------------------------------------------------


def observed_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]


@contextmanager
def forward_hooks(model: nn.Module, hook: Callable[..., Tensor | None]) -> Iterator[None]:
    handles = [layer.register_forward_hook(hook) for layer in observed_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def probe(batch: Batch, cotangents: Cotangents, deliver: Deliver) -> None:
    leaves: list[Tensor] = []

    def hook(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        a = args[0].detach()
        leaves.append(torch.zeros((), dtype=output.dtype, requires_grad=True))
        probed = output + leaves[-1]
        probed.register_hook(lambda g: deliver(layer, a, g.unsqueeze(0)))
        return probed

    with forward_hooks(batch.model, hook):
        logits = batch.model(batch.inputs)
    columns = cotangents(logits.detach())
    for v, u in enumerate(columns, start=1):
        torch.autograd.grad(logits, leaves, u, retain_graph=v < len(columns))


class Edges:
    """The layers that a forward pass went through, and where their gradients can be asked for."""

    def __init__(self, batch: Batch) -> None:
        self.layers: list[tuple[nn.Module, Tensor]] = []
        self.edges: list[GradientEdge] = []
        with forward_hooks(batch.model, self.hook):
            self.logits = batch.model(batch.inputs)

    def hook(self, layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        """Note a layer's input and the edge of its output; a forward hook."""
        self.layers.append((layer, args[0].detach()))
        self.edges.append(get_gradient_edge(output))

    def sweep(self, cotangents: Tensor, *, retain: bool, batched: bool = False) -> list[Tensor]:
        """Gradients at every edge, in the order of the layers."""
        return list(
            torch.autograd.grad(
                self.logits, self.edges, cotangents, retain_graph=retain, is_grads_batched=batched
            )
        )

    def release(self, gradients: list[Tensor], deliver: Deliver) -> None:
        """Deliver from the last layer to the first, dropping each gradient once it is used."""
        for layer, a in reversed(self.layers):
            deliver(layer, a, gradients.pop())


def edge(batch: Batch, cotangents: Cotangents, deliver: Deliver) -> None:
    tape = Edges(batch)
    columns = cotangents(tape.logits.detach())
    for v, u in enumerate(columns, start=1):
        gradients = tape.sweep(u, retain=v < len(columns))
        tape.release([g.unsqueeze(0) for g in gradients], deliver)


def edge_stacked(batch: Batch, cotangents: Cotangents, deliver: Deliver) -> None:
    tape = Edges(batch)
    columns = cotangents(tape.logits.detach())
    sweeps = [tape.sweep(u, retain=v < len(columns)) for v, u in enumerate(columns, start=1)]
    for layer, a in reversed(tape.layers):
        deliver(layer, a, torch.stack([sweep.pop() for sweep in sweeps]))


def edge_batched(batch: Batch, cotangents: Cotangents, deliver: Deliver) -> None:
    tape = Edges(batch)
    columns = cotangents(tape.logits.detach())
    tape.release(tape.sweep(columns, retain=False, batched=True), deliver)


# --- what is kept --------------------------------------------------------------------------------


def common_axes(layer: nn.Module, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A record as a (N, T, I), without a bias column, and g (V, N, T, O)."""
    if isinstance(layer, nn.Conv2d):
        patches = functional.unfold(
            a, layer.kernel_size, layer.dilation, layer.padding, layer.stride
        )
        return patches.mT, g.flatten(3).mT
    return a.reshape(len(a), -1, a.shape[-1]), g.reshape(*g.shape[:2], -1, g.shape[-1])


def squared_gradients(layer: nn.Module, a: Tensor, g: Tensor) -> Tensor:
    """Sum over cotangents and samples of the squared weight gradient: (O, I)."""
    a, g = common_axes(layer, a, g)
    if a.shape[1] == 1:
        return g.square().sum((0, 2)).mT @ a.square().squeeze(1)
    return torch.stack([(g_v.mT @ a).square().sum(0) for g_v in g]).sum(0)


class Diagonal:
    """The squared weight gradients of every layer, summed over samples and cotangents."""

    def __init__(self) -> None:
        self.total: dict[nn.Module, Tensor] = {}

    def __call__(self, layer: nn.Module, a: Tensor, g: Tensor) -> None:
        """Add one record."""
        new = squared_gradients(layer, a, g)
        self.total[layer] = self.total[layer] + new if layer in self.total else new


def nothing(layer: nn.Module, a: Tensor, g: Tensor) -> None:
    """Keep nothing: what remains is the cost of the capture."""


# --- the cases -----------------------------------------------------------------------------------

Case = tuple[str, str, str]
"""Sweep, statistic and mechanism, by their names below."""

SWEEPS: dict[str, Cotangents] = {"sampled": sampled_score, "exact": exact_columns}
STATISTICS: dict[str, Callable[[], Deliver]] = {"none": lambda: nothing, "diagonal": Diagonal}
MECHANISMS: dict[str, Callable[[Batch, Cotangents, Deliver], None]] = {
    "probe": probe,
    "edge": edge,
    "edge stacked": edge_stacked,
    "edge batched": edge_batched,
}
ONE_COTANGENT = ("probe", "edge")  # there is nothing to stack

CASES: list[Case] = [
    (sweep, statistic, mechanism)
    for sweep in SWEEPS
    for statistic in STATISTICS
    for mechanism in (ONE_COTANGENT if sweep == "sampled" else MECHANISMS)
]


def run(batch: Batch, case: Case) -> None:
    """One complete pass: forward, cotangents, sweeps, statistic."""
    sweep, statistic, mechanism = case
    MECHANISMS[mechanism](batch, SWEEPS[sweep], STATISTICS[statistic]())


def check(workload: str) -> None:
    """In float64, Σ_n g aᵀ of every record must be the weight gradient that autograd computes."""
    batch = WORKLOADS[workload].build().double()
    layers = observed_layers(batch.model)
    logits = batch.model(batch.inputs)
    weights = [layer.get_parameter("weight") for layer in layers]
    expected = torch.stack(
        [
            torch.cat([w.flatten() for w in torch.autograd.grad(logits, weights, u, True)])
            for u in exact_columns(logits.detach())
        ]
    )
    for name, catch in MECHANISMS.items():
        found: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}

        def deliver(
            layer: nn.Module,
            a: Tensor,
            g: Tensor,
            found: dict[nn.Module, list[Tensor]] = found,
        ) -> None:
            a, g = common_axes(layer, a, g)
            found[layer].append(torch.einsum("vnto,nti->voi", g, a).flatten(1))

        catch(batch, exact_columns, deliver)
        gradients = torch.cat([torch.cat(found[layer]) for layer in layers], dim=1)
        error = (gradients - expected).norm() / expected.norm()
        assert error < 1e-12, f"{name} is wrong on {workload}: relative error {error:.1e}."


# --- measurement, each in a process of its own ---------------------------------------------------

# Freed tensors stay, so that no page is mapped again: only work is timed.
KEEP_FREED = {
    name: str(2**32)
    for name in ("MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
}


def in_fresh_process(settings: dict[str, str], *arguments: str) -> Any:
    """What `python -m benchmarks.capture ARGUMENTS` prints under these allocator settings."""
    command = [sys.executable, "-m", "benchmarks.capture", *arguments]
    answer = subprocess.run(
        command, env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(answer.stdout)


def time_workload(workload: str) -> list[list[float]]:
    """CPU seconds on one thread: of forward and backward first, then of every case."""
    torch.set_num_threads(1)
    batch = WORKLOADS[workload].build()
    tasks: dict[str, Callable[[], object]] = {"unit": partial(forward_backward, batch)}
    tasks |= {" ".join(case): partial(run, batch, case) for case in CASES}
    return list(interleave(tasks, ROUNDS, clock=time.process_time).values())


def peak_of(workload: str, *case: Any) -> int:
    """Peak bytes of one case, or of forward and backward if no case is named."""
    batch = WORKLOADS[workload].build()
    return peak_memory(partial(run, batch, case) if case else partial(forward_backward, batch))


CHILDREN: dict[str, Callable[..., Any]] = {"time": time_workload, "peak": peak_of}


def measure(workload: str) -> dict[str, Any]:
    check(workload)
    unit, *times = in_fresh_process(KEEP_FREED, "time", workload)
    default_unit, *default_times = in_fresh_process({}, "time", workload)
    return {
        "title": WORKLOADS[workload].title,
        "unit_seconds": unit,
        "unit_seconds_default_allocator": default_unit,
        "unit_peak_bytes": in_fresh_process(RETURN_FREED, "peak", workload),
        "cases": [
            {
                "case": case,
                "ratio": quartiles(seconds, unit)[1],
                "ratio_default_allocator": quartiles(default_seconds, default_unit)[1],
                "peak_bytes": in_fresh_process(RETURN_FREED, "peak", workload, *case),
                "seconds": seconds,
                "seconds_default_allocator": default_seconds,
            }
            for case, seconds, default_seconds in zip(CASES, times, default_times, strict=True)
        ],
    }


def show(result: dict[str, Any]) -> None:
    columns = ("sweep", "statistic", "mechanism", "time", "default allocator", "peak MiB")
    table = Table(*columns, title=result["title"])
    unit = f"{result['unit_peak_bytes'] / 2**20:.1f}"
    table.add_row("forward + backward", "", "", "1.00", "1.00", unit)
    for case in result["cases"]:
        ratios = f"{case['ratio']:.2f}", f"{case['ratio_default_allocator']:.2f}"
        table.add_row(*case["case"], *ratios, f"{case['peak_bytes'] / 2**20:.1f}")
    Console().print(table)


def main() -> None:
    results = {}
    for workload in WORKLOADS:
        results[workload] = measure(workload)
        show(results[workload])
    write_results("capture", {"rounds": ROUNDS, "columns": COLUMNS, "workloads": results})


if __name__ == "__main__":
    torch.manual_seed(0)
    if sys.argv[1:]:
        child, *arguments = sys.argv[1:]
        print(json.dumps(CHILDREN[child](*arguments)))
    else:
        main()
