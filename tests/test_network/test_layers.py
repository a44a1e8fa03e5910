"""One harness for every layer and model (config, shapes, graph, saving, gradients), and what is special to each."""

import gc
import itertools
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

from errors import UserError
from network.affine import AffineNetwork, resampled_kernel
from network.base_networks import VTN, VoxelMorph
from network.blocks import (
    DoublingConvolution,
    Encoder,
    FlowUpConvolution,
    UpConvolution,
    convolution,
    leaky_relu,
)
from network.config import CascadeConfig
from network.kernels import whole_step
from network.recursive_cascaded_networks import RecursiveCascadedNetwork, build_network
from network.registry import BASE_NETWORKS

SIZES = [(32, 16, 24), (13, 18, 35)]


def noise(*shape):
    return tf.constant(np.random.default_rng(0).random(shape, np.float32))


def images(size):
    return [noise(2, *size, 1), 1.0 - noise(2, *size, 1)]


def cascades(size, **options):
    return build_network(CascadeConfig(image_size=size, channels=2, **options))


# name -> (layer for a size, its inputs for a size)
CASES = {
    "Encoder": (lambda size: Encoder(channels=2), lambda size: noise(2, *size, 2)),
    "UpConvolution": (
        lambda size: UpConvolution(5),
        lambda size: [noise(2, *(-(-n // 2) for n in size), 3), noise(2, *size, 1)],
    ),
    "FlowUpConvolution": (
        lambda size: FlowUpConvolution(3),
        lambda size: [noise(2, *(-(-n // 2) for n in size), 5), noise(2, *size, 1)],
    ),
    "DoublingConvolution": (
        lambda size: convolution(4, "layer", kind=DoublingConvolution),
        lambda size: [noise(2, *(-(-n // 2) for n in size), 3), noise(2, *size, 2)],
    ),
    "AffineNetwork": (lambda size: AffineNetwork(leaky_slope=0.2), images),
    "VTN": (lambda size: VTN(channels=2, flow_multiplier=0.5), images),
    "VoxelMorph": (lambda size: VoxelMorph(channels=2, leaky_slope=0.3), images),
    "cascade of VTN": (lambda size: cascades(size, n_cascades=2), images),
    "cascade of VoxelMorph": (lambda size: cascades(size, base_network="VoxelMorph", rep=2), images),
    "affine alone": (lambda size: cascades(size, n_cascades=0), images),
}


# The cascades at their second size repeat what their networks show at both.
REPEATS = [("cascade of VTN", SIZES[1]), ("cascade of VoxelMorph", SIZES[1]), ("affine alone", SIZES[1])]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] if case in REPEATS else [])
        for case in itertools.product(CASES, SIZES)
    ],
)
def test_harness(name, size, tmp_path):
    make, make_inputs = CASES[name]
    keras.utils.set_random_seed(1)
    layer, inputs = make(size), make_inputs(size)
    outputs = tf.nest.flatten(layer(inputs))

    again = type(layer).from_config(layer.get_config())
    symbolic = tf.nest.flatten(again(tf.nest.map_structure(lambda x: keras.Input(batch_shape=x.shape), inputs)))
    assert [tuple(s.shape) for s in symbolic] == [tuple(o.shape) for o in outputs]
    assert again.get_config() == layer.get_config()
    assert [w.shape for w in again.weights] == [w.shape for w in layer.weights]

    in_graph = tf.nest.flatten(whole_step(layer)(inputs))
    again.set_weights(layer.get_weights())
    for eager, graph, copied in zip(outputs, in_graph, tf.nest.flatten(again(inputs)), strict=True):
        np.testing.assert_allclose(graph, eager, atol=1e-4)
        np.testing.assert_allclose(copied, eager, atol=1e-4)

    if isinstance(layer, keras.Model):
        layer.save_weights(tmp_path / "a.weights.h5")
        again.set_weights([np.zeros_like(w) for w in layer.get_weights()])
        again.load_weights(tmp_path / "a.weights.h5")
        for eager, loaded in zip(outputs, tf.nest.flatten(again(inputs)), strict=True):
            np.testing.assert_allclose(loaded, eager, atol=1e-4)

    with tf.GradientTape() as tape:
        loss = tf.add_n([tf.reduce_sum(tf.square(o)) for o in tf.nest.flatten(layer(inputs))])
    gradients = tape.gradient(loss, layer.trainable_variables)
    for weight, gradient in zip(layer.trainable_variables, gradients, strict=True):
        assert gradient is not None, weight.path
        assert np.isfinite(gradient).all(), weight.path


@pytest.mark.parametrize("base_network", ["VTN", "VoxelMorph"])
def test_a_layer_alone_keeps_its_precision(base_network):
    layer = BASE_NETWORKS[base_network].load()(channels=2, dtype="mixed_bfloat16")
    again = type(layer).from_config(layer.get_config())
    again(images((8, 9, 10)))
    parts = [part for part in again._flatten_layers(include_self=False) if part is not again.head]
    assert {part.compute_dtype for part in parts} == {"bfloat16"}


def test_a_network_that_is_dropped_gives_its_weights_back():
    network = cascades((8, 9, 10))
    weights = weakref.ref(network.cascades[0].head)
    del network
    gc.collect()
    assert weights() is None


@pytest.mark.parametrize("slope", [0.0, 0.1, 0.7])
def test_the_leaky_relu_and_its_gradient(slope):
    x = tf.constant([-3.0, -1e-30, 0.0, 1e-30, 2.0])
    with tf.GradientTape() as tape:
        tape.watch(x)
        out = leaky_relu(x, slope)
    np.testing.assert_allclose(out, [-3.0 * slope, -1e-30 * slope, 0.0, 1e-30, 2.0])
    gradient = tape.gradient(out, x, tf.constant([1.0, 2.0, 3.0, 4.0, 5.0]))
    np.testing.assert_allclose(gradient, [slope, 2 * slope, 3 * slope, 4.0, 5.0])


def test_initial_weights_are_drawn_as_the_original_draws_them():
    keras.utils.set_random_seed(3)
    network = build_network(CascadeConfig("VTN", 1, image_size=(64, 64, 64)))
    for name, weight in network.named_weights().items():
        values = weight.numpy()
        if name.endswith("/b"):
            assert not values.any(), name
        else:
            bound = np.sqrt(3 / np.prod(values.shape[:-1]))
            assert np.abs(values).max() <= bound * (1 + 1e-6)
            assert np.abs(values).max() > 0.9 * bound, name
            assert values.std() == pytest.approx(bound / np.sqrt(3), rel=0.3), name
    head = build_network(CascadeConfig("VoxelMorph", 1, image_size=(16, 16, 16))).named_weights()
    assert head["gaffdfrm/deform_stem_0/flow/W"].numpy().std() == pytest.approx(1e-5, rel=0.2)


def test_repeats_share_weights_and_the_flow_multiplier_ignores_them():
    size = (16, 16, 16)
    once, twice = cascades(size, n_cascades=2), cascades(size, n_cascades=2, rep=2)
    twice.set_weights(once.get_weights())
    assert len(twice.weights) == len(once.weights)
    one, two = once(images(size)), twice(images(size))
    assert len(one.stages) == 3
    assert len(two.stages) == 5
    np.testing.assert_allclose(two.stages[1].flow, one.stages[1].flow, atol=1e-5)
    assert {c.flow_multiplier for c in twice.cascades} == {0.5}


def test_a_frozen_cascade_is_repeated_too():
    size = (16, 16, 16)
    model = cascades(size, rep=2)
    before = model(images(size)).flow
    model.trainable = False
    np.testing.assert_array_equal(model(images(size)).flow, before)


def test_cascades_are_traced_once_with_the_weights_of_each(monkeypatch):
    size, calls, call = (16, 16, 16), [], VTN.call
    model = cascades(size, n_cascades=3, rep=2)
    expected = model(images(size)).flow
    monkeypatch.setattr(VTN, "call", lambda self, inputs: calls.append(self.name) or call(self, inputs))
    np.testing.assert_allclose(tf.function(model)(images(size)).flow, expected, atol=1e-5)
    assert len(calls) == 1
    model.cascades[1].trainable = False
    np.testing.assert_allclose(tf.function(model)(images(size)).flow, expected, atol=1e-5)
    assert calls[1:] == ["deform_stem_0", "deform_stem_1"]


def test_weights_that_are_to_be_read_are_not_drawn(monkeypatch):
    config = CascadeConfig("VTN", 1, image_size=(16, 16, 16))
    drawn = build_network(config).get_weights()
    assert all(np.any(weight) for weight in drawn if weight.ndim > 1)
    monkeypatch.setattr(keras.initializers.LecunUniform, "__call__", None)
    assert [w.shape for w in build_network(config, drawn=False).get_weights()] == [w.shape for w in drawn]


@pytest.mark.parametrize("rep", [-1, 2.5, True])
def test_a_wrong_number_of_repeats_is_named(rep):
    with pytest.raises(UserError, match=f"rep.*{rep}"):
        cascades((16, 16, 16))(images((16, 16, 16)), rep=rep)


def test_no_gradient_through_the_warped_image_when_asked():
    size = (16, 16, 16)
    gradients = {}
    for warp_gradient in (True, False):
        keras.utils.set_random_seed(0)
        network = cascades(size, n_cascades=1, warp_gradient=warp_gradient)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(network(images(size)).stages[1].flow ** 2)
        gradients[warp_gradient] = tape.gradient(loss, network.affine.shift_head.kernel.value)
    assert np.abs(gradients[True]).max() > 0
    assert gradients[False] is None


@pytest.mark.parametrize("base_network", [pytest.param("VTN", marks=pytest.mark.slow), "VoxelMorph"])
def test_a_model_saved_by_keras_comes_back(base_network, tmp_path):
    network = cascades((16, 17, 18), base_network=base_network)
    network.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded, RecursiveCascadedNetwork)
    assert loaded.config == network.config
    np.testing.assert_allclose(loaded(images((16, 17, 18))).flow, network(images((16, 17, 18))).flow, atol=1e-5)


def test_a_class_derived_from_a_published_network_builds_layers_of_its_own():
    class Mine(VTN):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.last = keras.layers.Conv3D(3, 1)

        def call(self, inputs):
            return self.last(super().call(inputs))

    network = Mine(channels=2)
    network.build([(1, 16, 16, 16, 1)] * 2)
    assert len(network.trainable_variables) == len(cascades((16, 16, 16)).cascades[0].trainable_variables) + 2


def test_a_resampled_kernel_keeps_what_lies_in_each_part_of_the_grid():
    kernel = np.random.default_rng(0).random((2, 3, 1, 4, 5))
    np.testing.assert_allclose(resampled_kernel(kernel, (2, 3, 1)), kernel)
    np.testing.assert_allclose(resampled_kernel(kernel, (1, 1, 1))[0, 0, 0], kernel.sum((0, 1, 2)), rtol=1e-12)
    finer = resampled_kernel(kernel, (4, 6, 3))
    np.testing.assert_allclose(finer[1, 4, 2], kernel[0, 2, 0] / 12)
    # Three voxels as two: the middle one is shared.
    coarser = resampled_kernel(kernel, (2, 2, 1))
    np.testing.assert_allclose(coarser[:, 0], kernel[:, 0] + kernel[:, 1] / 2)
