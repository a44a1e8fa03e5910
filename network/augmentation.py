"""Training augmentation: one random cubic B-spline field deforms the moving side of a pair.

Two functions, as everywhere with chance: one draws control points from a seed, the other applies them.
"""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from .spatial_transformer import warp
from .splines import spline_matrix, tensor_product

CONTROL_POINTS = 5
MAX_OFFSET = 0.4  # of the distance of size / 4 between control points


def draw_control_points(seeds: tf.Tensor, size: Sequence[int]) -> tf.Tensor:
    """Random offsets of the control points of one field a pair.

    Each is sign(u)|u|^3 with u uniform, at most 0.4 in size, times a quarter of the image size.

    Args:
        seeds: int32 [B, 2], one seed per pair: the same seed gives the same field on every device.
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
    segments = CONTROL_POINTS - 1
    places = [(np.arange(n) + 0.5) / n * segments for n in size]
    matrices = [spline_matrix(place, segments)[:, 1:-1] for place in places]  # without those beyond the volume
    return tensor_product(tf.transpose(control, [0, 2, 1, 3, 4]), *map(tf.constant, matrices))


def augment(batch: dict[str, tf.Tensor], control: tf.Tensor) -> dict[str, tf.Tensor]:
    """Batch of training whose moving images are deformed by the field of `control`."""
    flow = spline_flow(control, batch["moving"].shape[1:4])
    return {**batch, "moving": warp(batch["moving"], flow)}
