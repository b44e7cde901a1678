"""Kernels that torch.func can transform: twice, in both modes, over batches."""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuromanifold.capture.plain import PlainAttention

__all__ = ["differentiable_twice", "plain_gradients", "plain_lookups"]


@contextlib.contextmanager
def differentiable_twice(model: nn.Module) -> Iterator[None]:
    """Kernels that torch.func can transform: attention by plain mathematics, no fused fast path."""
    _load_forward_mode()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    mkldnn = torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        torch._C._set_mkldnn_enabled(False)  # its recurrent layers have no forward mode
    try:
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            PlainAttention(),
            warnings.catch_warnings(),
        ):
            # A loop where an operator cannot be batched is slower, not wrong.
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch._C._set_mkldnn_enabled(mkldnn)


@functools.cache
def _load_forward_mode() -> None:
    """Have torch load its forward-mode rules, for which it uses a function it calls deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


@contextlib.contextmanager
def plain_gradients(model: nn.Module) -> Iterator[None]:
    """Give tables gradients that are derivatives, and dense.

    With `scale_grad_by_freq`, a row's gradient is divided by how often the batch looks it up.
    """
    tables = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    before = [(table.scale_grad_by_freq, table.sparse) for table in tables]
    for table in tables:
        table.scale_grad_by_freq = table.sparse = False
    try:
        yield
    finally:
        for table, (scale_grad_by_freq, sparse) in zip(tables, before, strict=True):
            table.scale_grad_by_freq, table.sparse = scale_grad_by_freq, sparse


@contextlib.contextmanager
def plain_lookups(model: nn.Module) -> Iterator[None]:
    """Look up tables by operations whose derivatives are right in every mode.

    Forward mode knows nothing of `padding_idx`, and bags have no second derivative.
    """
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    handles = [
        table.register_forward_hook(_without_padding)
        for table in tables
        if table.padding_idx is not None
    ]
    bags = [
        module
        for module in model.modules()
        if isinstance(module, nn.EmbeddingBag)
        and type(module).forward is nn.EmbeddingBag.forward
        and "forward" not in vars(module)
    ]
    for bag in bags:
        vars(bag)["forward"] = functools.partial(_bag, bag)
    try:
        with plain_gradients(model):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for bag in bags:
            del vars(bag)["forward"]


def _without_padding(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    assert isinstance(module, nn.Embedding)
    assert module.padding_idx is not None
    padding = (args[0] == module.padding_idx)[..., None]
    return torch.where(padding, output.detach(), output)


def _bag(
    module: nn.EmbeddingBag,
    indices: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """Sums, means or maxima of looked-up rows, `(bags, D)`."""
    if module.mode == "max":
        return _largest(module, indices, offsets)
    if offsets is None:
        num_bags = len(indices)
        bag = torch.arange(num_bags, device=indices.device)[:, None].expand_as(indices)
    else:
        num_bags = len(offsets) - int(module.include_last_offset)
        entries = torch.arange(len(indices), device=indices.device)
        bag = torch.searchsorted(offsets[:num_bags].contiguous(), entries, right=True) - 1
    rows = F.embedding(indices, module.weight).flatten(0, -2)
    kept = torch.ones_like(indices, dtype=rows.dtype)
    if module.padding_idx is not None:
        kept = (indices != module.padding_idx).to(rows.dtype)
    weights = kept if per_sample_weights is None else kept * per_sample_weights
    out = rows.new_zeros(num_bags, rows.shape[-1])
    out = out.index_add(0, bag.flatten(), rows * weights.flatten()[:, None])
    if module.mode == "sum":
        return out
    count = rows.new_zeros(num_bags).index_add(0, bag.flatten(), kept.flatten())
    return out / count.clamp(min=1)[:, None]


def _largest(module: nn.EmbeddingBag, indices: Tensor, offsets: Tensor | None) -> Tensor:
    """Entry by entry, zero for a bag of padding alone."""
    if offsets is not None:  # no loop over bags of unequal length: products say what they lack
        return nn.EmbeddingBag.forward(module, indices, offsets)
    rows = F.embedding(indices, module.weight)
    if module.padding_idx is not None:
        rows = rows.masked_fill((indices == module.padding_idx)[..., None], -torch.inf)
    largest = rows.max(dim=1).values
    return torch.where(largest.isinf(), 0, largest)
