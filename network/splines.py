"""Cubic B-splines: of the augmentation, the refinement and the joint histogram."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from .kernels import ordered_sum


def cubic_weights(u: Any) -> tuple:
    """Weights of the four control points around a place: four arrays or tensors like `u`, which sum to 1.

    `u` 0..1 is how far the place lies from the second control point to the third.
    """
    weights = (1 - u) ** 3, 3 * u**3 - 6 * u**2 + 4, -3 * u**3 + 3 * u**2 + 3 * u + 1, u**3
    return tuple(weight / 6 for weight in weights)


def spline_matrix(position: np.ndarray, segments: int) -> np.ndarray:
    """Weights of the control points at n positions on one axis: float32 [n, segments + 3]; each row sums to 1.

    Control points lie at -1, 0, 1, .. segments + 1, and the spline runs from 0 to `segments`, as `position` does.
    """
    segment = np.minimum(np.floor(position).astype(int), segments - 1)
    matrix = np.zeros((len(position), segments + 3), np.float32)
    for k, weight in enumerate(cubic_weights(position - segment)):
        matrix[np.arange(len(position)), segment + k] = weight
    return matrix


def tensor_product(control: tf.Tensor, x: Any, y: Any, z: Any) -> tf.Tensor:
    """Flow float32 [B, X, Y, Z, 3] of control points [B, i, j, k, 3] by matrices [X, i], [Y, j] and [Z, k].

    One small product an axis, so the flow costs little more than writing it.
    """
    flow = tf.einsum("zk,bijkc->bijzc", z, control)
    flow = tf.einsum("yj,bijzc->biyzc", y, flow)
    return tf.einsum("xi,biyzc->bxyzc", x, flow)


def spline_volumes(control: tf.Tensor, x: Any, y: Any, z: Any) -> tf.Tensor:
    """`tensor_product` of volumes apart: float32 [..., X, Y, Z] of control points [..., i, j, k].

    Plain matrix products.
    """
    *several, i, j, k = control.shape
    lines = tf.reshape(tf.matmul(tf.reshape(control, [-1, k]), z, transpose_b=True), [-1, j, z.shape[0]])
    planes = tf.reshape(tf.matmul(y, lines), [-1, i, y.shape[0] * z.shape[0]])
    return tf.reshape(tf.matmul(x, planes), [*several, x.shape[0], y.shape[0], z.shape[0]])


def spline_sums(volumes: tf.Tensor, x: Any, y: Any, z: Any) -> tf.Tensor:
    """Sum over all voxels of [..., X, Y, Z], weighted by each control point's weight: [..., i, j, k].

    The transpose of `spline_volumes`: it takes the gradient of volumes to that of their control points.
    """
    several, size = volumes.shape[:-3], volumes.shape[-3:]
    lines = tf.reshape(tf.matmul(tf.reshape(volumes, [-1, size[2]]), z), [-1, size[1], z.shape[1]])
    planes = tf.reshape(tf.matmul(y, lines, transpose_a=True), [-1, size[0], y.shape[1] * z.shape[1]])
    return tf.reshape(tf.matmul(x, planes, transpose_a=True), [*several, x.shape[1], y.shape[1], z.shape[1]])


class SplineSmoothness:
    """Half the mean square of the slopes of a flow and a spline together, of the spline's control points.

    It approximates `losses.smoothness_loss` of the full flow: slopes are differences between voxels at the places of
    the control points. A square of what is linear in the control points c: r + l c + c K c / 2. K is a sum of products
    of small matrices for each axis, so that no flow has to be made.

    Args:
        flow: the flow so far, float32 [B, X, Y, Z, 3].
        matrices: weights of the control points at the voxels of each axis: [X, i], [Y, j], [Z, k].
        stride: voxels from one control point to the next.
    """

    def __init__(self, flow: tf.Tensor, matrices: Sequence[tf.Tensor], stride: int) -> None:
        before = tf.transpose(flow[:, ::stride, ::stride, ::stride], [4, 0, 1, 2, 3])
        sparse = [matrix[::stride] for matrix in matrices]
        self.rest, of_before = _square_of_slopes(before, stride)
        self.linear = spline_sums(of_before, *sparse)
        count = float(np.prod(before.shape[2:])) * 3.0
        values = [tf.matmul(m, m, transpose_a=True) for m in sparse]
        steps = [(m[1:] - m[:-1]) / stride for m in sparse]
        slopes = [tf.matmul(m, m, transpose_a=True) / count for m in steps]
        self.squares = [[slopes[a] if a == axis else values[a] for a in range(3)] for axis in range(3)]

    def __call__(self, control: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The value [B] for control points [3, B, i, j, k], and its gradient."""
        square = ordered_sum([spline_volumes(control, *matrices) for matrices in self.squares])
        value = self.rest + tf.reduce_sum(control * (self.linear + 0.5 * square), [0, 2, 3, 4])
        return value, self.linear + square


def _square_of_slopes(flow: tf.Tensor, stride: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Half the mean square of the slopes of [3, B, X, Y, Z], whose voxels lie `stride` apart: [B], and its gradient."""
    count = float(np.prod(flow.shape[2:])) * 3.0
    total, gradient = tf.zeros(flow.shape[1]), tf.zeros_like(flow)
    for axis in (2, 3, 4):
        n = flow.shape[axis]
        low, high = (flow[(*(slice(None),) * axis, slice(start, start + n - 1))] for start in (0, 1))
        slope = (high - low) / stride
        total += 0.5 * tf.reduce_sum(tf.square(slope), [0, 2, 3, 4]) / count
        after, ahead = ([side if a == axis else [0, 0] for a in range(5)] for side in ([1, 0], [0, 1]))
        gradient += (tf.pad(slope, after) - tf.pad(slope, ahead)) / (stride * count)
    return total, gradient
