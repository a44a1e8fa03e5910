"""Files that appear whole under their names, or not at all, whatever happens while they are written.

What is written goes into a folder of its own beside its place, is brought to the disk, and is then renamed. So after a
kill or a power failure there is the old file or the whole new one. The folder is named after the machine and the
process; one whose process is gone was left by a kill, and the next command that writes there removes it.
"""

import errno
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import UserError

PARTIAL = ".partial-"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What libraries say that give no number of an error.
FULL_TEXTS = ("No space left", "Disk quota exceeded", "File too large", "wrote only")

_cleaned: set[Path] = set()


@contextmanager
def whole_file(path: str | os.PathLike, *failures: type[Exception]) -> Iterator[Path]:
    """Write a file that gets its name when the block has ended without an error, and replaces what was there.

    Args:
        path: the file's name in the end; its folder must be there.
        failures: what the writing library raises, besides OSError.

    Yields:
        Where to write it: another folder, the same name.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(path)
    with writing(path, *failures), partial_folder(path.parent) as folder:
        yield folder / path.name
        publish(folder / path.name, path)


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
    folder = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{socket.gethostname()}-{os.getpid()}-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(written: Path, path: Path) -> None:
    """Bring a file, or a folder with all that is in it, to the disk and rename it to `path`; a file replaces one."""
    if written.is_dir():
        for below in written.rglob("*"):
            if not below.is_symlink():
                _sync(below)
    _sync(written)
    os.replace(written, path)
    _sync(path.parent)


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
    """Remove what killed processes of this machine left unfinished in a folder, and say so; looked at once."""
    if parent in _cleaned:
        return
    _cleaned.add(parent)
    for folder in parent.glob(f"{PARTIAL}{socket.gethostname()}-*"):
        process = folder.name.rsplit("-", 2)[1]
        if folder.is_dir() and process.isdigit() and not _is_running(int(process)):
            shutil.rmtree(folder, ignore_errors=True)
            print(f"removed {folder}: a killed process left it unfinished", file=sys.stderr)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
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
    return getattr(error, "errno", None) in FULL or any(text in str(error) for text in FULL_TEXTS)


def cannot_write(path: str | os.PathLike, error: Exception) -> str:
    """Say in one line that a file cannot be written, why, and what to do."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = getattr(error, "strerror", None) or (lines[-1] if lines else type(error).__name__)
    if not is_full(error):
        return f"cannot write {path} ({reason}); may you write there? Else name another place"
    place = next(folder for folder in (Path(path).absolute(), *Path(path).absolute().parents) if folder.is_dir())
    left = shutil.disk_usage(place).free / 2**20
    return f"cannot write {path} ({reason}; {left:.0f} MiB left in {place}); make space, or name another place"
