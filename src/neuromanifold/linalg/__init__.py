"""Tensors in, tensors out; nothing here knows a network."""

from neuromanifold.linalg import krylov, lanczos, lowrank, memory, psd, traces
from neuromanifold.linalg.tree import Block, Layout, Slot, Vector

__all__ = [
    "Block",
    "Layout",
    "Slot",
    "Vector",
    "krylov",
    "lanczos",
    "lowrank",
    "memory",
    "psd",
    "traces",
]
