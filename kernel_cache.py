"""Keep the kernels that XLA compiles for the processor, so that the next command need not compile them again.

TensorFlow reads and writes such a cache itself, but fails at a damaged file, and would run what was compiled for
another processor. So each process has a folder of its own, with copies of those files of the user's cache that are
whole and were made by this TensorFlow on such a machine. What it adds goes into the cache when it ends.
"""

import atexit
import contextlib
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from checksums import checksum
from files import cache_folder, is_running
from files import machine as this_system

_FLAGS = "TF_XLA_FLAGS"
_FOLDER_FLAG = "--tf_xla_persistent_cache_directory"
_MOST_BYTES = 2**26  # of the cache; what a command needs for one size of volumes is half a megabyte
_LEAST_FREE = 2**26  # where a process has its folder: TensorFlow fails where it cannot write
_WRITING = "writing-"


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Import TensorFlow in the block to have it take kernels from the cache, and add to it when the process ends.

    Where the user's TF_XLA_FLAGS name a cache (even an empty name), or none can be kept, it has none.
    """
    before = os.environ.get(_FLAGS)
    folder = None if "tensorflow" in sys.modules or _FOLDER_FLAG in (before or "") else _filled_folder()
    if folder is None:
        yield
        return
    flags = f"{_FOLDER_FLAG}={folder} --tf_xla_persistent_cache_device_types=CPU"
    os.environ[_FLAGS] = f"{before} {flags}" if before else flags
    try:
        yield
        from tensorflow.python.client import pywrap_tf_session

        pywrap_tf_session.TF_GetXlaConstantFoldingDisabled()  # has it read the flags, which no child is to inherit
    finally:
        os.environ.pop(_FLAGS)
        if before is not None:
            os.environ[_FLAGS] = before


def _filled_folder() -> Path | None:
    """A folder for this process, with the kernels of the cache; None where there can be none."""
    machine = _machine()
    try:
        home = next((home for home in ("/dev/shm", tempfile.gettempdir()) if _has_room(home)), None)
        if home is None or machine is None:
            return None
        cache = cache_folder() / "kernels" / machine
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = _new_folder(Path(home))
        atexit.register(_keep, folder, cache, _copy(cache, folder))
        return folder
    except (OSError, ValueError):  # ValueError: a folder of another's has a name that is no number
        return None


def _new_folder(home: Path) -> Path:
    """A folder of this process, after those of killed ones are removed."""
    prefix = f"kernels-{this_system()}-"
    for old in home.glob(f"{prefix}*"):
        if not is_running(int(old.name.removeprefix(prefix).partition("-")[0])):
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=home))


def _has_room(home: str) -> bool:
    return os.access(home, os.W_OK) and shutil.disk_usage(home).free >= _LEAST_FREE


def _machine() -> str | None:
    """What kernels depend on beside their graphs: TensorFlow's build, the processor, its cores, and settings."""
    spec = importlib.util.find_spec("tensorflow")
    if spec is None or not spec.submodule_search_locations:
        return None
    libraries = sorted(Path(spec.submodule_search_locations[0]).glob("libtensorflow_*"))
    builds = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in libraries]
    processor = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        processor = "\n".join(line for line in lines if line.startswith(("model", "stepping", "flags", "Features")))
    settings = [os.environ.get(name) for name in (_FLAGS, "XLA_FLAGS", "TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS")]
    return checksum(repr((builds, processor, len(os.sched_getaffinity(0)), settings)).encode())


def _copy(cache: Path, folder: Path) -> set[str]:
    """Copy the files that are whole, whose names end in their checksums, and remove others; the names of the copies."""
    copied = set()
    for file in cache.iterdir():
        name, _, expected = file.name.rpartition(".")
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            content = file.read_bytes()
            if checksum(content) == expected:
                (folder / name).write_bytes(content)
                copied.add(name)
            elif not name.startswith(_WRITING):
                file.unlink()
    return copied


def _keep(folder: Path, cache: Path, known: set[str]) -> None:
    """Put what the process has added into the cache; where that fails, the next one compiles it again."""
    with contextlib.suppress(OSError):
        for file in folder.glob("*.pb"):
            if file.name not in known:
                content = file.read_bytes()
                written = cache / f"{_WRITING}{os.getpid()}.{file.name}"
                written.write_bytes(content)
                written.replace(cache / f"{file.name}.{checksum(content)}")
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
