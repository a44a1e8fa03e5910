"""Convolutions computed otherwise than by one operation of TensorFlow, against that operation."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from network import blocks, few_channels
from network.blocks import (
    DoublingConvolution,
    FlowUpConvolution,
    UpConvolution,
    beside,
    convolution,
    double_to,
    join,
)
from network.few_voxels import convolve_few, upsample_few


def noise(*shape):
    return tf.constant(np.random.default_rng(0).random(shape, np.float32))


def outcomes(function, *inputs):
    """A function's result, and its gradients of all inputs for an upstream one that differs everywhere."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        out = function(*inputs)
    upstream = tf.cos(tf.reshape(tf.range(tf.size(out), dtype=tf.float32), out.shape))
    return [out, *tape.gradient(out, inputs, tf.cast(upstream, out.dtype))]


@pytest.mark.parametrize("size", [(5, 8, 10), (3, 6, 8), (1, 2, 3)])  # more voxels, and few
def test_the_transposed_convolution_is_the_gradient_of_a_strided_one(size):
    layer = UpConvolution(2)
    features, skip = noise(2, *(-(-n // 2) for n in size), 3), noise(2, *size, 1)
    with tf.GradientTape() as tape:
        tape.watch(features)
        up = layer([features, skip])
    upstream = tf.cos(tf.reshape(tf.range(tf.size(up), dtype=tf.float32), up.shape))
    with tf.GradientTape(persistent=True) as there:
        target, kernel = tf.Variable(upstream), tf.Variable(layer.kernel)
        down = tf.nn.conv3d(target, kernel, strides=[1, 2, 2, 2, 1], padding="SAME")
    np.testing.assert_allclose(up, there.gradient(down, target, features), atol=1e-5)
    for found, expected in zip(
        tape.gradient(up, [features, layer.kernel], upstream),
        [down, there.gradient(down, kernel, features)],
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("pairs", [1, 2])
def test_the_gradient_of_a_kernel_in_bfloat16_on_the_coarsest_grid(pairs):
    inputs = tf.random.stateless_normal((pairs, 2, 2, 2, 16), (1, 2))
    gradients = []
    for precision in ("float32", "mixed_bfloat16"):
        keras.utils.set_random_seed(1)
        layer = convolution(16, "layer", dtype=precision)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(tf.cast(layer(inputs), tf.float32)))
        gradients.append(tape.gradient(loss, layer.kernel))
    assert tf.norm(gradients[1] - gradients[0]) < 0.02 * tf.norm(gradients[0])


def test_upsampling_repeats_each_voxel_and_follows_an_odd_skip():
    features = tf.reshape(tf.range(8.0), (1, 2, 2, 2, 1))
    out = double_to(features, noise(1, 3, 4, 3, 7))
    assert out.shape == (1, 3, 4, 3, 1)
    np.testing.assert_array_equal(out[0, :, 0, 0, 0], [0, 0, 4])
    np.testing.assert_array_equal(out[0, 0, :, 0, 0], [0, 0, 2, 2])
    np.testing.assert_array_equal(out[0, 0, 0, :, 0], [0, 0, 1])


@pytest.mark.parametrize("size", [(7, 10, 4), (8, 3, 1)])
def test_flow_upconvolution_is_the_transposed_convolution(size):
    inputs = [noise(2, *(-(-n // 2) for n in size), 5) - 0.4, noise(2, *size, 1)]
    plain, fast = UpConvolution(3), FlowUpConvolution(3)
    plain(inputs)
    fast(inputs)
    fast.set_weights(plain.get_weights())
    results = []
    for layer in (plain, fast):
        with tf.GradientTape() as tape:
            tape.watch(inputs[0])
            out = layer(inputs)
        upstream = tf.cos(tf.reshape(tf.range(tf.size(out), dtype=tf.float32), out.shape))
        results.append([out, *tape.gradient(out, [inputs[0], *layer.trainable_variables], upstream)])
    for expected, found in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 14, 10), (10, 7, 16), (2, 4, 2)])  # doubled on the coarse grid; cut; few voxels
def test_a_doubling_convolution_is_that_of_what_is_doubled_and_joined(size):
    inputs = [noise(2, *(-(-n // 2) for n in size), 3) - 0.4, noise(2, *size, 2) - 0.3]
    layer = convolution(4, "layer", kind=DoublingConvolution)
    layer(inputs)
    layer.bias.assign([1.0, -2.0, 3.0, -4.0])
    assert layer.is_folded(inputs[0].shape, inputs[1].shape) == (size == (8, 14, 10))

    def plain(inputs):
        joined = tf.concat([double_to(*inputs), inputs[1]], axis=-1)
        return tf.nn.conv3d(joined, layer.kernel, [1] * 5, "SAME") + layer.bias

    results = []
    for function in (plain, layer):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            out = function(inputs)
        upstream = tf.cos(tf.reshape(tf.range(tf.size(out), dtype=tf.float32), out.shape))
        results.append([out, *tape.gradient(out, [*inputs, *(v.value for v in layer.trainable_variables)], upstream)])
    for expected, found in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(2, 2, 3), (2, 3, 3), (2, 6, 6), (4, 1, 1), (3, 3, 3)])
@pytest.mark.parametrize("up", [False, True])
def test_gradients_of_kernels_in_bfloat16_on_thin_grids(size, up):
    features = noise(1, *size, 8) - 0.5
    layer = UpConvolution(3, dtype="bfloat16") if up else convolution(3, "layer", dtype="bfloat16")
    plain = UpConvolution(3) if up else convolution(3, "layer")
    arguments = [features, tf.zeros((1, *(2 * n for n in size), 1))] if up else features
    gradients = []
    for one in (plain, layer):
        one(arguments)
        one.set_weights(plain.get_weights())
        with tf.GradientTape() as tape:
            out = tf.cast(one(arguments), tf.float32)
        upstream = tf.cos(tf.reshape(tf.range(tf.size(out), dtype=tf.float32), out.shape))
        gradients.append(tape.gradient(out, one.kernel.value, upstream).numpy().astype(np.float32))
    assert np.linalg.norm(gradients[1] - gradients[0]) < 0.05 * np.linalg.norm(gradients[0])


@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_joined_on_a_fine_grid_as_on_a_coarse_one(slope, monkeypatch):
    parts = [noise(2, 3, 4, 5, channels) - 0.5 for channels in (4, 5, 3)]
    coarse = outcomes(lambda *parts: join(*parts, slope), *parts)
    monkeypatch.setattr(blocks, "FINE", 0)
    calls = []
    monkeypatch.setattr(blocks, "_join", lambda *args, kernel=blocks._join: calls.append(args) or kernel(*args))
    fine = outcomes(lambda *parts: join(*parts, slope), *parts)
    assert len(calls) == 1
    for one, other in zip(fine, coarse, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(2, 2, 2), (4, 1, 3), (5, 4, 2), (1, 1, 1)])
@pytest.mark.parametrize("taps", [(3, 3, 3), (1, 2, 4)])
def test_a_convolution_of_few_voxels_is_one(size, stride, taps):
    features, kernel = noise(2, *size, 5) - 0.4, noise(*taps, 5, 7) - 0.6
    found = outcomes(lambda a, b: convolve_few(a, b, 3 * [stride]), features, kernel)
    expected = outcomes(lambda a, b: tf.nn.conv3d(a, b, [1, *3 * [stride], 1], "SAME"), features, kernel)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize(("size", "channels"), [(1, 64), (2, 32), (2, 128), (4, 32)])
def test_a_pair_alone_has_the_bits_that_it_has_among_others(size, channels):
    features, kernel = noise(3, size, size, size, channels) - 0.5, noise(3, 3, 3, channels, 64) - 0.5
    turned = tf.transpose(noise(4, 4, 4, channels, 64) - 0.5, [0, 1, 2, 4, 3])
    for convolve in (
        tf.function(lambda features: convolve_few(features, kernel, (2, 2, 2))),
        tf.function(lambda features: upsample_few(features, turned, 3 * [2 * size])),
    ):
        alone = tf.concat([convolve(features[k : k + 1]) for k in range(3)], 0)
        np.testing.assert_array_equal(convolve(features), alone)


@pytest.mark.parametrize("size", [(2, 2, 2), (4, 1, 3), (1, 1, 1)])
@pytest.mark.parametrize("less", [(0, 0, 0), (0, 1, 1)])
def test_upsampling_of_few_voxels_is_a_transposed_convolution(size, less):
    features, kernel = noise(2, *size, 5) - 0.4, noise(4, 4, 4, 7, 5) - 0.6
    fine = [2 * n - k for n, k in zip(size, less, strict=True)]
    found = outcomes(lambda a, b: upsample_few(a, b, fine), features, kernel)
    expected = outcomes(lambda a, b: tf.nn.conv3d_transpose(a, b, [2, *fine, 7], 2, "SAME"), features, kernel)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("size", [(8, 9, 10), (7, 12, 5), (1, 2, 3)])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_of_images_is_one(size, channels, stride):
    images, kernel = noise(2, *size, channels) - 0.4, noise(3, 3, 3, channels, 7) - 0.6
    found = outcomes(lambda a, b: few_channels.of_images(a, b, stride), images, kernel)
    expected = outcomes(lambda a, b: tf.nn.conv3d(a, b, [1, *3 * [stride], 1], "SAME"), images, kernel)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-5)


@pytest.mark.parametrize("size", [(8, 9, 10), (7, 12, 5), (1, 2, 3)])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_convolution_to_few_channels_is_one(size, channels):
    features, kernel = noise(2, *size, 5) - 0.4, noise(3, 3, 3, 5, channels) - 0.6
    found = outcomes(few_channels.to_few_channels, features, kernel)
    expected = outcomes(lambda a, b: tf.nn.conv3d(a, b, [1] * 5, "SAME"), features, kernel)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-5)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((32, 6, 4), {"strides": 2}),
        ((32, 6, 4), {}),
        ((32, 33, 34), {"filters": 3, "channels": 5}),
        ((32, 33, 34), {"filters": 3, "channels": 5, "strides": 2}),
        ((4, 3, 2), {"strides": 2}),
        ((4, 3, 2), {"dilation_rate": 2}),
        ((4, 3, 2), {"groups": 2}),
        ((4, 3, 3), {"padding": "valid"}),
        ((4, 3, 2), {"use_bias": False}),
        ((4, 3, 2), {"activation": "relu"}),
    ],
)
def test_a_convolution_is_that_of_keras(size, options):
    """Whichever way it is computed; the next test says which."""
    options = dict(options)
    filters, channels = options.pop("filters", 4), options.pop("channels", 2)
    stride = options.get("strides", 1)
    layer = convolution(filters, "layer", stride=stride, **{k: v for k, v in options.items() if k != "strides"})
    plain = keras.layers.Conv3D(filters, 3, **{"padding": "same", **options})
    images = noise(2, *size, channels) - 0.4
    plain.build(images.shape)
    layer.build(images.shape)
    if layer.use_bias:
        layer.bias.assign(tf.range(filters, dtype=tf.float32))
    plain.set_weights(layer.get_weights())
    for one, other in zip(outcomes(layer, images), outcomes(plain, images), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize(
    ("size", "options", "way"),
    [
        ((32, 6, 4), {"stride": 2}, "of_images"),
        ((32, 6, 4), {}, "of_images"),
        ((32, 33, 34), {"filters": 3, "channels": 5}, "to_few_channels"),
        ((32, 31, 32), {"filters": 3, "channels": 5}, None),  # too few voxels
        ((32, 33, 34), {"filters": 3, "channels": 5, "stride": 2}, None),
        ((8, 6, 4), {"filters": 24, "stride": 2, "channels": 5}, "convolve_few"),
        ((8, 6, 4), {"filters": 23, "stride": 2, "channels": 5}, None),  # the kernel is the smaller one
        ((8, 8, 9), {"filters": 80, "stride": 2, "channels": 5}, None),  # too many voxels
        ((64, 3, 3), {"stride": 64, "kernel_size": 64}, None),  # of too many voxels to few
        ((4, 3, 3), {"dilation_rate": 2}, None),
        ((4, 3, 3), {"groups": 2, "filters": 4}, None),
        ((4, 3, 3), {"padding": "valid"}, None),
    ],
)
def test_how_a_convolution_is_computed(size, options, way, monkeypatch):
    calls = []
    for place, name in ((blocks, "convolve_few"), (few_channels, "of_images"), (few_channels, "to_few_channels")):
        function = getattr(place, name)
        wrapped = lambda *args, name=name, function=function: calls.append(name) or function(*args)  # noqa: E731
        monkeypatch.setattr(place, name, wrapped)
    options = dict(options)
    filters, images = options.pop("filters", 6), noise(1, *size, options.pop("channels", 2))
    convolution(filters, "layer", **options)(images)
    assert calls == ([] if way is None else [way])


@pytest.mark.parametrize("way", [few_channels.to_few_channels, lambda *a: few_channels.of_images(*a, 1)])
def test_few_channels_in_bfloat16(way):
    images, kernel = noise(1, 9, 8, 10, 2) - 0.4, noise(3, 3, 3, 2, 3) - 0.6
    found = outcomes(way, tf.cast(images, tf.bfloat16), tf.cast(kernel, tf.bfloat16))
    expected = outcomes(lambda a, b: tf.nn.conv3d(a, b, [1] * 5, "SAME"), images, kernel)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == tf.bfloat16
        assert tf.norm(tf.cast(one, tf.float32) - other) < 0.02 * tf.norm(other)


def test_two_images_beside_each_other_and_the_gradient_of_each():
    found = outcomes(beside, noise(2, 3, 4, 5, 1), 1.0 - noise(2, 3, 4, 5, 1))
    expected = outcomes(lambda *images: tf.concat(images, -1), noise(2, 3, 4, 5, 1), 1.0 - noise(2, 3, 4, 5, 1))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
