"""The inverse of a flow: closed forms, and there and back."""

import numpy as np
import tensorflow as tf
from scipy import ndimage

from network.inverse import TOLERANCE, inverse
from network.spatial_transformer import compose


def test_of_a_shift():
    flow = np.broadcast_to(np.float32([1.5, -0.5, 0.25]), (1, 9, 8, 7, 3))
    found, error = inverse(tf.constant(flow))
    np.testing.assert_allclose(found, -flow, atol=1e-6)
    assert float(tf.reduce_max(error)) < 1e-6


def test_of_a_stretch():
    """p -> 1.25 p about the centre goes back by p -> p / 1.25, also where the flow leads out of the grid."""
    places = np.moveaxis(np.indices((21, 17, 13)), 0, -1) - np.array([10, 8, 6])
    flow = (0.25 * places)[None].astype(np.float32)
    found, error = inverse(tf.constant(flow))
    np.testing.assert_allclose(found[0], places / 1.25 - places, atol=2 * TOLERANCE)
    assert float(tf.reduce_max(error)) < TOLERANCE


def test_there_and_back():
    rng = np.random.default_rng(7)
    steep = np.stack([ndimage.gaussian_filter(rng.normal(0, 60, (2, 26, 24, 22)), (0, 3, 3, 3)) for _ in range(3)], -1)
    slopes = np.abs(np.stack(np.gradient(steep, axis=(1, 2, 3)))).max()
    flow = tf.constant((0.6 / slopes * steep).astype(np.float32))
    found, error = inverse(flow)
    inside = (slice(None), *(slice(4, -4),) * 3)
    assert float(tf.reduce_max(error)) < TOLERANCE
    for there, back in ((flow, found), (found, flow)):
        left = tf.norm(compose(there, back), axis=-1).numpy()[inside]
        assert left.max() < 0.1  # the inverse is linear between its voxels
    assert float(tf.reduce_max(tf.abs(flow))) > 1


def test_what_is_told_is_how_far_it_is_off():
    rng = np.random.default_rng(8)
    flow = tf.constant(rng.normal(0, 4, (1, 12, 11, 10, 3)).astype(np.float32))  # folds nearly everywhere
    found, error = inverse(flow)
    np.testing.assert_allclose(error, np.linalg.norm(compose(flow, found), axis=-1), atol=1e-4)
    assert 0 < np.mean(error > 1) < 1
