"""The page about Helmholtz machines: log-likelihoods, samples and reconstructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neuromanifold._extras import require_extra
from neuromanifold.report.headline import Fact
from neuromanifold.report.kinds import require_kind
from neuromanifold.report.numerals import MISSING, count, counted, percent, quantity
from neuromanifold.report.wake_sleep import KIND, VERSION

__all__ = ["caught_up", "render_belief"]

Study = Mapping[str, Any]
Run = Mapping[str, Any]


def render_belief(studies: Sequence[Study], *, title: str) -> str:
    """One self-contained HTML page about machines that were trained, for one data set or several.

    It keeps the promises of `neuromanifold.report.render`: nothing is loaded from anywhere, and the
    tables hold the numbers without JavaScript.

    Args:
        studies: each as `study_belief` returns it.
        title: heading of the page, plain text.

    Returns:
        The page; write it as UTF-8.

    Raises:
        UnsupportedError: If the report extra is not installed.
        ValueError: If there is no study, or a dict is something else.
    """
    if not studies:
        raise ValueError("There is nothing to show: pass at least one study.")
    for study in studies:
        require_kind(study, (KIND, VERSION), what="The study", made_by="study_belief")
    require_extra("report", "jinja2", "altair", "vl_convert")
    from neuromanifold.report.render import fill
    from neuromanifold.report.sections.belief import belief_sections

    models = [
        {
            "id": f"study-{number}",
            "name": study["name"],
            "origin": _origin(study),
            "facts": _facts(study),
            "sections": belief_sections(study),
            "coverage": None,
            "notes": [],
        }
        for number, study in enumerate(studies, 1)
    ]
    return fill("belief.html", title=title, models=models)


def caught_up(study: Study, axis: str) -> float | None:
    """Where the leader had what the second has at the end, as a share of the second's whole way.

    Args:
        study: with a `difference`.
        axis: "step" or "seconds".

    Returns:
        None if there is no second. At evaluations only, so never too small.
    """
    if study["difference"] is None:
        return None
    runs = {run["name"]: run["curve"] for run in study["runs"]}
    first, second = (runs[study["difference"][which]] for which in ("first", "second"))
    there = next(point for point in first if point["value"] >= second[-1]["value"])
    return float(there[axis] / second[-1][axis])


def leader(study: Study) -> Run:
    """The run with the highest log-likelihood at the end."""
    return max(study["runs"], key=lambda run: float(run["curve"][-1]["value"]))


def _origin(study: Study) -> list[str]:
    sizes = "-".join(map(str, study["sizes"]))
    tested = (
        f"judged by {count(study['tested_on'])} images held out"
        if study["sampled"]
        else f"judged by all {count(study['tested_on'])} images there are"
    )
    return [
        f"layers {sizes}, roots first",
        f"{count(study['num_parameters'])} parameters",
        f"{counted(study['steps'], 'update')} with batches of {study['batch_size']}",
        tested,
        f"{count(study['samples'])} importance samples for each",
        f"{study['dtype']} on {study['device']}",
        "one run of each",
    ]


def _facts(study: Study) -> list[Fact]:
    best = leader(study)
    end, ahead = best["curve"][-1], study["difference"]
    bound = ""
    if study["best"] is not None:
        bound = f" None exceeds {quantity(study['best'])}, what the data allow."
    return [
        Fact(
            "Log-likelihood",
            quantity(end["value"]),
            "nats per image",
            f"Of {best['name']}, at the end: the higher, the better it knows the data.{bound}",
            "term-log-likelihood",
            f"± {quantity(end['stderr'], digits=2)}",
        ),
        Fact(
            "Lead",
            MISSING if ahead is None else quantity(ahead["value"]),
            "nats per image",
            "It was trained alone."
            if ahead is None
            else f"Of {ahead['first']} over {ahead['second']}, image by image. Other random starts "
            "would differ by more than the error says.",
            "term-interval",
            "" if ahead is None else f"± {quantity(ahead['stderr'], digits=2)}",
        ),
        Fact(
            "Pixels restored",
            percent(best["right"]),
            "",
            "Probability that a pixel comes back right when an image is recognised, and generated "
            f"from what was recognised, by {best['name']}.",
            "term-recognition",
        ),
    ]
