"""Plain torch: per-sample gradients by `vmap`, products by dual numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, linearize, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers._peer import (
    Named,
    Peer,
    flat,
    negative_log_likelihood,
    on,
    split,
)
from benchmarks.workloads import DAMPING, Batch, direction

__all__ = ["TORCH_FUNC"]

SAMPLES_AT_ONCE = 32
"""Of Jacobians of all logits, which are large."""


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def sample_gradients(batch: Batch, labels: Tensor) -> Callable[[], Named]:
    """Computes the gradients of all samples, (N, *shape)."""
    parameters = parameters_of(batch.model)

    def loss(parameters: Named, x: Tensor, y: Tensor) -> Tensor:
        logits = functional_call(batch.model, dict(parameters), (x.unsqueeze(0),))
        return negative_log_likelihood(logits, y)

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))
    return lambda: gradients(parameters, batch.inputs, labels)


def diagonal(batch: Batch, labels: Tensor) -> Callable[[], Named]:
    gradients = sample_gradients(batch, labels)
    return lambda: {name: g.square().mean(0) for name, g in gradients().items()}


def gram_matrix(gradients: Named) -> Tensor:
    return torch.stack([g.flatten(1) @ g.flatten(1).mT for g in gradients.values()]).sum(0)


def gram(batch: Batch, labels: Tensor) -> Callable[[], Tensor]:
    gradients = sample_gradients(batch, labels)
    return lambda: gram_matrix(gradients())


def gram_spectrum(batch: Batch, labels: Tensor) -> Callable[[], Tensor]:
    gradients = sample_gradients(batch, labels)
    return lambda: torch.linalg.eigvalsh(gram_matrix(gradients()) / len(labels)).flip(0)


def damped_first(batch: Batch, labels: Tensor) -> Callable[[], Tensor]:
    gradients, v = sample_gradients(batch, labels), direction(batch)
    return lambda: woodbury(gradients())(v)


def damped_further(batch: Batch, labels: Tensor) -> Callable[[], Tensor]:
    solve, v = woodbury(sample_gradients(batch, labels)()), direction(batch)
    return lambda: solve(v)


def woodbury(gradients: Named) -> Callable[[Tensor], Tensor]:
    """(F + damping)⁻¹ from the samples' gradients, factored in sample space."""
    U = torch.cat([g.flatten(1) for g in gradients.values()], dim=1)
    gram = U @ U.mT
    gram.diagonal().add_(DAMPING * len(U))
    factor = torch.linalg.cholesky(gram)
    return lambda v: (v - torch.cholesky_solve((U @ v)[:, None], factor)[:, 0] @ U) / DAMPING


def diagonal_exact(batch: Batch, _: Tensor) -> Callable[[], Named]:
    """Squares of the Jacobian times a root of each sample's output Fisher: √p (1 - p 1ᵀ)."""
    parameters = parameters_of(batch.model)

    def squares(x: Tensor) -> Named:
        def logits(parameters: Named) -> tuple[Tensor, Tensor]:
            y = functional_call(batch.model, dict(parameters), (x.unsqueeze(0),)).squeeze(0)
            return y, y

        jacobian, y = jacrev(logits, has_aux=True)(parameters)
        p = y.softmax(dim=0)
        root = (torch.diag(p.sqrt()) - p.sqrt()[:, None] * p).to(y)
        return {
            name: torch.tensordot(root, j, dims=1).square().sum(0) for name, j in jacobian.items()
        }

    total = vmap(squares, chunk_size=SAMPLES_AT_ONCE)
    return lambda: {name: s.mean(0) for name, s in total(batch.inputs).items()}


# --- products ------------------------------------------------------------------------------------


def fisher_of_outputs(logits: Tensor, u: Tensor) -> Tensor:
    """Mean over samples of the Fisher matrix of each position's logits, times u."""
    p = logits.softmax(dim=-1)
    return p * (u - (p * u).sum(dim=-1, keepdim=True)) / len(logits)


def outputs_of(batch: Batch) -> Callable[[Named], Tensor]:
    return lambda parameters: functional_call(batch.model, dict(parameters), (batch.inputs,))


def product_first(batch: Batch, _: Tensor) -> Callable[[], Callable[[], Tensor]]:
    """Dual numbers forward, then back through the graph of the same pass."""
    parameters = {name: p.requires_grad_() for name, p in parameters_of(batch.model).items()}
    outputs, v = outputs_of(batch), split(direction(batch), batch.model)

    def call() -> Callable[[], Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            with forward_ad.dual_level():
                pairs = {n: forward_ad.make_dual(p, v[n]) for n, p in parameters.items()}
                logits, u = forward_ad.unpack_dual(outputs(pairs))
                u = fisher_of_outputs(logits.detach(), u.detach())
            # Outside of the level, or gradients would carry tangents as well.
            product = torch.autograd.grad(logits, list(parameters.values()), u)
        return lambda: flat(product)

    return call


def product_repeated(batch: Batch, _: Tensor) -> Callable[[], Callable[[], Tensor]]:
    """With `linearize` and the graph of one backward pass, both kept."""
    parameters, outputs = parameters_of(batch.model), outputs_of(batch)
    v = split(direction(batch), batch.model)
    with sdpa_kernel(SDPBackend.MATH):
        logits, forward = linearize(outputs, parameters)
        _, back = vjp(outputs, parameters)

    def call() -> Callable[[], Tensor]:
        (product,) = back(fisher_of_outputs(logits, forward(v)))
        return lambda: flat(product.values())

    return call


TORCH_FUNC = Peer(
    "torch, by hand",
    "torch",
    {
        **on("W1 W2 W3", {"diagonal": diagonal}),
        **on("W1", {"diagonal, exact": diagonal_exact}),
        **on(
            "W1 W2 W3 W4", {"product, first": product_first, "product, repeated": product_repeated}
        ),
        **on(
            "W1",
            {
                "Gram matrix, NTK": gram,
                "Gram spectrum, all eigenvalues": gram_spectrum,
                "damped solve, first": damped_first,
                "damped solve, further": damped_further,
            },
        ),
    },
    {("W2", "diagonal, exact"): "after other rows it was seen to take 23 GB"},
)
