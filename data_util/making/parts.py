"""The parts of a data set: each finished scan is a file of its own until all are there, so a stopped build can go on.

The parts lie in the folder PREFIX.parts/, ID.h5 each, with the `Recipe` that they were made by in settings.json. One
process at a time works there, and holds a lock on it. Whatever a kill leaves in the folder, the next build goes on with
it: parts and settings appear whole or not at all, and in the end the settings are removed first, so that parts without
settings are what a finished build left behind.
"""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import SimpleITK as sitk
import tqdm

from data_util.hdf5 import CROP, MADE_BY, SOURCE
from data_util.hdf5_writer import new_file
from data_util.making.folders import data_files
from data_util.making.recipe import Recipe, make_scan
from data_util.making.sources import Source
from errors import UserError
from files import PARTIAL, remove_leftovers, write_text, writing

VERSION = 2  # of what a recipe makes of a scan; 1, without a number, took grey values at a coarser grid's places alone
SETTINGS, LOCK = "settings.json", ".lock"
STAMP, SCAN = "stamp", "scan"  # in a part: a digest of the scan's files, and the scan's group
# Unfinished files; the last two are of versions before `files`.
UNFINISHED = re.compile(rf"{re.escape(PARTIAL)}|\..+\.h5\.\d+$|settings\.json\.tmp$")
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # as on some file systems of clusters


def parts_folder(data: Path) -> Path:
    """The folder of the parts of an HDF5 file."""
    return data.with_suffix(".parts")


@contextmanager
def opened_parts(data: Path, recipe: Recipe, overwrite: bool) -> Iterator[Path]:
    """Make or find the folder of the parts of a data set, and keep it to this process.

    Args:
        data: the HDF5 file to be built.
        recipe: how its scans are made.
        overwrite: remove parts that were made by another recipe, and accept that the data set is there already.

    Yields:
        The folder.

    Raises:
        UserError: another build is at work there; the data set is there, or parts of another recipe are, and
            `overwrite` is False; the folder holds other things, or cannot be written.
    """
    folder = parts_folder(data)
    settings = folder / SETTINGS
    if not settings.exists():
        for path in (data, data.with_suffix(".json")):
            if path.exists() and not overwrite:
                raise UserError(f"{path} is there already; choose another name with -o, or replace it with --overwrite")
    with ExitStack() as stack:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not settings.exists() and not all(map(_is_ours, folder.iterdir())):
                raise UserError(f"{folder} holds other things than parts of a build; move it, or choose another -o")
            stack.enter_context(_lock(folder / LOCK, data))
            _write_settings(settings, recipe, overwrite)
        try:
            yield folder
        finally:
            if not any(folder.glob("*.h5")):
                remove_parts(folder)  # nothing was finished that could be kept


def remove_parts(folder: Path) -> None:
    """Remove the folder of a finished build, whose lock is held; what a build did not write there stays."""
    if not folder.is_dir():
        return
    (folder / SETTINGS).unlink(missing_ok=True)  # first: without them nothing here is gone on with
    for path in folder.iterdir():
        if path.name != LOCK and _is_ours(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / LOCK).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _is_ours(path: Path) -> bool:
    """Whether a build wrote what is in the folder of its parts."""
    if path.name in (LOCK, SETTINGS) or UNFINISHED.match(path.name):
        return True
    return path.suffix == ".h5" and _stamp_in(path) is not None


@contextmanager
def _lock(path: Path, data: Path) -> Iterator[None]:
    """Hold a lock file alone; a file system without locks gives none, and is worked on all the same."""
    with path.open("a+", encoding="utf-8") as file:
        is_ours = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except BlockingIOError:
            is_ours = False
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
        if not is_ours:  # or its build has just ended and removed the file
            raise UserError(f"another build is making {data}; wait until it has ended, or choose another -o")
        yield


def _write_settings(settings: Path, recipe: Recipe, overwrite: bool) -> None:
    """Write the recipe beside the parts, or see that those that are there were made by the same one."""
    wanted = {**json.loads(json.dumps(asdict(recipe))), "version": VERSION}
    if settings.exists():
        there = _read_settings(settings)
        name = next((name for name in wanted if there.get(name) != wanted[name]), None)
        if name is None:
            return
        if not there:
            print(f"{settings} is damaged: all scans are made anew", file=sys.stderr)
        elif not overwrite:
            raise UserError(
                f"{settings.parent} holds scans made with {name} {there.get(name)}, not {wanted[name]}; give the same "
                "options to go on, or begin anew with --overwrite"
            )
    for path in filter(_is_ours, settings.parent.glob("*.h5")):
        path.unlink()
    write_text(settings, json.dumps(wanted))


def _read_settings(settings: Path) -> dict[str, Any]:
    """The settings that are there; {} where they cannot be read."""
    try:
        there = json.loads(settings.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return there if isinstance(there, dict) else {}


def make_parts(sources: list[Source], recipe: Recipe, folder: Path, workers: int) -> dict[str, Path]:
    """Make the parts of all scans that are not there yet.

    A scan that cannot be made never keeps another from being made, whatever is the matter with it.

    Args:
        sources: the scans.
        recipe: how they are made.
        folder: where their parts go, as `opened_parts` yields it.
        workers: number of processes, one scan each at a time; what they make does not depend on it.

    Returns:
        Path of the part of every scan, by its id.

    Raises:
        UserError: scans could not be made, after all others are made and each is printed with its reason; a part
            cannot be written, or a process was killed.
    """
    parts = {source.id: folder / f"{source.id}.h5" for source in sources}
    jobs = [(source, recipe, parts[source.id]) for source in sources if not _is_made(parts[source.id], source)]
    failures: dict[str, str] = {}
    progress = {"total": len(sources), "initial": len(sources) - len(jobs), "unit": "scan", "desc": folder.stem}
    try:
        for scan_id, failure in tqdm.tqdm(_outcomes(jobs, min(workers, len(jobs))), **progress):
            if failure:
                failures[scan_id] = failure
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker was killed, most likely because memory ran out; finished scans are kept in {folder}: go on with "
            "the same command and fewer --workers"
        ) from error
    if failures:
        for scan_id in filter(failures.get, parts):
            print(f"{scan_id}: {failures[scan_id]}", file=sys.stderr)
        kept = f"the others are kept in {folder}" if len(failures) < len(sources) else "nothing is kept"
        raise UserError(
            f"{len(failures)} of {len(sources)} scans failed, for the reasons above; {kept}: mend or remove these and "
            "give the same command"
        )
    return parts


def _outcomes(jobs: list[tuple], workers: int) -> Iterator[tuple[str, str | None]]:
    """Make parts in some processes and yield (scan's id, why it failed or None) as they are finished."""
    if workers <= 1:
        for job in jobs:
            yield job[0].id, _make_part(*job)
        return
    context = multiprocessing.get_context("spawn")  # safe with the threads of SimpleITK
    with ProcessPoolExecutor(workers, context, _start_worker, (workers,)) as pool:
        futures = {pool.submit(_make_part, *job): job[0].id for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(workers: int) -> None:
    """Leave Ctrl-C to the parent, share the cores, and end with the parent, even where it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(max(1, (os.cpu_count() or 1) // workers))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
    os._exit(1)


def _make_part(source: Source, recipe: Recipe, part: Path) -> str | None:
    """Make one scan and write its part, whole or not at all; return why it cannot be made, in one line, or None."""
    try:
        if source.problem:
            raise UserError(source.problem)
        stamp = _stamp(source)
        scan, frame, own, facts = make_scan(source, recipe)
    except Exception as error:  # whatever it is: the other scans go on
        return _reason(error)
    attributes = {SOURCE: source.image.name, CROP: recipe.crop, **facts}
    frame.save(attributes)
    own.save(attributes, "source_")
    with new_file(part) as file:  # where this fails, so would all others
        file.attributes[STAMP] = stamp
        file.write_scan(SCAN, scan, attributes)
    return None


def _reason(error: Exception) -> str:
    """What is the matter with a scan, in one line; with its type where nobody foresaw it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, UserError):
        return " ".join(lines)
    if isinstance(error, MemoryError):
        return "does not fit into memory; use fewer --workers or a smaller --size"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    what = type(error).__name__ + (f": {lines[-1]}" if lines else "")  # SimpleITK's last line says most
    return f"cannot be made ({what}); convert the scan by another tool, or leave it out"


def _is_made(part: Path, source: Source) -> bool:
    """Whether a part is there, made of the files as they are now."""
    stamp = _stamp_in(part)
    with suppress(OSError):
        return stamp is not None and stamp == _stamp(source)
    return False


def _stamp_in(part: Path) -> str | None:
    """The stamp of the files that a part was made of; None where it is no part."""
    try:
        with h5py.File(part, "r") as file:
            return str(file.attrs[STAMP])
    except (OSError, KeyError, RuntimeError, TypeError, ValueError):  # as damage is reported
        return None


def _stamp(source: Source) -> str:
    """A digest that changes when one of a scan's files does, in name, size or time of change."""
    digest = hashlib.blake2b(digest_size=16)
    for path in (source.image, source.label, source.points):
        files = [] if path is None else sorted(path.rglob("*")) if path.is_dir() else [path, *data_files(path)]
        for file in files:
            status = file.stat() if file.exists() else file.lstat()  # a link may lead nowhere
            digest.update(f"{file.absolute()} {status.st_size} {status.st_mtime_ns}\n".encode())
        digest.update(b"\n")
    return digest.hexdigest()


def join_parts(parts: dict[str, Path], data: Path, command: Any) -> None:
    """Put parts together in one HDF5 file.

    Args:
        parts: path of the part of every scan, by its id.
        data: the file, which is replaced where it is there.
        command: what else decides what the data set is, fit for JSON; see `is_finished`.

    Raises:
        UserError: the file cannot be written.
    """
    stamps = {scan_id: _stamp_in(path) for scan_id, path in parts.items()}
    with new_file(data) as file:
        file.attributes[MADE_BY] = _digest(command, stamps)
        for scan_id, path in parts.items():
            file.copy_scan(scan_id, path, SCAN)


def is_finished(data: Path, sources: list[Source], command: Any) -> bool:
    """Whether a data set is there, and was made by the same command of the same files.

    It may be that its build was killed when all was done but to remove the parts: these are removed now.
    """
    folder = parts_folder(data)
    if (folder / SETTINGS).exists() or not data.with_suffix(".json").exists():
        return False
    try:
        with h5py.File(data, "r") as file:
            made_by = file.attrs.get(MADE_BY)
        if made_by != _digest(command, {source.id: _stamp(source) for source in sources}):
            return False
    except (OSError, RuntimeError, KeyError, TypeError, ValueError):  # as damage is reported
        return False
    if folder.is_dir() and all(map(_is_ours, folder.iterdir())):
        with writing(folder), _lock(folder / LOCK, data):
            remove_parts(folder)
    remove_leftovers(data.parent)
    return True


def _digest(command: Any, stamps: dict[str, str | None]) -> str:
    text = json.dumps([VERSION, command, stamps], default=str, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
