"""Warp, composition, sampling and the label vote: closed forms, then SciPy, then properties."""

import gc
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from scipy.ndimage import map_coordinates

from network.spatial_transformer import compose, sample_at_points, warp

ROOT = pathlib.Path(__file__).parents[2]
SIZE = (7, 9, 5)
BOTH = pytest.mark.parametrize("fast", [True, False])


def ramp(size=SIZE):
    """3x + 5y + 7z + 1, which trilinear interpolation gives exactly: [1, X, Y, Z, 1]."""
    x, y, z = np.indices(size, dtype=np.float32)
    return tf.constant((3 * x + 5 * y + 7 * z + 1)[None, ..., None])


def smooth_flow(rng, size=SIZE, amplitude=2.5, batch=2):
    return tf.constant(rng.uniform(-amplitude, amplitude, (batch, *size, 3)).astype(np.float32))


def clamped(image, flow):
    """SciPy's answer, an image and channel at a time, with the edge repeated."""
    image, flow = np.asarray(image, np.float64), np.asarray(flow, np.float64)
    out = np.empty((*flow.shape[:4], image.shape[-1]))
    for b, c in np.ndindex(len(image), image.shape[-1]):
        places = np.moveaxis(np.moveaxis(np.indices(flow.shape[1:4]), 0, -1) + flow[b], -1, 0)
        out[b, ..., c] = map_coordinates(image[b, ..., c], places, order=1, mode="nearest")
    return out


@BOTH
def test_a_constant_flow_moves_each_axis_by_its_own_channel(fast):
    flow = tf.broadcast_to(tf.constant([0.25, -0.5, 1.5]), (1, *SIZE, 3))
    warped = warp(ramp(), flow, fast=fast)
    inside = np.s_[:, 0:6, 1:9, 0:3]
    np.testing.assert_allclose(warped[inside], (ramp() + 3 * 0.25 - 5 * 0.5 + 7 * 1.5)[inside], rtol=1e-6)


@BOTH
@pytest.mark.parametrize("far", [0.5, 50, 1000, 1e6])
def test_outside_the_volume_the_edge_is_exact_however_far(fast, far):
    image = tf.constant(np.random.default_rng(0).random((1, *SIZE, 1), np.float32))
    for axis in range(3):
        for side in (-1, 1):
            flow = np.zeros((1, *SIZE, 3), np.float32)
            flow[..., axis] = side * (far + SIZE[axis])
            edge = np.take(image, [0 if side < 0 else SIZE[axis] - 1], axis=axis + 1)
            np.testing.assert_array_equal(warp(image, tf.constant(flow), fast=fast), np.broadcast_to(edge, image.shape))


@BOTH
def test_against_scipy(fast):
    rng = np.random.default_rng(1)
    image = rng.random((2, *SIZE, 3), np.float32)
    flow = smooth_flow(rng)
    np.testing.assert_allclose(warp(tf.constant(image), flow, fast=fast), clamped(image, flow), atol=2e-6)
    padded = np.pad(image, [(0, 0), (1, 1), (1, 1), (1, 1), (0, 0)])
    wide = np.pad(flow, [(0, 0), (1, 1), (1, 1), (1, 1), (0, 0)])
    expected = clamped(padded, wide)[:, 1:-1, 1:-1, 1:-1]
    np.testing.assert_allclose(warp(tf.constant(image), flow, True, fast), expected, atol=2e-6)


@BOTH
def test_image_and_flow_may_have_grids_of_their_own(fast):
    rng = np.random.default_rng(2)
    image, flow = rng.random((2, 6, 4, 8, 1), np.float32), smooth_flow(rng, (5, 7, 3))
    np.testing.assert_allclose(warp(tf.constant(image), flow, fast=fast), clamped(image, flow), atol=2e-6)


@BOTH
def test_gradients_against_finite_differences(fast):
    rng = np.random.default_rng(3)
    image = rng.random((1, 4, 5, 3, 2), np.float32)
    # Away from whole coordinates, where the interpolation has a kink, by more than the difference's step.
    flow = np.floor(rng.uniform(-2, 2, (1, 4, 5, 3, 3))) + rng.uniform(0.2, 0.8, (1, 4, 5, 3, 3))
    flow = flow.astype(np.float32)
    upstream = rng.random((1, 4, 5, 3, 2), np.float32)
    with tf.GradientTape() as tape:
        image_variable, flow_variable = tf.Variable(image), tf.Variable(flow)
        warped = warp(image_variable, flow_variable, fast=fast)
    gradients = tape.gradient(warped, [image_variable, flow_variable], upstream)

    def total(image, flow):
        return (clamped(image, flow) * upstream).sum()

    for which, value in enumerate((image, flow)):
        expected = np.empty(value.shape)
        for place in np.ndindex(value.shape):
            ends = []
            for sign in (1, -1):
                moved = [image.astype(np.float64), flow.astype(np.float64)]
                moved[which][place] += sign * 0.05
                ends.append(total(*moved))
            expected[place] = (ends[0] - ends[1]) / 0.1
        np.testing.assert_allclose(gradients[which], expected, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(17, 3, 4), (1, 6, 5)])
def test_the_gradient_of_the_image_is_that_of_the_formula(channels, size):
    rng = np.random.default_rng(channels)
    image = tf.constant(rng.normal(size=(2, 9, 4, 5, channels)), tf.float32)
    flow = tf.constant(rng.normal(0, 3, (2, *size, 3)), tf.float32)
    upstream = tf.constant(rng.normal(size=(2, *size, channels)), tf.float32)
    gradients = []
    for fast in (True, False):
        with tf.GradientTape() as tape:
            tape.watch(image)
            warped = warp(image, flow, fast=fast)
        gradients.append(tape.gradient(warped, image, upstream))
    np.testing.assert_allclose(*gradients, atol=1e-5)


@BOTH
def test_a_clamped_coordinate_has_no_gradient(fast):
    flow = np.zeros((1, *SIZE, 3), np.float32)
    flow[..., 1] = 20.0
    flow[..., 2] = -20.0
    with tf.GradientTape() as tape:
        variable = tf.Variable(flow + np.float32([0.3, 0, 0]))
        warped = warp(ramp(), variable, fast=fast)
    gradient = tape.gradient(warped, variable)
    np.testing.assert_array_equal(gradient[..., 1:], 0)
    np.testing.assert_allclose(gradient[:, :-1, ..., 0], 3, rtol=1e-5)


@BOTH
def test_a_nan_in_the_flow_gives_nan_there_and_nowhere_else(fast):
    flow = np.zeros((1, *SIZE, 3), np.float32)
    flow[0, 2, 3, 4, 1] = np.nan
    warped = warp(ramp(), tf.constant(flow), fast=fast).numpy()
    assert np.isnan(warped[0, 2, 3, 4, 0])
    assert np.isnan(warped).sum() == 1


def kept_by_a_tape(fast):
    """Bytes that are in use only while a tape remembers a warp."""
    size = (64, 66, 65)  # what is small, the allocator does not count
    image, flow = ramp(size), smooth_flow(np.random.default_rng(5), size, batch=1)

    def in_use():
        gc.collect()
        return tf.config.experimental.get_memory_info("CPU:0")["current"]

    with tf.GradientTape() as tape:
        tape.watch([image, flow])
        warped = warp(image, flow, fast=fast)
    before = in_use()
    del tape
    assert warped.shape == (1, *size, 1)
    return before - in_use()


def test_a_tape_keeps_nothing_but_image_and_flow():
    # In a process of its own, since TensorFlow counts nothing where it was started with the system's allocator.
    code = "from tests.test_network.test_spatial_transformer import kept_by_a_tape as k; print(k(True), k(False))"
    env = {name: value for name, value in os.environ.items() if name != "TF_ONEDNN_USE_SYSTEM_ALLOCATOR"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    fast, plain = map(int, done.stdout.split())
    assert fast == 0
    assert plain > 0


def test_composition_with_a_constant_flow():
    second = tf.broadcast_to(tf.constant([1.0, 0.0, -1.0]), (1, *SIZE, 3))
    first = tf.concat([ramp(), 2 * ramp(), -ramp()], axis=-1)
    composed = compose(first, second)
    moved = ramp()[:, 1:, :, :-1]  # the first flow one voxel on along x and one back along z
    expected = np.concatenate([moved, 2 * moved, -moved], axis=-1) + [1, 0, -1]
    np.testing.assert_allclose(composed[:, :-1, :, 1:], expected, rtol=1e-6)


def test_warping_by_a_composed_flow_is_warping_twice():
    rng = np.random.default_rng(4)
    first = tf.constant(rng.uniform(-1, 1, (1, 1, 1, 1, 3)).astype(np.float32) * np.ones((1, *SIZE, 1), np.float32))
    second = smooth_flow(rng, amplitude=1, batch=1)
    composed = compose(first, second)
    inner = np.s_[:, 2:-2, 2:-2, 2:-2]
    twice = warp(warp(ramp(), first), second)
    np.testing.assert_allclose(warp(ramp(), composed)[inner], twice[inner], rtol=1e-5)


def test_points_read_the_image_and_zero_outside():
    points = tf.constant([[[1.5, 2.25, 3.0], [-0.5, 2, 2], [-1, 2, 2], [6.5, 8, 4], [900, 0, 0]]])
    values = sample_at_points(ramp(), points)[0, :, 0]
    at_edge = 1 + 5 * 2 + 7 * 2
    expected = [3 * 1.5 + 5 * 2.25 + 7 * 3 + 1, at_edge / 2, 0, (3 * 6 + 5 * 8 + 7 * 4 + 1) / 2, 0]
    np.testing.assert_allclose(values, expected, rtol=1e-6)
