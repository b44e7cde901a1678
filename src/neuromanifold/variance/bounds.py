"""Upper bounds on the variance of a diagonal from sampled labels (papers.md §3.3).

With `γ_c` the component of a parameter's gradient along column c of the output Fisher, `I = Σ γ_c²`
is a sample's information, and one label's squared score has the variance `2 I² + κ₄`. Targets are
independent, so κ₄ is the sum of those of the targets k, of information `I_k`. It is bounded by

- `Σ_k I_k (m_k² + M_k² − 4 I_k)` for labels of classes, m_k and M_k the least and the greatest
  score. Proof for one label, whose score z has mean 0, with `s = m + M` and `q = −m M`:
  `0 ≤ E z² (M − z)(z − m) = q I + s E z³ − E z⁴`, and
  `0 ≤ Var(z² − s z) = E z⁴ − 2 s E z³ + s² I − I²`. Twice the first plus the second:
  `E z⁴ ≤ I (s² + 2 q − I) = I (m² + M² − I)`, and κ₄ is `3 I²` less. Two classes give equality.
  As `q ≥ I`, it is at most `I (R² − 6 I)`, the bound by the range of the score `R = M − m`.
- `A Σ_c γ_c⁴ + b Σ_k I_k²` for other families, where `κ₄ = Σ_c a_c γ_c⁴ + b Σ_k I_k²` and A is the
  largest `a_c`. Equality where all are alike, as for `nm.Gaussian()`: there they are zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from neuromanifold._fisher import requested
from neuromanifold._typing import Params
from neuromanifold.capture import Forward
from neuromanifold.errors import UnsupportedError
from neuromanifold.estimators import MonteCarlo
from neuromanifold.likelihoods import Likelihood
from neuromanifold.structures import Progress, Reducer
from neuromanifold.variance.moments import moments

__all__ = ["bound"]


def bound(
    model: nn.Module,
    likelihood: Likelihood,
    data: Any,
    *,
    estimator: MonteCarlo | None = None,
    params: Iterable[str] | None = None,
    forward: Forward | None = None,
    uncovered: Literal["generic", "error"] = "generic",
    reducer: Reducer | None = None,
    progress: bool | Progress = False,
) -> Params:
    """Upper bound on what sampled labels add to the variance of the Fisher's diagonal.

    It says what drives the variance: for classes the greatest and least score, which grow without
    limit relative to the information as a class becomes unlikely; for other families the output
    entry with the heaviest tails. An equality for two classes, for a parameter that moves one logit
    alone as in a last layer, for one Bernoulli or Poisson output, and for `nm.Gaussian()`. The cost
    is about that of `nm.variance.diagonal`, which gives the variance itself.

    Args:
        model: as for `nm.fisher`, like all that follow.
        likelihood: what the outputs mean; any but an `nm.FromDistribution` of infinite support.
        data: inputs, with or without targets.
        estimator: how many labels are drawn; `nm.MonteCarlo(1)` by default.
        params: names or patterns of the parameters.
        forward: how the model is called.
        uncovered: what to do about parameters without a layer rule.
        reducer: sums over processes.
        progress: True shows a progress bar.

    Returns:
        For each parameter at least `nm.variance.diagonal(...).variances["labels"]`, in
        nats²/parameter⁴.

    Raises:
        UnsupportedError: If the likelihood or the estimator has no closed form.
        ValueError: As `nm.fisher`.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(4, 1), torch.randn(256, 4)
        >>> most = nm.variance.bound(model, nm.Gaussian(), x)
        >>> true = nm.variance.diagonal(model, nm.Gaussian(), x).variances["labels"]
        >>> torch.allclose(most["weight"], true["weight"])
        True
    """
    estimator = MonteCarlo(1) if estimator is None else estimator
    asked = requested(
        model,
        likelihood,
        data,
        estimator=estimator,
        params=params,
        forward=forward,
        uncovered=uncovered,
        reducer=reducer,
        progress=progress,
    )
    with asked as (_, source):
        if not isinstance(estimator, MonteCarlo):
            raise UnsupportedError(
                f"The bound is on the noise of sampled labels, and {estimator!r} samples none: "
                f"give nm.MonteCarlo(...), or ask nm.variance.diagonal(...) for its variance."
            )
        bounds = estimator.noise_bounds(moments(source, bounds=True))
    if "labels" not in bounds:
        raise UnsupportedError(
            f"{likelihood!r} has no closed form for the fourth moment of its score, so there is no "
            f"bound on it. nm.variance.diagonal(...) measures it from sampled labels."
        )
    return bounds["labels"]
