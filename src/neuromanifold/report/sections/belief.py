"""Helmholtz machines: how fast they learn, what they dream, and what they remember."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from markupsafe import Markup

from neuromanifold._intervals import quantile
from neuromanifold.report import machines
from neuromanifold.report.belief import caught_up, leader
from neuromanifold.report.numerals import measured, percent, quantity, ratio
from neuromanifold.report.sections._base import Section, Table

__all__ = ["belief_sections"]

Study = Mapping[str, Any]


def belief_sections(study: Study) -> list[Section]:
    """Every section that there are numbers for, in reading order."""
    found = [by_update(study), by_second(study), dreams(study), restored(study)]
    return [*found, two_geometries(study)] if study["geometry"] else found


# ---- log-likelihoods -------------------------------------------------------------------------


def by_update(study: Study) -> Section:
    """Log-likelihoods against updates."""
    best = leader(study)
    says = Markup("The best at the end was {}, with {} nats per image").format(
        best["name"], _shown(best["curve"][-1])
    )
    share = caught_up(study, "step")
    if share is not None and share < 1:
        says += Markup(". It was where {} ended after {} of the updates").format(
            study["difference"]["second"], percent(share)
        )
    return Section(
        key="by-update",
        title="Who learns most from an update?",
        says=says + Markup("."),
        advice=Markup(
            "Give each the learning rate that suits it before you judge, and several seeds: this "
            "is one run of each."
        ),
        reading=_reading(study),
        chart=_curves(study, says, "step", "update"),
        table=Table(
            "At the end (nats per image)",
            ("training", "log-likelihood", "updates", "samples per image"),
            [
                [
                    run["name"],
                    _shown(run["curve"][-1]),
                    f"{study['steps']:,}",
                    str(run["samples"]),
                ]
                for run in study["runs"]
            ],
        ),
    )


def by_second(study: Study) -> Section:
    """Log-likelihoods against seconds of training."""
    times = {run["name"]: run["seconds"] / study["steps"] for run in study["runs"]}
    slowest, quickest = max(times, key=times.__getitem__), min(times, key=times.__getitem__)
    says = Markup("An update of {} takes {} ms").format(slowest, quantity(1e3 * times[slowest]))
    if slowest != quickest:
        says += Markup(", {} times as long as one of {}").format(
            ratio(times[slowest] / times[quickest]), quickest
        )
    share = caught_up(study, "seconds")
    if share is not None:
        says += Markup(". It took {} {} of the seconds of {} to be where that ended").format(
            study["difference"]["first"], percent(share), study["difference"]["second"]
        )
    return Section(
        key="by-second",
        title="Who learns fastest by the clock?",
        says=says + Markup("."),
        advice=Markup(
            "Natural updates cost less when their statistics are kept for longer, "
            "<code>period=100</code>, or taken of fewer states, <code>rows=128</code>."
        ),
        reading=_reading(study),
        chart=_curves(study, says, "seconds", "seconds of training, without evaluations"),
        table=Table(
            "Time",
            ("training", "seconds in all", "milliseconds per update"),
            [
                [run["name"], quantity(run["seconds"]), quantity(1e3 * times[run["name"]])]
                for run in study["runs"]
            ],
        ),
    )


def _curves(study: Study, says: Markup, x: str, title: str) -> dict[str, Any]:
    width = quantile(0.95)
    rows = [
        {
            "training": run["name"],
            x: point[x],
            "value": round(point["value"], 4),
            "low": round(point["value"] - width * point["stderr"], 4),
            "high": round(point["value"] + width * point["stderr"], 4),
        }
        for run in study["runs"]
        for point in run["curve"]
    ]
    # The first stretch is steep, and what comes after it is what tells trainings apart.
    lowest = min(run["curve"][1]["value"] for run in study["runs"])
    return machines.log_likelihoods(
        rows, says.striptags(), x=x, title=title, lowest=round(lowest, 4), best=study["best"]
    )


def _reading(study: Study) -> str:
    if study["sampled"]:
        return (
            "Bands: 95% intervals. Images are the same for all, so differences are known better "
            "than the bands say. The start is cut off."
        )
    return (
        "Bands: 95% intervals, because importance samples are finite. Dashed: minus the entropy of "
        "the data, which no model exceeds. The start is cut off."
    )


def _shown(point: Mapping[str, float]) -> str:
    return measured(point["value"], point["stderr"])


# ---- images ----------------------------------------------------------------------------------


def dreams(study: Study) -> Section:
    """Samples of the generative networks, next to data."""
    best, data = leader(study), study["test"]
    if data is None:
        says = Markup("Of the samples of {}, {} are among the images that it was to learn.").format(
            best["name"], percent(best["likeness"]["known"])
        )
    else:
        says = Markup(
            "A sample of {} is {} pixels away from the nearest training image, an image held out "
            "{}."
        ).format(best["name"], _distance(best["likeness"]), _distance(data))
    lines = [[run["name"], *_numbers(run["likeness"])] for run in study["runs"]]
    if data is not None:
        lines.append(["images held out", *_numbers(data)])
    head = ("samples of", "pixels on", "pixels from the nearest training image", "known")
    return Section(
        key="dreams",
        title="What do they dream?",
        says=says,
        advice=Markup(
            "Those that are not are mixtures of images: train on, or with more hidden units."
        )
        if data is None
        else Markup(
            "Samples nearer to training images than held-out images are were learned by heart; "
            "those much farther away were not learned yet."
        ),
        reading="Samples are the first ones drawn, not chosen.",
        chart=machines.gallery(
            {"data": study["images"]} | {run["name"]: run["dreams"] for run in study["runs"]},
            says.striptags(),
            shape=study["shape"],
        ),
        table=Table("Samples next to training images; known are those that equal one", head, lines),
    )


def _distance(likeness: Mapping[str, float]) -> str:
    return measured(likeness["nearest"], likeness["nearest_stderr"])


def _numbers(likeness: Mapping[str, float]) -> list[str]:
    return [percent(likeness["on"]), _distance(likeness), percent(likeness["known"])]


def restored(study: Study) -> Section:
    """Images as they come back from the hidden units."""
    order = sorted(study["runs"], key=lambda run: -float(run["right"]))
    says = Markup("With {}, a pixel comes back right with probability {}.").format(
        order[0]["name"], percent(order[0]["right"])
    )
    return Section(
        key="restored",
        title="What do they remember?",
        says=says,
        advice=Markup(
            "What is lost was not worth the nats of writing it down in hidden units; more of them, "
            "next to the visible ones, remember more."
        ),
        reading="The darker, or on a dark screen the brighter, the more probable that a pixel is "
        "on, given one draw of the hidden units from the recognition network.",
        chart=machines.gallery(
            {"data": study["images"]} | {run["name"]: run["restored"] for run in study["runs"]},
            says.striptags(),
            shape=study["shape"],
        ),
        table=Table(
            "Reconstructions",
            ("training", "pixels that come back right"),
            [[run["name"], percent(run["right"])] for run in order],
        ),
    )


# ---- natural gradients -----------------------------------------------------------------------


def two_geometries(study: Study) -> Section:
    """What the local natural gradient gains, next to the steepest direction of all."""
    rows, lines = [], []
    for point in study["geometry"]:
        share = point["full_rate"] / point["visible_rate"]
        rows += [
            {"step": point["step"], "measure": measure, "value": round(value, 4)}
            for measure, value in (
                ("gain of a short step, as a share of the steepest", share),
                ("cosine of the angle to the steepest", point["cosine"]),
            )
        ]
        numbers = point["visible_rate"], point["full_rate"], point["cosine"]
        lines.append([str(point["step"]), *map(quantity, numbers)])
    typical = median(row["value"] for row in rows[::2])
    says = Markup(
        "Along the way of {}, the natural gradient of all units gained {} of what the steepest "
        "change of the visible units would have (median)."
    ).format(study["runs"][0]["name"], percent(typical))
    return Section(
        key="geometries",
        title="What does the local geometry cost?",
        says=says,
        advice=Markup(
            "The steepest direction needs the dense matrix of the visible units, which only small "
            "networks have; the local one is a solve for each unit."
        ),
        reading="Exact, by enumeration. 1 where both natural gradients agree.",
        chart=machines.two_gradients(rows, says.striptags()),
        table=Table(
            "Gain of a short step, in nats per unit of step, and the angle between them",
            ("update", "visible units", "all units", "cosine"),
            lines,
        ),
    )
