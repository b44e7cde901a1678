"""Reading autograd's graph: which parameters it uses, how often, and where it hides something."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor
from torch.autograd.graph import Node

from neuromanifold.errors import CaptureError

__all__ = ["Graph"]

_REORDERING = ("Index", "Gather", "Scatter", "Sort", "Topk", "MaskedSelect", "Take")
"""Operations whose result can have its rows in an order that depends on values."""


@dataclass
class Graph:
    """What lies behind a tensor.

    Attributes:
        nodes: all operations.
        uses: how many times each parameter, by identity, enters.
        reorders: whether the order of rows may depend on values.
    """

    nodes: set[Node] = field(default_factory=set)
    uses: Counter[int] = field(default_factory=Counter)
    reorders: bool = False

    @classmethod
    def of(cls, outputs: Tensor) -> Graph:
        """Walk the graph of a tensor.

        Raises:
            CaptureError: At a node behind which autograd hides its graph.
        """
        graph = cls() if outputs.grad_fn is None else cls({outputs.grad_fn})
        stack = list(graph.nodes)
        kinds: set[str] = set()
        while stack:
            node = stack.pop()
            kinds.add(type(node).__name__)
            for child, _ in node.next_functions:
                if child is None:
                    continue
                if (variable := getattr(child, "variable", None)) is not None:
                    graph.uses[id(variable)] += 1
                elif child not in graph.nodes:
                    graph.nodes.add(child)
                    stack.append(child)
        for kind in kinds:
            _refuse_hidden_graph(kind)
        graph.reorders = any(name in kind for kind in kinds for name in _REORDERING)
        return graph


def _refuse_hidden_graph(kind: str) -> None:
    if "CheckpointFunction" in kind:
        raise CaptureError(
            "The model uses reentrant activation checkpointing, whose graph is built only "
            "during a backward pass. Use checkpoint(..., use_reentrant=False)."
        )
    if "CompiledFunction" in kind:
        raise CaptureError(
            "A part of the model was compiled before its layers could be observed, and hooks "
            "do not fire inside it. Compile the whole model (torch.compile(model) is taken off "
            "here), or measure the module before compiling its parts."
        )
