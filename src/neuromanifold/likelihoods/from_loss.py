"""The likelihood that a torch loss module stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from neuromanifold.errors import UnsupportedError
from neuromanifold.likelihoods._base import Likelihood
from neuromanifold.likelihoods.bernoulli import Bernoulli
from neuromanifold.likelihoods.categorical import Categorical
from neuromanifold.likelihoods.gaussian import Gaussian, GaussianMeanVariance
from neuromanifold.likelihoods.poisson import Poisson

__all__ = ["from_loss"]


def from_loss(loss: nn.Module) -> Likelihood:
    """The likelihood whose negative log-probability is the given loss, up to a constant.

    A likelihood sums over the positions and entries of a sample. A loss with `reduction="mean"`
    averages over them, and differs by their number: only for `nn.MSELoss` is this factor part of
    the likelihood, as its variance. `per="position"` divides by the number of positions.

    | loss | likelihood |
    |---|---|
    | `nn.CrossEntropyLoss` | `Categorical(class_axis=1)` with its `ignore_index` |
    | `nn.BCEWithLogitsLoss` | `Bernoulli()` |
    | `nn.MSELoss(reduction="mean")` | `Gaussian(0.5, per_event=True)` |
    | `nn.MSELoss(reduction="sum")`, or `"none"` | `Gaussian(0.5)` |
    | `nn.GaussianNLLLoss` | `GaussianMeanVariance(log_variance=False)` |
    | `nn.PoissonNLLLoss` | `Poisson()` |

    Args:
        loss: a loss module of torch.

    Returns:
        The likelihood; logits, means and log rates are what the loss takes as its input.

    Raises:
        UnsupportedError: If the loss, or an option of it, is no log-probability known here.

    Example:
        >>> from torch import nn
        >>> from_loss(nn.MSELoss())
        Gaussian(variance=0.5, per_event=True)
    """
    for kind, read in _READERS.items():
        # A subclass with its own forward is another loss.
        if isinstance(loss, kind) and type(loss).forward is kind.forward:
            return read(loss)
    known = ", ".join(f"nn.{kind.__name__}" for kind in _READERS)
    given = type(loss).__name__ if isinstance(loss, nn.Module) else repr(loss)
    raise UnsupportedError(
        f"No likelihood is known for the loss {given}; known are the modules {known}. Say what "
        f"the outputs mean with a likelihood of your own: FromDistribution(fn), where fn(outputs) "
        f"is a torch.distributions.Distribution."
    )


def _categorical(loss: nn.CrossEntropyLoss) -> Likelihood:
    _refuse(
        loss.weight is not None,
        "CrossEntropyLoss(weight=...) is not the log-probability of one label distribution. Use "
        "Categorical(class_axis=1), and draw the samples of rare classes more often instead.",
    )
    _refuse(
        loss.label_smoothing != 0,
        f"CrossEntropyLoss(label_smoothing={loss.label_smoothing}) changes the targets, not what "
        f"the outputs mean. Use Categorical(class_axis=1): its Fisher is the one that you want.",
    )
    return Categorical(ignore_index=loss.ignore_index, class_axis=1)


def _bernoulli(loss: nn.BCEWithLogitsLoss) -> Likelihood:
    for option in ("weight", "pos_weight"):
        _refuse(
            getattr(loss, option) is not None,
            f"BCEWithLogitsLoss({option}=...) is not the log-probability of one label "
            f"distribution. Use Bernoulli(), and draw rare samples more often instead.",
        )
    return Bernoulli()


def _gaussian(loss: nn.MSELoss) -> Likelihood:
    # A squared error (y − f)², without a ½, is the negative log-probability at variance ½.
    return Gaussian(variance=0.5, per_event=loss.reduction == "mean")


def _gaussian_mean_variance(loss: nn.GaussianNLLLoss) -> Likelihood:  # noqa: ARG001
    return GaussianMeanVariance(log_variance=False)


def _poisson(loss: nn.PoissonNLLLoss) -> Likelihood:
    _refuse(
        not loss.log_input,
        "PoissonNLLLoss(log_input=False) takes rates. Let the model return log rates and use "
        "Poisson(), or use FromDistribution(lambda rate: Independent(Poisson(rate), 1)).",
    )
    return Poisson()


def _refuse(condition: bool, message: str) -> None:
    if condition:
        raise UnsupportedError(message)


_READERS: dict[type[nn.Module], Callable[[Any], Likelihood]] = {
    nn.CrossEntropyLoss: _categorical,
    nn.BCEWithLogitsLoss: _bernoulli,
    nn.MSELoss: _gaussian,
    nn.GaussianNLLLoss: _gaussian_mean_variance,
    nn.PoissonNLLLoss: _poisson,
}
