"""Start TensorFlow quickly, and without the lines that its C++ parts print on the way, which no variable stops."""

import contextlib
import ctypes
import gc
import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import kernel_cache

_shown = False


def show_messages() -> None:
    """Let TensorFlow print what it likes, as `--verbose` asks."""
    global _shown
    _shown = True
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"


def tensorflow() -> ModuleType:
    """TensorFlow, imported without its messages; where that fails they are shown."""
    keep_memory()
    with quietly(), _quickly(), kernel_cache.kept():
        import network  # noqa: F401  It sets the variables that TensorFlow reads at its start.

        tf = importlib.import_module("tensorflow")
        tf.config.list_physical_devices()
    return tf


# glibc's numbers for `mallopt`.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def keep_memory() -> None:
    """Let the process keep the memory that it frees, for the next tensors; where the user has settings, these hold.

    Else each volume comes as new pages, which the system first fills with zeros: a fifth of the time of a pair or of a
    step of VTN. The peak of a training or evaluation is no higher, as all threads share what is free.
    """
    if any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Nothing below 1 GiB is to have pages of its own. Where glibc refuses that (before 2.35), the others would do harm.
    if mallopt is not None and mallopt(_M_MMAP_THRESHOLD, 2**30):
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_TRIM_THRESHOLD, -1)  # nothing is given back


@contextlib.contextmanager
def _quickly() -> Iterator[None]:
    """Import TensorFlow in two thirds of the time.

    Keras imports matplotlib for functions that draw galleries, and TensorFlow SciPy for its old Keras of version 1.
    Here they find none; whoever needs these imports them later.
    The garbage collector would go through the modules' objects again and again, in the import and in every trace that
    follows; they stay for good.
    """
    if "tensorflow" in sys.modules:
        yield
        return
    hidden: dict[str, Any] = dict.fromkeys({"matplotlib", "scipy"} - sys.modules.keys())  # None: an import fails
    sys.modules.update(hidden)
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        for name in hidden:
            del sys.modules[name]
        if collects:
            gc.enable()


def compiler() -> None:
    """Start XLA without its messages. After this the devices that TensorFlow sees cannot be changed any more."""
    with quietly():
        import tensorflow as tf

        tf.function(tf.negative, jit_compile=True)(tf.zeros([]))


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep from the terminal what is written to standard error in the block, and show it where the block fails."""
    if _shown:
        yield
        return
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as messages:
        os.dup2(messages.fileno(), 2)
        try:
            yield
        except BaseException:
            messages.seek(0)
            os.write(terminal, messages.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
