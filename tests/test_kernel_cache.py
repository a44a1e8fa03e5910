"""Kernels compiled by one process serve the next, and nothing that is wrong with the cache is seen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import files
import kernel_cache

ROOT = Path(__file__).parents[1]
WARP = """
import hashlib, os, start
tf = start.tensorflow()
assert "TF_XLA_FLAGS" not in os.environ
import numpy as np
from network.spatial_transformer import warp
rng = np.random.default_rng(0)
image, flow = (tf.constant(rng.random((1, 9, 8, 7, n), np.float32)) for n in (1, 3))
with tf.GradientTape() as tape:
    tape.watch(flow)
    warped = warp(image, flow)
print(hashlib.md5(b"".join(value.numpy().tobytes() for value in (warped, tape.gradient(warped, flow)))).hexdigest())
"""


pytestmark = pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="with GPUs, no kernels are kept")


def run(cache):
    """Warp a volume in a process of its own: what it prints."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run([sys.executable, "-c", WARP], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def kernels(cache):
    return {file: file.read_bytes() for file in cache.rglob("*.pb.*")}


def when_written(cache):
    return {file.stem: file.stat().st_mtime_ns for file in cache.rglob("*.pb.*")}


def test_kernels_are_kept_for_the_next_process_and_damaged_ones_replaced(tmp_path):
    first = run(tmp_path)
    kept = kernels(tmp_path)
    written = when_written(tmp_path)
    assert len(kept) > 2
    assert run(tmp_path) == first
    assert when_written(tmp_path) == written  # what is compiled anew is written anew
    cut, empty, changed, *_ = kept
    cut.write_bytes(kept[cut][:-1])
    empty.write_bytes(b"")
    changed.write_bytes(kept[changed][:100] + b"\xff" + kept[changed][101:])
    cut.with_name("of somebody else").write_text("text")
    assert run(tmp_path) == first
    again = when_written(tmp_path)
    assert again.keys() == written.keys()
    assert {name for name in written if again[name] != written[name]} == {cut.stem, empty.stem, changed.stem}
    assert len(kernels(tmp_path)) == len(kept)
    assert not cut.with_name("of somebody else").exists()


@pytest.fixture
def private(tmp_path, monkeypatch):
    """Both the cache and the folders of processes in tmp_path; what is to be done at the end, as a list."""
    ends = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_cache.atexit, "register", lambda *call: ends.append(call))
    return ends


def test_what_a_process_adds_is_kept_and_its_folder_removed(private):
    folder = kernel_cache._filled_folder()
    assert list(folder.iterdir()) == []
    assert folder.stat().st_mode & 0o077 == 0
    (folder / "one.pb").write_bytes(b"one")
    (folder / "one.pb.tmp").write_bytes(b"being written")
    [(keep, *arguments, process)] = private
    keep(*arguments, process + 1)  # as a child would at its end
    assert folder.exists()
    keep(*arguments, process)
    assert not folder.exists()
    again = kernel_cache._filled_folder()
    assert {file.name: file.read_bytes() for file in again.iterdir()} == {"one.pb": b"one"}
    private[1][0](*private[1][1:])


def test_only_files_that_nobody_else_could_write_are_used(private, tmp_path, monkeypatch):
    folder = kernel_cache._filled_folder()
    (folder / "one.pb").write_bytes(b"one")
    [(keep, *arguments)] = private
    keep(*arguments)
    [kept] = kernels(tmp_path)
    kept.chmod(0o620)
    assert list(kernel_cache._filled_folder().iterdir()) == []
    kept.chmod(0o600)
    monkeypatch.setattr(kernel_cache.os, "geteuid", lambda: os.getuid() + 1)
    assert list(kernel_cache._filled_folder().iterdir()) == []
    for keep, *arguments in private[1:]:
        keep(*arguments)


def test_folders_of_ended_processes_go(tmp_path):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    here = f"kernels-{files.machine()}"
    names = [f"{here}-{ended.stdout.strip()}-x", f"{here}-{os.getpid()}-before", "kernels-elsewhere-2-old"]
    stay = [f"{here}-{os.getppid()}-x", f"{here}-{'9' * 30}-x", "kernels-elsewhere-1-new", "of somebody else"]
    for name in (*names, *stay):
        (tmp_path / name).mkdir()
    os.utime(tmp_path / names[-1], (1e9, 1e9))
    folder = kernel_cache._new_folder(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {*stay, folder.name}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TF_XLA_FLAGS", "--tf_xla_persistent_cache_directory=mine"),
        ("TF_XLA_FLAGS", "flags.txt"),
        ("XLA_FLAGS", "flags.txt"),
        ("TF_CPP_MIN_LOG_LEVEL", "0"),
    ],
)
def test_settings_of_the_users_own_stay(private, monkeypatch, name, value):
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
    monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with kernel_cache.kept():
        assert dict(os.environ) == before
    assert private == []


def test_another_processor_build_or_setting_has_other_kernels(monkeypatch):
    here = kernel_cache._machine()
    assert kernel_cache._machine() == here
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    other = kernel_cache._machine()
    monkeypatch.setattr(kernel_cache.os, "sched_getaffinity", lambda process: range(77))
    third = kernel_cache._machine()
    monkeypatch.setattr(kernel_cache.Path, "read_text", lambda path: "flags : none\n\nflags : all")
    assert len({here, other, third, kernel_cache._machine()}) == 4
    monkeypatch.setattr(kernel_cache.importlib.util, "find_spec", lambda name: None)
    assert kernel_cache._machine() is None


def test_where_no_cache_can_be_there_is_none(private, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert kernel_cache._filled_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(kernel_cache, "_LEAST_FREE", 2**60)
        assert kernel_cache._filled_folder() is None
    monkeypatch.setattr(kernel_cache.Path, "home", lambda: 1 / 0)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert kernel_cache._filled_folder() is None
    assert private == []


def test_the_oldest_kernels_go_where_there_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_cache, "_MOST_BYTES", 100)
    for age, (machine, size) in enumerate((("new", 60), ("old", 30), ("old", 50))):
        file = tmp_path / machine / str(age)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x" * size)
        os.utime(file, (1e9 - age, 1e9 - age))
    kernel_cache._prune(tmp_path)
    assert sorted(file.name for file in tmp_path.glob("*/*")) == ["0", "1"]
