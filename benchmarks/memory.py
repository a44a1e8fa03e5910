"""Memory of the device, as TensorFlow's allocator counts it."""

import gc

import tensorflow as tf


def peak_of(run):
    """Bytes that `run()` takes at its peak beyond what is there before it, such as weights; not in its first run."""
    run()
    before = _now()
    tf.config.experimental.reset_memory_stats(_device())
    run()
    return tf.config.experimental.get_memory_info(_device())["peak"] - before


def kept_by(run):
    """Bytes that a tape keeps for its backward pass, where `run()` gives the tape and the result.

    What is asked is how much memory is free again after the tape, and nothing else, is gone.
    """
    tape, result = run()
    before = _now()
    del tape
    after = _now()
    del result
    return before - after


def _now():
    gc.collect()
    return tf.config.experimental.get_memory_info(_device())["current"]


def _device():
    return "GPU:0" if tf.config.list_physical_devices("GPU") else "CPU:0"
