"""Flows along velocities: against the equation of motion, their gradient, what they fold, and the way back."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import integrate as scipy_integrate
from scipy import ndimage

from network import losses, metrics
from network.affine import Affine, affine_flow, inverse_affine
from network.base_networks import BaseNetwork
from network.config import CascadeConfig
from network.recursive_cascaded_networks import build_network
from network.registry import Extension, Table
from network.spatial_transformer import compose
from network.training import kept_bytes
from network.velocities import integrate

SIZE = (14, 12, 17)


def smooth(size, seed=0, deviation=2.5, length=3.0):
    """A random velocity [1, X, Y, Z, 3] of so many voxels at most, smoothed by a Gaussian."""
    noise = np.random.default_rng(seed).standard_normal((*size, 3))
    field = ndimage.gaussian_filter(noise, (deviation, deviation, deviation, 0), mode="nearest")
    return tf.constant((field * length / np.abs(field).max())[None], tf.float32)


@pytest.mark.parametrize("fast", [True, False])
def test_a_constant_velocity_is_its_flow(fast):
    velocity = tf.fill((1, *SIZE, 3), 1.0) * [2.5, -1.25, 40.0]
    np.testing.assert_allclose(integrate(velocity, fast), velocity, rtol=1e-6)


def test_a_linear_velocity_grows_exponentially():
    """dx/dt = a (x - c) leads x - c to e^a (x - c); 128 small steps to (1 + a / 128)^128 times it, as linear as it."""
    rate = np.array([-0.5, 0.25, -1.0])
    centred = np.moveaxis(np.indices(SIZE), 0, -1) - (np.array(SIZE) - 1) / 2
    flow = integrate(tf.constant((rate * centred)[None], tf.float32)).numpy()[0]
    inner = (slice(None), slice(4, 8), slice(None))  # along y points go outwards
    expected = ((1 + rate / 128) ** 128 - 1) * centred
    np.testing.assert_allclose(flow[inner], expected[inner], atol=2e-4)
    np.testing.assert_allclose(flow[inner], (np.expm1(rate) * centred)[inner], rtol=0.01, atol=1e-3)


def test_a_smooth_velocity_against_the_equation_of_motion():
    size = (24, 22, 26)
    velocity = smooth(size, deviation=4, length=4)
    flow = integrate(velocity).numpy()[0]
    channels = [velocity[0, ..., k].numpy() for k in range(3)]

    def motion(_, place):
        return [ndimage.map_coordinates(channel, place[:, None], order=1, mode="nearest")[0] for channel in channels]

    for point in np.argwhere(np.linalg.norm(flow, axis=-1) > 1.5)[::200]:
        path = scipy_integrate.solve_ivp(motion, (0, 1), point.astype(float), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(flow[tuple(point)], path.y[:, -1] - point, atol=0.06)


def test_gradient_of_the_kernels_against_the_op_by_op_formula_and_a_direction():
    velocity, upstream = smooth(SIZE), smooth(SIZE, 1)
    gradients = []
    for fast in (True, False):
        with tf.GradientTape() as tape:
            tape.watch(velocity)
            value = tf.reduce_sum(upstream * integrate(velocity, fast))
        gradients.append(tape.gradient(value, velocity).numpy())
    np.testing.assert_allclose(gradients[0], gradients[1], atol=2e-5)
    way = smooth(SIZE, 2)
    high, low = (float(tf.reduce_sum(upstream * integrate(velocity + h * way))) for h in (0.01, -0.01))
    assert np.vdot(gradients[0], way) == pytest.approx((high - low) / 0.02, rel=0.01)


class Integrated:
    """In the place of a base network, for `kept_bytes`: a velocity made of the images, and its flow."""

    trainable_variables = ()

    def __call__(self, images):
        return integrate(tf.concat([*images, images[0]], -1))


def test_only_the_velocity_is_kept_for_the_backward_pass():
    assert sum(kept_bytes(Integrated(), SIZE)) / (4 * np.prod(SIZE)) <= 2 * 3


@pytest.mark.parametrize(
    ("deviation", "length", "most", "without"),
    [(2.5, 16, 0, 0.05), (1.5, 10, 0, 0.1), (0, 4, 0, 0.2), (0, 6, 0.004, 0.3)],
)
def test_what_folds(deviation, length, most, without):
    """Nothing up to slopes of 5 voxels a voxel, also of white noise; beyond, little. As displacements they all do."""
    velocity = smooth((24, 24, 24), deviation=deviation, length=length)
    folding = [float(metrics.folding(metrics.jacobian_determinant(v))[0]) for v in (integrate(velocity), velocity)]
    assert folding[0] <= most
    assert folding[1] > without


@pytest.mark.parametrize("sign", [1, -1])
def test_the_negative_velocity_leads_back(sign):
    velocity = sign * smooth((24, 24, 24), deviation=3, length=4)
    there, back = integrate(velocity), integrate(-velocity)
    left = tf.norm(compose(back, there), axis=-1).numpy()[0]
    inner = left[6:-6, 6:-6, 6:-6]
    assert inner.max() < 0.06
    assert inner.mean() < 0.01
    assert tf.reduce_max(tf.norm(there, axis=-1)) > 3


def test_an_affine_map_is_inverted_exactly():
    rng = np.random.default_rng(0)
    affine = Affine(
        tf.constant(0.4 * rng.random((2, 3, 3)), tf.float32), tf.constant(5 * rng.random((2, 3)), tf.float32)
    )
    there, back = (affine_flow(a, SIZE).numpy() for a in (affine, inverse_affine(affine)))
    linear = affine.matrix.numpy() + np.eye(3)
    centred = np.moveaxis(np.indices(SIZE), 0, -1) - (np.array(SIZE) - 1) / 2
    moved = (centred + back)[..., None]
    np.testing.assert_allclose(
        np.matmul(linear[:, None, None, None], moved)[..., 0] + affine.shift[:, None, None, None],
        np.broadcast_to(centred, there.shape),
        atol=1e-4,
    )


class Blurred(BaseNetwork):
    """A flow of some voxels, as smooth as a mean over seven voxels makes the images."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.layer = keras.layers.Dense(3, use_bias=False)

    def call(self, inputs):
        images = tf.concat(inputs, -1)
        for _ in range(3):
            images = tf.nn.avg_pool3d(images, 7, 1, "SAME")
        return self.layer(images - tf.reduce_mean(images, [1, 2, 3], keepdims=True)) * self.flow_multiplier


@pytest.fixture
def make(monkeypatch):
    """Function (size, options) -> a network of two cascades that move by some voxels, and its output for a pair."""
    monkeypatch.setattr("network.registry.BASE_NETWORKS", Table("base_network", {"Blurred": Extension(Blurred)}))
    for module in ("config", "recursive_cascaded_networks"):
        monkeypatch.setattr(f"network.{module}.BASE_NETWORKS", Table("base_network", {"Blurred": Extension(Blurred)}))

    def made(size, **options):
        keras.utils.set_random_seed(1)
        network = build_network(CascadeConfig("Blurred", 2, image_size=size, **options))
        for cascade in network.cascades:
            cascade.layer.kernel.assign(20 / network.config.rep * np.float32([[1, -2, 0], [0, 1, -1]]))
        images = [smooth(size, seed, length=1.0)[..., :1] for seed in (0, 1)]
        return network, network(images)

    return made


@pytest.mark.parametrize(("rep", "flow"), [(1, "velocity"), (2, "velocity"), (1, "displacement")])
def test_the_inverse_of_a_network_leads_back(make, rep, flow):
    network, output = make((26, 30, 28), rep=rep, flow=flow)
    assert len(output.velocities) == (2 * rep if flow == "velocity" else 0)
    inner = (0, *(slice(7, -7),) * 3)
    for first, second in [(output.flow, network.inverse(output)), (network.inverse(output), output.flow)]:
        assert tf.norm(first[inner], axis=-1).numpy().mean() > 1
        left = tf.norm(compose(first, second)[inner], axis=-1).numpy()
        assert left.mean() < 0.03
        assert left.max() < 0.1


def test_the_stages_of_a_network_with_velocities(make):
    network, output = make((16, 20, 18), flow="velocity")
    for stage, velocity in zip(output.stages[1:], output.velocities, strict=True):
        np.testing.assert_allclose(stage.flow, integrate(velocity), atol=1e-6)
    terms = losses.cascade_losses(output.warped, output, network.config.replace(bending_factor=2.0))
    for k, velocity in enumerate(output.velocities, start=1):
        assert float(terms[f"{k}_reg_loss"]) == pytest.approx(float(losses.smoothness_loss(velocity)[0]), rel=1e-5)
        assert float(terms[f"{k}_bending_loss"]) == pytest.approx(2 * float(losses.bending_loss(velocity)[0]), rel=1e-5)
