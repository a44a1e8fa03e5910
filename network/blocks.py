"""Convolutions as the original builds them, and the encoder that the affine cascade and VTN share.

Layer names are those of the published checkpoints (`conv3_1`, `upsamp6to5`, ...): `variable_names.py` relies on it.
"""

import contextlib
import contextvars
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from . import few_channels
from .doubling import TRANSPOSED_TAPS, doubled_convolution, folded, small_kernel
from .few_voxels import convolve_few, is_few, upsample_few
from .kernels import own_gradient, shape_of, xla_kernel

_UNDRAWN = contextvars.ContextVar("undrawn", default=False)


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Within the block the kernels of this module are left without values: a file has them, and zeros take time too."""
    token = _UNDRAWN.set(True)
    try:
        yield
    finally:
        _UNDRAWN.reset(token)


@keras.saving.register_keras_serializable("registration")
class KernelInitializer(keras.initializers.LecunUniform):
    """Uniform in +-sqrt(3 / prod(kernel shape but its last axis)), for transposed convolutions too.

    Keras counts the next-to-last axis of a kernel as its inputs, as the original does.
    """

    def __call__(self, shape: Any, dtype: Any = None) -> tf.Tensor:
        if _UNDRAWN.get():
            return tf.raw_ops.Empty(shape=shape, dtype=tf.as_dtype(dtype or tf.float32), init=False)
        return super().__call__(shape, dtype)


@keras.saving.register_keras_serializable("registration")
class Convolution(keras.layers.Conv3D):
    """Keras's `Conv3D`, in less time where it gives few voxels or few channels, and in the gradient of images.

    What oneDNN computes wrongly is computed in float32.
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """As Keras's, whose sum with the bias is four operations instead of one."""
        if not self.use_bias or self.data_format == "channels_first":
            return super().call(inputs)
        out = tf.nn.bias_add(self.convolution_op(inputs, tf.convert_to_tensor(self.kernel)), self.bias)
        return out if self.activation is None else self.activation(out)

    def convolution_op(self, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        size, strides = inputs.shape[1:4], self.strides
        is_plain = self.padding == "same" and self.data_format == "channels_last" and None not in size
        is_plain = is_plain and set(self.dilation_rate) == {self.groups} == {1}
        is_cubic = is_plain and self.kernel_size == (3, 3, 3) and strides in ((1, 1, 1), (2, 2, 2))
        result = [n and -(-n // k) for n, k in zip(size, strides, strict=True)]
        if is_plain and is_few(result, self.filters) and is_few(size, self.filters, times=8):
            return convolve_few(inputs, kernel, strides)
        if is_cubic and inputs.shape[-1] <= few_channels.IMAGES:
            return few_channels.of_images(inputs, kernel, strides[0])
        is_fine = is_cubic and strides[0] == 1 and math.prod(size) >= few_channels.LEAST_VOXELS
        if is_fine and self.filters <= few_channels.RESULTS:
            return few_channels.to_few_channels(inputs, kernel)
        if _is_wrong_in_bfloat16(inputs, result):
            out = super().convolution_op(tf.cast(inputs, tf.float32), tf.cast(kernel, tf.float32))
            return tf.cast(out, inputs.dtype)
        return super().convolution_op(inputs, kernel)


def _is_wrong_in_bfloat16(features: tf.Tensor, size: Sequence[int | None]) -> bool:
    """Whether oneDNN's gradient of a kernel is wrong: in bfloat16, where an axis of the grid has two voxels or less."""
    return features.dtype == tf.bfloat16 and min(n or 3 for n in size) <= 2


def convolution(
    filters: int,
    name: str,
    stride: int = 1,
    kernel_size: int | tuple[int, ...] = 3,
    kind: type[Convolution] = Convolution,
    **options: Any,
) -> Convolution:
    """A layer of class `kind` with 'same' padding, linear, with a bias unless `options` say otherwise."""
    options = {"padding": "same", "kernel_initializer": KernelInitializer, **options}
    return kind(filters, kernel_size, strides=stride, name=name, **options)


@keras.saving.register_keras_serializable("registration")
class DoublingConvolution(Convolution):
    """`Convolution` of features that are doubled to the grid of a skip, and joined with it: [features, skip].

    The doubling is that of `double_to`. Its kernel is (3, 3, 3, channels of the features and then of the skip, out). As
    a convolution of what is joined is a sum of two, that of the features is computed on their own, coarse grid.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.input_spec = None  # Keras's is that of one tensor.

    def build(self, input_shape: Any) -> None:
        super().build(self._joined(input_shape))
        self.input_spec = None

    def call(self, inputs: Sequence[tf.Tensor]) -> tf.Tensor:
        features, skip = inputs
        if not self.is_folded(features.shape, skip.shape):
            return super().call(tf.concat([double_to(features, skip), skip], axis=-1))
        of_features, of_skip = tf.split(self.kernel, [features.shape[-1], skip.shape[-1]], axis=3)
        addend = tf.nn.bias_add(self.convolution_op(skip, of_skip), self.bias)
        return doubled_convolution(features, of_features, addend)

    def is_folded(self, features: Any, skip: Any) -> bool:
        """Whether it pays, and holds: the doubled grid must not be cut, as a voxel beyond its border is zero."""
        even = all(2 * n == m for n, m in zip(features[1:4], skip[1:4], strict=True))
        return even and not is_few(features[1:4], self.filters)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        of_both = isinstance(input_shape[0], (list, tuple))  # Keras's `build` asks for what is joined.
        return super().compute_output_shape(self._joined(input_shape) if of_both else input_shape)

    def _joined(self, input_shape: Any) -> tuple[int | None, ...]:
        features, skip = input_shape
        return (*skip[:4], features[-1] + skip[-1])


def double_to(features: tf.Tensor, skip: tf.Tensor) -> tf.Tensor:
    """Nearest-neighbour upsampling by two, cut to the grid of `skip` where that is odd: [B, X, Y, Z, C]."""
    for axis in (1, 2, 3):
        features = tf.repeat(features, 2, axis=axis)
    if features.shape[1:4] == skip.shape[1:4]:  # a slice of everything would be a copy, as would its gradient
        return features
    size = tf.shape(skip)
    return features[:, : size[1], : size[2], : size[3]]


@keras.saving.register_keras_serializable("registration")
class UpConvolution(keras.layers.Layer):
    """Transposed convolution, 4^3 kernel, stride 2, without bias: doubles a grid to the given size.

    The kernel is (4, 4, 4, out, in). `call` takes [features, skip] and gives the skip's grid, so that levels of odd
    size are met exactly.
    """

    def __init__(self, filters: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.filters = filters

    def build(self, input_shape: Any) -> None:
        shape = (4, 4, 4, self.filters, input_shape[0][-1])
        self.kernel = self.add_weight(shape=shape, initializer=KernelInitializer, name="kernel")

    def call(self, inputs: Sequence[tf.Tensor]) -> tf.Tensor:
        features, skip = inputs
        out = self.upsample(features, tf.convert_to_tensor(self.kernel), skip)
        out.set_shape((*skip.shape[:4], self.filters))
        return out

    def upsample(self, features: tf.Tensor, kernel: tf.Tensor, skip: tf.Tensor) -> tf.Tensor:
        """Features on the grid of the skip: [B, X, Y, Z, filters]."""
        size = features.shape[1:4]
        if is_few(size, self.filters):
            return upsample_few(features, kernel, skip.shape[1:4])
        if _is_wrong_in_bfloat16(features, size):
            precise = UpConvolution.upsample(self, tf.cast(features, tf.float32), tf.cast(kernel, tf.float32), skip)
            return tf.cast(precise, features.dtype)
        shape = [*shape_of(skip)[:4], self.filters]
        return tf.nn.conv3d_transpose(features, kernel, shape, strides=2, padding="SAME")

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        return (*input_shape[1][:4], self.filters)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "filters": self.filters}


@keras.saving.register_keras_serializable("registration")
class FlowUpConvolution(UpConvolution):
    """`UpConvolution` in less time, where the grid is large and the output channels are few, as those of a flow are.

    It is computed on the coarse grid (`doubling.py`). The gradient is that of the transposed convolution.
    """

    def call(self, inputs: Sequence[tf.Tensor], factor: float = 1.0) -> tf.Tensor:
        """As `UpConvolution.call`, times a factor, by which the kernel is multiplied."""
        features, skip = inputs
        return self.upsample(features, self.kernel * factor, skip)

    def upsample(self, features: tf.Tensor, kernel: tf.Tensor, skip: tf.Tensor) -> tf.Tensor:
        """The output of `UpConvolution.upsample`, with the same gradient, computed faster."""

        @own_gradient
        def call(features: tf.Tensor, kernel: tf.Tensor) -> Any:
            def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
                with tf.GradientTape() as tape:
                    tape.watch([features, kernel])
                    out = super(FlowUpConvolution, self).upsample(features, kernel, skip)
                return tape.gradient(out, [features, kernel], upstream)

            small = small_kernel(tf.transpose(kernel, [0, 1, 2, 4, 3]), 3 * [TRANSPOSED_TAPS])
            return folded(features, small, skip.shape[1:4]), gradient

        return call(features, kernel)


@keras.saving.register_keras_serializable("registration")
class Encoder(keras.layers.Layer):
    """Ten leaky 3^3 convolutions, six of them with stride 2, from [B, X, Y, Z, 2] down to [B, ~X/64, ..., 32 c].

    Returns a dict: layer name -> features.
    """

    # name -> (channels over those of the first layer, stride)
    LAYERS = {
        "conv1": (1, 2),
        "conv2": (2, 2),
        "conv3": (4, 2),
        "conv3_1": (4, 1),
        "conv4": (8, 2),
        "conv4_1": (8, 1),
        "conv5": (16, 2),
        "conv5_1": (16, 1),
        "conv6": (32, 2),
        "conv6_1": (32, 1),
    }

    def __init__(self, channels: int = 16, leaky_slope: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.channels, self.leaky_slope = channels, leaky_slope
        self.convolutions = [
            convolution(k * channels, name, stride, dtype=self.dtype_policy)
            for name, (k, stride) in self.LAYERS.items()
        ]

    def build(self, input_shape: Any) -> None:
        for layer in self.convolutions:
            layer.build(input_shape)
            input_shape = layer.compute_output_shape(input_shape)

    def call(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        features, net = {}, images
        for layer in self.convolutions:
            net = features[layer.name] = leaky_relu(layer(net), self.leaky_slope)
        return features

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "channels": self.channels, "leaky_slope": self.leaky_slope}


def beside(fixed: tf.Tensor, moving: tf.Tensor) -> tf.Tensor:
    """Two images [B, X, Y, Z, 1] as the channels of one, in a tenth of the time that `tf.concat` takes."""

    @own_gradient
    def call(fixed: tf.Tensor, moving: tf.Tensor) -> Any:
        # Two kernels, so that the gradient of an image that nobody asks for is never computed.
        return _beside(fixed, moving), lambda up: [_channel(up, k) for k in (0, 1)]

    return call(fixed, moving)


@xla_kernel
def _beside(first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
    return tf.where(tf.range(2) == 0, first, second)


@xla_kernel
def _channel(volume: tf.Tensor, k: int) -> tf.Tensor:
    return volume[..., k : k + 1]


def join(skip: tf.Tensor, features: tf.Tensor, flow: tf.Tensor, slope: float) -> tf.Tensor:
    """The channels of a skip, of features after `leaky_relu`, and of a flow: [B, X, Y, Z, ..].

    On a fine grid in kernels, which pass over memory once, and with only the result kept for the backward pass.
    """
    if None in skip.shape[1:4] or math.prod(skip.shape[1:4]) < FINE:
        return tf.concat([skip, leaky_relu(features, slope), flow], axis=-1)

    @own_gradient
    def call(*parts: tf.Tensor) -> Any:
        joined = _join(*parts, slope)
        return joined, lambda upstream: _part(upstream, joined, [part.shape[-1] for part in parts], slope)

    return call(skip, features, flow)


# The least voxels of a fine grid: below, it takes longer to compile kernels than they save.
FINE = 2**17


@xla_kernel
def _join(skip: tf.Tensor, features: tf.Tensor, flow: tf.Tensor, slope: float) -> tf.Tensor:
    parts = [skip, tf.nn.leaky_relu(features, slope), flow]
    ends = list(itertools.accumulate(part.shape[-1] for part in parts))
    # With zeros around and added, which is a single loop; a concatenation is one for each part.
    return sum(
        tf.pad(part, [[0, 0]] * 4 + [[end - part.shape[-1], ends[-1] - end]])
        for part, end in zip(parts, ends, strict=True)
    )


@xla_kernel
def _part(upstream: tf.Tensor, joined: tf.Tensor, channels: list[int], slope: float) -> list[tf.Tensor]:
    """Gradients of the parts of `_join`, from that of its result and the result."""
    of_skip, of_features, of_flow = tf.split(upstream, channels, axis=-1)
    _, features, _ = tf.split(joined, channels, axis=-1)
    return [of_skip, tf.where(features > 0.0, of_features, slope * of_features), of_flow]


def leaky_relu(x: tf.Tensor, slope: float) -> tf.Tensor:
    """max(x, slope * x) for a slope of 0..1; only its output is kept for the backward pass."""

    @own_gradient
    def call(x: tf.Tensor) -> Any:
        # The gradient needs only the sign, which output and input share. The next layer keeps the output anyway, while
        # TensorFlow's own gradient would keep the input beside it.
        out = tf.nn.leaky_relu(x, slope)
        return out, lambda upstream: tf.raw_ops.LeakyReluGrad(gradients=upstream, features=out, alpha=slope)

    return call(x)
