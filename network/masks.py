"""Which voxels of a pair the similarity of the training loss looks at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import tensorflow as tf

from .kernels import volume_sum, xla_kernel
from .spatial_transformer import warp

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


def compared_voxels(batch: Mapping[str, tf.Tensor], flow: tf.Tensor, config: CascadeConfig) -> tf.Tensor | None:
    """Weights of the voxels that the similarity of a pair looks at: float32 [B, X, Y, Z, 1], or None for all alike.

    With `config.similarity_mask` 'inside', a voxel counts if its place in the moving image is inside of the volume;
    with 'scan', by the fixed scan's mask times the moving scan's, warped linearly; with 'both', by the product. A pair
    of which no voxel would count is compared everywhere. No gradient flows through the weights: the loss cannot become
    smaller by looking away.

    Args:
        batch: a Batch; for the scans' masks, with `fixed_mask` and `moving_mask`, float32 [B, X, Y, Z, 1] in 0..1.
        flow: composed flow that warps the moving image, float32 [B, X, Y, Z, 3] in voxels.
        config: `CascadeConfig`.
    """
    if config.similarity_mask is None:
        return None
    flow, weights = tf.stop_gradient(flow), []
    if config.similarity_mask in ("inside", "both"):
        weights.append(inside(flow))
    if config.similarity_mask in ("scan", "both"):
        weights += [batch["fixed_mask"], warp(batch["moving_mask"], flow, **config.warping)]
    return _or_everywhere(weights)


@xla_kernel
def _or_everywhere(weights: list[tf.Tensor]) -> tf.Tensor:
    """The product of weights [B, X, Y, Z, 1]; 1 everywhere where it is 0 everywhere."""
    product = weights[0]
    for weight in weights[1:]:
        product *= weight
    return tf.where(volume_sum(product)[:, None, None, None, None] > 0.0, product, 1.0)
