"""What a command prints beside its own lines: nothing of TensorFlow's in a good run, few lines in a log file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import devices
import progress
import start

ROOT = Path(__file__).parents[1]


def test_messages_of_other_parts_are_kept_back(capfd):
    with start.quietly():
        os.write(2, b"I0000 chatter\n")
    os.write(2, b"mine\n")
    assert capfd.readouterr().err == "mine\n"


def test_messages_are_shown_where_something_fails(capfd):
    with pytest.raises(ZeroDivisionError), start.quietly():
        raise ZeroDivisionError(os.write(2, b"the reason\n"))
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "the reason\nafter\n"


def test_messages_are_shown_when_asked(capfd, monkeypatch):
    monkeypatch.setattr(start, "_shown", False)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    start.show_messages()
    with start.quietly():
        os.write(2, b"I0000 chatter\n")
    assert capfd.readouterr().err == "I0000 chatter\n"


def test_tensorflow_and_its_compiler_start_in_silence_and_alone():
    code = (
        "import gc, sys, devices; s = devices.devices('auto', 4); print(s.num_replicas_in_sync)\n"
        "print('matplotlib' in sys.modules, 'scipy' in sys.modules, gc.isenabled())\n"
        "import matplotlib.figure, scipy.sparse"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout == "Computing on the CPU: TensorFlow finds no GPU\n1\nFalse False True\n"
    assert done.stderr == ""


class _Machine:
    """TensorFlow on a machine with some GPUs."""

    def __init__(self, gpus):
        self.config = self
        self.gpus = [f"GPU:{k}" for k in range(gpus)]

    def list_physical_devices(self, kind):
        return self.gpus


@pytest.mark.parametrize(
    ("gpus", "batch", "most", "chosen", "said"),
    [
        (0, 4, None, [], "Computing on the CPU: TensorFlow finds no GPU"),
        (1, 4, None, [0], "Computing on GPU 0"),
        (3, 4, None, [0, 1], "Computing on GPU 0,1 of 3"),
        (8, 4, None, [0, 1, 2, 3], "Computing on GPU 0,1,2,3 of 8"),
        (8, 4, 1, [0], "Computing on GPU 0 of 8"),
    ],
)
def test_the_automatic_choice_divides_the_batch(gpus, batch, most, chosen, said, capsys):
    assert devices._automatic(_Machine(gpus), batch, most) == chosen
    assert capsys.readouterr().out == said + "\n"


def test_a_bar_in_a_log_file_is_few_lines(capsys):
    for _ in progress.bar(range(1000), desc="pairs"):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("pairs:   0%")
    assert lines[1].startswith("pairs: 100%")
    assert all("\r" not in line for line in lines)


FREED = """
import ctypes, sys, start
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
start.keep_memory()
for _ in range(2):  # a volume of 128^3 voxels with 16 channels
    place = libc.malloc(2**27)
    ctypes.memset(place, 1, 2**27)
    libc.free(place)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""


@pytest.mark.parametrize(("settings", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_freed_memory_stays_unless_the_user_has_settings(settings, kept):
    mine = {
        k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k not in ("GLIBC_TUNABLES", "LD_PRELOAD")
    }
    ran = subprocess.run(
        [sys.executable, "-c", FREED], cwd=ROOT, env={**mine, **settings}, capture_output=True, text=True, check=True
    )
    assert (int(ran.stdout) * 1024 > 2**27) == kept
