"""Losses of a cascade: pure functions, one value per pair; `cascade_losses` sums them over the batch and names them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import tensorflow as tf

from errors import UserError

from .kernels import (
    TensorFunction,
    compiled,
    fast_volume_sum,
    fork,
    neighbours,
    ordered_sum,
    own_gradient,
    size_of,
    volume_sum,
    xla_kernel,
)
from .masks import compared_voxels, inside
from .registry import SIMILARITIES, similarity_terms
from .spatial_transformer import compose
from .splines import cubic_weights

if TYPE_CHECKING:
    from .config import CascadeConfig
    from .recursive_cascaded_networks import CascadeOutput

# Least divisor: the entropy of a constant image is 0, and rounding errors would be divided by it.
_LEAST_ENTROPY = 1e-2
_ORTHOGONALITY_EPSILON = 1e-5


def correlation(fixed: tf.Tensor, warped: tf.Tensor, mask: tf.Tensor | None = None) -> tf.Tensor:
    """Pearson correlation of two images [B, X, Y, Z, C], for each pair: float32 [B]. 1e-6 is added to the variances.

    With a mask, weights [B, X, Y, Z, 1] from 0, every voxel counts by its weight, and one of weight 0 not at all.
    """
    return _correlation(fixed, warped) if mask is None else _masked_correlation(fixed, warped, mask)


@own_gradient
def _correlation(fixed: tf.Tensor, warped: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], list[tf.Tensor]]]:
    count = size_of(fixed)
    means = [_of_volumes(fast_volume_sum(image) / count) for image in (fixed, warped)]

    def covariance(i: int, k: int) -> tf.Tensor:
        images = fixed, warped
        return fast_volume_sum(_centred_product(images[i], images[k], means[i], means[k])) / count

    variances = covariance(0, 0) + 1e-6, covariance(1, 1) + 1e-6
    scale = 1.0 / tf.sqrt(variances[0] * variances[1])
    found = covariance(0, 1) * scale

    def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
        # With images f, w less their means, variances u, v, correlation r: dr/dw = (f / sqrt(u v) - r w / v) / count.
        factors = [_of_volumes(upstream / count * factor) for factor in (scale, *(-found / v for v in variances))]
        return [
            _centred_sum(warped, fixed, means[1], means[0], factors[0], factors[1]),
            _centred_sum(fixed, warped, means[0], means[1], factors[0], factors[2]),
        ]

    return found, gradient


def _of_volumes(values: tf.Tensor) -> tf.Tensor:
    return tf.reshape(values, [-1, 1, 1, 1, 1])


@xla_kernel
def _centred_product(a: tf.Tensor, b: tf.Tensor, mean_a: tf.Tensor, mean_b: tf.Tensor) -> tf.Tensor:
    return (a - mean_a) * (b - mean_b)


@xla_kernel
def _centred_sum(
    a: tf.Tensor, b: tf.Tensor, mean_a: tf.Tensor, mean_b: tf.Tensor, of_a: tf.Tensor, of_b: tf.Tensor
) -> tf.Tensor:
    return of_a * (a - mean_a) + of_b * (b - mean_b)


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


def mutual_information_loss(
    fixed: tf.Tensor, warped: tf.Tensor, bins: int = 32, sampling: int = 1, mask: tf.Tensor | None = None
) -> tf.Tensor:
    """1 - mutual information over the entropy of the fixed image: float32 [B], 0..1.

    It is 1 where the images are statistically independent (or the fixed image is constant), and near 0 where the grey
    value of the one determines that of the other. The joint histogram has Parzen windows: a fixed voxel counts in the
    nearest bin, a warped voxel in four bins, weighted by a cubic B-spline (Mattes et al., 2003). So only the warped
    image has a gradient. Intensities are 0..1.

    Args:
        fixed, warped: float32 [B, X, Y, Z, 1].
        bins: of the histogram along each image; the outermost two only take the tails of the B-splines.
        sampling: one voxel of so many counts, always the same ones, which lie without a regular pattern.
        mask: weights [B, X, Y, Z, 1] from 0: a voxel counts by its weight; None for 1 everywhere.
    """
    joint, information = _information_kernels(bins, sampling)
    return information(joint(fixed, warped, *([] if mask is None else [mask])))


@functools.cache
def _information_kernels(bins: int, sampling: int) -> tuple[Callable[..., tf.Tensor], TensorFunction]:
    """Functions (fixed, warped) or (fixed, warped, mask) -> joint histogram -> loss."""

    @compiled
    def joint(fixed: tf.Tensor, warped: tf.Tensor, *mask: tf.Tensor) -> tf.Tensor:
        images = [image if not mask else tf.where(mask[0] > 0, image, 0.0) for image in (fixed, warped)]
        return _histogram(bins, *(_sampled(image, sampling) for image in (*images, *mask)))

    return joint, compiled(functools.partial(_information_loss, bins))


def _information_loss(bins: int, joint: tf.Tensor) -> tf.Tensor:
    joint /= tf.maximum(tf.reduce_sum(joint, [1, 2], keepdims=True), 1e-12)  # no voxel counts: a loss of 1
    fixed_entropy, warped_entropy = _entropy(tf.reduce_sum(joint, 2)), _entropy(tf.reduce_sum(joint, 1))
    information = fixed_entropy + warped_entropy - _entropy(tf.reshape(joint, [-1, bins * bins]))
    return 1.0 - information / tf.maximum(fixed_entropy, _LEAST_ENTROPY)


def _entropy(share: tf.Tensor) -> tf.Tensor:
    return -tf.reduce_sum(share * tf.math.log(tf.maximum(share, 1e-12)), axis=-1)


def _sampled(image: tf.Tensor, sampling: int) -> tf.Tensor:
    """Voxels of an image [B, X, Y, Z, 1], one of every `sampling` of each slice across x: [B, X, voxels]."""
    shape = tf.shape(image)
    image = tf.reshape(image, [shape[0], shape[1], -1])
    if sampling == 1:
        return image
    rows, voxels = shape[1], shape[2] * shape[3]
    count = tf.maximum(voxels // sampling, 1)
    # Multiples of the golden ratio fall evenly, but never in step with the rows and columns of a slice.
    number = tf.cast(tf.range(rows * count), tf.uint32)
    share = tf.cast(tf.bitwise.right_shift(number * tf.constant(2654435769, tf.uint32), 16), tf.int32)
    place = tf.range(count) * sampling + tf.reshape(share, [rows, count]) * sampling // 2**16
    return tf.gather(image, tf.tile(tf.minimum(place, voxels - 1)[None], [shape[0], 1, 1]), axis=2, batch_dims=2)


def _histogram(bins: int, fixed: tf.Tensor, warped: tf.Tensor, mask: tf.Tensor | None = None) -> tf.Tensor:
    """Joint histogram of the voxels [B, X, voxels] of two images, for each pair: [B, bins of fixed, bins of warped]."""
    pairs, rows = tf.shape(fixed)[0], tf.reduce_prod(tf.shape(fixed)[:2])
    fixed, warped = tf.reshape(fixed, [rows, -1]), tf.reshape(warped, [rows, -1])
    fixed_bin = tf.cast(tf.round(_bin_position(fixed, bins)), tf.int32)
    position = _bin_position(warped, bins)
    lower = tf.minimum(tf.floor(position), bins - 3)
    t = tf.where(tf.math.is_nan(warped), warped, position - lower)
    # Each slice across x has its own histogram: a voxel's part, added to a sum of millions, would be rounded off.
    first = (tf.range(rows)[:, None] * bins + fixed_bin) * bins + tf.cast(lower, tf.int32) - 1
    histograms = tf.zeros([rows * bins * bins])
    for k, weight in enumerate(cubic_weights(t)):
        weight = weight if mask is None else weight * tf.reshape(mask, [rows, -1])
        histograms = tf.tensor_scatter_nd_add(histograms, tf.reshape(first + k, [-1, 1]), tf.reshape(weight, [-1]))
    return tf.reduce_sum(tf.reshape(histograms, [pairs, -1, bins, bins]), 1)


def _bin_position(image: tf.Tensor, bins: int) -> tf.Tensor:
    """Place of intensities on the bins, from 1 (intensity 0) to the last but one (intensity 1); 1 for NaN."""
    return 1.0 + tf.clip_by_value(tf.where(tf.math.is_nan(image), 0.0, image), 0.0, 1.0) * (bins - 3)


def similarity_loss(config: CascadeConfig, masked: bool = False) -> TensorFunction:
    """The similarity that a config chooses, with its options: (fixed, warped), both [B, X, Y, Z, 1], -> float32 [B].

    Where it is a sum, each is multiplied by its weight. The built-in ones also take `mask`, weights [B, X, Y, Z, 1].

    Raises:
        UserError: it is to be `masked`, but takes no mask.
    """
    terms = []
    for weight, name in similarity_terms(config.similarity):
        row = SIMILARITIES.find(name)
        if masked and "mask" not in inspect.signature(row.load()).parameters:
            raise UserError(f"similarity {name!r} takes no mask; choose ncc, lncc, mi or mind, or leave the mask out")
        terms.append(
            (weight, functools.partial(row.load(), **{option: config.options[option] for option in row.options}))
        )
    if len(terms) == 1 and terms[0][0] == 1.0:
        return terms[0][1]

    def weighted(fixed: tf.Tensor, warped: tf.Tensor, **mask: tf.Tensor) -> tf.Tensor:
        images = (image for (image,) in fork([warped], len(terms)))
        return ordered_sum(
            [w * function(fixed, image, **mask) for (w, function), image in zip(terms, images, strict=True)]
        )

    return weighted


@own_gradient
def smoothness_loss(flow: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
    """Half the sum of squared forward differences of a flow over 3 X Y Z (total variation, squared): float32 [B]."""
    count = size_of(flow)

    def gradient(upstream: tf.Tensor) -> tf.Tensor:
        return _second_differences(flow, _of_volumes(upstream / count))

    return 0.5 * fast_volume_sum(_squared_differences(flow)) / count, gradient


@xla_kernel
def _squared_differences(flow: tf.Tensor) -> tf.Tensor:
    x, y, z = (tf.square(ahead - flow) for ahead in neighbours(flow, 1))
    return x + y + z


@xla_kernel
def _second_differences(flow: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    pairs = zip(neighbours(flow, 1), neighbours(flow, -1), strict=True)
    x, y, z = (2.0 * flow - ahead - behind for ahead, behind in pairs)
    return factor * (x + y + z)


@compiled
def bending_loss(flow: tf.Tensor) -> tf.Tensor:
    """Bending energy of a flow (Rueckert et al., 1999): float32 [B].

    The squares of its second differences over 3 X Y Z; mixed ones count twice, and each is taken where all its voxels
    lie inside. In voxels; an affine flow has none.
    """

    def along(volume: tf.Tensor, axis: int) -> tf.Tensor:
        before = (slice(None),) * axis
        return volume[(*before, slice(1, None))] - volume[(*before, slice(None, -1))]

    total = 0.0
    for axis in (1, 2, 3):
        slope = along(flow, axis)
        total += volume_sum(tf.square(along(slope, axis)))
        for other in range(axis + 1, 4):
            total += 2.0 * volume_sum(tf.square(along(slope, other)))
    return total / size_of(flow)


def inverse_loss(flow: tf.Tensor, padding: bool = False, fast: bool = True) -> tf.Tensor:
    """Half the mean square, over voxels and axes, of how far points are off after there and back: float32 [2 B].

    A point that goes outside of the volume on its way does not count.

    Args:
        flow: composed flows of B pairs, and then of the same pairs with their sides exchanged, float32 [2 B, X, Y, Z,
            3] in voxels.
        padding, fast: as in `spatial_transformer.compose`.
    """
    (back,), (there,) = fork([flow], 2)
    pairs = tf.shape(flow)[0] // 2
    there = tf.concat([there[pairs:], there[:pairs]], 0)
    return _half_mean_square(compose(back, there, padding, fast), inside(tf.stop_gradient(there)))


@compiled
def _half_mean_square(vectors: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    return 0.5 * volume_sum(weights * tf.square(vectors)) / (3.0 * tf.maximum(volume_sum(weights), 1.0))


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


def cascade_losses(
    fixed: tf.Tensor,
    output: CascadeOutput,
    config: CascadeConfig,
    supervision: Callable[[tf.Tensor], Mapping[str, tuple[float, tf.Tensor]]] | None = None,
    masks: Mapping[str, tf.Tensor] | None = None,
) -> dict[str, tf.Tensor]:
    """Every term of the training loss, summed over the pairs of the batch.

    Args:
        fixed: float32 [B, X, Y, Z, 1].
        output: `CascadeOutput` for that batch.
        config: `CascadeConfig`. With an `inverse_factor` the batch is one of `both_ways`, and terms are means.
        supervision: gives further terms for the composed flow, as `supervision.supervised_losses` does.
        masks: a Batch with what `compared_voxels` looks at, where the scans' masks are asked for.

    Returns:
        Dict of scalars, by the original's names: `loss`, the whole; `k_loss`, the part of stage k (0 is the affine
        cascade); and its terms `k_raw_loss` (the similarity), `k_reg_loss` (smoothness times reg_factor),
        `k_bending_loss` (bending energy times its factor, unless that is 0), `0_det_loss` and `0_ortho_loss` (before
        their factors). With an `inverse_factor`, `k_inverse_loss` of the last stage k, times the factor.
        Of each term of `supervision`, `k_NAME_loss` of the last stage k (before its factor), summed over the pairs that
        have it, and `NAME_pairs`, how many these are.
    """
    terms, similarity = {}, similarity_loss(config, config.similarity_mask is not None)
    det, ortho = tf.unstack(_affine_losses(output.affine.matrix))
    terms.update({"0_det_loss": det, "0_ortho_loss": ortho})
    parts = {0: [config.det_factor * det + config.ortho_factor * ortho]}
    smooth = output.velocities or [stage.flow for stage in output.stages[1:]]
    for k, field in enumerate(smooth, start=1):
        found = _regularisation(field, config)
        terms.update({f"{k}_{name}": value for name, value in found.items()})
        parts[k] = list(found.values())
    for k in config.similarity_stages:
        stage = output.stages[k]
        weights = compared_voxels(masks or {}, stage.composed_flow, config)
        mask = {} if weights is None else {"mask": weights}
        terms[f"{k}_raw_loss"] = tf.reduce_sum(similarity(fixed, stage.warped, **mask))
        parts[k].append(terms[f"{k}_raw_loss"])
    for_inverse = for_supervision = output.flow
    if config.inverse_factor and supervision:
        (for_inverse,), (for_supervision,) = fork([output.flow], 2)
    if config.inverse_factor:
        apart = config.inverse_factor * tf.reduce_sum(inverse_loss(for_inverse, **config.warping))
        terms[f"{config.last_stage}_inverse_loss"] = apart
        parts[config.last_stage].append(apart)
    for name, (factor, values) in (supervision(for_supervision) if supervision else {}).items():
        has_it = ~tf.math.is_nan(values)
        terms[f"{config.last_stage}_{name}_loss"] = tf.reduce_sum(tf.where(has_it, values, 0.0))
        terms[f"{name}_pairs"] = tf.reduce_sum(tf.cast(has_it, tf.float32))
        parts[config.last_stage].append(factor * terms[f"{config.last_stage}_{name}_loss"])
    totals = {k: ordered_sum(values) for k, values in parts.items()}
    terms.update({f"{k}_loss": total for k, total in totals.items()})
    terms = {"loss": ordered_sum(list(totals.values())), **terms}
    return {name: 0.5 * value for name, value in terms.items()} if config.inverse_factor else terms


def both_ways(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """A Batch of twice as many pairs: each pair, and after all of them each with its sides exchanged."""
    both = dict(batch)
    for fixed in (name for name in batch if "fixed" in name):
        moving = fixed.replace("fixed", "moving")
        sides = batch[fixed], batch[moving]
        both |= {fixed: tf.concat(sides, 0), moving: tf.concat(sides[::-1], 0)}
    return both


def _regularisation(flow: tf.Tensor, config: CascadeConfig) -> dict[str, tf.Tensor]:
    """What the flow or velocity of a deformable cascade costs, times the factors: name -> sum over the batch."""
    losses = {"reg_loss": (config.reg_factor, smoothness_loss)}
    if config.bending_factor:
        losses["bending_loss"] = (config.bending_factor, bending_loss)
    flows = [flow] if len(losses) == 1 else [one for (one,) in fork([flow], len(losses))]
    return {
        name: factor * tf.reduce_sum(loss(one))
        for (name, (factor, loss)), one in zip(losses.items(), flows, strict=True)
    }
