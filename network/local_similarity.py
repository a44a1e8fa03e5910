"""Similarities that look at the neighbourhood of every voxel: local correlation (`lncc`), and MIND-SSC (`mind`)."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from .kernels import compiled, own_gradient, shape_of, volume_sum, xla_kernel

# What is added to the variances of the local correlation: about one grey level of 255, squared, so that noise in a flat
# region does not count as structure.
_VARIANCE_EPSILON = 1e-5
# Least mean distance of patches in MIND: below it (a grey level of 255, squared) a neighbourhood counts as flat.
_LEAST_DISTANCE = 1e-5


def local_correlation_loss(
    fixed: tf.Tensor, warped: tf.Tensor, window: int = 9, mask: tf.Tensor | None = None
) -> tf.Tensor:
    """1 - mean of the squared correlation in the window around every voxel: float32 [B], 0..1.

    Each window has its own linear relation between the two images, of either sign; a window without structure counts
    as uncorrelated. At the edge of the volume a window is what lies inside. Squared as in VoxelMorph (Balakrishnan et
    al., 2019), after the cross-correlation of Avants et al. (2008).

    Args:
        fixed: float32 [B, X, Y, Z, 1] in 0..1.
        warped: the same.
        window: side of the window in voxels, odd.
        mask: weights [B, X, Y, Z, 1] from 0 of the voxels, within a window and of the windows; None for 1 everywhere.
    """
    return _local_correlation(window)(fixed, warped, *([] if mask is None else [mask]))


@functools.cache
def _local_correlation(window: int) -> Callable[..., tf.Tensor]:
    """Function (fixed, warped) or (fixed, warped, mask) -> loss, whose gradient is in closed form.

    The gradient needs the same means of windows as the value, so one kernel gives both and one volume is kept.
    """
    kernel = xla_kernel(functools.partial(_loss_and_gradient, window))

    @own_gradient
    def loss(fixed: tf.Tensor, warped: tf.Tensor, *mask: tf.Tensor) -> Any:
        value, slope = kernel(fixed, warped, *mask)

        def gradient(upstream: tf.Tensor) -> list[tf.Tensor | None]:
            upstream = upstream[:, None, None, None, None]
            # Training never asks for the fixed image's: a kernel of its own, which a graph then leaves out.
            return [upstream * kernel(warped, fixed, *mask)[1], upstream * slope, *[None] * len(mask)]

        return value, gradient

    return loss


def _loss_and_gradient(
    window: int, fixed: tf.Tensor, warped: tf.Tensor, mask: tf.Tensor | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """The loss [B], and its gradient with respect to `warped`.

    With m the means of a window, c the covariance and v the variances, the squared correlation is s = c^2 / (v1 v2).
    Its slope at voxel p is 2 / n [c / (v1 v2) (fixed(p) - m1) - s / v2 (warped(p) - m2)]: linear in the two grey
    values, so the sum over all windows around p takes three sums of windows.
    """
    fixed, warped = fixed[..., 0], warped[..., 0]
    weight = tf.ones_like(fixed) if mask is None else mask[..., 0]
    share = weight / _total(weight)
    per_window = 1.0 / _voxels_inside(fixed, window)
    if mask is not None:
        fixed, warped = (tf.where(weight > 0, image, 0.0) for image in (fixed, warped))
        total = _window_sums(weight[None], window)[0]
        per_window = tf.where(total > 0, 1.0 / tf.maximum(total, 1e-6), 0.0)
    # A variance is the small difference of two means; without the mean of the image they keep more digits.
    fixed, warped = fixed - _total(share * fixed), warped - _total(share * warped)
    parts = tf.stack([fixed, warped, fixed * warped, tf.square(fixed), tf.square(warped)])
    parts = parts if mask is None else weight * parts
    fixed_mean, warped_mean, product, fixed_square, warped_square = tf.unstack(_window_sums(parts, window) * per_window)
    covariance = product - fixed_mean * warped_mean
    fixed_variance = fixed_square - tf.square(fixed_mean) + _VARIANCE_EPSILON
    warped_variance = warped_square - tf.square(warped_mean) + _VARIANCE_EPSILON
    slope = covariance / (fixed_variance * warped_variance)
    squared = covariance * slope
    scale = -2.0 * share * per_window
    of_fixed, of_warped = scale * slope, -scale * squared / warped_variance
    rest = -(of_fixed * fixed_mean + of_warped * warped_mean)
    of_fixed, of_warped, rest = tf.unstack(_window_sums(tf.stack([of_fixed, of_warped, rest]), window))
    gradient = weight * (of_fixed * fixed + of_warped * warped + rest)
    return 1.0 - _total(share * squared)[:, 0, 0, 0], gradient[..., None]


def _total(volume: tf.Tensor) -> tf.Tensor:
    """Sum over [B, X, Y, Z] of each pair: [B, 1, 1, 1]."""
    return volume_sum(volume[..., None])[:, None, None, None]


def _window_sums(volumes: tf.Tensor, window: int) -> tf.Tensor:
    """Sum of the window around every voxel, as far as it lies inside: [N, B, X, Y, Z], one axis after the other.

    Several volumes are summed in one go: XLA takes as long to compile the sums of one.
    """
    half = window // 2
    for axis in (2, 3, 4):
        padded = tf.pad(volumes, [[half, half] if a == axis else [0, 0] for a in range(5)])
        volumes = _running_sum(padded, window, axis)
    return volumes


def _voxels_inside(volume: tf.Tensor, window: int) -> tf.Tensor:
    """Number of voxels of the window around each voxel of [B, X, Y, Z, ...] that lie inside: [1, X, Y, Z]."""
    half, count = window // 2, tf.ones([1] * 4)
    for axis in (1, 2, 3):
        n = shape_of(volume)[axis]
        place = tf.range(n)
        inside = tf.minimum(place + half + 1, n) - tf.maximum(place - half, 0)
        count *= tf.reshape(tf.cast(inside, tf.float32), [-1 if a == axis else 1 for a in range(4)])
    return count


def _running_sum(volume: tf.Tensor, width: int, axis: int) -> tf.Tensor:
    """Sums of `width` voxels (an odd number) along an axis, from each voxel on: the axis becomes shorter by width - 1.

    Sums of 2, 4, 8, ... voxels, each of two of the one before. The difference of two cumulative sums would lose the
    digits that the whole axis takes up.
    """
    n = shape_of(volume)[axis] - width + 1

    def part(sums: tf.Tensor, start: int, length: Any) -> tf.Tensor:
        return sums[(*(slice(None),) * axis, slice(start, start + length))]

    total, done, sums, covered = part(volume, 0, n), 1, volume, 1  # an odd width: one voxel and sums of 2, 4, ...
    while 2 * covered <= width:
        length = shape_of(sums)[axis] - covered
        sums, covered = part(sums, 0, length) + part(sums, covered, length), 2 * covered
        if width & covered:  # a digit of the width, which is a binary number
            total, done = total + part(sums, done, n), done + covered
    return total


def mind_loss(
    fixed: tf.Tensor, warped: tf.Tensor, radius: int = 1, dilation: int = 2, mask: tf.Tensor | None = None
) -> tf.Tensor:
    """Mean squared difference of two images' MIND-SSC: float32 [B], 0..1; for two modalities.

    MIND-SSC (Heinrich et al., MICCAI 2013) describes a voxel by how much the patches around it are like each other,
    whatever their grey values: twelve numbers, `mind_descriptor`.

    Args:
        fixed: float32 [B, X, Y, Z, 1] in 0..1.
        warped: the same.
        radius: a patch has 2 radius + 1 voxels a side.
        dilation: distance of the patches' centres from the voxel, in voxels.
        mask: weights [B, X, Y, Z, 1] from 0 of the voxels' descriptors, which themselves look `radius` + `dilation`
            voxels beyond the mask; None for 1 everywhere.
    """
    distances = [_patch_distances(image, radius, dilation) for image in (fixed, warped)]
    return _descriptors_apart(*distances, tf.ones_like(fixed) if mask is None else mask)


def mind_descriptor(image: tf.Tensor, radius: int = 1, dilation: int = 2) -> tf.Tensor:
    """MIND-SSC of an image [B, X, Y, Z, 1]: float32 [12, B, X, Y, Z], 0..1.

    Of the six neighbours at `dilation` along the axes, twelve pairs lie at a right angle. For each pair D is the mean
    squared difference of the patches around its two neighbours, less the least D of the twelve; the descriptor is
    exp(-D / V), with V their mean before that. The image's edge is repeated; of a patch counts what lies inside.
    """
    return _described(_patch_distances(image, radius, dilation))


def _described(distances: tf.Tensor) -> tf.Tensor:
    least, mean = tf.reduce_min(distances, 0), tf.reduce_mean(distances, 0)
    return tf.exp((least - distances) / (mean + _LEAST_DISTANCE))


@compiled
def _descriptors_apart(fixed: tf.Tensor, warped: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Mean squared difference, for each pair, of the descriptors of two images by their patches' distances."""
    apart = tf.reduce_mean(tf.square(_described(fixed) - _described(warped)), 0)[..., None]
    return volume_sum(mask * apart) / volume_sum(mask)


def _patch_distances(image: tf.Tensor, radius: int, dilation: int) -> tf.Tensor:
    """Mean squared difference of the patches of each of the twelve pairs: [12, B, X, Y, Z].

    In three kernels: XLA would work the squares out again for each sum that they enter.
    """
    squares, mean = _patch_kernels(radius, dilation)
    return mean(squares(image))


@functools.cache
def _patch_kernels(radius: int, dilation: int) -> tuple[Callable[..., tf.Tensor], Callable[..., tf.Tensor]]:
    """Functions image -> squared differences of each pair of neighbours, and those -> their means over the patches."""
    neighbours = [(axis, side) for axis in range(3) for side in (0, 2 * dilation)]
    pairs = [(a, b) for a, b in itertools.combinations(range(6), 2) if neighbours[a][0] != neighbours[b][0]]

    @compiled
    def squares(image: tf.Tensor) -> tf.Tensor:
        size, padded = tf.shape(image)[1:4], image[..., 0]
        for axis in (1, 2, 3):
            padded = _repeat_edge(padded, axis, dilation)
        shifted = []
        for axis, side in neighbours:
            start = [0, *(side if a == axis else dilation for a in range(3))]
            shifted.append(tf.slice(padded, start, tf.concat([[-1], size], 0)))
        return tf.stack([tf.square(shifted[a] - shifted[b]) for a, b in pairs])

    width = 2 * radius + 1
    sums = xla_kernel(functools.partial(_window_sums, window=width))

    @own_gradient
    def mean(volumes: tf.Tensor) -> Any:
        count = _voxels_inside(volumes[0], width)
        return sums(volumes) / count, lambda upstream: sums(upstream / count)

    return squares, mean


def _repeat_edge(volume: tf.Tensor, axis: int, n: int) -> tf.Tensor:
    """The volume with its first and last plane repeated n times along an axis."""
    first = tf.repeat(tf.gather(volume, [0], axis=axis), n, axis)
    last = tf.repeat(tf.gather(volume, [tf.shape(volume)[axis] - 1], axis=axis), n, axis)
    return tf.concat([first, volume, last], axis)
