"""`tf.data` batches of samples that Python reads, and what an error of such a reader becomes."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow as tf

from errors import UserError

_READERS = 4  # threads that decode pairs
_BATCHES_AHEAD = 2


@contextmanager
def user_errors() -> Iterator[None]:
    """Wrap a loop over a dataset (or a `fit`) in this: a UserError of a reader thread is raised as that UserError.

    When reading a pair fails, TensorFlow raises an error of its own, of which only the text says what had happened.

    Raises:
        UserError: reading a pair raised it.
    """
    try:
        yield
    except tf.errors.OpError as error:
        found = re.search(r"\bUserError: (.+)", error.message)
        if found is None:
            raise
        raise UserError(found[1]) from error


# What stands for "not there", by kind of array.
_EMPTY = {tf.float32: np.nan, tf.int32: -1, tf.int64: -1, tf.bool: False, tf.string: ""}


def batches(
    read: Callable[[int], dict[str, Any]], spec: dict[str, tf.TensorSpec], numbers: range, batch: int
) -> tf.data.Dataset:
    """Batches of read(n) for n in `numbers`, a range that `batch` divides.

    Args:
        read: function of a number that gives a sample: name -> array. What it lacks is not there: NaN, -1, False or "".
        spec: name -> TensorSpec of every array of a sample.
        numbers: of the samples.
        batch: samples in a Batch.
    """

    def arrays_of(n: np.ndarray) -> list[Any]:
        sample = read(int(n))
        return [sample[k] if k in sample else _nothing(s) for k, s in spec.items()]

    def load(n: tf.Tensor) -> dict[str, tf.Tensor]:
        arrays = tf.numpy_function(arrays_of, [n], [s.dtype for s in spec.values()])
        return {k: tf.ensure_shape(a, s.shape) for (k, s), a in zip(spec.items(), arrays, strict=True)}

    samples = tf.data.Dataset.range(numbers.start, numbers.stop)
    samples = samples.map(load, num_parallel_calls=_READERS, deterministic=True)
    return samples.batch(batch, drop_remainder=True).prefetch(_BATCHES_AHEAD).with_options(_untuned())


def _nothing(spec: tf.TensorSpec) -> np.ndarray:
    return np.full(spec.shape, _EMPTY[spec.dtype], spec.dtype.as_numpy_dtype)


def _untuned() -> tf.data.Options:
    """Nothing is left to be tuned. TensorFlow's tuner now and then sleeps on, up to 20 s, when its dataset ends."""
    options = tf.data.Options()
    options.autotune.enabled = False
    return options
