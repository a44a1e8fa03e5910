"""Curves for TensorBoard: what cannot be written is told for what it is, and never left out in silence."""

import contextlib

import numpy as np
import pytest
import tensorflow as tf

from errors import UserError
from network.curves import Curves

NOISE = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)  # 12 KiB as a picture


def written(folder):
    (file,) = folder.iterdir()
    events = tf.compat.v1.train.summary_iterator(str(file))
    return [(event.step, value.tag) for event in events for value in event.summary.value]


def write_scalars(curves, first, last):
    for step in range(first, last):
        curves.scalars(step, {"loss": 1.0, "none": None})


def write_pictures(curves, first, last):
    for step in range(first, last):
        curves.pictures(step, {"noise": NOISE})


def test_they_are_read_back(tmp_path):
    curves = Curves(tmp_path / "run")
    curves.scalars(7, {"loss": 0.5, "dice": None})
    curves.scalars(8, {"dice": None})
    curves.pictures(9, {"a": NOISE, "b": NOISE[..., :1]})
    assert written(tmp_path / "run") == [(7, "loss"), (9, "a"), (9, "b")]


@pytest.mark.parametrize("write", [write_scalars, write_pictures])
@pytest.mark.parametrize("more", [0, 1, 4096])  # bytes, beyond what is there
def test_a_limit_is_one_line(write, more, tmp_path, file_limit):
    curves = Curves(tmp_path / "run")
    write(curves, 0, 3)
    (file,) = (tmp_path / "run").iterdir()
    said = r"cannot write .*run \((File too large|wrote only \d+ bytes of a record); \d+ MiB left .*make space"
    with file_limit(file.stat().st_size + more), pytest.raises(UserError, match=said) as error:
        write(curves, 3, 99)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("write", [write_scalars, write_pictures])
def test_a_full_disk_is_not_taken_for_memory(write, small_disk):
    curves = Curves(small_disk / "run")
    with (small_disk / "all").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    with pytest.raises(UserError, match=r"cannot write .*run \(.*; 0 MiB left .*make space"):
        write(curves, 0, 99)
    with pytest.raises(UserError, match=r"cannot write .*other \(No space left on device; 0 MiB left"):
        Curves(small_disk / "other")
