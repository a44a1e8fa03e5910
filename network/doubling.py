"""Convolutions that double a grid, computed on the coarse grid.

Along each axis, a voxel of the fine grid meets two voxels of the coarse one, whatever the kernel. So the eight fine
voxels of a coarse one are eight convolutions of 2^3 taps on the coarse grid. They are computed as one convolution with
eight times the channels, and interleaved. The small kernel is linear in the large one, so the weights stay what they
are.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from .kernels import own_gradient, xla_kernel

# Which taps of a kernel make each of the two taps, for an odd and for an even fine voxel: [odd or even, tap, old tap].
# Of the transposed convolution with stride 2, a voxel meets every other tap.
TRANSPOSED_TAPS = (((0, 0, 1, 0), (1, 0, 0, 0)), ((0, 0, 0, 1), (0, 1, 0, 0)))
# After nearest-neighbour doubling, two of three neighbours are the same coarse voxel.
NEAREST_TAPS = (((1, 1, 0), (0, 0, 1)), ((1, 0, 0), (0, 1, 1)))


def small_kernel(kernel: tf.Tensor, taps: Sequence[Any]) -> tf.Tensor:
    """The kernel on the coarse grid, such as (2, 2, 2, C, 8 F), of one (k, k, k, C, F).

    Args:
        kernel: of the fine grid.
        taps: along x, y and z, a table [voxel of a block, tap on the coarse grid, tap of `kernel`] of 0 and 1, such as
            `TRANSPOSED_TAPS`.
    """
    table = np.einsum("pai,qbj,rck->abcpqrijk", *(np.array(along, np.float32) for along in taps))
    small, block, old = (math.prod(table.shape[k : k + 3]) for k in (0, 3, 6))
    channels = kernel.shape[3:]
    # One matrix product: an operation for each axis would take longer to start than to compute.
    taken = tf.constant(table.reshape(-1, old), kernel.dtype) @ tf.reshape(kernel, [old, -1])
    taken = tf.transpose(tf.reshape(taken, [small, block, *channels]), [0, 2, 1, 3])
    return tf.reshape(taken, [*table.shape[:3], channels[0], block * channels[1]])


def folded(features: tf.Tensor, small: tf.Tensor, size: Sequence[int], *addend: tf.Tensor) -> tf.Tensor:
    """The convolution of the fine grid, without a gradient.

    Args:
        features: [B, x, y, z, C].
        small: (2, 2, 2, C, 8 F), of `small_kernel`.
        size: X, Y, Z of the result, each twice the grid of the features or, where odd, one less.
        addend: nothing, or [B, X, Y, Z, F] that is added to the result.

    Returns:
        [B, X, Y, Z, F].
    """
    parts = tf.nn.conv3d(tf.pad(features, _ALL_AROUND), small, strides=[1] * 5, padding="VALID")
    # Of window m, which starts at voxel m of a coarse grid with one voxel around, the odd voxel is 2 m - 1.
    return interleaved(parts, _BLOCK, 1, tuple(size), *addend)


def doubled_convolution(features: tf.Tensor, kernel: tf.Tensor, addend: tf.Tensor) -> tf.Tensor:
    """A convolution of features doubled by nearest neighbours, with zeros around, plus what is added to it.

    Args:
        features: [B, x, y, z, C].
        kernel: (3, 3, 3, C, F).
        addend: [B, 2 x, 2 y, 2 z, F].

    Returns:
        [B, 2 x, 2 y, 2 z, F].
    """

    @own_gradient
    def call(features: tf.Tensor, small: tf.Tensor, addend: tf.Tensor) -> Any:
        def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
            # Not `Pad`: TensorFlow's graph optimiser joins that of the forward pass with its convolution, and gives up
            # all that it does to convolutions where another operation has the same use for it.
            around = tf.raw_ops.PadV2(
                input=features, paddings=_ALL_AROUND, constant_values=tf.zeros([], features.dtype)
            )
            parts = parted(upstream, _BLOCK, 1, tuple(around.shape[1:4]))
            by_features = tf.raw_ops.Conv3DBackpropInputV2(
                input_sizes=tf.shape(around), filter=small, out_backprop=parts, strides=[1] * 5, padding="SAME"
            )
            return [by_features[:, 1:-1, 1:-1, 1:-1], _kernel_gradient(around, parts), upstream]

        return folded(features, small, addend.shape[1:4], addend), gradient

    return call(features, small_kernel(kernel, 3 * [NEAREST_TAPS]), addend)


# What each coarse voxel gives, and one voxel on every side of a volume.
_BLOCK = (2, 2, 2)
_ALL_AROUND = [[0, 0], [1, 1], [1, 1], [1, 1], [0, 0]]


@xla_kernel
def interleaved(
    parts: tf.Tensor, block: tuple[int, ...], first: int, size: tuple[int, ...], *addend: tf.Tensor
) -> tf.Tensor:
    """Voxels of blocks as channels, [B, ..., voxels of a block times C], in their places: [B, size, C].

    Args:
        parts: the blocks.
        block: how many voxels one has along each axis.
        first: how many voxels of the first block are left out, along each axis.
        size: of the result.
        addend: nothing, or what is added to the result.
    """
    channels = parts.shape[-1] // math.prod(block)
    fine = tf.reshape(parts, [-1, *parts.shape[1:4], *block, channels])
    fine = tf.transpose(fine, [0, 1, 4, 2, 5, 3, 6, 7])
    fine = tf.reshape(fine, [-1, *(k * n for k, n in zip(block, parts.shape[1:4], strict=True)), channels])
    fine = fine[(slice(None), *(slice(first, first + n) for n in size))]
    return fine + addend[0] if addend else fine


@xla_kernel
def parted(fine: tf.Tensor, block: tuple[int, ...], first: int, grid: tuple[int, ...]) -> tf.Tensor:
    """The gradient of `interleaved`: [B, size, C] -> [B, grid, voxels of a block times C], zero where no voxel is."""
    around = [[first, k * n - first - size] for k, n, size in zip(block, grid, fine.shape[1:4], strict=True)]
    parts = tf.pad(fine, [[0, 0], *around, [0, 0]])
    pairs = [length for pair in zip(grid, block, strict=True) for length in pair]
    parts = tf.transpose(tf.reshape(parts, [-1, *pairs, fine.shape[-1]]), [0, 1, 3, 5, 2, 4, 6, 7])
    return tf.reshape(parts, [-1, *grid, math.prod(block) * fine.shape[-1]])


def _kernel_gradient(around: tf.Tensor, parts: tf.Tensor) -> tf.Tensor:
    """Gradient of the kernel of a 2^3 convolution from the padded features and the gradient of its result.

    Both are on one grid, so a tap is an offset between their rows, and its gradient one matrix product. What is beyond
    the grid meets zeros. oneDNN's own gradient of such a kernel takes four times as long.
    """
    _, _, y, z, channels = around.shape
    rows, upstream = tf.reshape(around, [-1, channels]), tf.reshape(parts, [-1, parts.shape[-1]])
    taps = []
    for i, j, k in itertools.product((0, 1), repeat=3):
        offset = (i * y + j) * z + k
        taps.append(tf.matmul(rows[offset:], upstream[: tf.shape(upstream)[0] - offset], transpose_a=True))
    return tf.reshape(tf.stack(taps), [2, 2, 2, channels, parts.shape[-1]])
