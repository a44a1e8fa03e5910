"""Fixtures of the whole suite. Importing `network` first sets the variables that TensorFlow reads at its start."""

import contextlib
import ctypes
import gc
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

import network  # noqa: F401

GOLDEN = Path(__file__).parent / "golden"
# The golden folder's scripts import `rule` from beside them.
sys.path.insert(0, str(GOLDEN))


def pytest_collection_finish():
    """Keep what was imported out of every later collection, which takes half a second with TensorFlow in it."""
    gc.freeze()


# Modules of minutes, which start first, so that no process is left alone with one at the end.
LONGEST = ("test_distribution.py", "test_train.py", "test_eval.py", "test_golden.py")


def pytest_collection_modifyitems(items):
    """Sort the modules of `LONGEST` to the front; the order within a module stays."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Commands keep what they compile in a folder of this run, for all its processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", os.environ.get("MPLCONFIGDIR") or str(Path.home() / ".cache" / "matplotlib"))
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield


@pytest.fixture
def file_limit():
    """A context in which files can have only so many bytes, as under a quota; Python ignores the signal for it."""

    @contextlib.contextmanager
    def limited(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for 256 KiB; skips where no file system may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(autouse=True)
def _release_memory():
    """Give a test's networks back to the system; otherwise a whole run piles up many GB."""
    started = time.perf_counter()
    yield
    if time.perf_counter() - started > 0.5:  # less is too short to have made any
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
