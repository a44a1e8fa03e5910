"""Batches of samples that Python reads."""

import numpy as np
import tensorflow as tf

from data_util.batches import batches


def test_each_sample_is_read_once_and_in_order():
    calls = []

    def read(n):
        calls.append(n)
        return {"unused": None, "number": np.int32(10 * n), "volume": np.full((2, 3), n, np.float32)}

    spec = {"volume": tf.TensorSpec((2, 3), tf.float32), "number": tf.TensorSpec((), tf.int32)}
    found = list(batches(read, spec, range(2, 8), 2))
    assert sorted(calls) == [2, 3, 4, 5, 6, 7]
    assert [batch["number"].numpy().tolist() for batch in found] == [[20, 30], [40, 50], [60, 70]]
    assert [batch["volume"][:, 1, 2].numpy().tolist() for batch in found] == [[2, 3], [4, 5], [6, 7]]
