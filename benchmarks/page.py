"""`results/bench.html`: the measured suite as one page with charts, which loads nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from benchmarks import charts
from benchmarks.rows import CALLS
from benchmarks.verdicts import Standing, peaks, standing
from neuromanifold._extras import require_extra

__all__ = ["write_page"]

TEMPLATES = Path(__file__).parent / "templates"
Result = Mapping[str, Any]


def write_page(results: Path) -> Path:
    """Draw what a JSON file of the suite holds, beside it.

    Needs the report extra: jinja2, altair and vl-convert-python.
    """
    require_extra("report", "jinja2", "altair", "vl_convert")
    from neuromanifold.report.render import fill

    model = _suite(json.loads(results.read_text()))
    page = fill("speed.html", templates=TEMPLATES, title="What it costs", models=[model])
    path = results.with_suffix(".html")
    path.write_text(page)
    return path


def _suite(found: Mapping[str, Any]) -> dict[str, Any]:
    by_quantity: dict[str, list[Result]] = {}
    for result in found["rows"]:
        by_quantity.setdefault(result["quantity"], []).append(result)
    notes = list(found["not_run"])
    if found["crowded_at_start"]:
        notes.append("Others used this machine: times mean nothing.")
    sections = [_section(name, results) for name, results in by_quantity.items()]
    if found.get("memory"):
        sections.append(_memory(found["memory"]))
    if found.get("steps"):
        sections.append(_steps(found["steps"]))
    sections += _slopes(found.get("slopes", []))
    return {
        "id": "speed",
        "name": "Ours and others",
        "origin": [*_machine(found), *_versions(found["peers"])],
        "facts": _facts(found["rows"]),
        "sections": sections,
        "coverage": None,
        "notes": notes,
    }


def _machine(found: Mapping[str, Any]) -> list[str]:
    machine = found["environment"]
    where = machine["cpu"] if found["device"] == "cpu" else found["device"]
    return [
        where,
        f"{machine['threads']} threads",
        f"torch {machine['torch']}",
        found["precision"],
        f"BENCH={found['mode']}",
    ]


def _versions(peers: Mapping[str, str | None]) -> list[str]:
    return [f"{name} {version or 'not installed'}" for name, version in peers.items()]


def _facts(results: Sequence[Result]) -> list[dict[str, str]]:
    standings = [standing(result) for result in results]
    judged = [s for s in standings if s.target]
    raced = [s for s in standings if s.against]
    return [
        _fact(
            "Targets reached",
            f"{sum(s.target == 'reached' for s in judged)} of {len(judged)}",
            "Whole quartile range at or below the target.",
        ),
        _fact(
            "Ahead of the best peer",
            f"{sum(s.against == 'ahead' for s in raced)} of {len(raced)}",
            "Quartiles apart, of the rows that a peer has a right answer to.",
        ),
    ]


def _fact(label: str, value: str, caption: str) -> dict[str, str]:
    return {
        "label": label,
        "value": value,
        "unit": "rows",
        "caption": caption,
        "term": "",
        "error": "",
    }


# --- sections ------------------------------------------------------------------------------------


def _section(quantity: str, results: Sequence[Result]) -> dict[str, Any]:
    found = {result["workload"]: standing(result) for result in results}
    says = " ".join(_sentence(workload, s) for workload, s in found.items())
    bars = [bar for result in results for bar in charts.bars_of(result)]
    return {
        "key": quantity.replace(" ", "-").replace(",", "").replace("%", "percent"),
        "title": quantity[0].upper() + quantity[1:],
        "says": says,
        "advice": Markup("<code>{}</code>").format(CALLS[quantity]),
        "reading": "Thick ticks: targets. Thin ticks: floors by operations.",
        "chart": charts.ratios(bars, says),
        "table": _table(results),
    }


def _sentence(workload: str, found: Standing) -> str:
    if found.ours is None:
        return f"{workload}: no right answer of ours."
    words = f"{workload}: {found.ours[1]:.2f}"
    if found.best is not None and found.lead is not None:
        words += f", {found.lead:.2g} times as fast as {found.best}"
    if found.below_floor:
        words += "; the target is below the floor"
    return f"{words}."


def _table(results: Sequence[Result]) -> dict[str, Any]:
    rows = []
    for result in results:
        for who, answer in result["answers"].items():
            quartiles = answer.get("quartiles")
            low, median, high = (f"{q:.2f}" for q in quartiles) if quartiles else ("–", "–", "–")
            rows.append([result["workload"], who, answer["problem"], median, low, high])
    head = ("workload", "library", "problem", "median", "lower quartile", "upper quartile")
    return {"caption": results[0]["form"], "head": head, "rows": rows, "num_names": 3}


def _memory(results: Sequence[Result]) -> dict[str, Any]:
    says = "Peaks of single calls, each in a process of its own, in that of forward and backward."
    bars, rows = [], []
    for result in results:
        found = peaks(result)
        bars += [charts.bar_of_peak(result, who, ratio) for who, ratio in found.items()]
        for who, answer in result["answers"].items():
            peak = f"{found[who]:.2f}" if who in found else "–"
            where = result["workload"], result["quantity"]
            rows.append([*where, who, answer["problem"], peak])
    head = ("workload", "quantity", "library", "problem", "peak")
    return {
        "key": "memory",
        "title": "Peak memory",
        "says": says,
        "advice": "What is kept between calls counts, the model and its batch do not.",
        "reading": "",
        "chart": charts.ratios(bars, says),
        "table": {"caption": "Peaks", "head": head, "rows": rows, "num_names": 4},
    }


def _steps(results: Sequence[Result]) -> dict[str, Any]:
    timed = [result for result in results if "mean" in result]
    says = "Means over whole periods of the schedule, in steps with fused AdamW."
    rows = [
        [result["workload"], result["by"], result["optimizer"], f"{result['mean']:.2f}"]
        for result in timed
    ]
    head = ("workload", "library", "optimizer", "mean")
    return {
        "key": "steps",
        "title": "Training steps",
        "says": says,
        "advice": "The unit is a step of fused AdamW, not forward and backward.",
        "reading": "Thick ticks: targets.",
        "chart": charts.ratios([charts.bar_of_step(result) for result in timed], says),
        "table": {"caption": "Steps", "head": head, "rows": rows, "num_names": 3},
    }


def _slopes(rows: Sequence[Result]) -> list[dict[str, Any]]:
    by_axis: dict[str, list[Result]] = {}
    for row in rows:
        by_axis.setdefault(row["axis"], []).append(row)
    return [_slope(axis, found) for axis, found in by_axis.items()]


def _slope(axis: str, rows: Sequence[Result]) -> dict[str, Any]:
    words = [f"{row['quantity']} {row['slope']:.2f} ± {row['stderr']:.2f}" for row in rows]
    says = f"Slopes of log time against log {axis}: {', '.join(words)}."
    cells = [
        [row["quantity"], row["network"], f"{row['slope']:.2f}", f"{row['stderr']:.2f}"]
        for row in rows
    ]
    head = ("quantity", "network", "slope", "standard error")
    return {
        "key": axis.replace(" ", "-"),
        "title": f"How cost grows with {axis}",
        "says": says,
        "advice": "A slope of 1 is time in proportion, 2 its square.",
        "reading": "",
        "chart": charts.growth(rows, says, axis),
        "table": {"caption": f"Slopes with {axis}", "head": head, "rows": cells, "num_names": 2},
    }
