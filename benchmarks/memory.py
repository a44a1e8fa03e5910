"""Memory of this process, as Linux counts it; exact to a few pages in an environment with the settings of `EXACT`."""

import gc
import pathlib

# Every tensor of some size is taken from the system and given back: TensorFlow's own allocator on CPUs keeps what it
# has, in pieces larger than what was asked for, and so hides what is in use.
EXACT = {"TF_ONEDNN_USE_SYSTEM_ALLOCATOR": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}


def peak_of(run):
    """Bytes that `run()` takes at its peak beyond what is there before it, such as weights; not in its first run."""
    run()
    before = _read("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    run()
    return _read("VmHWM") - before


def kept_by(run):
    """Bytes that a tape keeps for its backward pass, where `run()` gives the tape and the result.

    What is asked is how much memory is free again after the tape, and nothing else, is gone.
    """
    tape, result = run()
    before = _read("VmRSS")
    del tape
    after = _read("VmRSS")
    del result
    return before - after


def _read(name):
    gc.collect()
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024
