"""Similarities of neighbourhoods against NumPy and SciPy in double precision, their gradients, and masks of all."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage

from network.local_similarity import local_correlation_loss, mind_descriptor, mind_loss
from network.registry import SIMILARITIES

SIZE = (7, 12, 10)


def random(*shape, seed=0):
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def sums(image, window):
    return ndimage.uniform_filter(image.astype(np.float64), window, mode="constant") * window**3


def plain_loss(fixed, warped, mask, window):
    """1 - weighted mean of the squared weighted correlation of the windows: of one pair [X, Y, Z]."""
    count = sums(mask, window)
    mean = lambda image: sums(mask * image, window) / np.maximum(count, 1e-9)  # noqa: E731
    fixed, warped = (image - (mask * image).sum() / mask.sum() for image in (fixed, warped))
    covariance = mean(fixed * warped) - mean(fixed) * mean(warped)
    variances = [mean(image**2) - mean(image) ** 2 + 1e-5 for image in (fixed, warped)]
    return 1 - (mask * covariance**2 / variances[0] / variances[1]).sum() / mask.sum()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("of", ["fixed", "warped"])
@pytest.mark.parametrize("window", [3, 5])
def test_gradient_of_the_local_correlation_voxel_by_voxel(window, of, masked):
    images = {"fixed": random(1, *SIZE, 1), "warped": random(1, *SIZE, 1, seed=1)}
    mask = random(1, *SIZE, 1, seed=2) * (random(1, *SIZE, 1, seed=3) > 0.3) if masked else np.ones((1, *SIZE, 1))
    tensors = {side: tf.constant(image) for side, image in images.items()}
    with tf.GradientTape() as tape:
        tape.watch(tensors[of])
        loss = local_correlation_loss(
            *tensors.values(), window=window, mask=tf.constant(mask, tf.float32) if masked else None
        )
    gradient = tape.gradient(loss, tensors[of]).numpy()[0, ..., 0]
    plain = {side: image[0, ..., 0].astype(np.float64) for side, image in images.items()}
    assert float(loss[0]) == pytest.approx(plain_loss(**plain, mask=mask[0, ..., 0], window=window), abs=2e-5)
    for voxel in [(0, 0, 0), (3, 5, 6), (6, 11, 9), (1, 11, 4), (5, 2, 0)]:
        ends = []
        for step in (1e-4, -1e-4):
            moved = {side: image.copy() for side, image in plain.items()}
            moved[of][voxel] += step
            ends.append(plain_loss(**moved, mask=mask[0, ..., 0], window=window))
        assert gradient[voxel] == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=2e-3, abs=2e-7)


@pytest.mark.parametrize("similarity", ["ncc", "lncc", "mi"])
def test_what_lies_outside_a_mask_has_no_influence_at_all(similarity):
    mask = tf.constant((random(2, *SIZE, 1, seed=2) > 0.4) * random(2, *SIZE, 1, seed=3))
    found = []
    for outside in (0.2, 1.0, np.nan):
        fixed, warped = (
            tf.where(mask > 0, tf.constant(random(2, *SIZE, 1, seed=k)), outside * (k + 1) / 2) for k in (0, 1)
        )
        with tf.GradientTape() as tape:
            tape.watch(warped)
            loss = SIMILARITIES[similarity].load()(fixed, warped, mask=mask)
        found.append((loss.numpy(), tape.gradient(loss, warped).numpy()))
    assert np.isfinite(found[0][0]).all()
    for loss, gradient in found[1:]:
        np.testing.assert_array_equal(loss, found[0][0])
        np.testing.assert_array_equal(gradient, found[0][1])
    assert not found[0][1][mask.numpy() == 0].any()
    assert found[0][1][mask.numpy() > 0].any()


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_mask_of_one_weight_everywhere_is_none(similarity):
    fixed, warped = tf.constant(random(2, *SIZE, 1)), tf.constant(random(2, *SIZE, 1, seed=1))
    loss = SIMILARITIES[similarity].load()
    expected = loss(fixed, warped)
    np.testing.assert_allclose(loss(fixed, warped, mask=tf.fill(fixed.shape, 0.5)), expected, rtol=1e-4)
    half = tf.constant((np.arange(12) < 6).astype(np.float32)[None, None, :, None, None] * np.ones_like(fixed))
    cut = [loss(*(image[:, :, :6] for image in (fixed, warped))), loss(fixed, warped, mask=half)]
    if similarity != "mind":  # whose neighbourhoods look beyond
        np.testing.assert_allclose(cut[1], cut[0], rtol=1e-4)


def plain_mind(image, radius, dilation):
    """MIND-SSC of [X, Y, Z], patch by patch."""
    padded = np.pad(image.astype(np.float64), dilation, mode="edge")
    offsets = [np.eye(3, dtype=int)[axis] * side for axis in range(3) for side in (-dilation, dilation)]
    descriptor = []
    for one, other in itertools.combinations(offsets, 2):
        if abs(one @ other) > 0:  # opposite neighbours
            continue
        a, b = (np.roll(padded, tuple(-offset), (0, 1, 2)) for offset in (one, other))
        squares = ((a - b) ** 2)[(slice(dilation, -dilation),) * 3]
        distance = np.empty_like(squares)
        for place in np.ndindex(squares.shape):
            patch = tuple(slice(max(p - radius, 0), p + radius + 1) for p in place)
            distance[place] = squares[patch].mean()
        descriptor.append(distance)
    distances = np.array(descriptor)
    return np.exp(-(distances - distances.min(0)) / (distances.mean(0) + 1e-5))


@pytest.mark.parametrize(("radius", "dilation"), [(1, 2), (2, 1), (1, 3)])
def test_mind_against_numpy(radius, dilation):
    fixed, warped = random(1, *SIZE, 1), random(1, *SIZE, 1, seed=1)
    expected = [plain_mind(image[0, ..., 0], radius, dilation) for image in (fixed, warped)]
    found = mind_descriptor(tf.constant(fixed), radius, dilation)[:, 0].numpy()
    assert found.shape == (12, *SIZE)
    np.testing.assert_allclose(found, expected[0], atol=1e-4)
    loss = mind_loss(tf.constant(fixed), tf.constant(warped), radius, dilation)
    assert float(loss[0]) == pytest.approx(((expected[0] - expected[1]) ** 2).mean(), rel=1e-4)


def test_mind_sees_structure_and_not_grey_values():
    image = ndimage.gaussian_filter(random(*SIZE), 1)
    image = tf.constant((image - image.min())[None, ..., None] / np.ptp(image))
    shifted = tf.roll(image, 2, 2)
    assert float(mind_loss(image, 1 - image)[0]) < 1e-6 < 1e-2 < float(mind_loss(image, shifted)[0])
