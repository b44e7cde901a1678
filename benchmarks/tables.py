"""What was measured, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.markup import escape
from rich.table import Column, Table

from benchmarks.suite import OURS
from benchmarks.verdicts import Standing, peaks, standing

__all__ = ["memory", "problems", "rows", "slopes", "steps", "updates"]

UNTRUSTED = " (not judged: a rehearsal, or others used this machine)"
COLOURS = {
    "reached": "green",
    "ahead": "green",
    "missed": "red",
    "behind": "red",
    "unclear": "yellow",
    "level": "yellow",
}


def rows(results: Sequence[Mapping[str, Any]], *, trusted: bool) -> Table:
    """One line for each quantity on each workload."""
    table = _table(
        "workload",
        "quantity",
        "ours",
        "quartiles",
        "target",
        "floor",
        "best peer",
        "other peers",
        "verdict",
        title=f"Time in forward + backward passes on the same batch{_threads(trusted)}",
        caption="floor: operations that nobody can do without, in the same unit; — if not known",
    )
    for result in results:
        found = standing(result)
        table.add_row(
            result["workload"],
            result["quantity"],
            *_ours(found),
            _target(result, found),
            "—" if result["floor"] is None else f"{result['floor']:.2f}",
            "" if found.best is None else f"{found.peers[found.best]:.2f} {found.best}",
            _others(found),
            _verdict(found) if trusted else "[yellow]not judged[/]",
        )
    return table


def _ours(found: Standing) -> tuple[str, str]:
    if found.ours is None:
        return "[red]–[/]", "[red]see below[/]"
    low, median, high = found.ours
    return f"{median:.2f}", f"{low:.2f} to {high:.2f}"


def _target(result: Mapping[str, Any], found: Standing) -> str:
    if result["target"] is None:
        return ""
    return f"≤ {result['target']:.2f}" + ("\nbelow the floor" if found.below_floor else "")


def _others(found: Standing) -> str:
    slower = [f"{who} {ratio:.3g}" for who, ratio in found.peers.items() if who != found.best]
    return "\n".join([*slower, *(f"{who}: see below" for who in found.problems)])


def _verdict(found: Standing) -> str:
    words = []
    if found.target:
        words.append(f"[{COLOURS[found.target]}]target {found.target}[/]")
    if found.against and found.lead is not None:
        words.append(f"[{COLOURS[found.against]}]{found.against}, {found.lead:.2g} ×[/]")
    return "\n".join(words)


def problems(results: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Answers that are wrong, or were not given: their time does not count. No table if none is."""
    title = "Answers that do not count"
    table = _table("workload", "quantity", "library", "problem", title=title)
    for result in results:
        for who, answer in result["answers"].items():
            if answer["problem"]:
                table.add_row(
                    result["workload"], result["quantity"], who, escape(answer["problem"])
                )
    return [table] if table.row_count else []


def memory(results: Sequence[Mapping[str, Any]]) -> Table:
    """One line for each quantity on each workload."""
    table = _table(
        "workload",
        "quantity",
        "unit (MiB)",
        "ours",
        "best peer",
        "other peers",
        title="Peak memory in units of that of forward + backward, with all that is kept",
    )
    for result in results:
        ratios = peaks(result)
        ours = ratios.pop(OURS, None)
        peers = [f"{ratio:.3g} {who}" for who, ratio in ratios.items()]
        table.add_row(
            result["workload"],
            result["quantity"],
            f"{result['unit_bytes'] / 2**20:.1f}",
            "[red]see below[/]" if ours is None else f"{ours:.2f}",
            peers[0] if peers else "",
            "\n".join(peers[1:]),
        )
    return table


def steps(results: Sequence[Mapping[str, Any]], *, trusted: bool) -> Table:
    """One line for each optimizer on each workload."""
    table = _table(
        "workload",
        "optimizer",
        "by",
        "mean",
        "quartiles",
        "target",
        "state",
        "",
        title=f"A training step in units of one with fused AdamW{_threads(trusted)}",
        caption="mean over whole periods of the schedule; state in units of AdamW's",
    )
    for result in results:
        if result.get("problem"):
            table.add_row(
                result["workload"],
                result["optimizer"],
                result["by"],
                "–",
                escape(result["problem"]),
            )
            continue
        low, _, high = result["quartiles"]
        target = result["target"]
        reached = target is not None and result["mean"] <= target
        judged = target is not None and trusted
        table.add_row(
            result["workload"],
            result["optimizer"],
            result["by"],
            f"{result['mean']:.2f}",
            f"{low:.2f} to {high:.2f}",
            "" if target is None else f"≤ {target:.2f}",
            "" if result["memory"] is None else f"{result['memory']:.2f}",
            ("[green]reached[/]" if reached else "[red]missed[/]") if judged else "",
        )
    return table


def updates(results: Sequence[Mapping[str, Any]], *, trusted: bool) -> Table:
    """Natural wake-sleep in units of the plain one."""
    table = _table(
        "network",
        "median",
        "quartiles",
        title=f"A natural update of a Helmholtz machine, in plain ones{_threads(trusted)}",
    )
    for result in results:
        low, median, high = result["quartiles"]
        table.add_row(result["network"], f"{median:.2f}", f"{low:.2f} to {high:.2f}")
    return table


def slopes(results: Sequence[Mapping[str, Any]]) -> Table:
    """One line for each quantity along an axis."""
    table = _table("with", "network", "quantity", "slope", "ms", title="Slopes of log time")
    for result in results:
        table.add_row(
            result["axis"],
            result["network"],
            result["quantity"],
            f"{result['slope']:.2f} ± {result['stderr']:.2f}",
            " ".join(f"{1e3 * s:.3g}" for s in result["seconds"]),
        )
    return table


def _table(*names: str, title: str, caption: str | None = None) -> Table:
    """Cells that are too long for their column go on in the next line."""
    return Table(*(Column(name, overflow="fold") for name in names), title=title, caption=caption)


def _threads(trusted: bool) -> str:
    return f"; {torch.get_num_threads()} threads{'' if trusted else UNTRUSTED}"
