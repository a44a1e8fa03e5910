"""Progress bars: on a terminal a bar that moves, in a log file one line per minute; and how long each step took."""

import sys
import time
from collections.abc import Iterable
from typing import Any

import tqdm

EVERY_SECONDS = 60  # between two lines in a log file


class _Lines:
    """Standard error for a bar that is no terminal's: each state of the bar becomes a line."""

    def write(self, text: str) -> None:
        """Write what the bar shows now, as a line."""
        if line := text.strip("\r\n "):
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        """Bring it to the file."""
        sys.stderr.flush()


def bar(items: Iterable | None = None, **options: Any) -> tqdm.tqdm:
    """A `tqdm` bar on standard error.

    Args:
        items: what to go through, or None for a bar that `update` moves.
        options: those of tqdm, such as `total`, `desc` and `unit`.
    """
    if sys.stderr.isatty():
        return tqdm.tqdm(items, **options)
    return tqdm.tqdm(items, file=_Lines(), mininterval=EVERY_SECONDS, ncols=100, **options)


class Clock:
    """Adds up the wall time of named steps.

    Attributes:
        seconds: those of each step so far.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stop(self, step: str) -> None:
        """Add the time since the last stop to a step."""
        now = time.perf_counter()
        self.seconds[step] = round(self.seconds.get(step, 0) + now - self._last, 3)
        self._last = now
