"""How the information is spread over directions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from markupsafe import Markup

from neuromanifold.report import charts
from neuromanifold.report.headline import effective_dimension, reference_damping
from neuromanifold.report.numerals import count, counted, measured, percent, quantity, ratio
from neuromanifold.report.sections._base import (
    WHISKERS,
    Analysis,
    Section,
    Table,
    code,
    error,
    interval,
)

_MOST_POINTS = 1000
"""Eigenvalues drawn, evenly spread over the logarithm of their rank; more look the same."""


def eigenvalues(analysis: Analysis) -> Section | None:
    """The spectrum: how few directions hold most of the trace."""
    spectrum = analysis.get("spectrum")
    if not spectrum or not spectrum["eigenvalues"]:
        return None
    values = spectrum["eigenvalues"]
    cumulative = list(accumulate(values))
    half, most = (_first_reaching(cumulative, share) for share in (0.5, 0.9))
    says = Markup("{} half of the trace, and {} hold 90% of it, out of {}.").format(
        "One direction holds" if half == 1 else f"{count(half)} directions hold",
        count(most),
        counted(spectrum["total_dimension"], "direction"),
    )
    errors = dict(enumerate((spectrum.get("stderr") or {}).get("leading", ()), 1))
    rows = [
        {
            "rank": rank,
            "eigenvalue": values[rank - 1],
            **interval(values[rank - 1], errors.get(rank), logarithmic=True),
        }
        for rank in _spread_ranks(len(values))
    ]
    table = Table(
        f"The {len(spectrum['leading'])} largest of {count(spectrum['count'])} eigenvalues",
        ("rank", "eigenvalue (nats/param²)", "share of the trace", "up to here"),
        [
            [
                str(rank),
                measured(value, errors.get(rank)),
                percent(value / cumulative[-1]),
                percent(cumulative[rank - 1] / cumulative[-1]),
            ]
            for rank, value in enumerate(spectrum["leading"], 1)
        ],
    )
    return Section(
        key="spectrum",
        title="How many directions carry the information?",
        says=says,
        advice=_advice_on_spectrum(values, most, spectrum["total_dimension"], analysis["num_rows"]),
        reading=_read_spectrum(analysis),
        chart=charts.spectrum(rows, says.striptags()),
        table=table,
    )


def _advice_on_spectrum(values: Sequence[float], most: int, total: int, rows: int) -> Markup:
    if rows < total and most > rows / 2:
        return Markup(
            "That is {} of the {} that were sent back, so the count tells how much was measured "
            "rather than what the network is like: measure more samples before you choose a rank."
        ).format(percent(most / rows), counted(rows, "gradient"))
    if most > total / 10:
        return Markup(
            "The information is spread out, so a low-rank approximation saves little: keep a "
            "structure that covers all directions, such as {}."
        ).format(code("Kronecker()"))
    slow = values[0] / values[most - 1]
    return Markup(
        "A low-rank approximation needs {} of the directions for those 90%; plain gradient descent "
        "needs about {} times as many steps along the last of them as along the first."
    ).format(percent(most / total), ratio(slow))


def _read_spectrum(analysis: Analysis) -> str:
    spectrum = analysis["spectrum"]
    reading = (
        f"{counted(spectrum['count'], 'eigenvalue')} above the rounding of the largest; "
        f"{count(spectrum['zeros'])} more count as zero."
    )
    if (equal := analysis.get("participation_ratio")) is not None:
        equal = measured(equal, error(analysis, "participation_ratio"))
        reading += f" Trace and Frobenius norm are those of {equal} equal ones."
    if len(spectrum["eigenvalues"]) > _MOST_POINTS:
        reading += " Towards the right, only some of them are drawn."
    if any(error is not None for error in (spectrum.get("stderr") or {}).get("leading", ())):
        reading += f" {WHISKERS} Only the {len(spectrum['leading'])} largest have one."
    if analysis["num_rows"] < spectrum["total_dimension"]:
        reading += f" {count(analysis['num_rows'])} gradients span no more directions than that."
    return reading


def _first_reaching(cumulative: Sequence[float], share: float) -> int:
    """How many of the largest eigenvalues reach a share of their sum."""
    return 1 + next(i for i, so_far in enumerate(cumulative) if so_far >= share * cumulative[-1])


def _spread_ranks(last: int) -> list[int]:
    """Ranks from 1 to `last`, all of them or evenly spread over their logarithm."""
    if last <= _MOST_POINTS:
        return list(range(1, last + 1))
    steps = (last ** (i / (_MOST_POINTS - 1)) for i in range(_MOST_POINTS))
    return sorted({round(step) for step in steps})


def dimension_left(analysis: Analysis) -> Section | None:
    """How many directions stay above a damping."""
    rows = analysis.get("effective_dimension") or ()
    damping = reference_damping(analysis)
    if not rows or damping is None:
        return None
    values = analysis["spectrum"]["eigenvalues"]
    dimension = effective_dimension(values, damping)
    says = Markup(
        "At a damping of {}, a hundredth of the largest eigenvalue, {} of {} directions matter; at "
        "a hundredth of that damping, {}."
    ).format(
        quantity(damping),
        measured(dimension, error(analysis, "effective_dimension"))
        if error(analysis, "effective_dimension") is not None
        else quantity(dimension),
        count(analysis["spectrum"]["total_dimension"]),
        quantity(effective_dimension(values, damping / 100)),
    )
    points = [
        {
            "damping": row["damping"],
            "value": row["value"],
            **interval(row["value"], row.get("stderr")),
        }
        for row in rows
    ]
    samples = analysis["num_samples"]
    advice = Markup(
        "Read it at the damping you train with to see how many directions a natural-gradient step "
        "corrects, and at 1/{} for a Laplace approximation with a prior precision of 1, where the "
        "samples determine {} directions."
    ).format(count(samples), quantity(effective_dimension(values, 1 / samples)))
    table = Table(
        "Effective dimension against damping",
        ("damping (nats/param²)", "effective dimension (directions)"),
        [[quantity(row["damping"]), measured(row["value"], row.get("stderr"))] for row in rows],
        num_names=0,
    )
    return Section(
        key="dimension",
        title="How many directions are left once damping is added?",
        says=says,
        advice=advice,
        reading="Ring: the headline number. A damping adds that much to every eigenvalue."
        + (" Band: 95% intervals." if any("low" in point for point in points) else ""),
        chart=charts.dimension_curve(
            points, says.striptags(), reference={"damping": damping, "value": dimension}
        ),
        table=table,
    )
