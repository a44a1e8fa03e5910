"""Grids, warping, composition and sampling of flows: the conventions of the whole project are stated here.

Arrays are `[batch, x, y, z, channel]`. A flow lives on the fixed grid and says where to look in the moving image:

    warped(p) = moving(p + flow(p))

Channel k of a flow moves along spatial axis k, and the unit is one voxel. Points are voxel coordinates in their own
image: voxel centres are whole numbers, the first is 0. A point p of the fixed image lies at p + flow(p) in the moving
image. Two flows compose as

    compose(first, second)(p) = second(p) + first(p + second(p))

where `first` is the aggregate of the cascades so far and `second` the new cascade's flow (paper, equation 3). The
moving image is always interpolated once, from the original, by the composed flow.

Boundary: outside the image a warp repeats the edge, in value and in gradient those of a clamped coordinate; with
`padding` there is one voxel of zeros around the image, and its edge is repeated. Interpolation is trilinear, written as
a + (b - a) t on the clamped coordinate, which is exact however far outside a flow points. A NaN in the flow gives NaN.
"""

import functools
import itertools

import keras
import tensorflow as tf

# A mask of 0/255, warped linearly, counts as foreground above this value (the original's threshold).
FOREGROUND = 128
_VOTE = FOREGROUND / 255


def identity_grid(size):
    """Voxel coordinates of a grid: float32 [X, Y, Z, 3] for `size` (X, Y, Z)."""
    axes = [tf.range(n, dtype=tf.float32) for n in size]
    return tf.stack(tf.meshgrid(*axes, indexing="ij"), axis=-1)


def warp(image, flow, padding=False, fast=True):
    """Image read at p + flow(p) for every voxel p of the flow's grid, trilinearly.

    Args:
        image: float32 [B, X', Y', Z', C].
        flow: float32 [B, X, Y, Z, 3], in voxels.
        padding: surround the image by one voxel of zeros instead of repeating its edge.
        fast: compiled kernels that keep only image and flow for the backward pass; otherwise the same formula op by
            op with TensorFlow's own gradient.

    Returns:
        float32 [B, X, Y, Z, C].
    """
    if padding:
        image, flow = _pad(image), flow + 1.0
    return _fast_warp(image, flow) if fast else _plain_warp(image, flow)


def compose(first, second, padding=False, fast=True):
    """Flow of `second` followed into `first`: second(p) + first(p + second(p)), float32 [B, X, Y, Z, 3]."""
    return second + warp(first, second, padding, fast)


def sample_at_points(image, points):
    """Values of an image (or flow) [B, X, Y, Z, C] at points [B, L, 3] in voxels, zero outside: [B, L, C]."""
    return _interpolate(_pad(image), points + 1.0)


def warp_labels(segmentation, flow, padding=False):
    """Label map carried along a flow: the label that a linear vote of the eight corners elects, 0 where none wins.

    The same voxels as warping the 0/255 mask of each label linearly and keeping what exceeds 128: label L wins where
    the trilinear weights of the corners with label L sum to more than 128 / 255, and at most one label can.

    Args:
        segmentation: int32 [B, X, Y, Z, 1].
        flow: float32 [B, X, Y, Z, 3].
        padding: one voxel of label 0 around the image.

    Returns:
        int32 [B, X, Y, Z, 1].
    """
    if padding:
        segmentation, flow = _pad(segmentation), flow + 1.0
    return _vote(segmentation, flow)


def _pad(image):
    return tf.pad(image, [[0, 0], [1, 1], [1, 1], [1, 1], [0, 0]])


def _locate(coordinates, sizes):
    """Split clamped coordinates [B, ..., 3] into per-axis (lower, upper) linear offsets and the fraction between.

    Offsets are int32 and stay inside the volume even for NaN, whose fraction stays NaN.
    """
    strides = (sizes[1] * sizes[2], sizes[2], 1)
    offsets, fractions = [], []
    for axis in range(3):
        coordinate = coordinates[..., axis]
        nan = tf.math.is_nan(coordinate)
        clamped = tf.clip_by_value(coordinate, 0.0, tf.cast(sizes[axis] - 1, tf.float32))
        lower = tf.floor(clamped)
        fractions.append(tf.where(nan, coordinate, clamped - lower)[..., None])
        lower = tf.cast(tf.where(nan, 0.0, lower), tf.int32)
        upper = tf.minimum(lower + 1, sizes[axis] - 1)
        offsets.append((lower * strides[axis], upper * strides[axis]))
    return offsets, fractions


def _corners(image, coordinates):
    """The eight voxels around each coordinate as a dict (i, j, k) -> [B, ..., C], their indices, and the fractions."""
    shape = tf.shape(image)
    batch, sizes, channels = shape[0], shape[1:4], image.shape[-1]
    (x, y, z), fractions = _locate(coordinates, [sizes[0], sizes[1], sizes[2]])
    first = tf.reshape(tf.range(batch) * tf.reduce_prod(sizes), [-1] + [1] * (len(coordinates.shape) - 2))
    flat = tf.reshape(image, [-1, channels])
    index = {(i, j, k): first + x[i] + y[j] + z[k] for i, j, k in itertools.product((0, 1), repeat=3)}
    return {key: tf.gather(flat, value) for key, value in index.items()}, index, fractions


def _lerp(low, high, fraction):
    return low + (high - low) * fraction


def _interpolate(image, coordinates):
    """Trilinear values of image [B, X, Y, Z, C] at coordinates [B, ..., 3] in voxels: [B, ..., C]."""
    corner, _, (tx, ty, tz) = _corners(image, coordinates)
    edges = {ij: _lerp(corner[(*ij, 0)], corner[(*ij, 1)], tz) for ij in itertools.product((0, 1), repeat=2)}
    return _lerp(_lerp(edges[0, 0], edges[0, 1], ty), _lerp(edges[1, 0], edges[1, 1], ty), tx)


def _looked_at(flow):
    """Coordinates p + flow(p)."""
    shape = tf.shape(flow)
    return flow + identity_grid([shape[1], shape[2], shape[3]])


def _plain_warp(image, flow):
    return _interpolate(image, _looked_at(flow))


_kernel = functools.partial(tf.function, jit_compile=True)
_forward = _kernel(_plain_warp)


@_kernel
def _flow_gradient(image, flow, upstream):
    """Gradient of the warp with respect to the flow, [B, X, Y, Z, 3]; zero where the coordinate is clamped."""
    coordinates = _looked_at(flow)
    corner, _, (tx, ty, tz) = _corners(image, coordinates)
    z = {ij: _lerp(corner[(*ij, 0)], corner[(*ij, 1)], tz) for ij in itertools.product((0, 1), repeat=2)}
    x_slope = _lerp(z[1, 0] - z[0, 0], z[1, 1] - z[0, 1], ty)
    y_slope = _lerp(z[0, 1] - z[0, 0], z[1, 1] - z[1, 0], tx)
    dz = {ij: corner[(*ij, 1)] - corner[(*ij, 0)] for ij in itertools.product((0, 1), repeat=2)}
    z_slope = _lerp(_lerp(dz[0, 0], dz[0, 1], ty), _lerp(dz[1, 0], dz[1, 1], ty), tx)
    gradient = tf.stack([tf.reduce_sum(upstream * slope, axis=-1) for slope in (x_slope, y_slope, z_slope)], axis=-1)
    last = tf.cast(tf.shape(image)[1:4] - 1, tf.float32)
    return tf.where((coordinates >= 0) & (coordinates <= last), gradient, 0.0)


@_kernel
def _image_gradient(image, flow, upstream):
    """Gradient of the warp with respect to the image: upstream scattered back by the trilinear weights."""
    channels = image.shape[-1]
    if channels > 1:  # rows of four scatter faster than rows of three
        upstream = tf.pad(upstream, [[0, 0]] * 4 + [[0, -channels % 4]])
    rows = upstream.shape[-1]
    _, index, fractions = _corners(image[..., :1], _looked_at(flow))
    total = tf.zeros([tf.reduce_prod(tf.shape(image)[:4]), rows], upstream.dtype)
    for key, where in index.items():
        weight = functools.reduce(tf.multiply, [t if high else 1.0 - t for high, t in zip(key, fractions, strict=True)])
        update = tf.reshape(weight * upstream, [-1, rows])
        total = tf.tensor_scatter_nd_add(total, tf.reshape(where, [-1, 1]), update)
    return tf.reshape(total[:, :channels], tf.shape(image))


@tf.custom_gradient
def _fast_warp(image, flow):
    # Two separate kernels, so that a gradient which nobody asks for is never computed: the moving image is data.
    def gradient(upstream):
        return _image_gradient(image, flow, upstream), _flow_gradient(image, flow, upstream)

    return _forward(image, flow), gradient


@_kernel
def _vote(segmentation, flow):
    corner, _, fractions = _corners(segmentation, _looked_at(flow))
    weight = {
        key: functools.reduce(tf.multiply, [t if high else 1.0 - t for high, t in zip(key, fractions, strict=True)])
        for key in corner
    }
    elected = tf.zeros_like(corner[0, 0, 0])
    for candidate in corner.values():
        votes = sum(tf.where(corner[key] == candidate, weight[key], 0.0) for key in corner)
        elected = tf.where(votes > _VOTE, candidate, elected)
    return elected


@keras.saving.register_keras_serializable("registration")
class Warp(keras.layers.Layer):
    """Layer over `warp`: [image, flow] -> warped image."""

    def __init__(self, padding=False, fast=True, **kwargs):
        super().__init__(**kwargs)
        self.padding, self.fast = padding, fast

    def call(self, inputs):
        image, flow = inputs
        return warp(image, flow, self.padding, self.fast)

    def compute_output_shape(self, input_shape):
        image, flow = input_shape
        return (*flow[:-1], image[-1])

    def get_config(self):
        return {**super().get_config(), "padding": self.padding, "fast": self.fast}


@keras.saving.register_keras_serializable("registration")
class Compose(Warp):
    """Layer over `compose`: [first, second] -> composed flow."""

    def call(self, inputs):
        first, second = inputs
        return compose(first, second, self.padding, self.fast)
