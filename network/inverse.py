"""The inverse of a flow."""

import tensorflow as tf

from .kernels import xla_kernel
from .spatial_transformer import warp

STEPS = 50  # at most
TOLERANCE = 0.01  # voxels
# A voxel whose error does not fall takes smaller steps: a flow steeper than one voxel per voxel needs them.
SLOWER, SLOWEST = 0.5, 1 / 16


@xla_kernel
def inverse(flow: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The flow that leads back: compose(inverse, flow) and compose(flow, inverse) are none.

    Found by fixed-point iteration of inverse(p) = -flow(p + inverse(p)) (Chen et al., Medical Physics 35, 2008).

    Args:
        flow: float32 [B, X, Y, Z, 3], in voxels.

    Returns:
        The inverse float32 [B, X, Y, Z, 3], and how far each voxel is from where it started after the inverse and the
        flow, float32 [B, X, Y, Z]: near zero but where the flow folds or leads in from outside.
    """

    def left(found: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        error = found + warp(flow, found, fast=False)
        return error, tf.norm(error, axis=-1)

    def go_on(step: tf.Tensor, found: tf.Tensor, error: tf.Tensor, size: tf.Tensor, share: tf.Tensor) -> tf.Tensor:
        return (step < STEPS) & tf.reduce_any((size > TOLERANCE) & (share > SLOWEST))

    def improve(
        step: tf.Tensor, found: tf.Tensor, error: tf.Tensor, size: tf.Tensor, share: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        tried = found - share[..., None] * error
        new_error, new_size = left(tried)
        better = new_size < size
        share = tf.where(better, tf.minimum(share / SLOWER, 1.0), share * SLOWER)
        found, error = (tf.where(better[..., None], new, old) for new, old in ((tried, found), (new_error, error)))
        return step + 1, found, error, tf.where(better, new_size, size), share

    start = -flow
    error, size = left(start)
    _, found, _, size, _ = tf.while_loop(go_on, improve, (0, start, error, size, tf.ones_like(size)))
    return found, size
