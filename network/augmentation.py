"""Training augmentation: one random cubic B-spline field deforms the moving side of a pair.

Two functions, as everywhere with chance: one draws control points from a seed, the other applies them.
"""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from .spatial_transformer import identity_grid, warp
from .splines import cubic_weights, tensor_product

CONTROL_POINTS = 5
MAX_OFFSET = 0.4  # of the distance of size / 4 between control points


def draw_control_points(seeds: tf.Tensor, size: Sequence[int]) -> tf.Tensor:
    """Random offsets of the control points of one field a pair.

    Each is sign(u)|u|^3 with u uniform, at most 0.4 in size, times a quarter of the image size.

    Args:
        seeds: int32 [B, 2], one seed a pair: the same seed gives the same field on every device.
        size: (X, Y, Z) of the image.

    Returns:
        float32 [B, 5, 5, 5, 3], in voxels.
    """
    shape = [CONTROL_POINTS] * 3 + [3]
    bound = MAX_OFFSET ** (1 / 3)

    def draw(seed: tf.Tensor) -> tf.Tensor:
        return tf.random.stateless_uniform(shape, seed, -bound, bound, alg="philox")

    u = tf.map_fn(draw, seeds, fn_output_signature=tf.TensorSpec(shape, tf.float32))
    return u * u * u * (tf.constant(size, tf.float32) / 4.0)


def spline_flow(control: tf.Tensor, size: Sequence[int]) -> tf.Tensor:
    """Flow of a uniform cubic B-spline with the given control points: float32 [B, X, Y, Z, 3].

    The control points span the volume, size / 4 apart, and those beyond it are zero. As in the original, the first
    axis of `control` runs along y and the second along x.
    """
    return tensor_product(tf.transpose(control, [0, 2, 1, 3, 4]), *(tf.constant(_spline_matrix(n)) for n in size))


def _spline_matrix(n: int) -> np.ndarray:
    """Weights of the five control points along one axis at each of n voxels: float32 [n, 5]."""
    segments = CONTROL_POINTS - 1
    position = (np.arange(n) + 0.5) / n * segments
    segment = np.minimum(np.floor(position).astype(int), segments - 1)
    u = position - segment
    # A zero control point on either side, dropped again below, gives every segment its four neighbours.
    matrix = np.zeros((n, CONTROL_POINTS + 2))
    for k, weight in enumerate(cubic_weights(u)):
        matrix[np.arange(n), segment + k] = weight
    return matrix[:, 1:-1].astype(np.float32)


def augment(batch: dict[str, tf.Tensor], control: tf.Tensor) -> dict[str, tf.Tensor]:
    """Batch with its moving side deformed by the field of `control`: image, segmentation and landmarks, if there.

    A landmark goes to the voxel whose displaced place lies nearest to it. Missing segmentations (-1) and landmarks
    (NaN) stay missing.
    """
    size = batch["moving"].shape[1:4]
    flow = spline_flow(control, size)
    augmented = {**batch, "moving": warp(batch["moving"], flow)}
    if "moving_seg" in batch:
        warped = warp(tf.cast(batch["moving_seg"], tf.float32), flow)
        augmented["moving_seg"] = tf.cast(tf.round(warped), tf.int32)
    if "moving_points" in batch:
        augmented["moving_points"] = warp_points(batch["moving_points"], flow)
    return augmented


def warp_points(points: tf.Tensor, flow: tf.Tensor) -> tf.Tensor:
    """For each point [B, L, 3] the voxel p with p + flow(p) nearest to it, float32 [B, L, 3]; NaN stays NaN."""
    displaced = tf.reshape(identity_grid(flow.shape[1:4]) + flow, [tf.shape(flow)[0], -1, 3])

    def nearest(point: tf.Tensor) -> tf.Tensor:
        return tf.argmin(tf.reduce_sum(tf.square(displaced - point[:, None]), axis=-1), axis=1)

    index = tf.map_fn(nearest, tf.transpose(points, [1, 0, 2]), fn_output_signature=tf.int64)
    voxel = tf.unravel_index(tf.reshape(tf.transpose(index), [-1]), tf.constant(flow.shape[1:4], tf.int64))
    voxel = tf.reshape(tf.transpose(voxel), tf.shape(points))
    return tf.where(tf.math.is_nan(points), points, tf.cast(voxel, tf.float32))
