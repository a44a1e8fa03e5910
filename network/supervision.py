"""Weak supervision: the terms of the loss that look at labels and landmarks, which only training needs.

Each gives one value per pair, NaN where a pair has nothing that the term could look at: such a pair counts without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import tensorflow as tf

from .kernels import compiled, fork
from .label_maps import label_map, label_numbers, label_sums
from .spatial_transformer import sample_at_points

if TYPE_CHECKING:
    from .config import CascadeConfig


def dice_loss(fixed: tf.Tensor, moving: tf.Tensor, flow: tf.Tensor, labels: int, padding: bool = False) -> tf.Tensor:
    """1 - soft Dice of the warped labels, mean over the labels that both scans have: float32 [B], 0..1; NaN for none.

    The soft Dice of label l is 2 sum F W / (sum F + sum W) over the voxels, where F is 1 in the fixed scan's label and
    0 elsewhere, and W that mask of the moving scan, warped linearly (Balakrishnan et al., IEEE TMI 38, 2019, section
    III-C). All labels are looked at in one pass.

    Args:
        fixed: int32 [B, X, Y, Z, 1], labels as numbers from 1 (`label_maps.label_numbers`); 0 is the background.
        moving: the same of the moving scan, int32 [B, X', Y', Z', 1].
        flow: float32 [B, X, Y, Z, 3], in voxels.
        labels: the largest number.
        padding: as in `spatial_transformer.warp`.
    """
    warped, both = label_sums(fixed, moving, flow, labels, padding)
    there, fixed_count = _counts(moving, labels) > 0, _counts(fixed, labels)
    common = tf.cast(there & (fixed_count > 0), tf.float32)[:, 1:]
    # A label that the fixed scan has makes a sum of 1 at least; others do not count.
    dice = 2.0 * both[:, 1:] / tf.maximum(tf.cast(fixed_count, tf.float32) + warped, 1.0)[:, 1:]
    number = tf.reduce_sum(common, 1)
    mean = tf.reduce_sum(common * dice, 1) / tf.maximum(number, 1.0)
    return tf.where(number > 0, 1.0 - mean, float("nan"))


def _counts(numbers: tf.Tensor, labels: int) -> tf.Tensor:
    """Voxels of each number 0..`labels`, int32 [B, labels + 1]."""
    flat = tf.reshape(numbers, [tf.shape(numbers)[0], -1])
    # `tf.math.bincount` takes the number of bins from the values, for which XLA would compile each batch anew.
    return tf.raw_ops.DenseBincount(input=flat, size=tf.constant(labels + 1), weights=tf.zeros([0], tf.int32))


@compiled
def landmark_loss(fixed_points: tf.Tensor, moving_points: tf.Tensor, flow: tf.Tensor) -> tf.Tensor:
    """Mean distance of the carried fixed landmarks from the moving ones, in voxels: float32 [B]; NaN without any.

    A fixed landmark p is carried to p + flow(p), with the flow read linearly, and zero outside the volume: the same
    distance as the metric `landmark_distance`. The mean is over the landmarks that both scans have. Where one is met
    exactly its gradient is 0.

    Args:
        fixed_points, moving_points: float32 [B, L, 3], in voxels of their own scan, NaN where missing.
        flow: float32 [B, X, Y, Z, 3], in voxels.
    """
    common = ~tf.reduce_any(tf.math.is_nan(fixed_points + moving_points), axis=-1)
    fixed_points, moving_points = (tf.where(common[..., None], p, 0.0) for p in (fixed_points, moving_points))
    squared = tf.reduce_sum(tf.square(fixed_points + sample_at_points(flow, fixed_points) - moving_points), -1)
    counts = common & (squared != 0.0)  # a NaN stays
    distance = tf.where(counts, tf.sqrt(tf.where(counts, squared, 1.0)), 0.0)
    number = tf.reduce_sum(tf.cast(common, tf.float32), 1)
    return tf.where(number > 0, tf.reduce_sum(distance, 1) / tf.maximum(number, 1.0), float("nan"))


def supervised_losses(
    batch: Mapping[str, tf.Tensor], labels: Sequence[int] | None, config: CascadeConfig
) -> Callable[[tf.Tensor], dict[str, tuple[float, tf.Tensor]]] | None:
    """The terms that a config asks for, as a function of the composed flow [B, X, Y, Z, 3]; None if it asks for none.

    The function gives for each term, by name, its factor, and its values float32 [B] before that, NaN for none.

    Args:
        batch: a Batch with segmentations for `dice`, with landmarks for `landmark`.
        labels: values of the labels, or None where the segmentations are masks.
        config: with the factors `dice_factor` and `landmark_factor`, 0 for none.
    """

    def dice(flow: tf.Tensor) -> tf.Tensor:
        values = (1,) if labels is None else tuple(labels)
        fixed, moving = (label_numbers(label_map(batch[f"{s}_seg"], labels), values) for s in ("fixed", "moving"))
        return dice_loss(fixed, moving, flow, len(values), config.warp_padding)

    def landmark(flow: tf.Tensor) -> tf.Tensor:
        return landmark_loss(batch["fixed_points"], batch["moving_points"], flow)

    factors = {"dice": config.dice_factor, "landmark": config.landmark_factor}
    asked = {term.__name__: term for term in (dice, landmark) if factors[term.__name__]}

    def losses(flow: tf.Tensor) -> dict[str, tuple[float, tf.Tensor]]:
        flows = fork([flow], len(asked))
        return {
            name: (factors[name], term(handle)) for (name, term), (handle,) in zip(asked.items(), flows, strict=True)
        }

    return losses if asked else None
