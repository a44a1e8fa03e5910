"""The augmentation: its draws, its field, and what it does to image, labels and landmarks."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.interpolate import BSpline

from network.augmentation import augment, draw_control_points, spline_flow
from network.spatial_transformer import warp

SIZE = (16, 12, 20)


def test_draws_depend_on_the_pairs_seed_alone():
    seeds = tf.constant([[1, 2], [1, 3], [1, 2]])
    control = draw_control_points(seeds, SIZE).numpy()
    assert control.shape == (3, 5, 5, 5, 3)
    np.testing.assert_array_equal(control[0], control[2])
    assert np.abs(control[0] - control[1]).max() > 0.1
    np.testing.assert_array_equal(control[1:2], draw_control_points(seeds[1:2], SIZE))


def test_draws_are_cubed_uniforms_of_at_most_a_tenth_of_the_size():
    offsets = draw_control_points(tf.stack([tf.range(60), tf.zeros(60, tf.int32)], 1), SIZE) / (np.array(SIZE) / 4)
    u = np.cbrt(offsets.numpy().ravel())
    bound = 0.4 ** (1 / 3)
    assert np.abs(u).max() == pytest.approx(bound, rel=0.01)
    assert u.mean() == pytest.approx(0, abs=0.02)
    assert u.var() == pytest.approx(bound**2 / 3, rel=0.03)


@pytest.mark.parametrize("size", [SIZE, (13, 7, 10)])
def test_field_against_scipys_b_splines(size):
    control = np.random.default_rng(0).normal(size=(1, 5, 5, 5, 3)).astype(np.float32)
    flow = spline_flow(tf.constant(control), size)

    def weights(n):
        position = (np.arange(n) + 0.5) / n * 4
        bases = [BSpline.basis_element(np.arange(k - 2, k + 3), extrapolate=False)(position) for k in range(5)]
        return np.nan_to_num(np.stack(bases, 1))

    expected = np.einsum("xi,yj,zk,bjikc->bxyzc", *(weights(n) for n in size), control)
    np.testing.assert_allclose(flow, expected, atol=1e-5)


def test_only_the_moving_images_are_deformed():
    rng = np.random.default_rng(1)
    batch = {name: tf.constant(rng.random((2, *SIZE, 1), np.float32)) for name in ("fixed", "moving")}
    control = draw_control_points(tf.constant([[5, 1], [5, 2]]), SIZE)
    out, flow = augment(batch, control), spline_flow(control, SIZE)
    assert out["fixed"] is batch["fixed"]
    np.testing.assert_allclose(out["moving"], warp(batch["moving"], flow), atol=1e-6)
    assert np.abs(out["moving"] - batch["moving"]).max() > 0.1
