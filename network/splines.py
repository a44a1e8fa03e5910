"""Cubic B-splines: of the augmentation, the refinement and the joint histogram."""

from typing import Any

import numpy as np
import tensorflow as tf


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
    """`tensor_product` of volumes apart: float32 [N, X, Y, Z] of control points [N, i, j, k]. Plain matrix products."""
    n, i, j, k = control.shape
    lines = tf.reshape(tf.matmul(tf.reshape(control, [-1, k]), z, transpose_b=True), [n * i, j, -1])
    planes = tf.reshape(tf.matmul(y, lines), [n, i, -1])
    return tf.reshape(tf.matmul(x, planes), [n, x.shape[0], y.shape[0], z.shape[0]])


def spline_sums(volumes: tf.Tensor, x: Any, y: Any, z: Any) -> tf.Tensor:
    """Sum over all voxels of [N, X, Y, Z], weighted by each control point's weight: [N, i, j, k].

    The transpose of `spline_volumes`: it takes the gradient of volumes to that of their control points.
    """
    n, size = volumes.shape[0], volumes.shape[1:]
    lines = tf.reshape(tf.matmul(tf.reshape(volumes, [-1, size[2]]), z), [n * size[0], size[1], -1])
    planes = tf.reshape(tf.matmul(y, lines, transpose_a=True), [n, size[0], -1])
    return tf.reshape(tf.matmul(x, planes, transpose_a=True), [n, x.shape[1], y.shape[1], z.shape[1]])
