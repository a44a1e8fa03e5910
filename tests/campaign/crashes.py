"""Kills and power failures between any two steps of a command, and SIGKILLs at moments of any kind.

A kill leaves on the disk what is there. So one run, of which the working folder is copied at each step, gives what a
kill at each of its steps would leave. After a power failure a file is as it was when it was last brought to the disk
(fsync); of one that never was, the name may be there, and nothing in it.
"""

import functools
import hashlib
import json
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.campaign.commands import LOGS, NAMED, Command, content, difference, finals
from tests.campaign.crash_points import Steps
from tests.campaign.trying import Try, call, side_by_side

MOST = 5000  # steps


def undisturbed(command: Command, home: Path, folder: Path, old: Path | None = None) -> Path:
    """Run a command that nobody disturbs; return its working folder.

    Raises:
        RuntimeError: it fails.
    """
    place = command.prepare(home, folder, old)
    ended = call(command.run(), place)
    if ended.status != 0:
        raise RuntimeError(f"{command.name} fails without being disturbed, status {ended.status}: {ended.output}")
    return place


class States:
    """Copies of a working folder at each step of the command that runs in it, one of each that differs.

    Args:
        place: the working folder.
        copies: where the copies go: `<k>/`, and `<k>.json` with the step and the files that are not on the disk yet.
    """

    def __init__(self, place: Path, copies: Path) -> None:
        self.place, self.copies = place, copies
        self.synced: dict[int, tuple[int, int]] = {}
        self.seen: set[str] = set()
        self.lock = threading.Lock()

    def record(self, command: Callable[[], int]) -> int:
        """Run the command with copies; to be called in a process of its own."""
        self.copies.mkdir(parents=True)
        for path in self._files():
            self._note(path.stat())
        sync = os.fsync

        def noted(file: int) -> None:
            sync(file)
            self._note(os.fstat(file))

        os.fsync = noted
        steps = Steps(self.copy)
        steps.install()
        status = command()
        steps.tell("its end")
        return status

    def _files(self) -> list[Path]:
        return [path for path in self.place.rglob("*") if path.is_file() and not path.is_symlink()]

    def _note(self, status: os.stat_result) -> None:
        self.synced[status.st_ino] = status.st_mtime_ns, status.st_size

    def copy(self, step: str) -> None:
        """Copy the folder, unless it is as before another step."""
        with self.lock:
            digest, unsynced = hashlib.sha1(), []
            for path in sorted(self.place.rglob("*")):
                digest.update(str(path).encode())
                if path.is_file() and not path.is_symlink():
                    status = path.stat()
                    digest.update(path.read_bytes())
                    if self.synced.get(status.st_ino) != (status.st_mtime_ns, status.st_size):
                        unsynced.append(str(path.relative_to(self.place)))
                        digest.update(b"unsynced")
            if digest.hexdigest() in self.seen:
                return
            self.seen.add(digest.hexdigest())
            target = self.copies / str(len(self.seen))
            shutil.copytree(self.place, target, symlinks=True)
            told = {"step": step.replace(f"{self.place}/", ""), "unsynced": unsynced}
            target.with_suffix(".json").write_text(json.dumps(told))


def crashes(
    command: Command, home: Path, work: Path, chance: random.Random, reruns: int, old: Path | None = None
) -> Iterator[Try]:
    """Look at what a kill and a power failure leave at each step of a command, and run it again from some of these.

    Args:
        command: the command.
        home: what it reads.
        work: a new folder for all that is tried.
        chance: which states it is run again from.
        reruns: how many of each kind; all, where there are not more.
        old: a working folder with an older result, which the command replaces; None for nothing.
    """
    whole = undisturbed(command, home, work / "whole", old)
    place, copies = command.prepare(home, work / "place", old), work / "states"
    ended = call(lambda: States(place, copies).record(command.run()), place)
    if ended.status != 0:
        yield Try("copied at each step", "failed", f"status {ended.status}: {ended.output[-500:]}")
        return
    last, before = finals(content(place)), finals(content(old)) if old else {}
    states = sorted((path for path in copies.iterdir() if path.is_dir()), key=lambda path: int(path.name))
    jobs = []
    for failure in ("kill", "power failure"):
        for state in states:
            told = json.loads(state.with_suffix(".json").read_text())
            how = f"{failure} before {told['step']}"
            lost = look(command, content(state), last, before, told["unsynced"] if failure != "kill" else [])
            yield Try(how, f"{failure}: looked at", lost)
        for state in sorted(chance.sample(states, min(reruns, len(states)))):
            jobs.append(functools.partial(rerun, command, home, whole, state, work / "again" / state.name, failure))
    yield from side_by_side(jobs)


def look(
    command: Command, state: dict[str, bytes], last: dict[str, bytes], before: dict[str, bytes], unsynced: list[str]
) -> str | None:
    """What of the files in a state is neither the old one nor the new, as a whole; None where all are."""
    for name, data in finals(state).items():
        if data not in (before.get(name), last.get(name)):
            return f"{name} is neither the old file nor the new one"
    for name in unsynced:
        if ".partial-" not in name and not LOGS.search(name):
            return f"{name} has its name, and is not on the disk"
    for folder in command.folders:
        there = {name for name in state if name.startswith(f"{folder}/")}
        for known in (before, last):
            if there in (set(), {name for name in known if name.startswith(f"{folder}/")}):
                break
        else:
            return f"{folder} is there in parts: {len(there)} files"
    return None


def rerun(command: Command, home: Path, whole: Path, state: Path, place: Path, failure: str) -> list[Try]:
    """Run a command again where it was killed, and compare what comes of it with an undisturbed run."""
    told = json.loads(state.with_suffix(".json").read_text())
    command.prepare(home, place, state)
    if failure != "kill":
        for name in told["unsynced"]:
            (place / name).write_bytes(b"")
    return [again(command, place, whole, f"{failure} before {told['step']}", f"{failure}: run again")]


def again(command: Command, place: Path, whole: Path, how: str, outcome: str) -> Try:
    """Run a command again in a folder where it was ended, and compare with an undisturbed run."""
    ended = call(command.run_again(place), place)
    complete = ended.status == 1 and command.name == "train" and "already; raise --epochs" in ended.output
    if ended.status != 0 and not complete:
        lost: str | None = f"run again: status {ended.status}: {ended.output[-600:]}"
    else:
        lost = difference(place, whole)
    shutil.rmtree(place, ignore_errors=True)
    return Try(how, outcome, lost)


def kills(command: Command, home: Path, work: Path, chance: random.Random, tries: int) -> Iterator[Try]:
    """End a command by SIGKILL at random moments, look at what it left, and run it again."""
    started = time.monotonic()
    whole = undisturbed(command, home, work / "whole")
    duration = time.monotonic() - started
    last = finals(content(whole))
    moments = sorted(chance.uniform(0.1, 1) * duration for _ in range(tries))
    yield from side_by_side(
        functools.partial(_kill, command, home, whole, last, work / f"kill{k}", moment)
        for k, moment in enumerate(moments)
    )


def _kill(command: Command, home: Path, whole: Path, last: dict[str, bytes], place: Path, moment: float) -> list[Try]:
    command.prepare(home, place)
    ended = call(command.run(), place, killed_after=moment)
    how, outcome = f"SIGKILL after {moment:.1f} s", "killed" if ended.status is None else "had ended"
    left = Counter(name for name in content(place) if name.startswith((f"weights/{NAMED}/model", "evaluate/")))
    lost = look(command, content(place), {**last, **varying(content(place))}, {}, [])
    if lost is None:
        return [again(command, place, whole, f"{how}, {len(left)} files there", outcome)]
    return [Try(how, outcome, lost)]


def varying(found: dict[str, bytes]) -> dict[str, bytes]:
    """Whole files of `content` that tell times, and so differ from run to run: JSON and HTML."""
    return {name: data for name, data in finals(found).items() if name.endswith((".json", ".html")) and _ends(data)}


def _ends(data: bytes) -> bool:
    """Whether a JSON or HTML text is whole."""
    try:
        json.loads(data)
    except ValueError:
        return data.rstrip().endswith(b"</html>")
    return True
