"""Which voxels of a pair the similarity of the training loss looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tensorflow as tf

from .kernels import volume_sum, xla_kernel

if TYPE_CHECKING:
    from .config import CascadeConfig


@xla_kernel
def inside(flow: tf.Tensor) -> tf.Tensor:
    """1 where p + flow(p) lies between the volume's outermost voxels, else 0: float32 [B, X, Y, Z, 1]."""
    kept: tf.Tensor | bool = True
    for axis in range(3):
        n = tf.shape(flow)[axis + 1]
        place = flow[..., axis] + tf.reshape(tf.range(n, dtype=tf.float32), [-1 if a == axis else 1 for a in range(3)])
        kept &= (place >= 0.0) & (place <= tf.cast(n - 1, tf.float32))
    return tf.cast(kept, tf.float32)[..., None]


def compared_voxels(flow: tf.Tensor, config: CascadeConfig) -> tf.Tensor | None:
    """Weights of the voxels that the similarity of a pair looks at: float32 [B, X, Y, Z, 1], or None for all alike.

    With `config.similarity_mask` 'inside', a voxel counts if its place in the moving image is inside of the volume. A
    pair of which no voxel would count is compared everywhere. No gradient flows through the weights: the loss cannot
    become smaller by looking away.

    Args:
        flow: composed flow that warps the moving image, float32 [B, X, Y, Z, 3] in voxels.
        config: `CascadeConfig`.
    """
    return None if config.similarity_mask is None else _or_everywhere(inside(tf.stop_gradient(flow)))


@xla_kernel
def _or_everywhere(weights: tf.Tensor) -> tf.Tensor:
    """Weights [B, X, Y, Z, 1]; 1 everywhere where they are 0 everywhere."""
    return tf.where(volume_sum(weights)[:, None, None, None, None] > 0.0, weights, 1.0)
