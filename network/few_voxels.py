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

from .kernels import TensorFunction, compiled, own_gradient

# The most voxels of a coarse grid on which this pays.
MOST = 64


def is_few(size: Sequence[int | None], filters: int, times: int = 1) -> bool:
    """Whether a grid has at most 64 voxels and as many as filters, or so many `times` that; not if an axis is None."""
    return None not in size and math.prod(size) <= times * min(MOST, filters)  # type: ignore[arg-type]


def convolve_few(features: tf.Tensor, kernel: tf.Tensor, strides: Sequence[int]) -> tf.Tensor:
    """Convolution with zeros around, of 'same' padding.

    Args:
        features: [B, x, y, z, C].
        kernel: (i, j, k, C, F).
        strides: along x, y and z.

    Returns:
        [B, ceil(x / stride), .., .., F].
    """
    size, taps, result = features.shape[1:4], kernel.shape[:3], _result(features.shape[1:4], strides)
    voxels = math.prod(result)
    windows = _windows(features, _places(tuple(size), tuple(taps), tuple(strides)))
    rows = tf.reshape(windows, [-1, math.prod(kernel.shape[:4])])
    product = _accompanied(rows, voxels) @ tf.reshape(kernel, [-1, kernel.shape[-1]])
    product = product[:-1] if voxels == 1 else product
    return tf.reshape(product, [-1, *result, kernel.shape[-1]])


def _result(size: Sequence[int], strides: Sequence[int]) -> list[int]:
    return [-(-n // stride) for n, stride in zip(size, strides, strict=True)]


@functools.cache
def _places(size: tuple[int, ...], taps: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """Which voxel of a flattened grid each tap of the kernel sees for each voxel of the result: [result, taps].

    The number of voxels stands for a place outside of the grid.
    """
    place, is_inside = np.zeros([1] * 6, np.int64), np.ones([1] * 6, bool)
    for axis, (n, m, k, stride) in enumerate(zip(size, _result(size, strides), taps, strides, strict=True)):
        before = max((m - 1) * stride + k - n, 0) // 2  # voxels of zero
        along = stride * np.arange(m)[:, None] + np.arange(k) - before
        along = along.reshape([m if a == axis else k if a == 3 + axis else 1 for a in range(6)])
        place, is_inside = n * place + along, is_inside & (along >= 0) & (along < n)
    return np.where(is_inside, place, math.prod(size)).reshape(-1, math.prod(taps))


def _windows(features: tf.Tensor, places: np.ndarray) -> tf.Tensor:
    """What the taps see of features [B, x, y, z, C], with zeros around: [B, result, taps, C]."""
    size, channels = features.shape[1:4], features.shape[4]

    def read(rows: tf.Tensor, places: np.ndarray) -> tf.Tensor:
        return tf.gather(tf.pad(rows, [[0, 0], [0, 1], [0, 0]]), places, axis=1)

    @own_gradient
    def call(features: tf.Tensor) -> Any:
        def gradient(upstream: tf.Tensor) -> tf.Tensor:
            taps = tf.reshape(upstream, [-1, places.size, channels])
            return tf.reshape(tf.reduce_sum(read(taps, _seen_by(places, math.prod(size))), 2), [-1, *size, channels])

        return read(tf.reshape(features, [-1, math.prod(size), channels]), places), gradient

    return call(features)


def _seen_by(places: np.ndarray, voxels: int) -> np.ndarray:
    """For each voxel the entries of `places` that name it, by number and in order, filled up with the next number."""
    order = np.argsort(places, axis=None, kind="stable")
    first = np.searchsorted(places.flat[order], np.arange(voxels + 1))
    order = order[: first[-1]]
    voxel = places.flat[order]
    entries = np.full((voxels, np.diff(first).max()), places.size)
    entries[voxel, np.arange(len(order)) - first[voxel]] = order
    return entries


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
