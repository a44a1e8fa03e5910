"""Losses of a cascade: pure functions, one value per pair; `cascade_losses` sums them over the batch and names them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import tensorflow as tf

from .kernels import TensorFunction, compiled, ordered_sum, volume_sum
from .registry import SIMILARITIES
from .splines import cubic_weights

if TYPE_CHECKING:
    from .config import CascadeConfig
    from .recursive_cascaded_networks import CascadeOutput

# Bins of the joint histogram over the intensities 0..1; the outermost two only take the tails of the B-splines.
_BINS = 32
# Least divisor: the entropy of a constant image is 0, and rounding errors would be divided by it.
_LEAST_ENTROPY = 1e-2
_ORTHOGONALITY_EPSILON = 1e-5


def correlation(fixed: tf.Tensor, warped: tf.Tensor, mask: tf.Tensor | None = None) -> tf.Tensor:
    """Pearson correlation of two images [B, X, Y, Z, C], for each pair: float32 [B]. 1e-6 is added to the variances.

    With a mask, weights [B, X, Y, Z, 1] from 0, every voxel counts by its weight, and one of weight 0 not at all.
    """
    return _correlation(fixed, warped) if mask is None else _masked_correlation(fixed, warped, mask)


@compiled
def _correlation(fixed: tf.Tensor, warped: tf.Tensor) -> tf.Tensor:
    count = tf.cast(tf.reduce_prod(tf.shape(fixed)[1:]), tf.float32)
    fixed = fixed - (volume_sum(fixed) / count)[:, None, None, None, None]
    warped = warped - (volume_sum(warped) / count)[:, None, None, None, None]
    variances = volume_sum(tf.square(fixed)) / count, volume_sum(tf.square(warped)) / count
    return volume_sum(fixed * warped) / count / tf.sqrt((variances[0] + 1e-6) * (variances[1] + 1e-6))


@compiled
def _masked_correlation(fixed: tf.Tensor, warped: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    share = mask / volume_sum(mask)[:, None, None, None, None]
    fixed, warped = (tf.where(mask > 0, image, 0.0) for image in (fixed, warped))
    fixed = fixed - volume_sum(share * fixed)[:, None, None, None, None]
    warped = warped - volume_sum(share * warped)[:, None, None, None, None]
    variances = volume_sum(share * tf.square(fixed)), volume_sum(share * tf.square(warped))
    return volume_sum(share * fixed * warped) / tf.sqrt((variances[0] + 1e-6) * (variances[1] + 1e-6))


def correlation_loss(fixed: tf.Tensor, warped: tf.Tensor, mask: tf.Tensor | None = None) -> tf.Tensor:
    """1 - correlation (paper, section 3.4): float32 [B], 0 (warped = a fixed + b, a > 0) .. 2 (a < 0)."""
    return 1.0 - correlation(fixed, warped, mask)


def mutual_information_loss(fixed: tf.Tensor, warped: tf.Tensor, mask: tf.Tensor | None = None) -> tf.Tensor:
    """1 - mutual information over the entropy of the fixed image: float32 [B], 0..1.

    It is 1 where the images are statistically independent (or the fixed image is constant), and near 0 where the grey
    value of the one determines that of the other. The joint histogram has Parzen windows: a fixed voxel counts in the
    nearest bin, a warped voxel in four bins, weighted by a cubic B-spline (Mattes et al., 2003). So only the warped
    image has a gradient. Intensities are 0..1. With a mask, weights [B, X, Y, Z, 1] from 0, a voxel counts by its
    weight.
    """
    joint = _joint_histogram(fixed, warped) if mask is None else _masked_histogram(fixed, warped, mask)
    return _information_loss(joint)


@compiled
def _information_loss(joint: tf.Tensor) -> tf.Tensor:
    joint /= tf.reduce_sum(joint, [1, 2], keepdims=True)
    fixed_entropy, warped_entropy = _entropy(tf.reduce_sum(joint, 2)), _entropy(tf.reduce_sum(joint, 1))
    information = fixed_entropy + warped_entropy - _entropy(tf.reshape(joint, [-1, _BINS * _BINS]))
    return 1.0 - information / tf.maximum(fixed_entropy, _LEAST_ENTROPY)


def _entropy(share: tf.Tensor) -> tf.Tensor:
    return -tf.reduce_sum(share * tf.math.log(tf.maximum(share, 1e-12)), axis=-1)


@compiled
def _joint_histogram(fixed: tf.Tensor, warped: tf.Tensor) -> tf.Tensor:
    return _histogram(fixed, warped, None)


@compiled
def _masked_histogram(fixed: tf.Tensor, warped: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    return _histogram(tf.where(mask > 0, fixed, 0.0), tf.where(mask > 0, warped, 0.0), mask)


def _histogram(fixed: tf.Tensor, warped: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """Joint histogram of two images, for each pair: [B, bins of fixed, bins of warped]."""
    pairs, rows = tf.shape(fixed)[0], tf.reduce_prod(tf.shape(fixed)[:2])
    fixed, warped = tf.reshape(fixed, [rows, -1]), tf.reshape(warped, [rows, -1])
    fixed_bin = tf.cast(tf.round(_bin_position(fixed)), tf.int32)
    position = _bin_position(warped)
    lower = tf.minimum(tf.floor(position), _BINS - 3)
    t = tf.where(tf.math.is_nan(warped), warped, position - lower)
    # Each slice across x has its own histogram: a voxel's part, added to a sum of millions, would be rounded off.
    first = (tf.range(rows)[:, None] * _BINS + fixed_bin) * _BINS + tf.cast(lower, tf.int32) - 1
    histograms = tf.zeros([rows * _BINS * _BINS])
    for k, weight in enumerate(cubic_weights(t)):
        weight = weight if mask is None else weight * tf.reshape(mask, [rows, -1])
        histograms = tf.tensor_scatter_nd_add(histograms, tf.reshape(first + k, [-1, 1]), tf.reshape(weight, [-1]))
    return tf.reduce_sum(tf.reshape(histograms, [pairs, -1, _BINS, _BINS]), 1)


def _bin_position(image: tf.Tensor) -> tf.Tensor:
    """Place of intensities on the bins, from 1 (intensity 0) to the last but one (intensity 1); 1 for NaN."""
    return 1.0 + tf.clip_by_value(tf.where(tf.math.is_nan(image), 0.0, image), 0.0, 1.0) * (_BINS - 3)


def similarity_loss(config: CascadeConfig) -> TensorFunction:
    """The similarity that a config chooses, with its options: (fixed, warped), both [B, X, Y, Z, 1], -> float32 [B].

    The built-in ones also take `mask`, weights [B, X, Y, Z, 1].
    """
    return functools.partial(SIMILARITIES.find(config.similarity).load(), **config.similarity_options)


@compiled
def smoothness_loss(flow: tf.Tensor) -> tf.Tensor:
    """Half the sum of squared forward differences of a flow over 3 X Y Z (total variation, squared): float32 [B]."""
    differences = (
        flow[:, 1:] - flow[:, :-1],
        flow[:, :, 1:] - flow[:, :, :-1],
        flow[:, :, :, 1:] - flow[:, :, :, :-1],
    )
    total = sum(volume_sum(tf.square(d)) for d in differences)
    return 0.5 * total / tf.cast(tf.reduce_prod(tf.shape(flow)[1:]), tf.float32)


def determinant_loss(matrix: tf.Tensor) -> tf.Tensor:
    """Half the squared distance of det(W + I) from 1, for W [B, 3, 3]: float32 [B]."""
    return 0.5 * tf.square(_determinant(matrix + tf.eye(3)) - 1.0)


def orthogonality_loss(matrix: tf.Tensor) -> tf.Tensor:
    """Distance of A = W + I, W [B, 3, 3], from a rotation: float32 [B].

    With k the eigenvalues of A'A + eps: sum k + (1 + eps)^2 sum 1/k - 6 (1 + eps). The sums come from the
    characteristic polynomial, sum 1/k = s2 / s3, without solving for k.
    """
    eps = _ORTHOGONALITY_EPSILON
    a = matrix + tf.eye(3)
    c = tf.matmul(a, a, transpose_a=True) + eps * tf.eye(3)
    s1 = tf.linalg.trace(c)
    s2 = (tf.square(s1) - tf.linalg.trace(tf.matmul(c, c))) / 2.0
    s3 = _determinant(c)
    return s1 + (1.0 + eps) ** 2 * s2 / s3 - 6.0 * (1.0 + eps)


@compiled
def _affine_losses(matrix: tf.Tensor) -> tf.Tensor:
    """Both for W [B, 3, 3], summed over the batch: float32 [2]."""
    return tf.stack([tf.reduce_sum(determinant_loss(matrix)), tf.reduce_sum(orthogonality_loss(matrix))])


def _determinant(m: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(m[:, 0] * tf.linalg.cross(m[:, 1], m[:, 2]), axis=-1)


def cascade_losses(fixed: tf.Tensor, output: CascadeOutput, config: CascadeConfig) -> dict[str, tf.Tensor]:
    """Every term of the training loss, summed over the pairs of the batch.

    Args:
        fixed: float32 [B, X, Y, Z, 1].
        output: `CascadeOutput` for that batch.
        config: `CascadeConfig`.

    Returns:
        Dict of scalars, by the original's names: `loss`, the whole; `k_loss`, the part of stage k (0 is the affine
        cascade); and its terms `k_raw_loss` (the similarity), `k_reg_loss` (smoothness times reg_factor),
        `0_det_loss` and `0_ortho_loss` (before their factors).
    """
    terms, similarity = {}, similarity_loss(config)
    det, ortho = tf.unstack(_affine_losses(output.affine.matrix))
    terms.update({"0_det_loss": det, "0_ortho_loss": ortho})
    totals = {0: config.det_factor * det + config.ortho_factor * ortho}
    for k, stage in enumerate(output.stages[1:], start=1):
        totals[k] = terms[f"{k}_reg_loss"] = config.reg_factor * tf.reduce_sum(smoothness_loss(stage.flow))
    for k in config.similarity_stages:
        terms[f"{k}_raw_loss"] = tf.reduce_sum(similarity(fixed, output.stages[k].warped))
        totals[k] += terms[f"{k}_raw_loss"]
    terms.update({f"{k}_loss": total for k, total in totals.items()})
    return {"loss": ordered_sum(list(totals.values())), **terms}
