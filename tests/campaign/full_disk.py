"""Commands on a disk that is full, by a limit of a file's size or a small file system of its own."""

import functools
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.campaign.commands import Command, content, difference, finals
from tests.campaign.crashes import undisturbed, varying
from tests.campaign.trying import Ended, Try, call, side_by_side

PAGE = 4096


def full_disk(command: Command, home: Path, work: Path, chance: random.Random, levels: int) -> Iterator[Try]:
    """Run a command with too little space, at so many levels of each kind, and then with enough."""
    whole = undisturbed(command, home, work / "whole")
    sizes = [path.stat().st_size for path in whole.rglob("*") if path.is_file() and not path.is_symlink()]
    jobs = []
    for k in range(levels):
        limit = int(max(sizes) * (k + chance.random()) / levels)
        jobs.append(functools.partial(_limited, command, home, whole, work / f"limit{k}", limit))
    if can_mount(work / "probe"):
        for k in range(levels):
            space = int((sum(sizes) + PAGE * len(sizes)) * (k + chance.random()) / levels) // PAGE + 1
            jobs.append(functools.partial(_mounted, command, home, whole, work / f"disk{k}", space * PAGE))
    yield from side_by_side(jobs)


def _limited(command: Command, home: Path, whole: Path, place: Path, limit: int) -> list[Try]:
    command.prepare(home, place)
    ended = call(command.run(), place, file_limit=limit)
    lost = _wrong(ended, place, whole, f"at most {limit} bytes")
    return [_rerun(command, place, whole, f"files of at most {limit} bytes", ended, lost)]


def _mounted(command: Command, home: Path, whole: Path, place: Path, space: int) -> list[Try]:
    place.mkdir(parents=True)
    with small_disk(place, space):
        for name in command.inputs:
            (place / name).symlink_to((home / name).resolve())
        ended = call(command.run(), place)
        left = place.with_name(f"{place.name}-left")
        shutil.copytree(place, left, symlinks=True)
    lost = _wrong(ended, left, whole, f"a disk of {space} bytes")
    return [_rerun(command, left, whole, f"a disk of {space} bytes", ended, lost)]


def _wrong(ended: Ended, place: Path, whole: Path, how: str) -> str | None:
    if ended.status != 0 and (wrong := ended.refusal()):
        return f"{how}: {wrong}"
    if ended.status == 0 and (wrong := difference(place, whole)):
        return f"{how}: status 0, and {wrong}"
    ours, expected = finals(content(place)), finals(content(whole))
    for name, data in ours.items():
        if data != expected.get(name) and name not in varying(ours):
            return f"{how}: {name} is not whole"
    return None


def _rerun(command: Command, place: Path, whole: Path, how: str, ended: Ended, lost: str | None) -> Try:
    if ended.status == 0:
        return Try(how, "sufficed", lost)
    if lost is None:
        again = call(command.run_again(place), place)
        if again.status != 0:
            lost = f"{how}: with space, status {again.status}: {again.output[-600:]}"
        elif wrong := difference(place, whole):
            lost = f"{how}: with space, {wrong}"
    shutil.rmtree(place, ignore_errors=True)
    return Try(how, "one line, then whole", lost)


def can_mount(folder: Path) -> bool:
    """Whether file systems may be mounted here."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with small_disk(folder, 2**16):
            return True
    except subprocess.CalledProcessError:
        return False


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """Mount a file system of so many bytes at a folder.

    Raises:
        CalledProcessError: that is not permitted.
    """
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
