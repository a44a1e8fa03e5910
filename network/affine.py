"""The affine cascade: a network that gives a 3x3 matrix and a shift, and the flow that they stand for."""

import math
import typing
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from .blocks import Encoder, beside, convolution
from .kernels import own_gradient, shape_of, xla_kernel


class Affine(typing.NamedTuple):
    """Affine map x -> (matrix + I) x + shift, with x in voxels from the volume's centre.

    Attributes:
        matrix: float32 [B, 3, 3], the linear part less the identity.
        shift: float32 [B, 3], in voxels.
    """

    matrix: tf.Tensor
    shift: tf.Tensor


def affine_flow(affine: Affine, size: Sequence[int]) -> tf.Tensor:
    """Flow of an affine map on a grid of `size` (X, Y, Z): flow_i = sum_j W_ij x_j + b_i, [B, X, Y, Z, 3].

    x is counted from the centre of the volume, (size - 1) / 2.
    """
    size = tuple(size)

    @own_gradient
    def call(matrix: tf.Tensor, shift: tf.Tensor) -> Any:
        def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
            with tf.GradientTape() as tape:  # by TensorFlow's sums, which XLA's are no match for
                tape.watch([matrix, shift])
                flow = _affine_flow(matrix, shift, size)
            return tape.gradient(flow, [matrix, shift], upstream)

        return _fast_affine_flow(matrix, shift, size), gradient

    return call(*affine)


def _affine_flow(matrix: tf.Tensor, shift: tf.Tensor, size: Sequence[int]) -> tf.Tensor:
    flow = shift[:, None, None, None]
    columns = tf.unstack(matrix, axis=2)
    for axis, (n, column) in enumerate(zip(size, columns, strict=True)):
        centred = tf.range(n, dtype=tf.float32) - (n - 1.0) / 2.0
        # One product per line of voxels, broadcast to all of them, is ten times faster than one per voxel.
        along = centred[:, None] * column[:, None]
        flow += tf.reshape(along, [-1] + [n if k == axis else 1 for k in range(3)] + [3])
    return flow


# One pass over memory, instead of three additions.
_fast_affine_flow = xla_kernel(_affine_flow)


def inverse_affine(affine: Affine) -> Affine:
    """The affine map that leads back: x -> (W + I)^-1 (x - b), with x in voxels from the volume's centre."""
    linear = tf.linalg.inv(affine.matrix + tf.eye(3))
    return Affine(linear - tf.eye(3), -tf.linalg.matvec(linear, affine.shift))


def compose_affine(affine: Affine, first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
    """Composition of the affine flow `first` of `affine` with `second`, exact also outside the volume.

    (W + I) second(p) + first(p); float32 [B, X, Y, Z, 3]. An interpolated composition would clamp at the edge.
    """

    @own_gradient
    def call(matrix: tf.Tensor, first: tf.Tensor, second: tf.Tensor) -> Any:
        def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
            return [_sum_of_products(upstream, second), upstream, _second_gradient(matrix, upstream)]

        return _compose_affine(matrix, first, second), gradient

    return call(affine.matrix, first, second)


@xla_kernel
def _compose_affine(matrix: tf.Tensor, first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
    return first + _applied(matrix + tf.eye(3), second)


@xla_kernel
def _second_gradient(matrix: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
    return _applied(tf.linalg.matrix_transpose(matrix) + tf.eye(3), upstream)


def _applied(matrix: tf.Tensor, vectors: tf.Tensor) -> tf.Tensor:
    """A matrix [B, 3, 3] times vectors [B, X, Y, Z, 3]; in a kernel faster as three products than as a sum over j."""
    columns = (column[:, None, None, None] for column in tf.unstack(matrix, axis=2))
    first, *others = (part[..., None] * k for part, k in zip(tf.unstack(vectors, axis=-1), columns, strict=True))
    return sum(others, start=first)


def _sum_of_products(vectors: tf.Tensor, others: tf.Tensor) -> tf.Tensor:
    """Sum over all voxels of u v^T, from vectors u and others v, [B, X, Y, Z, 3] each: [B, 3, 3].

    It is a matrix product with more to do, and yet faster, where several voxels make a row: the blocks on the diagonal
    are theirs.
    """
    voxels = math.gcd(vectors.shape[3], 16)
    rows = [tf.reshape(a, [shape_of(a)[0], -1, 3 * voxels]) for a in (vectors, others)]
    blocks = tf.reshape(tf.matmul(*rows, transpose_a=True), [-1, voxels, 3, voxels, 3])
    return tf.einsum("bkikj->bij", blocks)


@keras.saving.register_keras_serializable("registration")
class AffineNetwork(keras.layers.Layer):
    """Encoder and two bias-free convolutions over the whole remaining grid: [fixed, moving] -> `Affine`.

    Its last kernels have the size of that grid, which ties its weights to ceil(image_size / 64).
    """

    published_names = True

    def __init__(self, channels: int = 16, leaky_slope: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.channels, self.leaky_slope = channels, leaky_slope
        self.encoder = Encoder(channels, leaky_slope, name="encoder", dtype=self.dtype_policy)

    def build(self, input_shape: Any) -> None:
        images = (*input_shape[0][:-1], 2)
        self.encoder.build(images)
        for layer in self.encoder.convolutions:
            images = layer.compute_output_shape(images)
        whole: dict[str, Any] = {"kernel_size": images[1:4], "padding": "valid", "use_bias": False, "dtype": "float32"}
        self.matrix_head = convolution(9, "conv7_W", **whole)
        self.shift_head = convolution(3, "conv7_b", **whole)
        self.matrix_head.build(images)
        self.shift_head.build(images)

    def call(self, inputs: Sequence[tf.Tensor]) -> Affine:
        features = self.encoder(beside(*inputs))["conv6_1"]
        matrix = tf.reshape(self.matrix_head(features), [-1, 3, 3])
        return Affine(matrix, tf.reshape(self.shift_head(features), [-1, 3]))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "channels": self.channels, "leaky_slope": self.leaky_slope}


def resampled_kernel(kernel: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """A kernel over the whole of a coarse grid, for a grid of another size.

    A new voxel has of each old one's weights the share that it covers. So features that are alike everywhere, and
    those of voxels that are merely divided, give the number that they gave: a shift stays one of as many voxels.

    Args:
        kernel: [x, y, z, in, out].
        size: of the new grid.
    """
    for axis, n in enumerate(size):
        cuts, old = np.linspace(0, kernel.shape[axis], n + 1), np.arange(kernel.shape[axis])
        covered = np.minimum(cuts[1:, None], old + 1) - np.maximum(cuts[:-1, None], old)
        kernel = np.moveaxis(np.tensordot(np.maximum(covered, 0), kernel, (1, axis)), 0, axis)
    return kernel
