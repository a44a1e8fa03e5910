"""Kill a command at each of its steps on the disk, as SIGKILL does: nothing is cleaned up and nothing is said.

A step is a file that is opened to be written, a write into one, a renaming, a removal, a folder made or a cut-off. The
interpreter tells of most of them itself, by its audit events, before they are done; of writes by its profile events.
So a command is killed between any two of its steps, also while a file is there and empty or half written. Only what
Python does is seen: a library that writes a file by itself is one step, from outside.

    for point in crash_points(lambda: main(["-o", "set"]), prepare):
        ...  # the folder is as the kill left it: run the command again and compare
"""

import io
import itertools
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType, FrameType
from typing import Any

import files

KILLED = 86
"""Exit status of a process that was killed at its step."""
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
WRITES = {"write", "writelines", "truncate"}
FILES = (io.FileIO, io.BufferedWriter, io.BufferedRandom, io.TextIOWrapper)
FIRST_WRITES = 2  # of a row of writes into one file, those that count: it is empty before one, begun before the other


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: its exit status; `KILLED` where it was killed.
        output: what it printed, standard output and error together.
        step: the step that it was killed at, such as "os.rename sets/mine.h5", or None.
    """

    status: int
    output: str
    step: str | None


def crash_points(command: Callable[[], Any], prepare: Callable[[], Any], most: int = 1000) -> Iterator[Ended]:
    """Run a command again and again, and kill it at its first step, its second, and so on until it is not reached.

    Args:
        command: the command, a function that returns its exit status; each run is a forked process.
        prepare: makes the place as it is before the command, each time anew.
        most: number of steps after which something is wrong.

    Yields:
        How the killed command ended, for each of its steps; the disk is as the kill left it.

    Raises:
        AssertionError: there are more steps, or the command that is not killed does not end with status 0.
    """
    for step in range(1, most + 1):
        prepare()
        ended = run_killed(command, step)
        if ended.status != KILLED:
            assert ended.status == 0, ended
            return
        yield ended
    raise AssertionError(f"more than {most} steps")


def run_killed(command: Callable[[], Any], step: int | None = None, seconds: int = 60) -> Ended:
    """Run a command in a forked process, and kill it before its step of that number (from 1; None: never)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run(command, step, writing, seconds)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8", errors="replace") as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    output, _, what = text.partition("\0")
    return Ended(status, output, what or None)


def _run(command: Callable[[], Any], step: int | None, pipe: int, seconds: int) -> None:
    """The forked process, which does not return."""
    import signal

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)  # a command that hangs ends by a signal
    files._cleaned.clear()  # a new process has looked at no folder yet
    told = sys.stdout = sys.stderr = io.StringIO()
    status = 70
    try:
        if step is not None:
            left = itertools.count(step - 1, -1)

            def kill_at_the_step(what: str) -> None:
                if next(left) == 0:
                    _say(pipe, told.getvalue() + "\0" + what)
                    os._exit(KILLED)

            Steps(kill_at_the_step).install()
        status = command() or 0
    except BaseException:
        traceback.print_exc()
    sys.setprofile(None)
    _say(pipe, told.getvalue())
    os._exit(status)


def _say(pipe: int, text: str) -> None:
    data = text.encode()
    while data:
        data = data[os.write(pipe, data) :]


class Steps:
    """Tells of each step of this process on the disk, before it is done.

    Args:
        tell: function of a step, such as "os.rename sets/mine.h5"; what it does itself on the disk is no step.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._function, self._telling = tell, False
        self._last_file, self._row = 0, 0

    def install(self) -> None:
        """Begin to tell, until the process ends."""
        sys.addaudithook(self._audited)
        sys.setprofile(self._profiled)
        threading.setprofile(self._profiled)

    def _audited(self, event: str, arguments: tuple) -> None:
        if event in CHANGES:
            self.tell(f"{event} {' '.join(str(argument) for argument in arguments[:2])}")
        elif event == "open":
            path, mode, flags = arguments
            writes = any(c in mode for c in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and path not in (os.devnull, None):
                self.tell(f"open {path}")

    def _profiled(self, frame: FrameType, event: str, function: Any) -> None:
        if event != "c_call" or not isinstance(function, BuiltinFunctionType) or function.__name__ not in WRITES:
            return
        file = function.__self__
        if isinstance(file, FILES):
            self._row = self._row + 1 if self._last_file == id(file) else 1
            self._last_file = id(file)
            if self._row <= FIRST_WRITES:
                self.tell(f"{function.__name__} {getattr(file, 'name', '')}", is_write=True)

    def tell(self, what: str, is_write: bool = False) -> None:
        """Tell of a step."""
        if self._telling:
            return
        if not is_write:
            self._last_file = 0
        self._telling = True
        try:
            self._function(what)
        finally:
            self._telling = False


def tree(folder: Path) -> list[str]:
    """Names of all that is in a folder, hidden things too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
