"""What is being measured, for how long, and how long the rest may take."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console

__all__ = ["Progress"]

TRUST = 0.2
"""In guesses: as if this share of the run had gone as guessed."""


class Progress:
    """A line for each part of a run that is done, and the present one on a terminal.

    What is left is what was guessed for the parts to come, times how far off the guesses were so
    far, which says more the more is done.

    Args:
        guesses: seconds of every part, by name.
        console: where lines go.
    """

    def __init__(self, guesses: Mapping[str, float], console: Console) -> None:
        self.console = console
        self.status = console.status("")
        self.guesses = dict(guesses)
        self.begun = self.since = time.monotonic()
        self.trust = self.guessed = TRUST * sum(guesses.values())
        self.part = ""

    def start(self, part: str, guess: float | None = None) -> None:
        """Finish the part before, and begin another one.

        Args:
            part: its name.
            guess: of its seconds, where more is known by now.
        """
        self.finish()
        self.part, self.since = part, time.monotonic()
        if guess is not None:
            self.guesses[part] = guess
        self.status.update(f"{part}{self._left()}")
        self.status.start()

    def finish(self) -> None:
        """Say how long the present part took; others may print until the next one begins."""
        self.status.stop()
        if not self.part:
            return
        now = time.monotonic()
        self.guessed += self.guesses.pop(self.part, 0.0)
        passed, seconds = _clock(now - self.begun), now - self.since
        self.console.print(f"{passed}  {self.part}: {seconds:.1f} s{self._left()}", highlight=False)
        self.part = ""

    def _left(self) -> str:
        """After the parts that are done."""
        if not self.guessed:
            return ""
        scale = (time.monotonic() - self.begun + self.trust) / self.guessed
        return f"; about {_clock(scale * sum(self.guesses.values()))} left"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:02d}:{rest:02d}"
