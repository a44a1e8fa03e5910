"""Losses of a cascade: pure functions, one value a pair; `cascade_losses` sums them over the batch and names them."""

import tensorflow as tf

from .kernels import compiled

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


def similarity_loss(fixed, warped):
    """1 - correlation (paper, section 3.4): float32 [B]."""
    return 1.0 - correlation(fixed, warped)


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
        cascade); and its terms `k_raw_loss` (1 - correlation), `k_reg_loss` (smoothness times reg_factor),
        `0_det_loss` and `0_ortho_loss` (before their factors).
    """
    terms = {}
    det = tf.reduce_sum(determinant_loss(output.affine.matrix))
    ortho = tf.reduce_sum(orthogonality_loss(output.affine.matrix))
    terms.update({"0_det_loss": det, "0_ortho_loss": ortho})
    totals = {0: config.det_factor * det + config.ortho_factor * ortho}
    for k, stage in enumerate(output.stages[1:], start=1):
        totals[k] = terms[f"{k}_reg_loss"] = config.reg_factor * tf.reduce_sum(smoothness_loss(stage.flow))
    for k in config.similarity_stages:
        terms[f"{k}_raw_loss"] = tf.reduce_sum(similarity_loss(fixed, output.stages[k].warped))
        totals[k] += terms[f"{k}_raw_loss"]
    terms.update({f"{k}_loss": total for k, total in totals.items()})
    return {"loss": tf.add_n(list(totals.values())), **terms}
