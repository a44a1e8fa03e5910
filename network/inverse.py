"""The inverse of a flow."""

from collections.abc import Callable

import tensorflow as tf

from .kernels import volume_sum, xla_kernel
from .spatial_transformer import interpolate, warp

STEPS = 10  # of the whole volume, at most
FEW = 0.01  # share of the voxels that is left to be improved one by one
LEFT_STEPS = 50  # of those, at most
TOLERANCE = 0.01  # voxels
# A voxel whose error does not fall takes smaller steps: a flow steeper than one voxel per voxel needs them.
SLOWER, SLOWEST = 0.5, 1 / 16


def inverse(flow: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The flow that leads back: compose(inverse, flow) and compose(flow, inverse) are none.

    Found by iteration of inverse(p) = -flow(p + inverse(p)) (Chen et al., Medical Physics 35, 2008). What a voxel is
    off is led back by the slope of the inverse so far, as Newton's method does, which halves the number of steps.

    Args:
        flow: float32 [B, X, Y, Z, 3], in voxels.

    Returns:
        The inverse float32 [B, X, Y, Z, 3], and how far each voxel is from where it started after the inverse and the
        flow, float32 [B, X, Y, Z]: near zero but where the flow folds or leads in from outside.
    """
    found, size = _of_all(flow)
    return tf.map_fn(_of_what_is_left, (flow, found, size), fn_output_signature=(found.dtype, size.dtype))


@xla_kernel
def _of_all(flow: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The inverse of all voxels but `FEW`, as `inverse` gives it."""

    def correction(found: tf.Tensor, error: tf.Tensor, share: tf.Tensor) -> tf.Tensor:
        slope = sum(error[..., axis, None] * _difference(found, axis + 1) for axis in range(3))
        return error + tf.where(share[..., None] == 1, slope, 0.0)  # where steps are small the slope misleads

    some = FEW * tf.cast(tf.size(flow[..., 0]), tf.float32)

    def is_much(size: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(volume_sum(tf.cast(size > TOLERANCE, tf.float32)[..., None])) > some

    return _iterate(lambda tried: tried + warp(flow, tried, fast=False), -flow, correction, is_much, STEPS)


@tf.function(autograph=False, reduce_retracing=True)
def _of_what_is_left(parts: tuple[tf.Tensor, tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    """The inverse of one pair [X, Y, Z, 3] with its errors [X, Y, Z], improved where it is off."""
    flow, found, size = parts
    places = tf.where(size > TOLERANCE)
    start = tf.cast(places, flow.dtype)

    def off(tried: tf.Tensor) -> tf.Tensor:
        return tried + interpolate(flow[None], tf.unstack((start + tried)[None], axis=-1))[0]

    better, left = _iterate(
        off,
        tf.gather_nd(found, places),
        lambda _, error, __: error,
        lambda left: tf.reduce_any(left > TOLERANCE),
        LEFT_STEPS,
    )
    return tf.tensor_scatter_nd_update(found, places, better), tf.tensor_scatter_nd_update(size, places, left)


def _iterate(
    off: Callable[[tf.Tensor], tf.Tensor],
    start: tf.Tensor,
    correction: Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor],
    is_much: Callable[[tf.Tensor], tf.Tensor],
    steps: int,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Displacements [..., 3] whose error becomes small, and its length [...].

    Args:
        off: the error [..., 3] of displacements.
        start: what to try first.
        correction: what to take off of displacements, by their errors and the share of it that is taken [...].
        is_much: whether to go on, by the lengths of the errors where it makes sense, elsewhere 0.
        steps: how often to try, at most.
    """

    def go_on(step: tf.Tensor, *state: tf.Tensor) -> tf.Tensor:
        size, share = state[-2:]
        return (step < 1) | ((step < steps) & is_much(tf.where(share > SLOWEST, size, 0.0)))

    def improve(
        step: tf.Tensor, tried: tf.Tensor, found: tf.Tensor, error: tf.Tensor, size: tf.Tensor, share: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        new_error = off(tried)
        new_size = tf.norm(new_error, axis=-1)
        better = new_size < size
        found, error = (tf.where(better[..., None], new, old) for new, old in ((tried, found), (new_error, error)))
        share = tf.where(better, tf.minimum(share / SLOWER, 1.0), share * SLOWER)
        tried = found - share[..., None] * correction(found, error, share)
        return step + 1, tried, found, error, tf.where(better, new_size, size), share

    share = tf.ones_like(start[..., 0])
    state = (0, start, start, tf.zeros_like(start), share / 0.0, share)
    _, _, found, _, size, _ = tf.while_loop(go_on, improve, state)
    return found, size


def _difference(volume: tf.Tensor, axis: int) -> tf.Tensor:
    """Central differences along an axis, at the edge half of the one-sided ones."""

    def part(first: int | None, end: int | None) -> tf.Tensor:
        return volume[(slice(None),) * axis + (slice(first, end),)]

    return (tf.concat([part(1, None), part(-1, None)], axis) - tf.concat([part(None, 1), part(None, -1)], axis)) / 2
