"""Convolutions on grids of a few voxels, as matrix products.

Such a kernel is far larger than what it is applied to, and all the work is to read it once. A convolution of oneDNN
reorders it first, which takes five to nine times as long.
"""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

# The most voxels of a coarse grid on which this pays.
MOST = 32


def is_few(size: Sequence[int | None], times: int = 1) -> bool:
    """Whether a grid of `size` has so few voxels, or so many `times` that; not where an axis is unknown (None)."""
    return None not in size and math.prod(size) <= times * MOST  # type: ignore[arg-type]


def convolve_few(features: tf.Tensor, kernel: tf.Tensor, strides: Sequence[int]) -> tf.Tensor:
    """Convolution with zeros around, of 'same' padding.

    Args:
        features: [B, x, y, z, C].
        kernel: (i, j, k, C, F).
        strides: along x, y and z.

    Returns:
        [B, ceil(x / stride), .., .., F].
    """
    size = features.shape[1:4]
    along = [_seen(n, taps, stride) for n, taps, stride in zip(size, kernel.shape[:3], strides, strict=True)]
    seen = np.einsum("oai,pbj,qck->opqabcijk", *along)
    voxels = tf.reshape(features, [-1, math.prod(size), features.shape[-1]])
    windows = tf.constant(seen.reshape(-1, math.prod(size)), features.dtype) @ voxels
    # With a row of zeros: a product of a single row would be rounded otherwise, and a pair by itself than among others.
    rows = tf.pad(tf.reshape(windows, [-1, math.prod(kernel.shape[:4])]), [[0, 1], [0, 0]])
    product = (rows @ tf.reshape(kernel, [-1, kernel.shape[-1]]))[:-1]
    return tf.reshape(product, [-1, *seen.shape[:3], kernel.shape[-1]])


def _seen(n: int, taps: int, stride: int) -> np.ndarray:
    """Which voxel of n each tap of the kernel sees for each voxel of the result: 0 or 1, [result, tap, n]."""
    result = -(-n // stride)
    before = max((result - 1) * stride + taps - n, 0) // 2  # voxels of zero
    place = stride * np.arange(result)[:, None] + np.arange(taps) - before
    return (place[..., None] == np.arange(n)).astype(np.float32)


def upsample_few(features: tf.Tensor, kernel: tf.Tensor, shape: tf.Tensor) -> tf.Tensor:
    """Transposed convolution of stride 2, whose 4^3 windows, two voxels apart, are added where they overlap.

    Args:
        features: [B, x, y, z, C].
        kernel: (4, 4, 4, F, C).
        shape: of the result, [B, X, Y, Z, F].
    """
    rows = [tf.reshape(a, [-1, kernel.shape[-1]]) for a in (features, kernel)]
    windows = tf.reshape(tf.matmul(*rows, transpose_b=True), [-1, *features.shape[1:4], *kernel.shape[:4]])
    for axis in (1, 2, 3):
        lower, upper = tf.split(windows, 2, axis=4)
        none = tf.zeros_like(tf.gather(lower, [0], axis=axis))
        pairs = tf.concat([lower, none], axis) + tf.concat([none, upper], axis)
        even, odd = tf.unstack(pairs, axis=4)
        windows = _alternate(even, odd, axis)
    return windows[:, 1 : shape[1] + 1, 1 : shape[2] + 1, 1 : shape[3] + 1]


def _alternate(even: tf.Tensor, odd: tf.Tensor, axis: int) -> tf.Tensor:
    """Two volumes interleaved along an axis: a voxel of the first, one of the second, and so on."""
    pairs = tf.stack([even, odd], axis=axis + 1)
    shape = [-1, *pairs.shape[1:]]
    return tf.reshape(pairs, [*shape[:axis], 2 * shape[axis], *shape[axis + 2 :]])
