"""An approximation beside the truth: how far its spectrum is from that of the matrix itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neuromanifold._estimate import Estimate
from neuromanifold._fisher import fisher
from neuromanifold._intervals import plus_minus
from neuromanifold.capture import Forward
from neuromanifold.estimators import Estimator, Exact
from neuromanifold.likelihoods import Likelihood
from neuromanifold.operators import FisherOperator
from neuromanifold.operators.coverage import join
from neuromanifold.spectral.choice import operator
from neuromanifold.spectral.quadrature import logdet, require_damping
from neuromanifold.spectral.quantities import summary
from neuromanifold.structures import Kronecker, Structure

__all__ = ["Fidelity", "Surrogate", "surrogate"]

QUANTITIES = ("trace", "norm", "largest_eigenvalue", "effective_dimension", "logdet")


@dataclass(frozen=True)
class Fidelity:
    """Numbers of an approximation, and of the matrix that it stands for.

    Attributes:
        num_parameters: of the layer, or of the network.
        kept: the structures that represent the parameters, e.g. "Kronecker".
        eigenvalues: of the approximation, `(P,)`, descending, float64, in nats/parameter². Of
            Kronecker factors, the products of theirs.
        approximate: by name: `trace`, `norm` and `largest_eigenvalue` in nats/parameter²,
            `effective_dimension`, and `logdet` with the damping added, in nats. Exact.
        exact: the same numbers of the matrix itself, with their errors where they are estimates.
        method: how the latter were found: "all eigenvalues", or what was iterated.
    """

    num_parameters: int
    kept: str
    eigenvalues: Tensor
    approximate: Mapping[str, float]
    exact: Mapping[str, Estimate]
    method: str

    @property
    def off(self) -> dict[str, Estimate]:
        """How far the approximation is: 1 is right for ratios, 0 for the log-determinant.

        Approximate over exact; of the log-determinant, approximate minus exact, in nats.
        """
        return {name: self._off(name) for name in QUANTITIES}

    def _off(self, name: str) -> Estimate:
        truth, found = self.exact[name], self.approximate[name]
        value, stderr = truth.value, truth.stderr
        assert isinstance(value, Tensor)
        assert isinstance(stderr, Tensor)
        if name == "logdet":
            off, error = found - value, stderr
        else:
            # Layers without information have none in the approximation either.
            off = torch.where(value == found, torch.ones_like(value), found / value)
            error = torch.where(stderr > 0, off.abs() * stderr / value, 0)
        return Estimate(off, {"matrix": error.square()}, truth.num_samples, truth.draws)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON, without the eigenvalues."""
        return {
            "num_parameters": self.num_parameters,
            "kept": self.kept,
            "approximate": dict(self.approximate),
            "exact": {name: number.to_dict() for name, number in self.exact.items()},
            "off": {name: number.to_dict() for name, number in self.off.items()},
            "method": self.method,
        }


@dataclass(frozen=True)
class Surrogate:
    """An approximation beside the truth, layer by layer; `print` shows a table.

    Attributes:
        layers: by name.
        whole: the approximation of the whole matrix, which leaves out what couples layers.
        structure: what approximates.
        damping: in nats/parameter².
        matrix: what the exact numbers are of: how it was measured, and why so.
    """

    layers: Mapping[str, Fidelity]
    whole: Fidelity
    structure: str
    damping: float
    matrix: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON, without the eigenvalues."""
        return {
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
            "whole": self.whole.to_dict(),
            "structure": self.structure,
            "damping": self.damping,
            "matrix": self.matrix,
        }

    def __str__(self) -> str:
        rows = [["layer", "parameters", "kept as", *QUANTITIES]]
        parts = [*((name or "(root)", layer) for name, layer in self.layers.items())]
        for name, part in [*parts, ("all", self.whole)]:
            off = part.off
            shown = [_shown(off[each], signed=each == "logdet") for each in QUANTITIES]
            rows.append([name, f"{part.num_parameters:,}", part.kept, *shown])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        methods = dict.fromkeys(part.method for _, part in [*parts, ("all", self.whole)])
        return "\n".join(
            [
                *(line.replace("_", " ") if not i else line for i, line in enumerate(table)),
                f"{self.structure} over the matrix itself; logdet: the difference, in nats; "
                f"damping {self.damping:g}",
                f"the matrix itself: {self.matrix}; {'; '.join(methods)}",
            ]
        )


def _shown(number: Estimate, *, signed: bool) -> str:
    value, stderr = number.value, number.stderr
    assert isinstance(value, Tensor)
    assert isinstance(stderr, Tensor)
    if bool(stderr > 0):
        return plus_minus(float(value), float(stderr))
    return f"{float(value):+.3g}" if signed else f"{float(value):.3g}"


def surrogate(
    model: nn.Module,
    likelihood: Likelihood,
    data: Any,
    *,
    damping: float,
    structure: Structure | None = None,
    estimator: Estimator | None = None,
    params: Iterable[str] | None = None,
    per: Literal["sample", "position"] = "sample",
    forward: Forward | None = None,
    generator: torch.Generator | None = None,
    max_bytes: int | str = "1 GiB",
) -> Surrogate:
    """How far the spectrum of Kronecker factors is from that of the matrix they stand for.

    Both are measured on the same data, with the same labels where an estimator draws them. Numbers
    of the matrix itself are exact where `operator` can keep it in sample space, or a layer is
    small; elsewhere they are estimates with their errors, and `.method` says so.

    Args:
        model: as for `nm.fisher`, like all that follow.
        likelihood: what the outputs mean.
        data: if an iterable, one that can be read again.
        damping: of log-determinant and effective dimension; positive, in nats/parameter².
        structure: the approximation, of any kind that knows its eigenvalues; `nm.Kronecker()` by
            default.
        estimator: which vectors are sent back; `nm.Exact()` by default.
        params: names or patterns of the parameters.
        per: as for `nm.fisher`.
        forward: how the model is called.
        generator: source of the estimator's randomness, and of random vectors.
        max_bytes: as for `operator`.

    Returns:
        Numbers of both, per layer and whole.

    Raises:
        ValueError: As `nm.fisher`.
        UnsupportedError: If the structure has no exact eigenvalues.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
        >>> found = nm.spectral.surrogate(model, nm.Gaussian(), x, damping=0.1)
        >>> print(f"{found.whole.off['trace'].value:.6f}")  # exact for one layer with these outputs
        1.000000
    """
    require_damping(damping)
    structure = Kronecker() if structure is None else structure
    estimator = Exact() if estimator is None else estimator
    seed = int(torch.randint(2**62, (), generator=generator))

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    F = operator(
        model,
        likelihood,
        data,
        estimator=estimator,
        params=params,
        per=per,
        forward=forward,
        generator=seeded(),
        max_bytes=max_bytes,
    )
    S = fisher(
        model,
        likelihood,
        data,
        structure,
        estimator=estimator,
        params=params,
        per=per,
        forward=forward,
        generator=seeded(),
    )
    names = dict.fromkeys(entry.block for entry in S.coverage)
    layers = {
        name: _compare(S.block(name), F.block(name), damping, seeded().manual_seed(seed + i))
        for i, name in enumerate(names, 1)
    }
    whole = _compare(S, F, damping, seeded())
    return Surrogate(layers, whole, repr(structure), damping, F.origin.notes[-1])


def _compare(
    S: FisherOperator, F: FisherOperator, damping: float, generator: torch.Generator
) -> Fidelity:
    values = S.eigenvalues().double()
    logs = (values / damping).log1p().sum()
    logs += S.num_parameters * torch.tensor(damping, dtype=torch.float64).log()
    found = summary(F, damping=damping, generator=generator)
    numbers = {**found.numbers, "logdet": logdet(F, damping=damping, generator=generator)}
    return Fidelity(
        num_parameters=S.num_parameters,
        kept=join(entry.structure for entry in S.coverage),
        eigenvalues=values,
        approximate={
            "trace": float(values.sum()),
            "norm": float(values.norm()),
            "largest_eigenvalue": float(values[0]),
            "effective_dimension": float((values / (values + damping)).sum()),
            "logdet": float(logs),
        },
        exact={name: numbers[name] for name in QUANTITIES},
        method=found.method,
    )
