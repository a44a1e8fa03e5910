"""Losses of a cascade: pure functions, one value a pair; `cascade_losses` sums them over the batch and names them."""

import tensorflow as tf

from .kernels import compiled, ordered_sum
from .splines import cubic_weights

# Side of the window of the local correlation, in voxels, and what is added to its variances: about one grey level of
# 255, squared, so that noise in a flat region does not count as structure.
_WINDOW = 9
_VARIANCE_EPSILON = 1e-5
# Bins of the joint histogram over the intensities 0..1; the outermost two take in only their neighbours' part.
_BINS = 32
# A constant image has no entropy, and rounding is not to be divided by it.
_LEAST_ENTROPY = 1e-2
_ORTHOGONALITY_EPSILON = 1e-5


def _sum(volume):
    """Sum over all axes but the batch. In two steps: XLA sums a whole volume in one slow thread, and less exactly."""
    return tf.reduce_sum(tf.reduce_sum(volume, [1, 2]), [1, 2])


@compiled
def correlation(fixed, warped):
    """Pearson correlation of two images [B, X, Y, Z, C] a pair: float32 [B], variances + 1e-6."""
    count = tf.cast(tf.reduce_prod(tf.shape(fixed)[1:]), tf.float32)
    fixed = fixed - (_sum(fixed) / count)[:, None, None, None, None]
    warped = warped - (_sum(warped) / count)[:, None, None, None, None]
    variances = _sum(tf.square(fixed)) / count, _sum(tf.square(warped)) / count
    return _sum(fixed * warped) / count / tf.sqrt((variances[0] + 1e-6) * (variances[1] + 1e-6))


def correlation_loss(fixed, warped):
    """1 - correlation (paper, section 3.4): float32 [B], 0 (warped = a fixed + b, a > 0) .. 2 (a < 0)."""
    return 1.0 - correlation(fixed, warped)


def local_correlation_loss(fixed, warped):
    """1 - mean of the squared correlation in the 9^3 window around every voxel: float32 [B], 0..1.

    Each window has its own linear relation between the two images, of either sign; a window without structure counts
    as uncorrelated. At the edge of the volume a window is what lies inside. Squared as in VoxelMorph (Balakrishnan et
    al., 2019), after the cross-correlation of Avants et al. (2008).
    """
    return 1.0 - _local_correlation(fixed, warped)


@compiled
def _local_correlation(fixed, warped):
    # Sums of small numbers keep more digits: a variance is what is left of two large means.
    count = tf.cast(tf.reduce_prod(tf.shape(fixed)[1:]), tf.float32)
    fixed = fixed - (_sum(fixed) / count)[:, None, None, None, None]
    warped = warped - (_sum(warped) / count)[:, None, None, None, None]
    fixed_mean, warped_mean = _window_mean(fixed), _window_mean(warped)
    covariance = _window_mean(fixed * warped) - fixed_mean * warped_mean
    fixed_variance = _window_mean(tf.square(fixed)) - tf.square(fixed_mean) + _VARIANCE_EPSILON
    warped_variance = _window_mean(tf.square(warped)) - tf.square(warped_mean) + _VARIANCE_EPSILON
    return _sum(tf.square(covariance) / (fixed_variance * warped_variance)) / count


def _window_mean(volume):
    """Mean of the window around every voxel, as far as it lies inside: running sums along one axis after the other."""
    half = _WINDOW // 2
    for axis in (1, 2, 3):
        n = tf.shape(volume)[axis]
        padding = [[half + 1, half] if a == axis else [0, 0] for a in range(5)]
        sums = tf.cumsum(tf.pad(volume, padding), axis)
        before = (slice(None),) * axis
        place = tf.range(n)
        inside = tf.minimum(place + half + 1, n) - tf.maximum(place - half, 0)
        inside = tf.reshape(tf.cast(inside, tf.float32), [-1 if a == axis else 1 for a in range(5)])
        volume = (sums[(*before, slice(_WINDOW, None))] - sums[(*before, slice(None, -_WINDOW))]) / inside
    return volume


def mutual_information_loss(fixed, warped):
    """1 - mutual information over the entropy of the fixed image: float32 [B], 0..1.

    The share of the fixed image's information that the warped one leaves open: 1 where neither tells of the other (or
    the fixed image is constant), near 0 where each grey value of one means one of the other, whichever that is. The
    joint histogram has Parzen windows: a fixed voxel counts in the nearest bin, a warped one in four by a cubic
    B-spline (Mattes et al., 2003). So the gradient is that of the warped image alone. Intensities are 0..1.
    """
    return _open_information(_joint_histogram(fixed, warped))


@compiled
def _open_information(joint):
    joint /= tf.reduce_sum(joint, [1, 2], keepdims=True)
    fixed_entropy, warped_entropy = _entropy(tf.reduce_sum(joint, 2)), _entropy(tf.reduce_sum(joint, 1))
    information = fixed_entropy + warped_entropy - _entropy(tf.reshape(joint, [-1, _BINS * _BINS]))
    return 1.0 - information / tf.maximum(fixed_entropy, _LEAST_ENTROPY)


def _entropy(share):
    return -tf.reduce_sum(share * tf.math.log(tf.maximum(share, 1e-12)), axis=-1)


@compiled
def _joint_histogram(fixed, warped):
    """Joint histogram of two images a pair, [B, bins of fixed, bins of warped]."""
    pairs, rows = tf.shape(fixed)[0], tf.reduce_prod(tf.shape(fixed)[:2])
    fixed, warped = tf.reshape(fixed, [rows, -1]), tf.reshape(warped, [rows, -1])
    fixed_bin = tf.cast(tf.round(_bin_position(fixed)), tf.int32)
    position = _bin_position(warped)
    lower = tf.minimum(tf.floor(position), _BINS - 3)
    t = tf.where(tf.math.is_nan(warped), warped, position - lower)
    # Each slice across x has a histogram of its own: added to a sum of millions, a voxel's part would lose its digits.
    first = (tf.range(rows)[:, None] * _BINS + fixed_bin) * _BINS + tf.cast(lower, tf.int32) - 1
    histograms = tf.zeros([rows * _BINS * _BINS])
    for k, weight in enumerate(cubic_weights(t)):
        histograms = tf.tensor_scatter_nd_add(histograms, tf.reshape(first + k, [-1, 1]), tf.reshape(weight, [-1]))
    return tf.reduce_sum(tf.reshape(histograms, [pairs, -1, _BINS, _BINS]), 1)


def _bin_position(image):
    """Place of intensities on the bins, from 1 (intensity 0) to the last but one (intensity 1); 1 for NaN."""
    return 1.0 + tf.clip_by_value(tf.where(tf.math.is_nan(image), 0.0, image), 0.0, 1.0) * (_BINS - 3)


# name of --net_args' `similarity` -> function (fixed, warped), both [B, X, Y, Z, 1], giving a loss float32 [B].
SIMILARITIES = {"ncc": correlation_loss, "lncc": local_correlation_loss, "mi": mutual_information_loss}


@compiled
def smoothness_loss(flow):
    """Half the sum of squared forward differences of a flow over 3 X Y Z (total variation, squared): float32 [B]."""
    differences = (
        flow[:, 1:] - flow[:, :-1],
        flow[:, :, 1:] - flow[:, :, :-1],
        flow[:, :, :, 1:] - flow[:, :, :, :-1],
    )
    total = sum(_sum(tf.square(d)) for d in differences)
    return 0.5 * total / tf.cast(tf.reduce_prod(tf.shape(flow)[1:]), tf.float32)


def determinant_loss(matrix):
    """Half the squared distance of det(W + I) from 1, for W [B, 3, 3]: float32 [B]."""
    return 0.5 * tf.square(_determinant(matrix + tf.eye(3)) - 1.0)


def orthogonality_loss(matrix):
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
def _affine_losses(matrix):
    """Both for W [B, 3, 3], summed over the batch: float32 [2]."""
    return tf.stack([tf.reduce_sum(determinant_loss(matrix)), tf.reduce_sum(orthogonality_loss(matrix))])


def _determinant(m):
    return tf.reduce_sum(m[:, 0] * tf.linalg.cross(m[:, 1], m[:, 2]), axis=-1)


def cascade_losses(fixed, output, config):
    """Every term of the training loss, summed over the pairs of the batch.

    Args:
        fixed: float32 [B, X, Y, Z, 1].
        output: `CascadeOutput` for that batch.
        config: `CascadeConfig`.

    Returns:
        Dict of scalars, by the original's names: `loss`, the whole; `k_loss`, the part of stage k (0 is the affine
        cascade); and its terms `k_raw_loss` (of `SIMILARITIES`), `k_reg_loss` (smoothness times reg_factor),
        `0_det_loss` and `0_ortho_loss` (before their factors).
    """
    terms, similarity = {}, SIMILARITIES[config.similarity]
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
