"""Memory of this process, as Linux counts it."""

import gc
import pathlib


def resident():
    """Bytes in memory now."""
    gc.collect()
    return _read("VmRSS")


def peak_of(run):
    """Bytes that `run()` needs at its peak beyond what is there before; it must be the first large thing here.

    The memory that TensorFlow has once taken, it keeps for itself: a second measurement would show nothing.
    """
    before = resident()
    run()
    return _read("VmHWM") - before


def _read(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024
