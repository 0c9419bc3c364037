"""A progress bar of one line, for terminals only."""

from __future__ import annotations

import sys
import time
from typing import TextIO

WIDTH = 28
SECONDS_BETWEEN_UPDATES = 0.1


class ProgressBar:
    """Redraws one line on ``stream``; silent unless that is a terminal and ``quiet`` is False."""

    def __init__(
        self, label: str, total: int, *, quiet: bool = False, stream: TextIO | None = None
    ) -> None:
        self._label = label
        self._total = max(1, total)
        self._stream = sys.stderr if stream is None else stream
        self._on = not quiet and self._stream.isatty()
        self._drawn = 0.0
        self._length = 0

    def update(self, done: int, note: str = "") -> None:
        """Shows ``done`` of the total and a short note; redraws at most ten times a second."""
        now = time.monotonic()
        if not self._on or (done < self._total and now - self._drawn < SECONDS_BETWEEN_UPDATES):
            return
        self._drawn = now
        filled = WIDTH * min(done, self._total) // self._total
        bar = "#" * filled + "." * (WIDTH - filled)
        self._write(f"{self._label} [{bar}] {done}/{self._total} {note}")

    def write(self, line: str) -> None:
        """Prints a line above the bar, also where there is no bar to draw."""
        if self._on:
            self._write("")
        print(line, flush=True)

    def close(self) -> None:
        """Removes the bar."""
        if self._on and self._length:
            self._write("")

    def _write(self, text: str) -> None:
        self._stream.write("\r" + text.ljust(self._length) + ("\r" if not text else ""))
        self._stream.flush()
        self._length = len(text)
