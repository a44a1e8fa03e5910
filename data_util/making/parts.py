"""The parts of a data set: each finished scan is a file of its own until all are there, so a stopped build can go on.

The parts lie in the folder PREFIX.parts/, ID.h5 each, with the `Recipe` that they were made by in settings.json. One
process at a time works there, and holds a lock on it.
"""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import h5py
import SimpleITK as sitk
import tqdm

from data_util.hdf5 import write_scan
from data_util.making.folders import data_files
from data_util.making.recipe import Recipe, make_scan
from data_util.making.sources import Source
from errors import UserError

VERSION = 2  # of what a recipe makes of a scan; 1, without a number, took grey values at a coarser grid's places alone
SETTINGS, LOCK = "settings.json", ".lock"
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # as on some file systems of clusters


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
    folder = data.with_suffix(".parts")
    settings = folder / SETTINGS
    if not settings.exists():
        for path in (data, data.with_suffix(".json")):
            if path.exists() and not overwrite:
                raise UserError(f"{path} is there already; choose another name with -o, or replace it with --overwrite")
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not settings.exists() and {path.name for path in folder.iterdir()} - {LOCK}:
                raise UserError(f"{folder} holds other things than parts of a build; move it, or choose another -o")
            stack.enter_context(_lock(folder / LOCK, data))
            _write_settings(settings, recipe, overwrite)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}; choose another place with -o") from error
        try:
            yield folder
        finally:
            if folder.exists() and not any(folder.glob("*.h5")):
                shutil.rmtree(folder)  # nothing was finished that could be kept


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
        there = json.loads(settings.read_text(encoding="utf-8"))
        name = next((name for name in wanted if there.get(name) != wanted[name]), None)
        if name is None:
            return
        if not overwrite:
            raise UserError(
                f"{settings.parent} holds scans made with {name} {there.get(name)}, not {wanted[name]}; give the same "
                "options to go on, or begin anew with --overwrite"
            )
        for path in settings.parent.iterdir():
            if path.name != LOCK:
                path.unlink()
    new = settings.with_name(f"{SETTINGS}.tmp")
    new.write_text(json.dumps(wanted), encoding="utf-8")
    os.replace(new, settings)


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
        UserError: scans could not be made, after all others are made and each is printed with its reason; the build
            was stopped, or a process was killed.
    """
    parts = {source.id: folder / f"{source.id}.h5" for source in sources}
    jobs = [(source, recipe, parts[source.id]) for source in sources if not _is_made(parts[source.id], source)]
    failures: dict[str, str] = {}
    progress = {"total": len(sources), "initial": len(sources) - len(jobs), "unit": "scan", "desc": folder.stem}
    try:
        for scan_id, failure in tqdm.tqdm(_outcomes(jobs, min(workers, len(jobs))), **progress):
            if failure:
                failures[scan_id] = failure
    except KeyboardInterrupt:
        raise UserError(f"stopped; finished scans are kept in {folder}: go on with the same command") from None
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
    """Make one scan and write its part, whole or not at all; return why it failed, in one line, or None."""
    new = part.with_name(f".{part.name}.{os.getpid()}")
    try:
        if source.problem:
            raise UserError(source.problem)
        stamp = _stamp(source)
        scan, frame, own, facts = make_scan(source, recipe)
        with h5py.File(new, "w") as file:
            file.attrs["stamp"] = stamp
            group = file.create_group("scan")
            write_scan(group, scan, {"source": source.image.name, "crop": recipe.crop, **facts})
            frame.save(group.attrs)
            own.save(group.attrs, "source_")
        os.replace(new, part)
    except Exception as error:  # whatever it is: the other scans go on
        return _reason(error)
    finally:
        new.unlink(missing_ok=True)
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
    try:
        with h5py.File(part, "r") as file:
            return file.attrs["stamp"] == _stamp(source)
    except (OSError, KeyError):
        return False


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


def join_parts(parts: dict[str, Path], data: Path) -> None:
    """Put parts together in one HDF5 file.

    Args:
        parts: path of the part of every scan, by its id.
        data: the file, which is replaced where it is there.

    Raises:
        UserError: the file cannot be written.
    """
    new = Path(f"{data}.{os.getpid()}.tmp")
    try:
        with h5py.File(new, "w") as file:
            for scan_id, path in parts.items():
                with h5py.File(path, "r") as part:
                    part.copy("scan", file, name=scan_id)
        os.replace(new, data)
    except OSError as error:
        raise UserError(f"cannot write {data}: {error.strerror or error}; the parts are kept") from error
    finally:
        new.unlink(missing_ok=True)
