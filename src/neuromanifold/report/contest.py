"""The page that compares optimizers."""

from __future__ import annotations

from neuromanifold._extras import require_extra
from neuromanifold.report.headline import Fact
from neuromanifold.report.kinds import require_kind
from neuromanifold.report.numerals import MISSING, count, counted, measured, percent, quantity
from neuromanifold.report.standing import (
    Contest,
    Standing,
    measure_name,
    share_needed,
    standings,
    verdict,
)

__all__ = ["render_contest"]

_KIND, _VERSION = "neuromanifold.contest", 1


def render_contest(contest: Contest, *, title: str) -> str:
    """One self-contained HTML page about training by one optimizer or several.

    It keeps the promises of `neuromanifold.report.render`: nothing is loaded from anywhere, and the
    tables hold the numbers without JavaScript.

    Args:
        contest: as `neuromanifold.training.compare_optimizers` returns it.
        title: heading of the page, plain text.

    Returns:
        The page; write it as UTF-8.

    Raises:
        UnsupportedError: If the report extra is not installed.
        ValueError: If the dict is something else.
    """
    made_by = "neuromanifold.training.compare_optimizers"
    require_kind(contest, (_KIND, _VERSION), what="The comparison", made_by=made_by)
    require_extra("report", "jinja2", "altair", "vl_convert")
    from neuromanifold.report.render import fill
    from neuromanifold.report.sections.contest import contest_sections

    order = standings(contest)
    model = {
        "id": "contest",
        "name": verdict_heading(order),
        "origin": _origin(contest),
        "facts": _facts(contest, order),
        "sections": contest_sections(contest),
        "coverage": None,
        "notes": contest["notes"],
        "verdict": verdict(contest),
    }
    return fill("contest.html", title=title, models=[model])


def verdict_heading(order: list[Standing]) -> str:
    """The names of those that took part, best first."""
    return ", ".join(each.optimizer for each in order)


def _origin(contest: Contest) -> list[str]:
    seeds = len(contest["seeds"])
    return [
        contest["model"]["class"],
        f"{count(contest['model']['num_trainable'])} parameters",
        contest["likelihood"],
        f"{contest['dtype']} on {contest['device']}",
        f"{counted(contest['epochs'], 'epoch')} of {count(contest['samples_per_epoch'])} samples",
        f"{counted(contest['steps_per_epoch'], 'step')} per epoch",
        counted(seeds, "seed"),
    ]


def _facts(contest: Contest, order: list[Standing]) -> list[Fact]:
    first = order[0]
    kind = measure_name(contest).replace("_", " ").replace("train ", "training ")
    loss = first.loss
    found = [
        Fact(
            f"{kind[0].upper()}{kind[1:]}",
            MISSING if loss is None else quantity(loss.value),
            "nats per sample",
            f"Of {first.optimizer}, at the end: the lower, the better the predictions.",
            "term-loss",
            "" if loss is None or loss.stderr is None else f"± {quantity(loss.stderr, digits=2)}",
        )
    ]
    accuracy = first.mean("test_accuracy" if contest["has_test"] else "train_accuracy")
    if accuracy is not None:
        found.append(
            Fact(
                "Right predictions",
                percent(accuracy.value),
                "",
                f"Share of {'test' if contest['has_test'] else 'training'} targets that were the "
                f"most probable value, with {first.optimizer}.",
                "",
                "" if accuracy.stderr is None else f"± {percent(accuracy.stderr)}",
            )
        )
    if len(order) > 1:
        found.append(_catching_up(first, order[1]))
    else:
        seconds = first.mean("seconds")
        assert seconds is not None
        found.append(
            Fact(
                "Time",
                measured(seconds.value, seconds.stderr)
                if seconds.stderr is not None
                else quantity(seconds.value),
                "s",
                f"Of training, for {counted(first.runs[0]['steps'], 'step')}.",
            )
        )
    return found


def _catching_up(first: Standing, second: Standing) -> Fact:
    steps = seconds = None
    if first.loss is not None and second.loss is not None:
        steps, seconds = (share_needed(first, second, axis) for axis in ("step", "seconds"))
    caption = f"{first.optimizer} was not where {second.optimizer} ended, for one seed at least."
    if steps is not None and seconds is not None:
        caption = (
            f"After that much, and {percent(steps)} of the steps, {first.optimizer} was where "
            f"{second.optimizer} ended."
        )
    return Fact("Time to catch up", percent(seconds), f"of {second.optimizer}’s", caption)
