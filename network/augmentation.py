"""Training augmentation: what a config chooses of a random deformation, affine maps and contrasts.

Two functions, as everywhere with chance: `draw` draws from the pairs' seeds, `augment` applies what was drawn. What
moves a side of a pair, its image and all that lies on it, is one flow, which `flows` gives.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf

from .affine import Affine, affine_flow, compose_affine, inverse_affine
from .contrast import Contrast, draw_contrast, recolour
from .kernels import xla_kernel
from .label_maps import read_labels
from .random_draws import fold_in, uniform
from .spatial_transformer import sample_at_points, warp
from .splines import spline_matrix, tensor_product

if TYPE_CHECKING:
    from .config import CascadeConfig

CONTROL_POINTS = 5
MAX_OFFSET = 0.4  # of the distance of size / 4 between control points
# Steps that find where the field takes a landmark, and what it may then be off, in voxels.
STEPS, TOLERANCE = 50, 0.01
SIDES = ("fixed", "moving")


class Draws(typing.NamedTuple):
    """What was drawn for the pairs of a batch; None or a side that is left out is not augmented so.

    Attributes:
        control: control points of the moving side's deformation, float32 [B, 5, 5, 5, 3].
        affine: of each side, the map of its augmented image into the image.
        contrast: of each side, how its grey values change.
    """

    control: tf.Tensor | None
    affine: dict[str, Affine]
    contrast: dict[str, Contrast]


def draw(seeds: tf.Tensor, config: CascadeConfig) -> Draws:
    """What a config's augmentation does to each pair.

    Args:
        seeds: int32 [B, 2], one seed per pair: the same seed gives the same on every device.
        config: its `augmentation_options` and `image_size`.
    """
    chosen, size = config.augmentation_options, config.image_size
    affine, contrast = {}, {}
    for k, side in enumerate(SIDES):
        if "affine" in chosen:
            affine[side] = draw_affine(fold_in(seeds, 1 + k), size, **chosen["affine"])
        if "contrast" in chosen:
            contrast[side] = draw_contrast(fold_in(seeds, 3 + k), size, **chosen["contrast"])
    return Draws(draw_control_points(seeds, size) if "bspline" in chosen else None, affine, contrast)


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

    def draw_one(seed: tf.Tensor) -> tf.Tensor:
        return tf.random.stateless_uniform(shape, seed, -bound, bound, alg="philox")

    u = tf.map_fn(draw_one, seeds, fn_output_signature=tf.TensorSpec(shape, tf.float32))
    return u * u * u * (tf.constant(size, tf.float32) / 4.0)


def draw_affine(
    seeds: tf.Tensor, size: Sequence[int], rotation: float, scale: float, shear: float, shift: float
) -> Affine:
    """A random affine map for each pair, around the centre of the volume, in voxels.

    Its linear part is Rz Ry Rx (I + U) S: rotations about the axes, U with the three shears above the diagonal, and S
    with a factor for each axis.

    Args:
        seeds: int32 [B, 2], one seed per map.
        size: (X, Y, Z) of the image.
        rotation: the greatest angle about each axis, in degrees.
        scale: each axis' factor lies between 1 / (1 + scale) and 1 + scale.
        shear: the greatest shear.
        shift: the greatest shift along each axis, as a share of the size.
    """
    u = 2.0 * uniform(seeds, 12) - 1.0
    linear = tf.eye(3)[None] * tf.exp(u[:, 3:6] * math.log1p(scale))[:, None]
    x, y, z = tf.unstack(u[:, 6:9] * shear, axis=1)
    i, o = tf.ones_like(x), tf.zeros_like(x)
    (cx, cy, cz), (sx, sy, sz) = (tf.unstack(f(u[:, :3] * math.radians(rotation)), axis=1) for f in (tf.cos, tf.sin))
    for rows in (
        [[i, x, y], [o, i, z], [o, o, i]],
        [[i, o, o], [o, cx, -sx], [o, sx, cx]],
        [[cy, o, sy], [o, i, o], [-sy, o, cy]],
        [[cz, -sz, o], [sz, cz, o], [o, o, i]],
    ):
        linear = tf.stack([tf.stack(row, axis=-1) for row in rows], axis=-2) @ linear
    return Affine(linear - tf.eye(3), u[:, 9:] * shift * tf.constant(size, tf.float32))


def spline_flow(control: tf.Tensor, size: Sequence[int]) -> tf.Tensor:
    """Flow of a uniform cubic B-spline with the given control points: float32 [B, X, Y, Z, 3].

    The control points span the volume, size / 4 apart, and those beyond it are zero. As in the original, the first
    axis of `control` runs along y and the second along x.
    """
    segments = CONTROL_POINTS - 1
    places = [(np.arange(n) + 0.5) / n * segments for n in size]
    matrices = [spline_matrix(place, segments)[:, 1:-1] for place in places]  # without those beyond the volume
    return tensor_product(tf.transpose(control, [0, 2, 1, 3, 4]), *map(tf.constant, matrices))


def flows(draws: Draws, size: Sequence[int]) -> dict[str, tf.Tensor]:
    """The flow that moves each side of a pair, float32 [B, X, Y, Z, 3]; none for a side that stays.

    The augmented image at p is the image at p + flow(p). The deformation comes first, then the affine map.
    """
    found = {side: affine_flow(affine, size) for side, affine in draws.affine.items()}
    if draws.control is not None:
        deformation = spline_flow(draws.control, size)
        if "moving" in found:
            deformation = compose_affine(draws.affine["moving"], found["moving"], deformation)
        found["moving"] = deformation
    return found


def augment(batch: dict[str, tf.Tensor], draws: Draws, config: CascadeConfig) -> dict[str, tf.Tensor]:
    """Batch of training, augmented.

    What a flow moves of a side is its image and mask, read linearly at p + flow(p); its labels, read at the nearest
    voxel; and its landmarks, which go the other way: q to the place p with p + flow(p) = q, where the new image shows
    what the image shows at q.
    Where contrasts were drawn, `seen_fixed` and `seen_moving` are what the network is shown, and `fixed` and
    `moving` stay in their own contrast, in which the loss compares them.
    """
    moved = flows(draws, config.image_size)
    batch = {**batch, **{side: warp(batch[side], flow) for side, flow in moved.items()}}
    for side, flow in moved.items():
        if f"{side}_seg" in batch:
            batch[f"{side}_seg"] = read_labels(batch[f"{side}_seg"], flow)
        if f"{side}_mask" in batch:
            batch[f"{side}_mask"] = warp(batch[f"{side}_mask"], flow)
        if f"{side}_points" in batch:
            batch[f"{side}_points"] = carry_points(batch[f"{side}_points"], flow, draws.affine.get(side))
    for side, contrast in draws.contrast.items():
        batch[f"seen_{side}"] = recolour(batch[side], contrast, config.augmentation_options["contrast"]["blur"])
    return batch


def carry_points(points: tf.Tensor, flow: tf.Tensor, affine: Affine | None = None) -> tf.Tensor:
    """Places p with p + flow(p) = point: float32 [B, L, 3]; NaN where there is none in the volume, and for NaN.

    Found by the iteration p -> p - A^-1 (p + flow(p) - point), with A the linear part of an affine map. It converges
    where the flow is A after a deformation whose slope is below 1.

    Args:
        points: float32 [B, L, 3], in voxels.
        flow: float32 [B, X, Y, Z, 3], in voxels; read linearly, and zero outside.
        affine: the affine map that the flow contains; None for none.
    """
    back = tf.eye(3) if affine is None else tf.eye(3) + inverse_affine(affine).matrix
    return _carry_points(points, flow, tf.broadcast_to(back, [tf.shape(points)[0], 3, 3]))


@xla_kernel
def _carry_points(points: tf.Tensor, flow: tf.Tensor, back: tf.Tensor) -> tf.Tensor:
    known = tf.where(tf.math.is_nan(points), 0.0, points)
    last = tf.cast(tf.shape(flow)[1:4] - 1, tf.float32)

    def off(found: tf.Tensor) -> tf.Tensor:
        return found + sample_at_points(flow, found) - known

    def improve(step: tf.Tensor, found: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return step + 1, tf.clip_by_value(found - tf.matmul(off(found), back, transpose_b=True), 0.0, last)

    _, found = tf.while_loop(lambda step, _: step < STEPS, improve, (0, tf.clip_by_value(known, 0.0, last)))
    is_found = tf.reduce_all(tf.abs(off(found)) <= TOLERANCE, axis=-1) & ~tf.reduce_any(tf.math.is_nan(points), axis=-1)
    return tf.where(is_found[..., None], found, float("nan"))
