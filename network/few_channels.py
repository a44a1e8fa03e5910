"""Convolutions of few channels on a fine grid, computed on a coarser one.

oneDNN computes 16 channels at a time, so that of a convolution that gives two or three most is thrown away. Here the
voxels of a block, 2x2x2 or 2x2x1, are channels of one coarse voxel, and so is what comes out: a convolution with a
larger kernel that steps from block to block, in a third to half of the time. The images that a network sees have two
channels, so this is their gradient too.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from .doubling import folded, interleaved, parted, small_kernel
from .kernels import own_gradient

# The most channels for which this pays, of images that are convolved and of a result, and the least voxels of a result.
IMAGES, RESULTS, LEAST_VOXELS = 2, 3, 2**15
# Of the transpose of a convolution with stride 2, where the grid has an even number of voxels, and where an odd one; as
# `doubling.TRANSPOSED_TAPS`.
_HALVING_TAPS = ((((0, 1, 0), (0, 0, 0)), ((0, 0, 1), (1, 0, 0))), (((0, 0, 1), (1, 0, 0)), ((0, 0, 0), (0, 1, 0))))
# Of a block of one voxel, and of two: [voxel of the block, tap of the larger kernel, tap of the kernel].
_BLOCK_TAPS = {
    1: (((1, 0, 0), (0, 1, 0), (0, 0, 1)),),
    2: (((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)), ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))),
}
_SAME: dict[str, Any] = {"strides": [1] * 5, "padding": "SAME"}


def to_few_channels(features: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """A convolution that gives few channels, 'same'; it and the gradient of its kernel are computed by blocks.

    Args:
        features: [B, X, Y, Z, C].
        kernel: (3, 3, 3, C, F).

    Returns:
        [B, X, Y, Z, F].
    """

    @own_gradient
    def call(features: tf.Tensor, kernel: tf.Tensor) -> Any:
        def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
            block = _block(kernel)
            with tf.GradientTape() as tape:
                tape.watch(kernel)
                large = _large_kernel(kernel, block)
            by_large = tf.raw_ops.Conv3DBackpropFilterV2(
                input=features,
                filter_sizes=large.shape,
                out_backprop=parted(upstream, block, 0, _coarse(features.shape[1:4], block)),
                strides=[1, *block, 1],
                padding="SAME",
            )
            by_features = tf.raw_ops.Conv3DBackpropInputV2(
                input_sizes=tf.shape(features), filter=kernel, out_backprop=upstream, **_SAME
            )
            return [by_features, tape.gradient(large, kernel, by_large)]

        return _by_blocks(features, kernel), gradient

    return call(features, tf.convert_to_tensor(kernel))


def of_images(images: tf.Tensor, kernel: tf.Tensor, stride: int) -> tf.Tensor:
    """A convolution of few channels, 'same'; the gradient of what is convolved is computed on a coarser grid.

    Args:
        images: [B, X, Y, Z, C].
        kernel: (3, 3, 3, C, F).
        stride: 1 or 2.

    Returns:
        [B, ceil(X / stride), .., .., F].
    """
    options = {**_SAME, "strides": [1, stride, stride, stride, 1]}

    @own_gradient
    def call(images: tf.Tensor, kernel: tf.Tensor) -> Any:
        def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
            size, back = images.shape[1:4], tf.transpose(kernel, [0, 1, 2, 4, 3])
            if stride == 2:
                small = small_kernel(back, [_HALVING_TAPS[n % 2] for n in size])
                by_images = folded(upstream, small, size)
            else:
                by_images = _by_blocks(upstream, back[::-1, ::-1, ::-1])
            by_kernel = tf.raw_ops.Conv3DBackpropFilterV2(
                input=images, filter_sizes=kernel.shape, out_backprop=upstream, **options
            )
            return [by_images, by_kernel]

        return tf.nn.conv3d(images, kernel, **options), gradient

    return call(images, tf.convert_to_tensor(kernel))


def _by_blocks(features: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """The convolution of `to_few_channels`, without a gradient."""
    block = _block(kernel)
    parts = tf.nn.conv3d(features, _large_kernel(kernel, block), strides=[1, *block, 1], padding="SAME")
    return interleaved(parts, block, 0, tuple(features.shape[1:4]))


def _block(kernel: tf.Tensor) -> tuple[int, int, int]:
    """The block that makes no more than 16 channels of those of the result."""
    return (2, 2, 2) if kernel.shape[-1] <= 2 else (2, 2, 1)


def _large_kernel(kernel: tf.Tensor, block: Sequence[int]) -> tf.Tensor:
    """(4, 4, 4 or 3, C, voxels of the block times F)."""
    return small_kernel(kernel, [_BLOCK_TAPS[n] for n in block])


def _coarse(size: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-n // step) for n, step in zip(size, block, strict=True))
