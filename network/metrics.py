"""Metrics of a registration: pure functions, one value (or one a label or landmark) a pair. NaN is 'not measured'."""

import tensorflow as tf

from .kernels import compiled
from .spatial_transformer import FOREGROUND, sample_at_points, warp, warp_labels


def label_map(segmentation, labels=None):
    """Segmentation as a map of label values, int32: a 0/255 mask (`labels` None) becomes 0/1; -1 (missing) stays."""
    if labels is not None:
        return segmentation
    return tf.where(segmentation < 0, segmentation, tf.cast(segmentation > FOREGROUND, tf.int32))


def carry_labels(segmentation, flow, labels=None, padding=False):
    """Label map (as of `label_map`) of a moving segmentation warped linearly, label by label, at a threshold of 128.

    Args:
        segmentation: int32 [B, X, Y, Z, 1]: a mask of 0/255 (`labels` None) or a label map; -1 everywhere if missing.
        flow: float32 [B, X, Y, Z, 3].
        labels: None for a mask; otherwise the label values in use.
        padding: as in `spatial_transformer.warp`.

    Returns:
        int32 [B, X, Y, Z, 1]; -1 everywhere where missing.
    """
    if labels is None:
        values = warp(tf.cast(tf.maximum(segmentation, 0), tf.float32), flow, padding)
        carried = tf.cast(values > FOREGROUND, tf.int32)
    else:
        carried = warp_labels(segmentation, flow, padding)
    return tf.where(is_measured(segmentation)[:, None, None, None, None], carried, -1)


def is_measured(segmentation):
    """Whether each scan has a segmentation: bool [B]."""
    return tf.reduce_any(segmentation >= 0, [1, 2, 3, 4])


def overlap(fixed, warped, labels=None):
    """Dice and Jaccard of two label maps.

    Args:
        fixed, warped: int32 [B, X, Y, Z, 1], as of `label_map` and `carry_labels`.
        labels: the K label values to measure, or None for a mask (K = 1).

    Returns:
        dice, jaccard: float32 [B, K]. NaN where a segmentation is missing or a label is in neither image.
    """
    counts = _label_counts(fixed, warped, [1] if labels is None else labels)
    fixed_count, warped_count, both = (tf.cast(n, tf.float32) for n in counts)
    union = fixed_count + warped_count - both
    measured = (is_measured(fixed) & is_measured(warped))[:, None] & (union > 0)
    dice = tf.math.divide_no_nan(2.0 * both, fixed_count + warped_count)
    jaccard = tf.math.divide_no_nan(both, union)
    return tf.where(measured, dice, float("nan")), tf.where(measured, jaccard, float("nan"))


def _label_counts(fixed, warped, labels):
    """Voxels of each label in two label maps and in both at once: three int32 [B, K]."""
    # Label values are mapped to 1..K (0 for the rest), so that one histogram counts every label.
    values = tf.constant(sorted(labels), tf.int32)
    order = tf.constant([sorted(labels).index(v) for v in labels])
    bins = len(labels) + 1

    def index(seg):
        seg = tf.reshape(seg, [tf.shape(seg)[0], -1])
        place = tf.minimum(tf.searchsorted(values, tf.reshape(seg, [-1])), len(labels) - 1)
        place = tf.reshape(place, tf.shape(seg))
        return tf.where(tf.gather(values, place) == seg, place + 1, 0)

    def histogram(index):
        return tf.gather(tf.math.bincount(index, minlength=bins, maxlength=bins, axis=-1)[:, 1:], order, axis=1)

    fixed, warped = index(fixed), index(warped)
    return histogram(fixed), histogram(warped), histogram(tf.where(fixed == warped, fixed, 0))


def landmark_distances(fixed_points, moving_points, flow):
    """Distance in voxels between each carried fixed landmark and its moving counterpart: float32 [B, L].

    A fixed landmark p is carried to p + flow(p). NaN marks a landmark that either scan lacks.
    """
    missing = tf.reduce_any(tf.math.is_nan(fixed_points), axis=-1, keepdims=True)
    points = tf.where(missing, 0.0, fixed_points)
    carried = fixed_points + sample_at_points(flow, points)
    return tf.norm(carried - moving_points, axis=-1)


@compiled
def jacobian_std(flow):
    """Standard deviation of det(I + forward differences of the flow) over the volume: float32 [B].

    The determinant is taken where all three differences exist: (X - 1)(Y - 1)(Z - 1) voxels.
    """
    here = flow[:, :-1, :-1, :-1]
    a = flow[:, 1:, :-1, :-1] - here
    b = flow[:, :-1, 1:, :-1] - here
    c = flow[:, :-1, :-1, 1:] - here
    ax, ay, az = 1.0 + a[..., 0], a[..., 1], a[..., 2]
    bx, by, bz = b[..., 0], 1.0 + b[..., 1], b[..., 2]
    cx, cy, cz = c[..., 0], c[..., 1], 1.0 + c[..., 2]
    determinant = ax * (by * cz - bz * cy) - ay * (bx * cz - bz * cx) + az * (bx * cy - by * cx)
    mean = tf.reduce_mean(tf.reduce_mean(determinant, [1, 2], keepdims=True), 3, keepdims=True)
    return tf.sqrt(tf.reduce_mean(tf.reduce_mean(tf.square(determinant - mean), [1, 2]), 1))


def flow_error(flow, true_flow, mask=None):
    """Mean length of flow - true_flow in voxels, over `mask` (bool [B, X, Y, Z, 1]) or everywhere: float32 [B].

    NaN where the true flow is unknown (NaN) or the mask is empty.
    """
    error = tf.norm(flow - true_flow, axis=-1, keepdims=True)
    if mask is None:
        return tf.reduce_mean(error, [1, 2, 3, 4])
    total = tf.reduce_sum(tf.where(mask, error, 0.0), [1, 2, 3, 4])
    return total / tf.reduce_sum(tf.cast(mask, tf.float32), [1, 2, 3, 4])
