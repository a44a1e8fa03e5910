"""Convolutions on grids of a few voxels, as matrix products.

Such a kernel is far larger than what it is applied to, and all the work is to read it once. A convolution of oneDNN
reorders it first, which takes five to nine times as long.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from .kernels import TensorFunction, compiled

# The most voxels of a coarse grid on which this pays.
MOST = 64

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
    result, voxels = seen.shape[:3], math.prod(seen.shape[:3])
    windows = _read(tf.reshape(features, [-1, math.prod(size), features.shape[-1]]), seen.reshape(-1, math.prod(size)))
    rows = tf.reshape(windows, [-1, math.prod(kernel.shape[:4])])
    product = _accompanied(rows, voxels) @ tf.reshape(kernel, [-1, kernel.shape[-1]])
    product = product[:-1] if voxels == 1 else product
    return tf.reshape(product, [-1, *result, kernel.shape[-1]])


def _seen(n: int, taps: int, stride: int) -> np.ndarray:
    """Which voxel of n each tap of the kernel sees for each voxel of the result: 0 or 1, [result, tap, n]."""
    result = -(-n // stride)
    before = max((result - 1) * stride + taps - n, 0) // 2  # voxels of zero
    place = stride * np.arange(result)[:, None] + np.arange(taps) - before
    return place[..., None] == np.arange(n)


def _read(rows: tf.Tensor, seen: np.ndarray) -> tf.Tensor:
    """Rows [B, n, C] read in the places that a table [m, n] marks, at most one in a line of it: [B, m, C], else 0."""

    @tf.custom_gradient
    def call(rows: tf.Tensor) -> Any:
        return _sums(rows, seen), lambda upstream: _sums(upstream, seen.T)

    return call(rows)


def _sums(rows: tf.Tensor, marked: np.ndarray) -> tf.Tensor:
    """For each line of a table [m, n], the sum of the rows [B, n, C] that it marks, in their order: [B, m, C]."""
    order, most = np.argsort(~marked, axis=1, kind="stable"), marked.sum(axis=1).max()
    places = np.where(np.take_along_axis(marked, order, axis=1), order, len(marked.T))[:, :most]
    read = tf.gather(tf.pad(rows, [[0, 0], [0, 1], [0, 0]]), places, axis=1)
    return tf.reduce_sum(read, axis=2) if most > 1 else read[:, :, 0]


def _accompanied(rows: tf.Tensor, voxels: int) -> tf.Tensor:
    """Rows, `voxels` a pair, with one of zeros at the end where a pair has a single one.

    A product of a single row would be rounded otherwise, and so a pair by itself than among others.
    """
    return tf.pad(rows, [[0, 1], [0, 0]]) if voxels == 1 else rows


def upsample_few(features: tf.Tensor, kernel: tf.Tensor, size: Sequence[int]) -> tf.Tensor:
    """Transposed convolution of stride 2, whose 4^3 windows, two voxels apart, are added where they overlap.

    Args:
        features: [B, x, y, z, C].
        kernel: (4, 4, 4, F, C).
        size: X, Y, Z of the result, each twice the grid of the features or, where odd, one less.

    Returns:
        [B, X, Y, Z, F].
    """
    # The kernel is the first factor: as the second one it would be turned, which takes as long again as to read it.
    columns, voxels = (tf.reshape(a, [-1, kernel.shape[-1]]) for a in (kernel, features))
    n = math.prod(features.shape[1:4])
    windows = tf.matmul(columns, _accompanied(voxels, n), transpose_b=True)
    windows = windows[:, :-1] if n == 1 else windows  # a slice of everything would be a copy, as would its gradient
    return _overlapped(tuple(size))(tf.reshape(windows, [*kernel.shape[:4], -1, *features.shape[1:4]]))


@functools.cache
def _overlapped(size: tuple[int, ...]) -> TensorFunction:
    """Kernel that adds windows (4, 4, 4, F, B, x, y, z) where they overlap: [B, X, Y, Z, F] of `size`."""

    @compiled
    def add(windows: tf.Tensor) -> tf.Tensor:
        for axis in range(3):
            # The upper half of a window lies where the lower one of the next does.
            around = [[[0, 0]] * (5 + axis) + [[upper, 1 - upper]] + [[0, 0]] * (2 - axis) for upper in (0, 1)]
            windows = sum(tf.pad(half, a) for half, a in zip(tf.split(windows, 2, axis), around, strict=True))
        fine = tf.transpose(windows, [4, 5, 0, 6, 1, 7, 2, 3])
        fine = tf.reshape(fine, [-1, *(2 * n for n in windows.shape[5:]), windows.shape[3]])
        return fine[(slice(None), *(slice(1, 1 + n) for n in size))]

    return add
