"""Convolutions that double a grid, and gradients of one that halves it, computed on the coarse grid.

Along each axis, a voxel of the fine grid meets two voxels of the coarse one, whatever the kernel. So the eight fine
voxels of a coarse one are eight convolutions of 2^3 taps on the coarse grid. They are computed as one convolution with
eight times the channels, and interleaved. The small kernel is linear in the large one, so the weights stay what they
are.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from .kernels import xla_kernel

# Which taps of a kernel make each of the two taps, for an odd and for an even fine voxel: [odd or even, tap, old tap].
# Of the transposed convolution with stride 2, a voxel meets every other tap.
TRANSPOSED_TAPS = (((0, 0, 1, 0), (1, 0, 0, 0)), ((0, 0, 0, 1), (0, 1, 0, 0)))
# After nearest-neighbour doubling, two of three neighbours are the same coarse voxel.
NEAREST_TAPS = (((1, 1, 0), (0, 0, 1)), ((1, 0, 0), (0, 1, 1)))
# Of what a convolution with stride 2 made of a voxel: where the grid has an even number of voxels, and an odd one.
HALVING_TAPS = ((((0, 1, 0), (0, 0, 0)), ((0, 0, 1), (1, 0, 0))), (((0, 0, 1), (1, 0, 0)), ((0, 0, 0), (0, 1, 0))))


def fold(kernel: tf.Tensor, taps: Sequence[Any]) -> tf.Tensor:
    """The small kernel (2, 2, 2, C, 8 F) of a kernel (k, k, k, C, F), by taps along x, y and z, as those above."""
    along = [tf.constant(table, kernel.dtype) for table in taps]
    small = tf.einsum("pai,qbj,rck,ijkxy->abcxpqry", *along, kernel)
    return tf.reshape(small, [2, 2, 2, kernel.shape[3], 8 * kernel.shape[4]])


def folded(features: tf.Tensor, small: tf.Tensor, size: Sequence[int], *addend: tf.Tensor) -> tf.Tensor:
    """The convolution of the fine grid, without a gradient.

    Args:
        features: [B, x, y, z, C].
        small: (2, 2, 2, C, 8 F), of `fold`.
        size: X, Y, Z of the result, each twice the grid of the features or, where odd, one less.
        addend: nothing, or [B, X, Y, Z, F] that is added to the result.

    Returns:
        [B, X, Y, Z, F].
    """
    parts = tf.nn.conv3d(tf.pad(features, _ALL_AROUND), small, strides=[1] * 5, padding="VALID")
    return _interleave(parts, tuple(size), *addend)


def doubled_convolution(features: tf.Tensor, kernel: tf.Tensor, addend: tf.Tensor) -> tf.Tensor:
    """A convolution of features doubled by nearest neighbours, with zeros around, plus what is added to it.

    Args:
        features: [B, x, y, z, C].
        kernel: (3, 3, 3, C, F).
        addend: [B, 2 x, 2 y, 2 z, F].

    Returns:
        [B, 2 x, 2 y, 2 z, F].
    """

    @tf.custom_gradient
    def call(features: tf.Tensor, small: tf.Tensor, addend: tf.Tensor) -> Any:
        def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
            # Not `Pad`: TensorFlow's graph optimiser joins that of the forward pass with its convolution, and gives up
            # all that it does to convolutions where another operation has the same use for it.
            around = tf.raw_ops.PadV2(
                input=features, paddings=_ALL_AROUND, constant_values=tf.zeros([], features.dtype)
            )
            parts = _part(upstream, tuple(around.shape[1:4]))
            by_features = tf.raw_ops.Conv3DBackpropInputV2(
                input_sizes=tf.shape(around), filter=small, out_backprop=parts, strides=[1] * 5, padding="SAME"
            )
            return [by_features[:, 1:-1, 1:-1, 1:-1], _kernel_gradient(around, parts), upstream]

        # Where this runs eagerly, an outer tape would otherwise record and keep what follows.
        inputs = [tf.stop_gradient(a) for a in (features, small, addend)]
        return folded(*inputs[:2], addend.shape[1:4], inputs[2]), gradient

    return call(features, fold(kernel, 3 * [NEAREST_TAPS]), addend)


def halving_convolution(features: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """A convolution with stride 2 and zeros around, 'same': its gradient of the features is one on the coarse grid.

    Args:
        features: [B, X, Y, Z, C].
        kernel: (3, 3, 3, C, F).

    Returns:
        [B, ceil(X / 2), .., .., F].
    """
    options: dict[str, Any] = {"strides": [1, 2, 2, 2, 1], "padding": "SAME"}

    @tf.custom_gradient
    def call(features: tf.Tensor, kernel: tf.Tensor) -> Any:
        def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
            size = features.shape[1:4]
            small = fold(tf.transpose(kernel, [0, 1, 2, 4, 3]), [HALVING_TAPS[n % 2] for n in size])
            by_kernel = tf.raw_ops.Conv3DBackpropFilterV2(
                input=features, filter_sizes=kernel.shape, out_backprop=upstream, **options
            )
            return [folded(upstream, small, size), by_kernel]

        return tf.nn.conv3d(tf.stop_gradient(features), tf.stop_gradient(kernel), **options), gradient

    return call(features, tf.convert_to_tensor(kernel))


# One voxel on every side of a volume.
_ALL_AROUND = [[0, 0], [1, 1], [1, 1], [1, 1], [0, 0]]


@xla_kernel
def _interleave(parts: tf.Tensor, size: tuple[int, ...], *addend: tf.Tensor) -> tf.Tensor:
    """[B, n + 1, ..., 8 C], odd and even fine voxels as channels, -> [B, size, C].

    Of window m, which starts at voxel m of a coarse grid with one voxel around, the odd voxel is 2 m - 1, the even
    one 2 m.
    """
    fine = tf.reshape(parts, [-1, *parts.shape[1:4], 2, 2, 2, parts.shape[-1] // 8])
    fine = tf.transpose(fine, [0, 1, 4, 2, 5, 3, 6, 7])
    fine = tf.reshape(fine, [-1, *(2 * n for n in parts.shape[1:4]), parts.shape[-1] // 8])
    fine = fine[:, 1 : size[0] + 1, 1 : size[1] + 1, 1 : size[2] + 1]
    return fine + addend[0] if addend else fine


@xla_kernel
def _part(fine: tf.Tensor, grid: tuple[int, ...]) -> tf.Tensor:
    """The gradient of `_interleave`: [B, size, C] -> [B, grid, 8 C], zero where no fine voxel is."""
    around = [[1, 2 * n - 1 - size] for n, size in zip(grid, fine.shape[1:4], strict=True)]
    parts = tf.pad(fine, [[0, 0], *around, [0, 0]])
    parts = tf.reshape(parts, [-1, grid[0], 2, grid[1], 2, grid[2], 2, fine.shape[-1]])
    return tf.reshape(tf.transpose(parts, [0, 1, 3, 5, 2, 4, 6, 7]), [-1, *grid, 8 * fine.shape[-1]])


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
