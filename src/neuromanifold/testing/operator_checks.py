"""The contract of a Fisher matrix as a callable test-suite."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from neuromanifold import structures
from neuromanifold.errors import UnsupportedError
from neuromanifold.operators import FisherOperator
from neuromanifold.operators.storage import load
from neuromanifold.testing._compare import STANDARD_ERRORS, assert_close, rounding

__all__ = ["check_operator"]

Answer = TypeVar("Answer")

_NUM_DRAWS = 4_000


def check_operator(
    operator: FisherOperator, *, damping: float, generator: torch.Generator | None = None
) -> None:
    """Check that every method of a Fisher matrix agrees with its own dense form.

    Products, functions, numbers, parts, combinations and files are compared to rounding; the
    covariance of samples to its standard error. A method may raise `UnsupportedError` if the
    message names a structure that is not the operator's own.

    Args:
        operator: what to check, of at most some hundred parameters.
        damping: positive, in nats/parameter²; rounding is allowed to grow like λ_max / damping.
        generator: of test vectors and samples; seeded with 0 if not given.

    Raises:
        AssertionError: If a part of the contract is broken; the sentence says which.

    Example:
        >>> import torch, neuromanifold as nm
        >>> model, x = torch.nn.Linear(3, 2).double(), torch.randn(8, 3).double()
        >>> check_operator(nm.fisher(model, nm.Gaussian(), x), damping=0.1)
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    vectors = torch.randn(operator.num_parameters, 3, generator=generator, dtype=torch.float64).to(
        operator.device, operator.dtype
    )
    dense = operator.to_dense()
    _check_description(operator, dense)
    _check_products(operator, dense, vectors)
    _check_numbers(operator, dense)
    _check_inverses(operator, dense, vectors, damping)
    _check_roots(operator, dense, vectors, damping)
    _check_samples(operator, dense, damping, generator)
    _check_parts(operator, dense)
    _check_combinations(operator, dense)
    _check_file(operator, dense)
    _check_scipy(operator, dense, vectors)
    _check_refusals(operator, vectors[:, 0])


def _check_description(operator: FisherOperator, dense: Tensor) -> None:
    p = operator.layout.num_parameters
    assert operator.num_parameters == p, "num_parameters differs from the layout's."
    assert operator.shape == dense.shape == (p, p), f"shape and to_dense() must be ({p}, {p})."
    assert dense.dtype == operator.dtype, f"to_dense() is {dense.dtype}, not {operator.dtype}."
    assert dense.device == operator.device, f"to_dense() is on {dense.device}."
    assert not dense.requires_grad, "to_dense() must not carry an autograd graph."
    covered = tuple(entry.parameter for entry in operator.coverage)
    assert covered == operator.layout.names, (
        f"coverage lists {covered}; expected every parameter once: {operator.layout.names}."
    )
    tolerance = _tolerance(dense)
    assert_close("The transpose of to_dense()", dense.T, dense, tolerance)
    least = torch.linalg.eigvalsh(dense.double())[0]
    assert least >= -tolerance, f"The matrix has a negative eigenvalue, {least:.3g}."


def _check_products(operator: FisherOperator, dense: Tensor, vectors: Tensor) -> None:
    expected = dense @ vectors
    tolerance = _tolerance(dense) * vectors.norm()
    assert_close("F @ V", operator @ vectors, expected, tolerance)
    assert_close("matmat", operator.matmat(vectors), expected, tolerance)
    u, v = vectors[:, 0], vectors[:, 1]
    assert_close("F @ v", operator @ v, expected[:, 1], tolerance)
    params = operator @ operator.layout.unflatten(v)
    assert list(params) == list(operator.layout.names), "F @ dict must answer with the same keys."
    assert_close("F @ dict", operator.layout.flatten(params), expected[:, 1], tolerance)
    inner = operator.inner(u, operator.layout.unflatten(v))
    assert_close("inner", inner, u @ expected[:, 1], tolerance * u.norm())


def _check_numbers(operator: FisherOperator, dense: Tensor) -> None:
    tolerance = _tolerance(dense)
    assert_close("trace", operator.trace(), dense.trace(), tolerance)
    diagonal = operator.layout.flatten(operator.diagonal())
    assert_close("diagonal", diagonal, dense.diagonal(), tolerance)
    if (norm := _supported(operator, operator.norm)) is not None:
        assert_close("norm", norm, torch.linalg.matrix_norm(dense), tolerance)
    if (values := _supported(operator, operator.eigenvalues)) is not None:
        assert bool((values.diff() <= 0).all()), "eigenvalues must descend."
        expected = torch.linalg.eigvalsh(dense.double()).flip(0)
        unlisted = expected.new_zeros(operator.num_parameters - len(values))
        assert_close("eigenvalues", torch.cat([values.double(), unlisted]), expected, tolerance)
        k = min(2, len(values))
        assert_close(f"eigenvalues({k})", operator.eigenvalues(k), values[:k], tolerance)


def _check_inverses(
    operator: FisherOperator, dense: Tensor, vectors: Tensor, damping: float
) -> None:
    damped = _damped(dense, damping)
    tolerance = _condition(dense, damping) * rounding(len(dense), dense.dtype)
    solution = _supported(operator, lambda: operator.solve(vectors, damping=damping))
    if solution is not None:
        expected = torch.linalg.solve(damped, vectors.double())
        assert_close("solve", solution, expected, tolerance * vectors.norm() / damping)
        one = operator.solve(operator.layout.unflatten(vectors[:, 0]), damping=damping)
        assert_close(
            "solve of a dict",
            operator.layout.flatten(one),
            expected[:, 0],
            tolerance * vectors.norm() / damping,
        )
    logdet = _supported(operator, lambda: operator.logdet(damping=damping))
    if logdet is not None:
        assert_close("logdet", logdet, torch.logdet(damped), len(dense) * tolerance)


def _check_roots(operator: FisherOperator, dense: Tensor, vectors: Tensor, damping: float) -> None:
    size = vectors.norm()
    root = _supported(operator, lambda: operator.sqrt_matvec(vectors))
    if root is not None:
        # The root of an eigenvalue that is rounding is the root of rounding.
        relative = math.sqrt(rounding(len(dense), dense.dtype))
        norm = torch.linalg.matrix_norm(dense)
        twice = operator.sqrt_matvec(root)
        assert_close("sqrt_matvec twice", twice, dense @ vectors, relative * norm * size)
        moment = vectors.T @ root
        tolerance = relative * norm.sqrt() * size**2
        assert_close("The transpose of vᵀ sqrt_matvec(v)", moment.T, moment, tolerance)
        least = torch.linalg.eigvalsh((moment + moment.T).double() / 2)[0]
        assert least >= -tolerance, "sqrt_matvec is not positive semi-definite."
    root = _supported(operator, lambda: operator.inv_sqrt_matvec(vectors, damping=damping))
    if root is not None:
        damped = _damped(dense, damping)
        expected = torch.linalg.solve(damped, vectors.double())
        twice = operator.inv_sqrt_matvec(root, damping=damping)
        tolerance = _condition(dense, damping) * rounding(len(dense), dense.dtype)
        assert_close("inv_sqrt_matvec twice", twice, expected, tolerance * size / damping)


def _check_samples(
    operator: FisherOperator, dense: Tensor, damping: float, generator: torch.Generator
) -> None:
    draws = _supported(
        operator, lambda: operator.sample(_NUM_DRAWS, damping=damping, generator=generator)
    )
    if draws is None:
        return
    p = operator.num_parameters
    assert draws.shape == (_NUM_DRAWS, p), f"sample must be ({_NUM_DRAWS}, {p})."
    # Multiplied by (F + damping)^½ the draws are standard normal, if they are right: the variance
    # of an estimated variance is then 2 / num, that of an estimated covariance 1 / num.
    values, basis = torch.linalg.eigh(dense.double())
    white = draws.double() @ basis * (values.clamp(min=0) + damping).sqrt()
    eye = torch.eye(p, dtype=white.dtype, device=white.device)
    stderr = ((1 + eye) / _NUM_DRAWS).sqrt()
    excess = ((white.T @ white / _NUM_DRAWS - eye).abs() / stderr).max()
    assert excess <= STANDARD_ERRORS, (
        f"The covariance of sample is {excess:.1f} standard errors away from (F + damping)⁻¹."
    )
    mean = white.mean(0).abs().max() * _NUM_DRAWS**0.5
    assert mean <= STANDARD_ERRORS, f"The mean of sample is {mean:.1f} standard errors from zero."


def _check_parts(operator: FisherOperator, dense: Tensor) -> None:
    for name in operator.layout.names:
        _check_part(operator.restrict([name]), [name], operator, dense)
    for block in dict.fromkeys(entry.block for entry in operator.coverage):
        names = [entry.parameter for entry in operator.coverage if entry.block == block]
        _check_part(operator.block(block), names, operator, dense)


def _check_part(
    part: FisherOperator, names: list[str], whole: FisherOperator, dense: Tensor
) -> None:
    assert list(part.layout.names) == names, f"The part of {names} is over {part.layout.names}."
    position = torch.arange(len(dense), device=dense.device)
    kept = torch.cat([position[whole.layout.slices[name]] for name in names])
    expected = dense[kept[:, None], kept]
    tolerance = _tolerance(dense)
    assert_close(f"restrict({names})", part.to_dense(), expected, tolerance)
    assert_close(f"The trace of restrict({names})", part.trace(), expected.trace(), tolerance)


def _check_combinations(operator: FisherOperator, dense: Tensor) -> None:
    tolerance = 3 * _tolerance(dense)
    for name, combined, factor in (
        ("2.5 * F", 2.5 * operator, 2.5),
        ("F + F", operator + operator, 2.0),
        ("F + 0.5 * F", operator + 0.5 * operator, 1.5),
    ):
        assert_close(name, combined.to_dense(), factor * dense, tolerance)
        assert_close(f"The trace of {name}", combined.trace(), factor * dense.trace(), tolerance)
    both = operator + operator
    assert both.num_samples == 2 * operator.num_samples, "A sum is over the samples of both terms."


def _check_file(operator: FisherOperator, dense: Tensor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fisher.safetensors"

        def save() -> FisherOperator:
            operator.save(path)
            return load(path)

        loaded = _supported(operator, save)
        written = [path.name for path in Path(folder).iterdir()]
    assert written == ([] if loaded is None else ["fisher.safetensors"]), f"save left {written}."
    if loaded is not None:
        # The stored numbers are the same; their products may round differently in other memory.
        assert_close("A loaded matrix", loaded.to_dense(), dense.cpu(), _tolerance(dense))
        for attribute in ("layout", "coverage", "origin", "dtype"):
            before, after = getattr(operator, attribute), getattr(loaded, attribute)
            assert after == before, f"{attribute} was {before}, after loading {after}."


def _check_scipy(operator: FisherOperator, dense: Tensor, vectors: Tensor) -> None:
    if find_spec("scipy") is None:
        return
    linear = operator.to_scipy()
    tolerance = _tolerance(dense) * vectors.norm()
    columns = vectors.cpu().numpy()
    reverse = vectors.flip(0)
    assert_close(
        "to_scipy() @ V", torch.from_numpy(linear @ columns), (dense @ vectors).cpu(), tolerance
    )
    got = torch.from_numpy(linear @ columns[::-1, 0])
    assert_close("to_scipy() @ v", got, (dense @ reverse[:, 0]).cpu(), tolerance)
    got = torch.from_numpy(linear.rmatvec(columns[:, 0]))
    assert_close("to_scipy().rmatvec", got, (dense @ vectors[:, 0]).cpu(), tolerance)


def _check_refusals(operator: FisherOperator, v: Tensor) -> None:
    first = operator.layout.names[0]
    refused: dict[str, Callable[[], object]] = {
        "a negative damping": lambda: operator.solve(v, damping=-1.0),
        "a damping that is not a number": lambda: operator.logdet(damping=math.nan),
        "a vector that is too long": lambda: operator @ torch.cat([v, v]),
        "a dict with an unknown name": lambda: operator @ {f"no {first}": v},
        "an unknown parameter": lambda: operator.restrict([f"no {first}"]),
        "an unknown block": lambda: operator.block("no such block"),
        "a negative factor": lambda: -1.0 * operator,
    }
    for what, call in refused.items():
        try:
            call()
        except ValueError:
            continue
        raise AssertionError(f"The operator takes {what}; expected a ValueError.")


def _supported(operator: FisherOperator, method: Callable[[], Answer]) -> Answer | None:
    """The answer; None if the operator has none and its message says which structure has one."""
    try:
        return method()
    except UnsupportedError as error:
        message = str(error)
    named = set(re.findall(r"nm\.(\w+)\(", message)) & set(structures.__all__)
    own = set(re.findall(r"(\w+)\(", operator.origin.structure))
    assert named - own, f"An UnsupportedError must name a structure that helps, got: {message}"
    return None


def _tolerance(dense: Tensor) -> Tensor:
    """Rounding of sums over the matrix."""
    return rounding(len(dense), dense.dtype) * torch.linalg.matrix_norm(dense)


def _damped(dense: Tensor, damping: float) -> Tensor:
    """`F + damping · I` in float64."""
    return dense.double() + damping * torch.eye(len(dense), dtype=torch.float64).to(dense.device)


def _condition(dense: Tensor, damping: float) -> float:
    """Condition number of the damped matrix."""
    assert damping > 0, "check_operator needs a positive damping."
    return 1 + float(torch.linalg.matrix_norm(dense, ord=2)) / damping
