"""Tries of a campaign: commands as processes of their own with a time limit, and several tries side by side."""

import os
import pickle
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import files

AT_A_TIME = 2
POLL = 0.005  # seconds
FAILED = 70  # exit status of a command that raised something


@dataclass(frozen=True)
class Try:
    """One try of a campaign.

    Attributes:
        how: what was done, such as "killed before os.rename sets/mine.h5".
        outcome: how it ended, in a word or two, such as "refused"; tries are counted by it.
        lost: what is wrong, or None.
    """

    how: str
    outcome: str
    lost: str | None = None


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: its exit status; minus the signal that ended it; None where it was still running at its limit.
        output: what it printed, standard output and error together, also that of libraries.
    """

    status: int | None
    output: str

    def refusal(self) -> str | None:
        """What is wrong with how the command said that it cannot go on; None where it is one line and status 1."""
        if self.status is None:
            return "hangs"
        if "Traceback" in self.output:
            return f"a traceback: {self.output[-600:]}"
        errors = sum(line.startswith("error: ") for line in self.output.replace("\r", "\n").splitlines())
        if self.status != 1 or errors != 1:
            return f"status {self.status} and {errors} lines of error: {self.output[-600:]}"
        return None


def call(
    command: Callable[[], Any],
    place: Path,
    seconds: float = 300,
    file_limit: int | None = None,
    killed_after: float | None = None,
) -> Ended:
    """Run a command in a forked process, in the folder `place`, and wait for its end.

    Args:
        command: function that returns an exit status, or None for 0.
        place: the working folder.
        seconds: after which it counts as hanging, and is ended.
        file_limit: bytes that a file can have at most; None for as many as it likes.
        killed_after: seconds after which it is ended by SIGKILL; None for never.
    """
    with tempfile.TemporaryFile() as told:
        child = os.fork()
        if child == 0:
            _run(command, place, told.fileno(), file_limit)
        status = _wait(child, seconds if killed_after is None else killed_after)
        told.seek(0)
        return Ended(status, told.read().decode(errors="replace"))


def _run(command: Callable[[], Any], place: Path, output: int, file_limit: int | None) -> None:
    """The forked process, which does not return."""
    status = FAILED
    try:
        for number in (1, 2):
            os.dup2(output, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        os.chdir(place)
        files._cleaned.clear()  # a new process has looked at no folder yet
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        status = command() or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _wait(child: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(POLL)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def side_by_side(tries: Iterable[Callable[[], list[Try]]]) -> Iterator[Try]:
    """Do tries in forked processes, `AT_A_TIME`, and give what they return, as they end."""
    running: dict[int, Any] = {}
    for one in tries:
        file = tempfile.TemporaryFile()  # noqa: SIM115  It is closed when its try has ended.
        child = os.fork()
        if child == 0:
            try:
                pickle.dump(one(), file)
                file.flush()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        running[child] = file
        if len(running) == AT_A_TIME:
            yield from _next_of(running)
    while running:
        yield from _next_of(running)


def _next_of(running: dict[int, Any]) -> Iterator[Try]:
    child, status = os.wait()
    with running.pop(child) as file:
        if status:
            yield Try("a try", "failed", f"the campaign itself ended with status {os.waitstatus_to_exitcode(status)}")
            return
        file.seek(0)
        yield from pickle.load(file)
