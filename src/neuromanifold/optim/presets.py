"""Optimizers in one line, by the structure that they keep of the Fisher matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import nn

from neuromanifold.capture import Forward
from neuromanifold.estimators import Estimator
from neuromanifold.likelihoods import DiagonalLikelihood, Gaussian, Likelihood
from neuromanifold.optim.natural_gradient import NaturalGradient
from neuromanifold.optim.preconditioner import Preconditioner
from neuromanifold.optim.schedules import Number, Schedule
from neuromanifold.structures import (
    Diagonal,
    EigenKronecker,
    Kronecker,
    MeanField,
    Projected,
    QuasiDiagonal,
    RecursiveInverse,
    Reducer,
    RelativeUnits,
    Structure,
    UnitWise,
)

__all__ = [
    "Options",
    "diagonal",
    "ekfac",
    "kfac",
    "meanfield",
    "projected_kfac",
    "quasidiagonal",
    "relative",
    "unitwise",
]


class Options(TypedDict, total=False):
    """What every preset takes, beside the model and the likelihood.

    `lr`, `momentum`, `weight_decay`, `kl_max`, `adamw_lr`, `line` and `maximize` are those of
    `nm.optim.NaturalGradient`, but that presets decay weights by 0.02 per unit of lr if nothing is
    said; `estimator`, `damping`, `relative`, `per`, `schedule`, `decay`, `fraction`, `split`,
    `forward`, `observe`, `reducer` and `generator` those of `nm.optim.Preconditioner`.

    Attributes:
        params: parameters or groups of them; all of the model by default.
        follow: names or patterns of the parameters that follow the curvature.
    """

    params: Iterable[Any]
    follow: Iterable[str]
    lr: float
    momentum: float
    weight_decay: float
    kl_max: float | None
    adamw_lr: float
    line: bool
    maximize: bool
    estimator: Estimator
    damping: Number
    relative: Number
    per: Literal["position", "sample"]
    schedule: Schedule
    decay: float
    fraction: float
    split: bool
    forward: Forward
    observe: Literal["automatic", "explicit"]
    reducer: Reducer
    generator: torch.Generator


WEIGHT_DECAY = 0.02
"""Of presets, as that of AdamW is not zero: best on digits and a small language model
(`python -m benchmarks.training`)."""

RELATIVE: Options = {"lr": 0.05, "relative": 0.001, "schedule": Schedule(25, 50)}
"""Of relative metrics, whose scale is that of the inputs and not of the loss, and which change
slowly (papers.md §1.4; `python -m benchmarks.races relative`)."""

OF_OPTIMIZER = ("lr", "momentum", "weight_decay", "kl_max", "adamw_lr", "line", "maximize")


def _preset(
    model: nn.Module, likelihood: Likelihood, structure: Structure, options: Options
) -> NaturalGradient:
    given: dict[str, Any] = {**options}
    of_optimizer = {name: given[name] for name in OF_OPTIMIZER if name in given}
    known = Options.__annotations__.keys()
    unknown = given.keys() - known
    if unknown:
        raise TypeError(
            f"There is no option {sorted(unknown)[0]!r}. There are: {', '.join(sorted(known))}."
        )
    of_curvature = {
        "params" if name == "follow" else name: value
        for name, value in given.items()
        if name not in {*OF_OPTIMIZER, "params"}
    }
    preconditioner = Preconditioner(model, likelihood, structure, **of_curvature)
    params = given.get("params", model.parameters())
    return NaturalGradient(params, preconditioner, **{"weight_decay": WEIGHT_DECAY, **of_optimizer})


def kfac(model: nn.Module, likelihood: Likelihood, **options: Unpack[Options]) -> NaturalGradient:
    """Kronecker factors of the true Fisher matrix: the one to begin with.

    Costs two matrix products per layer and step, and the inversion of factors as wide as the
    layers, every 50 steps in the long run.

    Args:
        model: that is trained.
        likelihood: what its outputs mean.
        **options: see `nm.optim.Options`.

    Source: Martens and Grosse, arXiv 1503.05671.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x, y = torch.nn.Linear(4, 3), torch.randn(32, 4), torch.randint(3, (32,))
        >>> opt = nm.optim.kfac(model, nm.Categorical(), lr=0.1)
        >>> torch.nn.functional.cross_entropy(model(x), y).backward()
        >>> opt.step()
    """
    return _preset(model, likelihood, Kronecker(), options)


def ekfac(model: nn.Module, likelihood: Likelihood, **options: Unpack[Options]) -> NaturalGradient:
    """Kronecker-factored eigenbases, with the measured second moment along each direction.

    Follows changes between two inversions, and has the exact trace; twice the products of `kfac`,
    and eigendecompositions in place of inversions.

    Source: George et al., arXiv 1806.03884.
    """
    return _preset(model, likelihood, EigenKronecker(), options)


def unitwise(
    model: nn.Module, likelihood: Likelihood, **options: Unpack[Options]
) -> NaturalGradient:
    """An exact block for each unit, over its incoming weights: for narrow layers.

    Source: Amari, Karakida and Oizumi, arXiv 1808.07172.
    """
    return _preset(model, likelihood, UnitWise(), options)


def quasidiagonal(
    model: nn.Module, likelihood: Likelihood, **options: Unpack[Options]
) -> NaturalGradient:
    """The diagonal and the row of each unit's bias: as cheap as Adam, indifferent to input offsets.

    Source: Ollivier, arXiv 1303.0818.
    """
    return _preset(model, likelihood, QuasiDiagonal(), options)


def diagonal(
    model: nn.Module, likelihood: Likelihood, **options: Unpack[Options]
) -> NaturalGradient:
    """The diagonal of the Fisher matrix alone: the cheapest, and the one to compare with."""
    return _preset(model, likelihood, Diagonal(), options)


def projected_kfac(
    model: nn.Module,
    likelihood: Likelihood,
    *,
    rank: float = 0.125,
    energy: float = 1.0,
    narrowest: int = 64,
    recursive: bool = False,
    **options: Unpack[Options],
) -> NaturalGradient:
    """`kfac` along some directions of each factor, for wide layers: a fraction of time and memory.

    Each factor keeps its largest eigenvalues; in all other directions its damped inverse is the
    mean of what it would be there. A side is kept whole, as `kfac` does, where its directions would
    be half its width or more.

    Args:
        model: that is trained.
        likelihood: what its outputs mean.
        rank: directions of each factor, or their share of its width; see `nm.Projected`.
        energy: as few of them as hold this share of the trace.
        narrowest: sides with fewer numbers are kept whole.
        recursive: whether the inverses follow each measurement, `nm.RecursiveInverse`.
        **options: see `nm.optim.Options`.

    Source: papers.md §4.5; Kaul and Lall, Projective Fisher Information for Natural Gradient
    Descent, 2023.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x, y = torch.nn.Linear(400, 3), torch.randn(32, 400), torch.randint(3, (32,))
        >>> opt = nm.optim.projected_kfac(model, nm.Categorical(), rank=20)
        >>> torch.nn.functional.cross_entropy(model(x), y).backward()
        >>> opt.step()
    """
    kind = RecursiveInverse if recursive else Projected
    factor = kind(rank, energy, narrowest=narrowest)
    structure = Kronecker(inputs=factor, outputs=factor)
    return _preset(model, likelihood, structure, options)


def meanfield(
    model: nn.Module,
    likelihood: Likelihood,
    *,
    covariance: Literal["diagonal", "full"] = "diagonal",
    **options: Unpack[Options],
) -> NaturalGradient:
    """The explicit natural gradient of random networks: a diagonal plus rank two for each unit.

    No matrix is inverted: a step costs O(1) for each weight. As if the inputs of each layer were
    Gaussian: `nm.meanfield.gaussianity` names the layers where they are far from it.

    Args:
        model: that is trained.
        likelihood: what its outputs mean.
        covariance: of each layer's inputs, see `nm.MeanField`.
        **options: see `nm.optim.Options`.

    Source: Amari, Karakida and Oizumi, arXiv 1808.07172.
    """
    return _preset(model, likelihood, MeanField(covariance), options)


def relative(
    model: nn.Module,
    likelihood: Likelihood,
    *,
    response: DiagonalLikelihood | Mapping[str, DiagonalLikelihood] | None = None,
    wide: Literal["shared", "quasidiagonal"] = "shared",
    widest: int = 2**22,
    **options: Unpack[Options],
) -> NaturalGradient:
    """Relative natural gradient (RNGD): each unit follows the metric of its own response.

    What the network makes of a response is left out of the metric, so that no gradient goes back to
    measure it: a measurement is one forward pass.

    Args:
        model: that is trained.
        likelihood: what its outputs mean.
        response: of each unit, given its activation; Gaussian by default. See
            `nm.structures.RelativeUnits`, also for the next two.
        wide: what is kept of layers that are too wide for a matrix for each unit.
        widest: numbers that these matrices of a layer may have.
        **options: see `nm.optim.Options`. Unless they say otherwise, `lr` is 0.05, each block is
            damped by 0.001 times its mean eigenvalue (`relative`), and the metric is measured every
            25 and inverted every 50 steps.

    Source: Sun and Nielsen, arXiv 1606.06069.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
        ... )
        >>> opt = nm.optim.relative(model, nm.Categorical(), lr=0.1)
        >>> x, y = torch.randn(32, 4), torch.randint(3, (32,))
        >>> torch.nn.functional.cross_entropy(model(x), y).backward()
        >>> opt.step()
    """
    structure = RelativeUnits(Gaussian() if response is None else response, wide, widest)
    return _preset(model, likelihood, structure, {**RELATIVE, **options})
