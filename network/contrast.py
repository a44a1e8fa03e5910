"""Random contrasts: an image as another modality, another scanner or a worse one might show it.

Two functions, as everywhere with chance: one draws from a seed, the other applies what was drawn.
"""

import functools
import math
import typing
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from .kernels import xla_kernel
from .random_draws import fold_in, uniform
from .splines import spline_matrix, tensor_product

# Grey values of the map: at 0, 1/7, .. 1, and linear in between.
KNOTS = 8
# Control points of the bias field along an axis, those beyond the volume among them.
_BIAS_POINTS = 5
_TAILS = 2.5  # standard deviations of a Gaussian that count


class Contrast(typing.NamedTuple):
    """What is done to the grey values of one image of each pair.

    Attributes:
        exponent: float32 [B], of the grey values 0..1, before the map (gamma).
        knots: float32 [B, 8], 0..1: the map's value at 0, 1/7, .. 1. The least is 0, the greatest 1.
        blur: float32 [B], standard deviation of a Gaussian, in voxels.
        bias: float32 [B, 5, 5, 5], control points of a cubic B-spline: the logarithm of a smooth factor.
        noise: float32 [B, X, Y, Z, 1], what is added.
    """

    exponent: tf.Tensor
    knots: tf.Tensor
    blur: tf.Tensor
    bias: tf.Tensor
    noise: tf.Tensor


def draw_contrast(
    seeds: tf.Tensor, size: Sequence[int], gamma: float, blur: float, bias: float, noise: float
) -> Contrast:
    """A random contrast for each pair.

    For every second image, by chance, the map rises throughout: its knots are sorted. Otherwise they are
    independent, and tissues may change their order or become one. Noise is Gaussian, of a deviation that is drawn too.

    Args:
        seeds: int32 [B, 2], one seed per image: the same seed gives the same contrast on every device.
        size: (X, Y, Z) of the image.
        gamma: the exponent lies between 1 / (1 + gamma) and 1 + gamma.
        blur: the greatest standard deviation of the blur, in voxels.
        bias: the greatest logarithm of the smooth factor, either way.
        noise: the greatest standard deviation of the noise, where grey values are 0..1.
    """
    u = uniform(fold_in(seeds, 0), 4 + KNOTS + _BIAS_POINTS**3)
    kind, exponent, spread, deviation = tf.unstack(u[:, :4], axis=1)
    knots, control = u[:, 4 : 4 + KNOTS], u[:, 4 + KNOTS :]
    knots = tf.where(kind[:, None] < 0.5, tf.sort(knots, axis=1), knots)
    least, most = tf.reduce_min(knots, 1, keepdims=True), tf.reduce_max(knots, 1, keepdims=True)
    volume = tf.TensorSpec((*size, 1))
    normal = tf.map_fn(
        lambda seed: tf.random.stateless_normal(volume.shape, seed, alg="philox"),
        fold_in(seeds, 1),
        fn_output_signature=volume,
    )
    return Contrast(
        exponent=tf.exp((2.0 * exponent - 1.0) * math.log1p(gamma)),
        knots=(knots - least) / (most - least),
        blur=spread * blur,
        bias=tf.reshape(2.0 * control - 1.0, [-1, *[_BIAS_POINTS] * 3]) * bias,
        noise=normal * (deviation * noise)[:, None, None, None, None],
    )


def recolour(image: tf.Tensor, contrast: Contrast, blur: float) -> tf.Tensor:
    """The image in another contrast: its map, then blur, then the smooth factor and noise, and 0..1 again.

    Args:
        image: float32 [B, X, Y, Z, 1] in 0..1.
        contrast: as `draw_contrast` gives it.
        blur: the greatest standard deviation that it was drawn with.

    Returns:
        float32 [B, X, Y, Z, 1] in 0..1. No gradient flows back.
    """
    segments = _BIAS_POINTS - 3
    places = (np.linspace(0, segments, n, dtype=np.float64) for n in image.shape[1:4])
    logarithm = tensor_product(contrast.bias[..., None], *(spline_matrix(place, segments) for place in places))
    mapped = _mapped(image, contrast.exponent, contrast.knots)
    reach = math.ceil(_TAILS * blur)
    blurred = _blurring(reach)(mapped, contrast.blur) if reach else mapped
    return _degraded(blurred, logarithm, contrast.noise)


@xla_kernel
def _mapped(image: tf.Tensor, exponent: tf.Tensor, knots: tf.Tensor) -> tf.Tensor:
    """The map of grey values. Sums of hats, where a table look-up for every voxel would be slow."""
    place = tf.pow(tf.clip_by_value(image, 0.0, 1.0), _of_pair(exponent)) * (KNOTS - 1.0)
    hats = (_of_pair(knots[:, k]) * tf.maximum(1.0 - tf.abs(place - k), 0.0) for k in range(KNOTS))
    return sum(hats)


def _of_pair(values: tf.Tensor) -> tf.Tensor:
    return values[:, None, None, None, None]


@functools.cache
def _blurring(reach: int) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """Function of an image and each pair's standard deviation: a Gaussian of `reach` voxels either way.

    The edge is repeated. A kernel for each axis: XLA would work out the sums of one axis again for each of the next.
    """
    axes = [xla_kernel(functools.partial(_blurred, reach, axis)) for axis in (1, 2, 3)]
    return lambda image, deviation: functools.reduce(lambda part, axis: axis(part, deviation), axes, image)


def _blurred(reach: int, axis: int, image: tf.Tensor, deviation: tf.Tensor) -> tf.Tensor:
    place = tf.range(-reach, reach + 1, dtype=tf.float32) / tf.maximum(deviation, 1e-3)[:, None]
    weights = tf.exp(-0.5 * tf.square(place))
    weights /= tf.reduce_sum(weights, 1, keepdims=True)
    first, last = ([slice(None)] * axis + [part] for part in (slice(0, 1), slice(-1, None)))
    padded = tf.concat([image[(*first,)]] * reach + [image] + [image[(*last,)]] * reach, axis)
    n = image.shape[axis]
    return sum(_of_pair(weights[:, k]) * padded[(*[slice(None)] * axis, slice(k, k + n))] for k in range(2 * reach + 1))


@xla_kernel
def _degraded(image: tf.Tensor, logarithm: tf.Tensor, noise: tf.Tensor) -> tf.Tensor:
    return tf.clip_by_value(image * tf.exp(logarithm) + noise, 0.0, 1.0)
