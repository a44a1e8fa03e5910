"""Label maps: what is in them, and how a flow carries them.

A segmentation is int32 [B, X, Y, Z, 1]: a mask of 0/255, or the values of labels; -1 everywhere where a scan has none.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from .kernels import own_gradient, shape_of, three_in_one_loop, xla_kernel
from .spatial_transformer import (
    CORNERS,
    cells_around,
    image_gradient,
    interpolate,
    looked_at,
    pad,
    slopes_between,
)

# A mask of 0/255, warped linearly, counts as foreground above this value (the original's threshold).
FOREGROUND = 128
_VOTE = FOREGROUND / 255
NO_LABEL = -2  # a label value that no scan has, and that is not that of a missing segmentation


def label_map(segmentation: tf.Tensor, labels: Sequence[int] | None = None) -> tf.Tensor:
    """Segmentation as a map of label values, int32: a 0/255 mask (`labels` None) becomes 0/1; -1 (missing) stays."""
    if labels is not None:
        return segmentation
    return _of_mask(segmentation)


@xla_kernel
def _of_mask(segmentation: tf.Tensor) -> tf.Tensor:
    return tf.where(segmentation < 0, segmentation, tf.cast(segmentation > FOREGROUND, tf.int32))


def has_labels(segmentation: tf.Tensor) -> tf.Tensor:
    """Whether each scan has a segmentation: bool [B]."""
    return tf.reduce_max(segmentation, [1, 2, 3, 4]) >= 0


def label_numbers(label_map: tf.Tensor, labels: Sequence[int]) -> tf.Tensor:
    """Each voxel's place, from 1, among the sorted values of some labels; 0 where it has none of them: int32."""
    values = tf.constant(sorted(labels), tf.int32)
    place = tf.minimum(tf.searchsorted(values, tf.reshape(label_map, [-1])), len(labels) - 1)
    place = tf.reshape(place, tf.shape(label_map))
    return tf.where(tf.gather(values, place) == label_map, place + 1, 0)


def carry_labels(
    segmentation: tf.Tensor, flow: tf.Tensor, labels: Sequence[int] | None = None, padding: bool = False
) -> tf.Tensor:
    """Label map (of `label_map`) of a moving segmentation warped linearly, label by label, at a threshold of 128.

    Label L is where its mask of 0/255, warped, exceeds 128: where the trilinear weights of the corners with label L sum
    to more than 128 / 255, which at most one label can. In a label map one vote of the corners finds it for all labels.

    Args:
        segmentation: int32 [B, X, Y, Z, 1]: a mask of 0/255 (`labels` None) or a label map; -1 everywhere if missing,
            and as 0 elsewhere in a mask.
        flow: float32 [B, X, Y, Z, 3].
        labels: None for a mask; otherwise the label values in use.
        padding: one voxel of label 0 around the image.

    Returns:
        int32 [B, X, Y, Z, 1]: 0 where no label is, and -1 everywhere where missing.
    """
    is_there = has_labels(segmentation)
    if padding:
        segmentation, flow = pad(segmentation), flow + 1.0
    return (_above_threshold if labels is None else _vote)(segmentation, flow, is_there)


def read_labels(segmentation: tf.Tensor, flow: tf.Tensor) -> tf.Tensor:
    """Label map read at the voxel nearest to p + flow(p), the edge repeated outside: int32 [B, X, Y, Z, 1].

    Args:
        segmentation: int32 [B, X', Y', Z', 1].
        flow: float32 [B, X, Y, Z, 3], in voxels.
    """
    return _nearest(segmentation, flow)


def label_sums(
    fixed: tf.Tensor, moving: tf.Tensor, flow: tf.Tensor, labels: int, padding: bool = False
) -> tuple[tf.Tensor, tf.Tensor]:
    """How much of each label a warp brings in all, and how much of it onto the same label, for all labels in one pass.

    The share of label l that is warped to voxel p, 0..1, is the sum of the trilinear weights of those of the eight
    corners that have it: the mask 0/1 of the label, warped linearly. It has a gradient with respect to the flow. The
    kernels keep nothing but the label maps and the flow, and their memory does not grow with the number of labels.

    Args:
        fixed: int32 [B, X, Y, Z, 1], each voxel's label as a number 0..`labels`.
        moving: the same of the moving image, int32 [B, X', Y', Z', 1].
        flow: float32 [B, X, Y, Z, 3].
        labels: the largest number.
        padding: as in `warp`; what surrounds the image has number 0.

    Returns:
        float32 [B, labels + 1] each: the sum over all voxels of the share of each label that is warped there, and the
        sum over those voxels where `fixed` has that label.
    """
    if padding:
        moving, flow = pad(moving), flow + 1.0

    @own_gradient
    def sums(flow: tf.Tensor) -> Any:
        def gradient(*upstream: tf.Tensor) -> tf.Tensor:
            return _label_sums_gradient(fixed, moving, flow, *upstream)

        return _label_sums(fixed, moving, flow, labels), gradient

    return tuple(sums(flow))


@xla_kernel
def _vote(segmentation: tf.Tensor, flow: tf.Tensor, is_there: tf.Tensor) -> tf.Tensor:
    cells = cells_around(looked_at(flow), shape_of(segmentation))
    flat = tf.reshape(segmentation, [-1])
    label = {corner: tf.gather(flat, cells.index_of(corner)) for corner in CORNERS}
    weight = {corner: cells.weight(corner) for corner in CORNERS}
    elected = tf.zeros_like(label[0, 0, 0])
    for candidate in label.values():
        votes = sum(tf.where(label[corner] == candidate, weight[corner], 0.0) for corner in CORNERS)
        elected = tf.where(votes > _VOTE, candidate, elected)
    return _or_missing(elected[..., None], is_there)


@xla_kernel
def _above_threshold(segmentation: tf.Tensor, flow: tf.Tensor, is_there: tf.Tensor) -> tf.Tensor:
    values = interpolate(tf.cast(tf.maximum(segmentation, 0), tf.float32), looked_at(flow))
    return _or_missing(tf.cast(values > FOREGROUND, tf.int32), is_there)


def _or_missing(label_map: tf.Tensor, is_there: tf.Tensor) -> tf.Tensor:
    return tf.where(is_there[:, None, None, None, None], label_map, -1)


@xla_kernel
def _nearest(segmentation: tf.Tensor, flow: tf.Tensor) -> tf.Tensor:
    cells = cells_around(looked_at(flow), shape_of(segmentation))
    nearest = cells.lowest
    for fraction, step in zip(cells.fractions, cells.steps, strict=True):
        nearest += tf.where(fraction >= 0.5, step, 0)
    return tf.gather(tf.reshape(segmentation, [-1]), nearest)[..., None]


@xla_kernel
def _label_sums(fixed: tf.Tensor, moving: tf.Tensor, flow: tf.Tensor, labels: int) -> list[tf.Tensor]:
    cells = cells_around(looked_at(flow), shape_of(moving))
    flat, here = tf.reshape(moving, [-1]), fixed[..., 0]
    onto_same = sum(tf.where(tf.gather(flat, cells.index_of(c)) == here, cells.weight(c), 0.0) for c in CORNERS)
    # How much each moving voxel is read in all; a sum over these by label is faster than one over eight corners.
    reads = image_gradient(tf.zeros_like(moving, tf.float32), flow, tf.ones_like(fixed, tf.float32))
    return [_by_label(numbers, values, labels) for numbers, values in ((moving, reads), (fixed, onto_same))]


def _by_label(numbers: tf.Tensor, values: tf.Tensor, labels: int) -> tf.Tensor:
    """Sums of values, one for each voxel of [B, X, Y, Z, 1], over the voxels of each number: [B, labels + 1].

    Each slice across x has sums of its own: a value, added to a sum of millions, would be rounded off.
    """
    pairs, rows = tf.shape(numbers)[0], tf.reduce_prod(tf.shape(numbers)[:2])
    place = tf.reshape(tf.range(rows), [pairs, -1, 1, 1]) * (labels + 1) + numbers[..., 0]
    sums = tf.zeros([rows * (labels + 1)])
    sums = tf.tensor_scatter_nd_add(sums, tf.reshape(place, [-1, 1]), tf.reshape(values, [-1]))
    return tf.reduce_sum(tf.reshape(sums, [pairs, -1, labels + 1]), 1)


@three_in_one_loop
def _label_sums_gradient(
    fixed: tf.Tensor, moving: tf.Tensor, flow: tf.Tensor, warped: tf.Tensor, both: tf.Tensor
) -> list[tf.Tensor]:
    """Gradient of `label_sums` with respect to the flow, from those of its sums, [B, labels + 1] each.

    At a voxel the gradient of label l's share is `warped[l]`, and `both[l]` more where the fixed image has l there. So
    it is the slope of a single image, in which each corner has the number that belongs to its label.
    """
    pairs = tf.shape(fixed)[0]
    first = tf.reshape(tf.range(pairs) * tf.shape(warped)[1], [-1, 1, 1, 1])
    flat, here = tf.reshape(moving, [-1]), fixed[..., 0]
    of_label, of_same = tf.reshape(warped, [-1]), tf.gather(tf.reshape(both, [-1]), first + here)

    def value_of(indices: tf.Tensor) -> tf.Tensor:
        label = tf.gather(flat, indices)
        return tf.gather(of_label, first + label) + tf.where(label == here, of_same, 0.0)

    return slopes_between(value_of, shape_of(moving), looked_at(flow))
