"""What a measured row says: is the target reached, and who is faster?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.suite import OURS

__all__ = ["Standing", "peaks", "standing"]


@dataclass(frozen=True)
class Standing:
    """A row, judged.

    Attributes:
        ours: quartiles in units of forward and backward; None if ours failed or is wrong.
        target: "reached", "missed", "unclear", or "" without a target.
        below_floor: whether the target asks for fewer operations than the quantity takes.
        best: name of the fastest peer whose answer is right; None if there is none.
        peers: medians of those whose answers are right, fastest first.
        problems: what is wrong with the others.
        lead: the best peer's median over ours.
        against: "ahead", "behind", or "level" where quartiles overlap; "" without a peer.
    """

    ours: list[float] | None
    target: str
    below_floor: bool
    peers: dict[str, float]
    problems: dict[str, str]
    best: str | None
    lead: float | None
    against: str


def standing(result: Mapping[str, Any]) -> Standing:
    """Judge a row as `suite.measure` gives it.

    A target, or a peer, between the quartiles is decided by a longer run on a quieter machine.
    """
    answers = dict(result["answers"])
    ours = _right(answers.pop(OURS))
    peers = {who: q for who, answer in answers.items() if (q := _right(answer)) is not None}
    order = sorted(peers, key=lambda who: peers[who][1])
    best = order[0] if order else None
    target, floor = result["target"], result["floor"]
    return Standing(
        ours=ours,
        target=_reached(ours, target),
        below_floor=target is not None and floor is not None and target < floor,
        peers={who: peers[who][1] for who in order},
        problems={who: a["problem"] for who, a in answers.items() if a["problem"]},
        best=best,
        lead=peers[best][1] / ours[1] if best and ours else None,
        against=_against(ours, peers[best]) if best and ours else "",
    )


def peaks(result: Mapping[str, Any]) -> dict[str, float]:
    """Peak memory of everyone who gave an answer, in that of forward and backward, least first."""
    unit = result["unit_bytes"]
    answers = result["answers"].items()
    found = {who: answer["bytes"] / unit for who, answer in answers if not answer["problem"]}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _right(answer: Mapping[str, Any]) -> list[float] | None:
    quartiles: list[float] | None = None if answer["problem"] else answer.get("quartiles")
    return quartiles


def _reached(ours: list[float] | None, target: float | None) -> str:
    if ours is None or target is None:
        return ""
    low, _, high = ours
    if high <= target:
        return "reached"
    return "missed" if low > target else "unclear"


def _against(ours: list[float], theirs: list[float]) -> str:
    if ours[2] < theirs[0]:
        return "ahead"
    return "behind" if ours[0] > theirs[2] else "level"
