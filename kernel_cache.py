"""Keep the kernels that XLA compiles for the processor, so that the next command need not compile them again.

TensorFlow reads and writes such a cache itself, but fails at a damaged file, and would run what was compiled for
another processor. So each process has a folder of its own, with copies of those files of the user's cache that are
whole and were made by this TensorFlow on such a machine. What it adds goes into the cache when it ends.
"""

import atexit
import contextlib
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from checksums import checksum
from files import cache_folder, has_ended, own_folder
from files import machine as this_system

_FLAGS = "TF_XLA_FLAGS"
_FOLDER_FLAG = "--tf_xla_persistent_cache_directory"
_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
_MOST_BYTES = 2**24  # of the cache; what a command needs for one size of volumes is half a megabyte
_LEAST_FREE = 2**26  # where a process has its folder: TensorFlow fails where it cannot write
_SECONDS_UNTIL_LEFT = 7 * 86400
_PREFIX, _WRITING = "kernels-", "writing-"


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Import TensorFlow in the block to have it take kernels from the cache, and add to it when the process ends.

    There is no cache where the user's settings say otherwise, where there is a GPU, or where none can be kept.
    """
    before = os.environ.get(_FLAGS)
    folder = _filled_folder() if _is_wanted() else None
    if folder is None:
        yield
        return
    flags = f"{_FOLDER_FLAG}={folder} --tf_xla_persistent_cache_device_types=CPU"
    os.environ[_FLAGS] = f"{before} {flags}" if before else flags
    # Of every kernel that it reads it says, as an error, that this machine lacks features that no machine names.
    os.environ[_LEVEL] = "3"
    try:
        yield
        from tensorflow.python.client import pywrap_tf_session

        pywrap_tf_session.TF_GetXlaConstantFoldingDisabled()  # has it read the flags, which no child is to inherit
    finally:
        os.environ.pop(_FLAGS)
        if before is not None:
            os.environ[_FLAGS] = before


def _is_wanted() -> bool:
    """Whether the settings leave room for a cache: no cache or file of flags is named, and no message asked for.

    With GPUs TensorFlow has messages that matter, and it is not their kernels that would be kept.
    """
    flags = [os.environ.get(name, "") for name in (_FLAGS, "XLA_FLAGS")]
    return (
        "tensorflow" not in sys.modules
        and not any(_FOLDER_FLAG in text or (text and not text.startswith("-")) for text in flags)
        and os.environ.get(_LEVEL, "2") in ("2", "3")
        and not Path("/dev/nvidiactl").exists()
    )


def _filled_folder() -> Path | None:
    """A folder for this process, with the kernels of the cache; None where there can be none."""
    try:
        home = next((home for home in ("/dev/shm", tempfile.gettempdir()) if _has_room(home)), None)
        machine = _machine()
        if home is None or machine is None:
            return None
        cache = cache_folder() / "kernels" / machine
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder, known = _new_folder(Path(home)), set[str]()
        atexit.register(_keep, folder, cache, known, os.getpid())
        _copy(cache, folder, known)
        return folder
    except Exception:  # whatever it is: a command goes without a cache
        return None


def _has_room(home: str) -> bool:
    return os.access(home, os.W_OK) and shutil.disk_usage(home).free >= _LEAST_FREE


def _machine() -> str | None:
    """What kernels depend on beside their graphs: TensorFlow's build, the processor, its cores, and settings."""
    spec = importlib.util.find_spec("tensorflow")
    if spec is None or not spec.submodule_search_locations:
        return None
    libraries = sorted(Path(spec.submodule_search_locations[0]).glob("libtensorflow_*"))
    builds = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in libraries]
    told = ("model", "stepping", "flags", "Features", "CPU")
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    processor = [line for line in lines if line.startswith(told)]
    if not builds or not processor:
        return None
    settings = [os.environ.get(name) for name in (_FLAGS, "XLA_FLAGS", "TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS")]
    return checksum(repr((builds, os.uname().machine, processor, len(os.sched_getaffinity(0)), settings)).encode())


def _new_folder(home: Path) -> Path:
    """A folder of this process, after those that ended processes left are removed."""
    for old in home.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            status = old.lstat()
            # An old one may be of another container or boot; a process that lives makes its folder again.
            is_left = has_ended(old, _PREFIX) or time.time() - status.st_mtime > _SECONDS_UNTIL_LEFT
            if is_left and status.st_uid == os.geteuid():
                shutil.rmtree(old, ignore_errors=True)
    return own_folder(home, _PREFIX)


def _copy(cache: Path, folder: Path, known: set[str]) -> None:
    """Copy the user's files that are whole, whose names end in their checksums, into `known`; remove others."""
    for file in cache.iterdir():
        with contextlib.suppress(OSError):  # such as one that another process has removed
            name, _, expected = file.name.rpartition(".")
            status = file.lstat()
            if name.startswith(_WRITING) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
                continue
            content = file.read_bytes()
            if checksum(content) == expected:
                (folder / name).write_bytes(content)
                known.add(name)
            else:
                file.unlink()


def _keep(folder: Path, cache: Path, known: set[str], process: int) -> None:
    """Put what the process has added into the cache; where that fails, the next one compiles it again."""
    if os.getpid() != process:  # a child
        return
    with contextlib.suppress(OSError):
        for file in folder.glob("*.pb"):
            if file.name not in known:
                content = file.read_bytes()
                written = cache / f"{_WRITING}{this_system()}-{process}.{file.name}"
                try:
                    written.write_bytes(content)
                    written.chmod(0o600)
                    written.replace(cache / f"{file.name}.{checksum(content)}")
                finally:
                    written.unlink(missing_ok=True)
        _prune(cache.parent)
    shutil.rmtree(folder, ignore_errors=True)


def _prune(kernels: Path) -> None:
    """Remove the oldest files of a cache that has grown too large."""
    found = [(file.stat(), file) for file in kernels.glob("*/*")]
    size = sum(status.st_size for status, _ in found)
    for status, file in sorted(found, key=lambda one: one[0].st_mtime):
        if size <= _MOST_BYTES:
            break
        file.unlink(missing_ok=True)
        size -= status.st_size
