"""Kernels compiled by one process serve the next, and nothing that is wrong with the cache is seen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def run(cache, **environment):
    """Warp a volume in a process of its own: what it prints."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run([sys.executable, "-c", WARP], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def kernels(cache):
    return {file: file.read_bytes() for file in cache.rglob("*.pb.*")}


def test_kernels_are_kept_for_the_next_process_and_damaged_ones_replaced(tmp_path):
    first = run(tmp_path)
    kept = kernels(tmp_path)
    assert len(kept) > 2
    assert run(tmp_path) == first
    assert kernels(tmp_path) == kept
    cut, empty, changed, *_ = kept
    cut.write_bytes(kept[cut][:-1])
    empty.write_bytes(b"")
    changed.write_bytes(kept[changed][:100] + b"\xff" + kept[changed][101:])
    cut.with_name("of somebody else").write_text("text")
    assert run(tmp_path) == first
    assert {file.name.rpartition(".")[0] for file in kernels(tmp_path)} == {f.name.rpartition(".")[0] for f in kept}
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
    (folder / "one.pb").write_bytes(b"one")
    (folder / "one.pb.tmp").write_bytes(b"being written")
    [(keep, *arguments)] = private
    keep(*arguments)
    assert not folder.exists()
    again = kernel_cache._filled_folder()
    assert {file.name: file.read_bytes() for file in again.iterdir()} == {"one.pb": b"one"}
    private[1][0](*private[1][1:])


def test_folders_of_killed_processes_go(private, tmp_path):
    (alive, dead, other) = folders = [kernel_cache._new_folder(tmp_path) for _ in range(3)]
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    of_dead = dead.rename(str(dead).replace(str(os.getpid()), process.stdout.strip()))
    of_other = other.rename(tmp_path / "kernels-elsewhere-1-x")
    again = kernel_cache._new_folder(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([alive, again, of_other])
    assert len({*folders, again, of_dead}) == 5


def test_a_cache_of_the_users_own_stays(private, monkeypatch):
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    monkeypatch.setenv("TF_XLA_FLAGS", "--tf_xla_persistent_cache_directory=mine")
    with kernel_cache.kept():
        assert os.environ["TF_XLA_FLAGS"] == "--tf_xla_persistent_cache_directory=mine"
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
    monkeypatch.setattr(kernel_cache, "_LEAST_FREE", 2**60)
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
