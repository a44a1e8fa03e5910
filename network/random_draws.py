"""Random numbers of seeds: the same seed gives the same numbers, in any order, on every device."""

import tensorflow as tf


def uniform(seeds: tf.Tensor, n: int) -> tf.Tensor:
    """`n` numbers from 0 to 1 for each of the seeds int32 [B, 2]: float32 [B, n]."""
    return tf.map_fn(
        lambda seed: tf.random.stateless_uniform([n], seed, alg="philox"),
        seeds,
        fn_output_signature=tf.TensorSpec([n], tf.float32),
    )


def fold_in(seeds: tf.Tensor, purpose: int) -> tf.Tensor:
    """Seeds int32 [B, 2] for one purpose out of several, of which each must draw other numbers."""
    return tf.map_fn(lambda seed: tf.random.experimental.stateless_fold_in(seed, purpose, alg="philox"), seeds)
