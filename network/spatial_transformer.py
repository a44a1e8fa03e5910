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

import itertools
import typing
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from .kernels import own_gradient, shape_of, three_in_one_loop, xla_kernel


def identity_grid(size: Any) -> tf.Tensor:
    """Voxel coordinates of a grid: float32 [X, Y, Z, 3] for `size` (X, Y, Z)."""
    axes = [tf.range(n, dtype=tf.float32) for n in size]
    return tf.stack(tf.meshgrid(*axes, indexing="ij"), axis=-1)


def warp(image: tf.Tensor, flow: tf.Tensor, padding: bool = False, fast: bool = True) -> tf.Tensor:
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
        image, flow = pad(image), flow + 1.0
    return _fast_warp(image, flow) if fast else _plain_warp(image, flow)


def compose(first: tf.Tensor, second: tf.Tensor, padding: bool = False, fast: bool = True) -> tf.Tensor:
    """Flow of `second` followed into `first`: second(p) + first(p + second(p)), float32 [B, X, Y, Z, 3]."""
    if not fast:
        return second + warp(first, second, padding, fast)
    if padding:
        return _fast_compose(pad(first), second + 1.0) - 1.0
    return _fast_compose(first, second)


def sample_at_points(image: tf.Tensor, points: tf.Tensor) -> tf.Tensor:
    """Values of an image (or flow) [B, X, Y, Z, C] at a few points [B, L, 3] in voxels, zero outside: [B, L, C].

    The corners are weighted and summed: `interpolate` has operations of its own for each, which outside of a kernel
    take longer than a few points.
    """
    shape = shape_of(image)
    size = shape[1:4]
    lower, fraction = _place_in_cell(points, [_clamped(n - 2, 0, tf.int32.max) for n in size])
    corners, fraction = tf.constant(CORNERS), fraction[..., None, :]
    weights = tf.reduce_prod(tf.where(corners > 0, fraction, 1.0 - fraction), -1, keepdims=True)
    places = lower[..., None, :] + corners * [_clamped(n - 1, 0, 1) for n in size]
    indices = tf.reduce_sum(places * [size[1] * size[2], size[2], 1], -1)
    flat = tf.reshape(image, [shape[0], -1, shape[4]])
    values = tf.reduce_sum(weights * tf.gather(flat, indices, axis=1, batch_dims=1), -2)
    # As with a voxel of zeros around the image, but without a copy of it: outside, a value fades over one voxel.
    outside = tf.maximum(tf.maximum(-points, points - tf.cast([n - 1 for n in size], tf.float32)), 0.0)
    share = tf.reduce_prod(tf.maximum(1.0 - outside, 0.0), -1, keepdims=True)
    return tf.where(share <= 0.0, 0.0, share * values)


def pad(image: tf.Tensor) -> tf.Tensor:
    """The image with one voxel of zeros around it."""
    return tf.pad(image, [[0, 0], [1, 1], [1, 1], [1, 1], [0, 0]])


class Cells(typing.NamedTuple):
    """The cell of eight voxels around each of some coordinates; a corner is (i, j, k), 1 for the upper voxel.

    lowest     int32 [B, ...], index of corner (0, 0, 0) in the flattened image; inside it even for NaN.
    steps      how much the index grows to the upper voxel along each axis; 0 where the axis has a single voxel.
    fractions  how far along each axis the coordinate lies in the cell, [B, ...] each, 0..1; NaN for NaN.
    """

    lowest: tf.Tensor
    steps: tuple
    fractions: tuple

    def index_of(self, corner: Sequence[int]) -> tf.Tensor:
        """Indices of a corner in the flattened image."""
        return self.lowest + sum(step for step, upper in zip(self.steps, corner, strict=True) if upper)

    def weight(self, corner: Sequence[int]) -> tf.Tensor:
        """Trilinear weight of a corner, [B, ...]."""
        x, y, z = (t if upper else 1.0 - t for t, upper in zip(self.fractions, corner, strict=True))
        return x * y * z


CORNERS = tuple(itertools.product((0, 1), repeat=3))


def _clamped(n: Any, least: int, most: int) -> Any:
    """A length of `shape_of`, within limits."""
    return min(max(n, least), most) if isinstance(n, int) else tf.clip_by_value(n, least, most)


def cells_around(coordinates: Sequence[tf.Tensor], shape: Sequence[Any]) -> Cells:
    """`Cells` of an image with `shape_of` [B, X, Y, Z, ..] around coordinates: three tensors [B, ...], for x, y, z."""
    strides = shape[2] * shape[3], shape[3], 1
    steps = tuple(_clamped(n - 1, 0, 1) * stride for n, stride in zip(shape[1:4], strides, strict=True))
    image = tf.range(shape[0]) * (shape[1] * strides[0])
    lowest = tf.reshape(image, [-1] + [1] * (len(coordinates[0].shape) - 1))
    fractions = []
    for axis, (coordinate, stride) in enumerate(zip(coordinates, strides, strict=True)):
        lower, fraction = _place_in_cell(coordinate, _clamped(shape[axis + 1] - 2, 0, tf.int32.max))
        fractions.append(fraction)
        lowest += lower * stride
    return Cells(lowest, steps, tuple(fractions))


def _place_in_cell(coordinate: tf.Tensor, last_cell: Any) -> tuple[tf.Tensor, tf.Tensor]:
    """The lower voxel of the cell of coordinates, int32 of 0 .. `last_cell`, and how far along in it they lie."""
    last_cell = tf.cast(last_cell, tf.float32)
    lower = tf.cast(tf.where(coordinate > 0.0, tf.minimum(coordinate, last_cell), 0.0), tf.int32)
    fraction = coordinate - tf.cast(lower, tf.float32)
    # Not clip_by_value: so a NaN stays, and the gradient ends at the edge.
    return lower, tf.where(fraction >= 1.0, 1.0, tf.where(fraction < 0.0, 0.0, fraction))


def _lerp(low: tf.Tensor, high: tf.Tensor, fraction: tf.Tensor) -> tf.Tensor:
    return low + (high - low) * fraction


def interpolate(image: tf.Tensor, coordinates: Sequence[tf.Tensor]) -> tf.Tensor:
    """Trilinear values of image [B, X, Y, Z, C] at coordinates, three tensors [B, ...] in voxels: [B, ..., C]."""
    cells = cells_around(coordinates, shape_of(image))
    flat = tf.reshape(image, [-1, image.shape[-1]])
    value = {corner: tf.gather(flat, cells.index_of(corner)) for corner in CORNERS}
    tx, ty, tz = (t[..., None] for t in cells.fractions)
    edge = {(i, j): _lerp(value[i, j, 0], value[i, j, 1], tz) for i, j in itertools.product((0, 1), repeat=2)}
    return _lerp(_lerp(edge[0, 0], edge[0, 1], ty), _lerp(edge[1, 0], edge[1, 1], ty), tx)


def looked_at(flow: tf.Tensor) -> list[tf.Tensor]:
    """Coordinates p + flow(p): three tensors [B, X, Y, Z]."""
    return _from_grid(tf.unstack(flow, axis=-1))


def _from_grid(parts: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Coordinates p + parts(p) of three volumes [B, X, Y, Z].

    A vector for each axis is added, where a whole grid would cost a pass over memory.
    """
    axes = (tf.range(n, dtype=tf.float32) for n in shape_of(parts[0])[1:])
    return [
        part + tf.reshape(axis, [-1] + [1] * (2 - k)) for k, (part, axis) in enumerate(zip(parts, axes, strict=True))
    ]


def _plain_warp(image: tf.Tensor, flow: tf.Tensor) -> tf.Tensor:
    return interpolate(image, looked_at(flow))


def _plain_compose(first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
    return second + _plain_warp(first, second)


def _flow_gradient(image: tf.Tensor, flow: tf.Tensor, upstream: tf.Tensor) -> list[tf.Tensor]:
    """Gradient of the warp with respect to the flow along x, y and z, [B, X, Y, Z] each."""
    coordinates, shape, flat = looked_at(flow), shape_of(image), tf.reshape(image, [-1])
    total: Any = (0.0, 0.0, 0.0)
    for k, factor in enumerate(tf.unstack(upstream, axis=-1)):
        slopes = slopes_between(lambda indices, k=k: tf.gather(flat, indices * shape[4] + k), shape, coordinates)  # type: ignore[misc]
        total = [whole + factor * slope for whole, slope in zip(total, slopes, strict=True)]
    return total


def slopes_between(
    value_of: Callable[[tf.Tensor], tf.Tensor], shape: Any, coordinates: Sequence[tf.Tensor]
) -> list[tf.Tensor]:
    """Slopes of an interpolated image along x, y and z at coordinates, [B, X, Y, Z] each; 0 along a clamped one.

    Args:
        value_of: function of indices into the flattened image, of one channel, that gives its values.
        shape: of the image, [B, X', Y', Z', ..].
        coordinates: three tensors [B, X, Y, Z], for x, y and z.
    """
    cells = cells_around(coordinates, shape)
    tx, ty, tz = cells.fractions
    value = {corner: value_of(cells.index_of(corner)) for corner in CORNERS}
    edge = {(i, j): _lerp(value[i, j, 0], value[i, j, 1], tz) for i, j in itertools.product((0, 1), repeat=2)}
    rise = {(i, j): value[i, j, 1] - value[i, j, 0] for i, j in edge}
    along = (
        _lerp(edge[1, 0] - edge[0, 0], edge[1, 1] - edge[0, 1], ty),
        _lerp(edge[0, 1] - edge[0, 0], edge[1, 1] - edge[1, 0], tx),
        _lerp(_lerp(rise[0, 0], rise[0, 1], ty), _lerp(rise[1, 0], rise[1, 1], ty), tx),
    )
    last = [tf.cast(shape[k + 1] - 1, tf.float32) for k in range(3)]
    clamped = [(c < 0.0) | (c >= end) for c, end in zip(coordinates, last, strict=True)]
    return [tf.where(still, 0.0, slope) for still, slope in zip(clamped, along, strict=True)]


@xla_kernel
def warp_by_parts(image: tf.Tensor, flow: tf.Tensor) -> tf.Tensor:
    """`warp` of an image [B, X', Y', Z', 1] by a flow whose three channels are volumes apart: [3, B, X, Y, Z].

    Three plain volumes are read and written faster than one with three channels; refinement keeps its flows so.
    No gradient is kept.
    """
    return interpolate(image, _from_grid(tf.unstack(flow)))


@xla_kernel
def image_gradient(image: tf.Tensor, flow: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
    """Gradient of the warp with respect to the image: upstream scattered back by the trilinear weights.

    One corner of the cells after the other: what a loop has from outside, here the fractions of the cells, XLA computes
    once, where a single expression of all eight would compute it again for each number that it writes. Four channels
    are scattered in half the time of three. The volume is taken a few planes at a time, for the processor's caches.
    """
    channels, shape = image.shape[-1], shape_of(image)
    width = channels if channels < 3 else 4 * -(-channels // 4)
    upstream = tf.pad(upstream, [[0, 0]] * 4 + [[0, width - channels]])
    planes = _clamped(shape_of(flow)[1], 1, _PLANES)
    slabs = [_slabs(a, planes) for a in (*looked_at(flow), upstream)]

    def add_slab(k: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        *coordinates, gradient = (tf.gather(a, k, axis=1) for a in slabs)
        cells = cells_around(coordinates, shape)

        def add_corner(n: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            corner = tf.gather(CORNERS, n)
            where = tf.reshape(cells.lowest + tf.reduce_sum(corner * tf.stack(cells.steps)), [-1, 1])
            x, y, z = (tf.where(corner[k] > 0, t, 1.0 - t) for k, t in enumerate(cells.fractions))
            update = tf.reshape((x * y * z)[..., None] * gradient, [-1, width])
            return n + 1, tf.tensor_scatter_nd_add(total, where, update)

        return k + 1, tf.while_loop(lambda n, _: n < len(CORNERS), add_corner, (0, total))[1]

    total = tf.zeros([tf.reduce_prod(shape[:4]), width])
    _, total = tf.while_loop(lambda k, _: k < tf.shape(slabs[0])[1], add_slab, (0, total))
    return tf.reshape(total[:, :channels], shape)


# The most planes of a slab: what is made of more leaves the processor's caches, and with fewer the loops are longer.
_PLANES = 8


def _slabs(volume: tf.Tensor, planes: Any) -> tf.Tensor:
    """[B, X, ...] in slabs of planes, [B, X / planes, planes, ...], with zeros at the end of the last one."""
    padded = tf.pad(volume, [[0, 0], [0, -shape_of(volume)[1] % planes]] + [[0, 0]] * (volume.shape.rank - 2))
    shape = tf.shape(padded)
    return tf.reshape(padded, tf.concat([[shape[0], shape[1] // planes, planes], shape[2:]], axis=0))


def _recomputing(forward: Callable, flow_gradient: Callable) -> Callable:
    """A function of image and flow, in kernels that keep these two alone for the backward pass."""
    forward, flow_gradient = xla_kernel(forward), three_in_one_loop(flow_gradient)

    @own_gradient
    def call(image: tf.Tensor, flow: tf.Tensor) -> Any:
        # Two separate kernels, so that a gradient which nobody asks for is never computed: the moving image is data.
        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return image_gradient(image, flow, upstream), flow_gradient(image, flow, upstream)

        return forward(image, flow), gradient

    return call


_fast_warp = _recomputing(_plain_warp, _flow_gradient)


def _second_gradient(first: tf.Tensor, second: tf.Tensor, upstream: tf.Tensor) -> list[tf.Tensor]:
    """Gradient of a composition with respect to its second flow along x, y and z, [B, X, Y, Z] each."""
    parts = zip(tf.unstack(upstream, axis=-1), _flow_gradient(first, second, upstream), strict=True)
    return [itself + through for itself, through in parts]


# The second flow is added inside: as an operation of its own it would be one more use, and two more passes over memory.
_fast_compose = _recomputing(_plain_compose, _second_gradient)
