"""Files that appear whole under their names, or not at all, whatever happens while they are written.

What is written goes into a folder of its own beside its place, is brought to the disk, and is then renamed. So after a
kill or a power failure there is the old file or the whole new one. The folder is named after the machine and the
process; one whose process is gone was left by a kill, and the next command that writes there removes it. Where that
cannot be told (another machine, another container, a folder of an older version), it goes a day after its last change.
"""

import errno
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from errors import UserError, text_of

PARTIAL = ".partial-"
REPLACED = "replaced"  # in a partial folder: the folder that is being replaced, until the new one has its place
SECONDS_UNTIL_LEFT = 24 * 3600
AT_A_TIME = 16  # files that are brought to the disk: 1700 take 0.3 s, one after another 8 s
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What libraries say that give no number of an error.
_FULL_TEXTS = (*map(os.strerror, FULL), "wrote only", "only wrote")
_KNOWN_TEXTS = tuple(map(os.strerror, (*FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)))

_cleaned: set[Path] = set()
_own: set[str] = set()


def cache_folder() -> Path:
    """The folder for what is kept only to save time, such as fetched files: in XDG_CACHE_HOME, or else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recursive-cascaded-networks"


@contextmanager
def whole_file(path: str | os.PathLike, *failures: type[Exception]) -> Iterator[Path]:
    """Write a file that gets its name when the block has ended without an error, and replaces what was there.

    Args:
        path: the file's name in the end; its folder must be there.
        failures: what the writing library raises, besides OSError.

    Yields:
        Where to write it: another folder, the same name; a device, such as /dev/stdout, itself. Other files that are
        put beside it there, such as the voxels that an image's header names, appear too, before it.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(path)
    if _is_device(path):
        with writing(path, *failures):
            yield path
        return
    with writing(path, *failures), partial_folder(path.parent) as folder:
        new = folder / path.name
        yield new
        for other in sorted(set(folder.iterdir()) - {new}):
            publish(other, path.parent / other.name)
        publish(new, path)


def _is_device(path: Path) -> bool:
    """Whether a path is none of a file or folder, or in the folder of devices, where nothing may be replaced."""
    return path.parent.absolute() == Path("/dev") or (path.exists() and not path.is_file() and not path.is_dir())


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    with whole_file(path) as new:
        new.write_text(text, encoding="utf-8")


@contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """Give a new folder in `parent` for what is not finished, and remove it in the end, with what is still in it.

    Folders that killed processes left in `parent` are removed too.
    """
    remove_leftovers(parent)
    folder = own_folder(parent, PARTIAL)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(written: Path, path: Path) -> None:
    """Bring a file, or a folder with all that is in it, to the disk and rename it to `path`; a file replaces one.

    What goes into a folder that is unfinished itself is brought to the disk with that.
    """
    inside = any(part.startswith(PARTIAL) for part in path.parent.absolute().parts)
    if not inside:
        sync(written)
    os.replace(written, path)
    if not inside:
        _sync(path.parent)


def sync(written: Path) -> None:
    """Bring a file, or a folder with all that is in it, to the disk."""
    if written.is_dir():
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            list(pool.map(_sync, (below for below in written.rglob("*") if not below.is_symlink())))
    _sync(written)


def replace_folder(written: Path, path: Path) -> None:
    """Publish a folder in place of one that is there, which ends with the partial folder that `written` is in.

    A kill between its two renames leaves neither in its place: `remove_leftovers` puts the old one back.
    """
    aside = written.parent / REPLACED / path.name
    aside.parent.mkdir()
    sync(written)
    os.replace(path, aside)
    try:
        publish(written, path)
    except BaseException:
        os.replace(aside, path)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot
            raise
    finally:
        os.close(descriptor)


def remove_leftovers(parent: Path) -> None:
    """Remove what killed processes left unfinished in a folder, and say so; looked at once."""
    if parent in _cleaned:
        return
    _cleaned.add(parent)
    for folder in leftovers(parent):
        for old in (folder / REPLACED).glob("*"):
            if not (parent / old.name).exists():
                with suppress(OSError):
                    os.replace(old, parent / old.name)
                    print(f"put {parent / old.name} back: a killed process was replacing it", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            print(f"removed {folder}: a killed process left it unfinished", file=sys.stderr)


def leftovers(parent: Path) -> list[Path]:
    """Unfinished folders in a folder that no process is writing any more."""
    with suppress(OSError):  # a folder that is not there, or may not be read
        return [folder for folder in sorted(parent.glob(f"{PARTIAL}*")) if folder.is_dir() and _is_left(folder)]
    return []


def own_folder(parent: Path, prefix: str) -> Path:
    """Make a folder in `parent` whose name begins with `prefix` and tells whose it is: `has_ended`."""
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{machine()}-{os.getpid()}-", dir=parent))
    _own.add(folder.name)
    return folder


def has_ended(folder: Path, prefix: str) -> bool | None:
    """Whether the process that made an `own_folder` has ended; None where that is no process of this machine."""
    here = f"{prefix}{machine()}-"
    process = folder.name.removeprefix(here).partition("-")[0] if folder.name.startswith(here) else ""
    if not process.isdigit():
        return None
    is_ours = int(process) == os.getpid()  # or of a process before, in a container that was started again
    return folder.name not in _own if is_ours else not _is_running(int(process))


def _is_left(folder: Path) -> bool:
    ended = has_ended(folder, PARTIAL)
    if ended is not None:
        return ended
    try:
        changed = max(path.lstat().st_ctime for path in (folder, *folder.rglob("*")))
    except FileNotFoundError:  # it is being written, or removed
        return False
    return time.time() - changed > SECONDS_UNTIL_LEFT


def machine() -> str:
    """Name of the machine as partial folders have it: where it is the same, so are the numbers of processes.

    It tells apart machines of one name, and containers of one machine.
    """
    parts = [socket.gethostname()]
    with suppress(OSError):  # no Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text()[:8])
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return ".".join(parts)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; no number of a process at all
        return True
    return True


@contextmanager
def writing(path: str | os.PathLike, *failures: type[Exception]) -> Iterator[None]:
    """Turn what goes wrong while `path` is written into a UserError with the reason, the space left and the remedy.

    Args:
        path: what is written, a file or a folder.
        failures: what the writing library raises, besides OSError.

    Raises:
        UserError: anything of that was raised.
    """
    expected: tuple[type[Exception], ...] = (OSError, *failures)
    try:
        yield
    except expected as error:
        raise UserError(cannot_write(path, error)) from error


def is_full(error: Exception) -> bool:
    """Whether something could not be written because the disk, a quota or a limit of the file's size is reached."""
    return getattr(error, "errno", None) in FULL or any(text in str(error) for text in _FULL_TEXTS)


def cannot_write(path: str | os.PathLike | None, error: Exception) -> str:
    """Say in one line that a file (None: an unknown one) cannot be written, why, and what to do."""
    if path is None:
        return f"cannot write a file ({_reason(error)}); make space on that disk (df -h shows which is full)"
    path = Path(*(part for part in Path(path).parts if not part.startswith(PARTIAL)))  # its name in the end
    if not is_full(error):
        return f"cannot write {path} ({_reason(error)}); may you write there? Else name another place"
    place = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    left = shutil.disk_usage(place).free / 2**20
    return f"cannot write {path} ({_reason(error)}; {left:.0f} MiB left in {place}); make space, or name another place"


def _reason(error: Exception) -> str:
    if getattr(error, "strerror", None):
        return str(error.strerror)  # type: ignore[attr-defined]
    text = text_of(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((known for known in _KNOWN_TEXTS if known in text), lines[-1] if lines else type(error).__name__)
