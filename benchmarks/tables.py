"""What was measured, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from benchmarks.verdicts import Standing, standing

__all__ = ["problems", "rows", "steps", "updates"]

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
    table = Table(
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
        caption="floor: operations that nobody can do without, in the same unit",
    )
    for result in results:
        found = standing(result)
        table.add_row(
            result["workload"],
            result["quantity"],
            *_ours(found),
            "" if result["target"] is None else f"≤ {result['target']:.2f}",
            "" if result["floor"] is None else f"{result['floor']:.2f}",
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


def problems(results: Sequence[Mapping[str, Any]]) -> Table:
    """Answers that are wrong, or were not given: their time does not count."""
    table = Table("workload", "quantity", "library", "problem", title="Answers that do not count")
    for result in results:
        for who, answer in result["answers"].items():
            if answer["problem"]:
                table.add_row(
                    result["workload"], result["quantity"], who, escape(answer["problem"])
                )
    return table


def steps(results: Sequence[Mapping[str, Any]], *, trusted: bool) -> Table:
    """One line for each optimizer on each workload."""
    table = Table(
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
                result["workload"], result["optimizer"], result["by"], "–", result["problem"]
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
    table = Table(
        "network",
        "median",
        "quartiles",
        title=f"A natural update of a Helmholtz machine, in plain ones{_threads(trusted)}",
    )
    for result in results:
        low, median, high = result["quartiles"]
        table.add_row(result["network"], f"{median:.2f}", f"{low:.2f} to {high:.2f}")
    return table


def _threads(trusted: bool) -> str:
    return f"; {torch.get_num_threads()} threads{'' if trusted else UNTRUSTED}"
