"""Random contrasts: their draws, and what they do to grey values."""

import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage
from scipy.interpolate import BSpline

from network.contrast import KNOTS, Contrast, draw_contrast, recolour

SIZE = (10, 13, 17)
RANGES = {"gamma": 0.5, "blur": 1.2, "bias": 0.3, "noise": 0.05}


def image(seed=0, pairs=2):
    return np.random.default_rng(seed).random((pairs, *SIZE, 1), np.float32)


def plain(pairs=2):
    """The contrast that changes nothing."""
    ramp = np.linspace(0, 1, KNOTS, dtype=np.float32)
    none = np.zeros(pairs, np.float32)
    return Contrast(none + 1, np.tile(ramp, (pairs, 1)), none, np.zeros((pairs, 5, 5, 5), np.float32), 0 * image(0))


def seeds(n, first=3):
    return tf.stack([tf.fill([n], first), tf.range(n)], 1)


def test_draws_depend_on_the_seed_alone():
    drawn = draw_contrast(tf.constant([[1, 2], [1, 3], [1, 2]]), SIZE, **RANGES)
    alone = draw_contrast(tf.constant([[1, 3]]), SIZE, **RANGES)
    for name, values in drawn._asdict().items():
        np.testing.assert_array_equal(values[0], values[2], name)
        np.testing.assert_array_equal(values[1:2], getattr(alone, name), name)
        assert np.abs(values[0] - values[1]).max() > 0, name


def test_draws_stay_in_their_ranges_and_half_of_the_maps_rise():
    ranges = {"gamma": 1.0, "blur": 2.0, "bias": 0.4, "noise": 0.1}
    drawn = tf.function(lambda: draw_contrast(seeds(200), (4, 4, 4), **ranges))()
    logarithm = np.log2(drawn.exponent)
    assert -1 <= logarithm.min() < -0.9
    assert 0.9 < logarithm.max() <= 1
    assert 1.9 < drawn.blur.numpy().max() <= 2
    assert 0.39 < np.abs(drawn.bias).max() <= 0.4
    assert (drawn.knots.numpy().min(1) == 0).all()
    assert (drawn.knots.numpy().max(1) == 1).all()
    rising = (np.diff(drawn.knots, axis=1) >= 0).all(1)
    assert 0.4 < rising.mean() < 0.6
    noise = drawn.noise.numpy().reshape(200, -1)
    deviations = noise.std(1)
    assert deviations.max() < 0.15
    assert deviations.mean() == pytest.approx(0.05, rel=0.15)
    assert np.abs(noise.mean()) < 0.005


@pytest.mark.parametrize("blur", [0.0, 1.2])
def test_the_plain_contrast_changes_nothing(blur):
    np.testing.assert_allclose(recolour(tf.constant(image()), plain(), blur), image(), atol=2e-6)


def test_every_part_against_numpy_and_scipy():
    drawn = draw_contrast(seeds(2), SIZE, **RANGES)
    got = recolour(tf.constant(image()), drawn, RANGES["blur"])

    def bases(n):
        places = np.linspace(0, 2, n)
        found = [BSpline.basis_element(np.arange(k - 3, k + 2), extrapolate=False)(places) for k in range(5)]
        return np.nan_to_num(np.stack(found, 1))

    for k in range(2):
        exponent, knots, deviation, bias, noise = (np.float64(part[k]) for part in drawn)
        expected = np.interp(image()[k, ..., 0].astype(np.float64) ** exponent, np.linspace(0, 1, KNOTS), knots)
        expected = ndimage.gaussian_filter(expected, deviation, mode="nearest", radius=3)
        expected = expected * np.exp(np.einsum("xi,yj,zk,ijk->xyz", *map(bases, SIZE), bias)) + noise[..., 0]
        np.testing.assert_allclose(got[k, ..., 0], np.clip(expected, 0, 1), atol=2e-5)


@pytest.mark.parametrize("part", ["exponent", "knots", "blur", "bias", "noise"])
def test_each_part_changes_the_image_of_its_pair_alone(part):
    drawn = draw_contrast(seeds(2), SIZE, **RANGES)
    mixed = np.stack([getattr(plain(), part)[0], getattr(drawn, part)[1]])
    got = recolour(tf.constant(image()), plain()._replace(**{part: mixed}), RANGES["blur"])
    np.testing.assert_allclose(got[0], image()[0], atol=2e-6)
    assert np.abs(got[1] - image()[1]).max() > 0.02
