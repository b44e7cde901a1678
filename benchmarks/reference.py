"""What answers are checked against, in float64: `torch.func` and textbook formulas, no tricks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.workloads import DAMPING, Batch, direction

__all__ = ["Probed", "Reference", "Sides", "reference"]

SOME_SAMPLES = 8
"""Whose gradients are kept for all labels at once."""

PROBES = 16


@dataclass(frozen=True)
class Sides:
    """Both sides of a Linear or Conv2d layer, a row per sample and position.

    Attributes:
        a: inputs (N·T, I), with a last column of ones if there is a bias.
        g: gradients of the log-probability at the outputs (N·T, O).
    """

    a: Tensor
    g: Tensor


@dataclass(frozen=True)
class Probed:
    """What a spectral density has to agree with.

    Attributes:
        largest: the largest eigenvalue, a scalar.
        draws: means of all eigenvalues by single probes, (PROBES,).
    """

    largest: Tensor
    draws: Tensor


@dataclass(frozen=True)
class Reference:
    """The Fisher matrix of a batch, with sampled labels and exact, as numbers to compare with.

    Attributes:
        batch: in float64.
        labels: sampled ones (N, *T).
        rounding: what float32 does to the gradient of the loss, relative to its norm. Where a relu
            turns over, that is far more than its last digit.
    """

    batch: Batch
    labels: Tensor
    rounding: float

    # --- with sampled labels ---------------------------------------------------------------------

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """Of each sample's log-probability of its labels, (N, *shape)."""
        return self._gradients(self.labels)

    def diagonal(self) -> dict[str, Tensor]:
        """Mean squares."""
        return {name: g.square().mean(0) for name, g in self.gradients.items()}

    @cached_property
    def gram(self) -> Tensor:
        """Inner products of the gradients, (N, N): F is their mean outer product."""
        flat = (g.flatten(1) for g in self.gradients.values())
        return sum((g @ g.mT for g in flat), torch.zeros(()))

    def eigenvalues(self) -> Tensor:
        """Those of F that can be non-zero, descending."""
        return torch.linalg.eigvalsh(self.gram / self._count).flip(0)

    def product(self) -> Tensor:
        """F v, (P,)."""
        return self._combined(self._projected(self.direction)) / self._count

    def solve(self) -> Tensor:
        """Woodbury's formula for (F + damping) x = v."""
        v, count = self.direction, self._count
        inner = self.gram + DAMPING * count * torch.eye(count, device=v.device)
        seen = torch.linalg.solve(inner, self._projected(v))
        return (v - self._combined(seen)) / DAMPING

    def unitwise(self) -> Tensor:
        """Products with one block per unit, (P,)."""
        products = {}
        for layer, g, v in self._units():
            along = (g * v).sum(-1, keepdim=True)
            products[layer] = (g * along).mean(0)
        return self._flat_units(products)

    def quasidiagonal(self) -> Tensor:
        """Products with the diagonal and the bias row; weights interact through the bias."""
        products = {}
        for layer, g, v in self._units():
            squares = torch.einsum("noi,noi->oi", g, g) / self._count
            row = torch.einsum("noi,no->oi", g, g[..., -1]) / self._count
            row = (row / row[:, -1:].sqrt()).nan_to_num(0.0)  # 0/0 of a unit that never answers
            rest = squares - row.square()
            products[layer] = rest * v + row * (row * v).sum(-1, keepdim=True)
        return self._flat_units(products)

    def meanfield(self) -> Tensor:
        """Products with papers.md §2.4's matrix of each unit, its inputs uncorrelated."""
        products = {}
        for layer, sides in self.sides.items():
            w, b = (self._named[f"{layer}.{kind}"].detach() for kind in ("weight", "bias"))
            x, signals = sides.a[:, :-1], sides.g.square()
            u = x @ w.mT + b
            standard = (u - u.mean(0)) / u.std(0, correction=0)
            alpha, beta, gamma = ((signals * standard**k).mean(0)[:, None] for k in range(3))
            m, s = x.mean(0), x.var(0, correction=0)
            c = s * w / (s * w.square()).sum(1, keepdim=True).sqrt()
            v = self._direction[f"{layer}.weight"]
            along_m = v @ m[:, None] + self._direction[f"{layer}.bias"][:, None]
            along_c = (c * v).sum(1, keepdim=True)
            of_m = alpha * along_m + beta * along_c
            of_c = beta * along_m + (gamma - alpha) * along_c
            products[layer] = torch.cat([alpha * s * v + of_m * m + of_c * c, of_m], dim=1)
        return self._flat_units(products)

    # --- Kronecker factors -----------------------------------------------------------------------

    @cached_property
    def sides(self) -> dict[str, Sides]:
        """By name of the layer."""
        layers = {
            name: layer
            for name, layer in self.batch.model.named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d))
        }
        inputs, outputs = {}, {}

        def note(name: str, _: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            inputs[name], outputs[name] = args[0].detach(), output

        handles = [
            layer.register_forward_hook(partial(note, name)) for name, layer in layers.items()
        ]
        logits = self.batch.model(self.batch.inputs)
        for handle in handles:
            handle.remove()
        loss = functional.cross_entropy(
            logits.flatten(0, -2), self.labels.flatten(), reduction="sum"
        )
        gradients = torch.autograd.grad(loss, list(outputs.values()))
        return {
            name: _sides(layers[name], inputs[name], g)
            for name, g in zip(outputs, gradients, strict=True)
        }

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A, a mean over samples and positions, and G, a mean over samples."""
        return {
            name: (x.a.mT @ x.a / len(x.a), x.g.mT @ x.g / self._count)
            for name, x in self.sides.items()
        }

    def kronecker_solve(self) -> Tensor:
        """Solve G X A + damping X = V in each layer, (P,)."""
        solutions = {}
        for layer, (a, g) in self.factors().items():
            (of_a, q_a), (of_g, q_g) = torch.linalg.eigh(a), torch.linalg.eigh(g)
            v = q_g.mT @ self._matrix(layer) @ q_a
            solutions[layer] = q_g @ (v / (of_g[:, None] * of_a + DAMPING)) @ q_a.mT
        return self._flat_units(solutions)

    def eigenkronecker(self) -> Tensor:
        """Products with the second moments along the factors' eigenvectors, (P,)."""
        products = {}
        for layer, (a, g) in self.factors().items():
            q_a, q_g = torch.linalg.eigh(a)[1], torch.linalg.eigh(g)[1]
            x = self.sides[layer]
            of_a, of_g = (
                (y @ q).unflatten(0, (self._count, -1)) for y, q in ((x.a, q_a), (x.g, q_g))
            )
            moments = torch.zeros_like(self._matrix(layer))
            for some_g, some_a in zip(of_g.split(16), of_a.split(16), strict=True):
                moments += (some_g.mT @ some_a).square().sum(0) / self._count
            products[layer] = q_g @ (moments * (q_g.mT @ self._matrix(layer) @ q_a)) @ q_a.mT
        return self._flat_units(products)

    # --- exact -----------------------------------------------------------------------------------

    def exact_diagonal(self) -> dict[str, Tensor]:
        """Expected squares over all labels; outputs at one position only."""
        return {name: self.diagonal_and_variance[name] for name in self._named}

    @cached_property
    def diagonal_and_variance(self) -> dict[str, Tensor]:
        """The same, and 'NAME, variance', that of their mean with one label per sample."""
        squares = {name: torch.zeros_like(p) for name, p in self._named.items()}
        variances = {f"{name}, variance": torch.zeros_like(x) for name, x in squares.items()}
        for first in range(0, self._count, SOME_SAMPLES):
            batch = replace(self.batch, inputs=self.batch.inputs[first : first + SOME_SAMPLES])
            some = replace(self, batch=batch, labels=self.labels[first : first + SOME_SAMPLES])
            for name, (second, fourth) in some._moments().items():
                squares[name] += second.sum(0) / self._count
                variances[f"{name}, variance"] += (fourth - second.square()).sum(0)
        return squares | {name: v / self._count**2 for name, v in variances.items()}

    def _moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Second and fourth moments of each sample's gradients."""
        with torch.no_grad():
            p = self.batch.model(self.batch.inputs).softmax(-1)
        each = [self._gradients(torch.full_like(self.labels, c)) for c in range(p.shape[-1])]
        found = {}
        for name in self._named:
            squares = torch.stack([g[name] for g in each]).square_()
            second = torch.einsum("nc,cn...->n...", p, squares)
            found[name] = second, torch.einsum("nc,cn...->n...", p, squares.square_())
        return found

    def exact_trace(self) -> Tensor:
        """Sum of the exact diagonal."""
        return torch.stack([d.sum() for d in self.exact_diagonal().values()]).sum()

    def exact_product(self, v: Tensor | None = None) -> Tensor:
        """F v = (1/N) Σ_n Jᵀ (diag p − p pᵀ) J v, (P,)."""
        parameters = {name: p.detach() for name, p in self._named.items()}
        tangent = self._direction if v is None else self._by_name(v)

        def logits(parameters: dict[str, Tensor]) -> Tensor:
            return functional_call(self.batch.model, parameters, (self.batch.inputs,))

        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward mode
            outputs, pushed = jvp(logits, (parameters,), (tangent,))[:2]
            p = outputs.softmax(-1)
            centred = p * (pushed - (p * pushed).sum(-1, keepdim=True))
            pulled = vjp(logits, parameters)[1](centred)[0]
        return torch.cat([x.flatten() for x in pulled.values()]) / self._count

    def largest(self, k: int) -> Tensor:
        """Eigenvalues of the exact F by SciPy, descending."""
        from scipy.sparse.linalg import LinearOperator, eigsh

        def product(v: object) -> object:
            return self.exact_product(torch.as_tensor(v, device=self.batch.device)).cpu().numpy()

        size = len(self.direction)
        start = self.direction.cpu().numpy()
        operator = LinearOperator((size, size), matvec=product, dtype="float64")
        values = eigsh(operator, k, v0=start, tol=1e-6, return_eigenvectors=False)
        return torch.tensor(sorted(values, reverse=True), device=self.batch.device)

    def probed(self) -> Probed:
        """The largest eigenvalue, and means of all from random signs."""
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (PROBES, len(self.direction)), generator=generator)
        probes = (2 * signs - 1).to(self.direction)
        draws = torch.stack([v @ self.exact_product(v) for v in probes])
        return Probed(self.largest(1)[0], draws / len(self.direction))

    # --- vectors ---------------------------------------------------------------------------------

    @cached_property
    def direction(self) -> Tensor:
        """v, (P,)."""
        return direction(self.batch).double()

    @cached_property
    def _direction(self) -> dict[str, Tensor]:
        return self._by_name(self.direction)

    @cached_property
    def _named(self) -> dict[str, nn.Parameter]:
        return dict(self.batch.model.named_parameters())

    @property
    def _count(self) -> int:
        return len(self.labels)

    def _by_name(self, v: Tensor) -> dict[str, Tensor]:
        parts = v.double().split([p.numel() for p in self._named.values()])
        return {
            name: part.view_as(p)
            for (name, p), part in zip(self._named.items(), parts, strict=True)
        }

    def _gradients(self, labels: Tensor) -> dict[str, Tensor]:
        parameters = {name: p.detach() for name, p in self._named.items()}

        def log_prob(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            logits = functional_call(self.batch.model, parameters, (x.unsqueeze(0),))
            return -functional.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="sum")

        each = vmap(grad(log_prob), in_dims=(None, 0, 0))
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batching rule
            return each(parameters, self.batch.inputs, labels)

    def _projected(self, v: Tensor) -> Tensor:
        """Inner products of every gradient with v, (N,)."""
        named = self._by_name(v)
        parts = [g.flatten(1) @ named[name].flatten() for name, g in self.gradients.items()]
        return torch.stack(parts).sum(0)

    def _combined(self, weights: Tensor) -> Tensor:
        """Weighted sum of the gradients, (P,)."""
        return torch.cat([weights @ g.flatten(1) for g in self.gradients.values()])

    def _matrix(self, layer: str) -> Tensor:
        """Piece of v that belongs to a layer, (O, I), a bias in the last column."""
        weight, bias = (self._direction.get(f"{layer}.{kind}") for kind in ("weight", "bias"))
        assert weight is not None
        parts = [weight.flatten(1), *([] if bias is None else [bias[:, None]])]
        return torch.cat(parts, dim=1)

    def _units(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Of every layer, gradients (N, O, I) and v (O, I), biases in the last column."""
        for layer in self.sides:
            weight, bias = (self.gradients[f"{layer}.{kind}"] for kind in ("weight", "bias"))
            g = torch.cat([weight.flatten(2), bias[:, :, None]], dim=2)
            yield layer, g, self._matrix(layer)

    def _flat_units(self, matrices: dict[str, Tensor]) -> Tensor:
        """Back from (O, I), in the order of the parameters."""
        flat = []
        for name in self._named:
            layer, _, kind = name.rpartition(".")
            has_bias = f"{layer}.bias" in self._named
            matrix = matrices[layer]
            weights = matrix[:, :-1] if has_bias else matrix
            flat.append(matrix[:, -1] if kind == "bias" else weights.flatten())
        return torch.cat(flat)


def reference(batch: Batch, labels: Tensor) -> Reference:
    """What is known about a batch with these labels (N, *T)."""
    exact = batch.double()
    single, double = (_gradient(b, labels).double() for b in (batch, exact))
    return Reference(exact, labels, float((single - double).norm() / double.norm()))


def _gradient(batch: Batch, labels: Tensor) -> Tensor:
    logits = batch.model(batch.inputs)
    loss = functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
    gradients = torch.autograd.grad(loss, list(batch.model.parameters()))
    return torch.cat([g.flatten() for g in gradients])


def _sides(layer: nn.Module, inputs: Tensor, gradients: Tensor) -> Sides:
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        patches = functional.unfold(
            inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride
        )
        inputs, gradients = patches.mT, gradients.flatten(2).mT
    a, g = inputs.flatten(0, -2), gradients.flatten(0, -2)
    if layer.bias is not None:
        a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)
    return Sides(a, g)
