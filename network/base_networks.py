"""Base networks of the deformable cascades: layers [fixed, moving] -> flow, both images [B, X, Y, Z, 1] in 0..1.

The flow is [B, X, Y, Z, 3] in voxels (conventions: `spatial_transformer.py`).
"""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from .blocks import (
    Convolution,
    DoublingConvolution,
    Encoder,
    FlowUpConvolution,
    UpConvolution,
    beside,
    convolution,
    join,
    leaky_relu,
)


class BaseNetwork(keras.layers.Layer):
    """What every base network is: a layer that takes [fixed, moving] and gives a flow.

    A subclass makes its layers in `__init__`, as attributes, and defines `call(self, inputs)` or, where a layer acts
    otherwise in training, `call(self, inputs, training=False)`. It multiplies its flow by `flow_multiplier`.
    docs/extending.md has an example.

    Args:
        flow_multiplier: factor on the flow, 1 over the number of cascades.
    """

    def __init__(self, flow_multiplier: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.flow_multiplier = flow_multiplier

    def build(self, input_shape: Any) -> None:
        # The weights do not depend on the size. Outside of any graph: the global table of custom gradients would keep
        # the graph of this call, and with it the weights, for as long as the process lives.
        with tf.init_scope():
            self.call([tf.zeros((1, 4, 4, 4, 1), self.compute_dtype)] * 2)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        return (*input_shape[0][:-1], 3)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "flow_multiplier": self.flow_multiplier}


class _PublishedNetwork(BaseNetwork):
    """What VTN and VoxelMorph share: the options of their rows in `registry`, and published names of their weights."""

    published_names = True

    def __init__(self, channels: int = 16, leaky_slope: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.channels, self.leaky_slope = channels, leaky_slope

    def build(self, input_shape: Any) -> None:
        if "_build_layers" in vars(type(self)):
            self._build_layers()
        else:  # a class derived from one of these may have other layers
            super().build(input_shape)

    def _build_layers(self) -> None:
        """Build each layer by the channels that `call` gives it: to call all takes longer than to make the weights."""
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "channels": self.channels, "leaky_slope": self.leaky_slope}


def _channels(n: int) -> tuple[int | None, ...]:
    """The shape of a volume of some channels, of any size."""
    return (None, None, None, None, n)


@keras.saving.register_keras_serializable("registration")
class VTN(_PublishedNetwork):
    """Volume Tweening Network (Zhao et al., JBHI 2019): flow predictions from coarse to fine.

    At each of five levels a 3-channel prediction is upsampled and joined, with the upsampled features, to the
    encoder's features of the next finer level; the last transposed convolution gives the flow.
    """

    # Level k of the decoder meets this layer of the encoder.
    SKIPS = {5: "conv5_1", 4: "conv4_1", 3: "conv3_1", 2: "conv2", 1: "conv1"}

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        same = {"dtype": self.dtype_policy}
        self.encoder = Encoder(self.channels, self.leaky_slope, name="encoder", **same)
        self.predictions = {k + 1: convolution(3, f"pred{k + 1}", **same) for k in self.SKIPS}
        self.flow_ups = {
            k: (FlowUpConvolution if k == 1 else UpConvolution)(3, name=f"upsamp{k + 1}to{k}", **same)
            for k in self.SKIPS
        }
        self.feature_ups = {
            k: UpConvolution(Encoder.LAYERS[skip][0] * self.channels, name=f"deconv{k}", **same)
            for k, skip in self.SKIPS.items()
        }
        # A flow of many voxels needs float32, in whatever precision the rest computes.
        self.head = FlowUpConvolution(3, name="upsamp1to0", dtype="float32")

    def _build_layers(self) -> None:
        self.encoder.build(_channels(2))
        channels = Encoder.LAYERS["conv6_1"][0] * self.channels
        for k, name in self.SKIPS.items():
            skip = _channels(Encoder.LAYERS[name][0] * self.channels)
            self.predictions[k + 1].build(_channels(channels))
            self.flow_ups[k].build([_channels(3), skip])
            self.feature_ups[k].build([_channels(channels), skip])
            channels = 2 * Encoder.LAYERS[name][0] * self.channels + 3
        self.head.build([_channels(channels), _channels(2)])

    def call(self, inputs: Sequence[tf.Tensor]) -> tf.Tensor:
        images = beside(*inputs)
        encoded = self.encoder(images)
        net = encoded["conv6_1"]
        for k, name in self.SKIPS.items():
            skip = encoded[name]
            prediction = self.flow_ups[k]([self.predictions[k + 1](net), skip])
            net = join(skip, self.feature_ups[k]([net, skip]), prediction, self.leaky_slope)
        return self.head([net, images], factor=20.0 * self.flow_multiplier)


@keras.saving.register_keras_serializable("registration")
class VoxelMorph(_PublishedNetwork):
    """VoxelMorph (Balakrishnan et al., CVPR 2018), its larger variant: an encoder-decoder with skips to the images."""

    # name -> (channels over those of the first layer, stride)
    ENCODER = {"conv1": (1, 2), "conv2": (2, 2), "conv3": (2, 2), "conv4": (2, 2)}
    # name -> (channels over those of the first layer, layer whose features join before it)
    DECODER = {
        "decode4": (2, None),
        "decode3": (2, "conv3"),
        "decode2": (2, "conv2"),
        "decode1": (2, "conv1"),
        "decode1_1": (2, None),
        "decode0": (1, "images"),
        "decode0_1": (1, None),
    }

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        same = {"dtype": self.dtype_policy}
        self.encoders = [
            convolution(k * self.channels, name, stride, **same) for name, (k, stride) in self.ENCODER.items()
        ]
        self.decoders = [
            convolution(k * self.channels, name, kind=Convolution if skip is None else DoublingConvolution, **same)
            for name, (k, skip) in self.DECODER.items()
        ]
        self.head = convolution(
            3, "flow", kernel_initializer=keras.initializers.RandomNormal(stddev=1e-5), dtype="float32"
        )

    def _build_layers(self) -> None:
        features = {"images": _channels(2)}
        net = features["images"]
        for layer in self.encoders:
            layer.build(net)
            net = features[layer.name] = _channels(layer.filters)
        for layer in self.decoders:
            skip = self.DECODER[layer.name][1]
            layer.build(net if skip is None else [net, features[skip]])
            net = _channels(layer.filters)
        self.head.build(net)

    def call(self, inputs: Sequence[tf.Tensor]) -> tf.Tensor:
        net = beside(*inputs)
        features = {"images": net}
        for layer in self.encoders:
            net = features[layer.name] = leaky_relu(layer(net), self.leaky_slope)
        for layer in self.decoders:
            skip = self.DECODER[layer.name][1]
            net = leaky_relu(layer(net if skip is None else [net, features[skip]]), self.leaky_slope)
        return self.head(net) * self.flow_multiplier
