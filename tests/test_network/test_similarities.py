"""Similarities of two images against NumPy and SciPy in double precision, and their gradients."""

import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage
from scipy.interpolate import BSpline

from network import losses
from network.affine import Affine
from network.config import CascadeConfig
from network.local_similarity import local_correlation_loss
from network.recursive_cascaded_networks import CascadeOutput, Stage
from network.registry import SIMILARITIES as TABLE

SIZE = (6, 9, 4)


def random(*shape, seed=0):
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def test_correlation_a_pair_against_numpy():
    fixed, warped = random(3, *SIZE, 1), random(3, *SIZE, 1, seed=1)
    warped[1] = 0.5 - 2 * fixed[1]
    warped[2] = 0.7
    values = losses.correlation(tf.constant(fixed), tf.constant(warped))
    expected = np.corrcoef(fixed[0].ravel(), warped[0].ravel())[0, 1]
    np.testing.assert_allclose(values, [expected, -1, 0], atol=2e-5)
    np.testing.assert_allclose(losses.correlation_loss(fixed, warped), 1 - np.array([expected, -1, 0]), atol=2e-5)


def test_correlation_of_a_large_volume_keeps_its_digits():
    fixed = random(1, 96, 80, 112, 1) + 10
    warped = fixed + random(1, 96, 80, 112, 1, seed=1)
    expected = np.corrcoef(fixed.ravel().astype(float), warped.ravel().astype(float))[0, 1]
    assert losses.correlation(tf.constant(fixed), tf.constant(warped)).numpy()[0] == pytest.approx(expected, abs=1e-4)


def test_gradients_of_the_correlation_against_the_op_by_op_formula():
    fixed, warped = tf.constant(random(2, *SIZE, 1)), tf.constant(3.0 - 2.0 * random(2, *SIZE, 1, seed=1))
    factor = tf.constant([2.0, -3.0])
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([fixed, warped])
        found = losses.correlation(fixed, warped)
        a, b = (image - tf.reduce_mean(image, [1, 2, 3, 4], keepdims=True) for image in (fixed, warped))
        means = (tf.reduce_mean(product, [1, 2, 3, 4]) for product in (a * a, a * b, b * b))
        of_a, of_both, of_b = means
        plain = of_both / tf.sqrt((of_a + 1e-6) * (of_b + 1e-6))
    np.testing.assert_allclose(found, plain, atol=1e-6)
    for image in (fixed, warped):
        one, other = tape.gradient(found, image, factor), tape.gradient(plain, image, factor)
        np.testing.assert_allclose(one, other, atol=1e-4 * float(tf.reduce_max(tf.abs(other))))


SIMILARITIES = pytest.mark.parametrize("similarity", [row.load() for row in TABLE.values()], ids=list(TABLE))


def test_every_similarity_of_the_config_has_a_function():
    assert list(TABLE) == ["ncc", "lncc", "mi", "mind"]
    assert TABLE[CascadeConfig().similarity].load() is losses.correlation_loss


def test_the_training_loss_takes_the_similarity_of_the_config():
    flow, warped, fixed = (
        tf.zeros((2, *SIZE, 3)),
        tf.constant(random(2, *SIZE, 1)),
        tf.constant(random(2, *SIZE, 1, seed=1)),
    )
    output = CascadeOutput((Stage(flow, flow, warped),) * 2, Affine(tf.zeros((2, 3, 3)), tf.zeros((2, 3))))
    found = {}
    for name, row in TABLE.items():
        config = CascadeConfig(image_size=SIZE, similarity=name)
        found[name] = float(losses.cascade_losses(fixed, output, config)["1_raw_loss"])
        assert found[name] == pytest.approx(float(tf.reduce_sum(row.load()(fixed, warped))), rel=1e-6)
    assert len(set(found.values())) == 4


@SIMILARITIES
def test_gradients_of_a_similarity_against_finite_differences(similarity):
    fixed, warped = random(2, 7, 12, 10, 1), random(2, 7, 12, 10, 1, seed=1)
    warped = 0.1 + 0.8 * (0.5 * warped + 0.5 * fixed)
    with tf.GradientTape() as tape:
        variable = tf.constant(warped)
        tape.watch(variable)
        values = similarity(tf.constant(fixed), variable)
    gradient = tape.gradient(values, variable).numpy()
    for pair in range(2):
        direction = gradient[pair] / np.linalg.norm(gradient[pair])
        ends = np.stack([warped[pair] + h * direction for h in (0.05, -0.05)])
        high, low = similarity(tf.constant(fixed[[pair, pair]]), tf.constant(ends)).numpy()
        assert (high - low) / 0.1 == pytest.approx(np.linalg.norm(gradient[pair]), rel=0.02)


@SIMILARITIES
@pytest.mark.parametrize("flat", ["fixed", "warped", "both"])
def test_a_constant_image_has_a_loss_of_1_and_a_finite_gradient(similarity, flat):
    images = {side: tf.constant(random(1, *SIZE, 1, seed=k)) for k, side in enumerate(("fixed", "warped"))}
    for side in images if flat == "both" else [flat]:
        images[side] = tf.fill((1, *SIZE, 1), 0.7)
    with tf.GradientTape() as tape:
        tape.watch(images["warped"])
        loss = similarity(images["fixed"], images["warped"])
    if similarity is not TABLE["mind"].load():  # which tells no structure from structure
        assert float(loss[0]) == pytest.approx(1, abs=1e-5)
    assert np.isfinite(tape.gradient(loss, images["warped"])).all()


@SIMILARITIES
def test_a_nan_in_the_warped_image_is_a_nan_in_the_loss_of_its_pair(similarity):
    warped = random(2, *SIZE, 1, seed=1)
    warped[1, 2, 3, 1] = np.nan
    loss = similarity(tf.constant(random(2, *SIZE, 1)), tf.constant(warped))
    np.testing.assert_array_equal(np.isnan(loss), [False, True])


@SIMILARITIES
@pytest.mark.parametrize("size", [(20, 24, 2), (9, 1, 10)], ids=str)
def test_a_similarity_of_thin_volumes_is_least_at_the_same_image(similarity, size):
    fixed, other = tf.constant(random(1, *size, 1)), tf.constant(random(1, *size, 1, seed=1))
    assert float(similarity(fixed, fixed)[0]) < float(similarity(fixed, other)[0])


def plain_local_correlation(fixed, warped, window=9):
    """1 - mean squared correlation of the windows, in double precision with SciPy's filter."""

    def mean(image):
        sums, count = (ndimage.uniform_filter(a, window, mode="constant") for a in (image, np.ones_like(image)))
        return sums / count

    expected = []
    for f, w in zip(fixed[..., 0].astype(np.float64), warped[..., 0].astype(np.float64), strict=True):
        covariance = mean(f * w) - mean(f) * mean(w)
        variances = [mean(image**2) - mean(image) ** 2 + 1e-5 for image in (f, w)]
        expected.append(1 - (covariance**2 / variances[0] / variances[1]).mean())
    return expected


@pytest.mark.parametrize("window", [3, 5, 7, 9, 15])
def test_local_correlation_against_scipy(window):
    fixed, warped = random(2, 13, 6, 17, 1), random(2, 13, 6, 17, 1, seed=1)
    warped[1] = np.where(np.arange(13)[:, None, None, None] < 6, 3 * fixed[1], 1 - fixed[1]) + 0.1 * warped[1]
    expected = plain_local_correlation(fixed, warped, window)
    np.testing.assert_allclose(local_correlation_loss(fixed, warped, window), expected, atol=2e-5)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_local_correlation_keeps_its_digits_along_a_long_flat_axis(axis):
    fixed, warped = 0.02 * random(1, 20_000, 3, 3, 1), 0.02 * random(1, 20_000, 3, 3, 1, seed=1)
    warped = 0.5 * fixed + 0.5 * warped
    for image in (fixed, warped):
        image[:, 10_000:] += 0.9  # far from the mean on either side
    fixed, warped = np.swapaxes(fixed, 1, axis), np.swapaxes(warped, 1, axis)
    expected = plain_local_correlation(fixed, warped)
    np.testing.assert_allclose(local_correlation_loss(fixed, warped), expected, atol=5e-4)


def test_local_correlation_of_linear_relations():
    fixed = random(1, 24, 9, 10, 1)
    factor = np.where(np.arange(24) < 12, -2, 0.5).astype(np.float32)[:, None, None, None]
    warped = np.concatenate([fixed, 3 - 2 * fixed, factor * fixed + 1, random(1, 24, 9, 10, 1, seed=1)])
    same, inverted, two, independent = local_correlation_loss(np.repeat(fixed, 4, 0), warped).numpy()
    assert same == pytest.approx(0, abs=1e-3)
    assert inverted == pytest.approx(0, abs=1e-3)
    assert two < 0.35  # only the windows across the border of the two relations
    assert independent > 0.95


def plain_information(fixed, warped, bins=32):
    """1 - MI / H(fixed) in double precision, with SciPy's B-spline."""
    window = BSpline.basis_element([-2, -1, 0, 1, 2], extrapolate=False)
    place = 1 + warped.ravel().astype(np.float64)[:, None] * (bins - 3)
    weights = np.nan_to_num(window(place - np.arange(bins)))
    rows = np.eye(bins)[np.rint(1 + fixed.ravel() * (bins - 3)).astype(int)]
    joint = rows.T @ weights / fixed.size
    outer = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    share = joint[joint > 0]
    p = joint.sum(1)[joint.sum(1) > 0]
    return 1 - (share * np.log(share / outer[joint > 0])).sum() / -(p * np.log(p)).sum()


def test_mutual_information_against_numpy():
    fixed, other = random(3, 13, 6, 17, 1), random(3, 13, 6, 17, 1, seed=1)
    warped = np.stack([other[0], 0.5 * fixed[1] + 0.5 * other[1], np.abs(2 * fixed[2] - 1)])
    expected = [plain_information(f, w) for f, w in zip(fixed, warped, strict=True)]
    np.testing.assert_allclose(losses.mutual_information_loss(fixed, warped), expected, atol=2e-5)


@pytest.mark.parametrize(("bins", "sampling"), [(16, 1), (48, 5)])
def test_mutual_information_with_other_bins_and_of_some_voxels(bins, sampling):
    fixed, warped = random(2, 13, 6, 17, 1), random(2, 13, 6, 17, 1, seed=1)
    warped = 0.5 * fixed + 0.5 * warped
    places = np.arange(fixed[0].size, dtype=np.float32).reshape(1, 13, 6, 17, 1)
    chosen = losses._sampled(tf.constant(np.concatenate([places, places])), sampling).numpy().astype(int)
    assert chosen.shape == (2, 13, 6 * 17 // sampling)
    np.testing.assert_array_equal(chosen[0], chosen[1])
    rows, blocks = chosen[0] // (6 * 17), chosen[0] % (6 * 17) // sampling  # one of every so many in each slice
    assert (rows == np.arange(13)[:, None]).all()
    assert (blocks == np.arange(6 * 17 // sampling)).all()
    expected = [
        plain_information(f.ravel()[chosen[0]], w.ravel()[chosen[0]], bins) for f, w in zip(fixed, warped, strict=True)
    ]
    with tf.GradientTape() as tape:
        tape.watch(variable := tf.constant(warped))
        value = losses.mutual_information_loss(tf.constant(fixed), variable, bins, sampling)
    np.testing.assert_allclose(value, expected, atol=3e-5)
    gradient = tape.gradient(value, variable).numpy()
    elsewhere = np.setdiff1d(np.arange(fixed[0].size), chosen)
    assert not gradient.reshape(2, -1)[:, elsewhere].any()
    way = random(*fixed.shape, seed=2) - 0.5
    high, low = (
        losses.mutual_information_loss(fixed, warped + h * way, bins, sampling).numpy() for h in (0.002, -0.002)
    )
    np.testing.assert_allclose((gradient * way).sum((1, 2, 3, 4)), (high - low) / 0.004, rtol=0.05, atol=2e-4)


def test_sampled_places_have_no_pattern_of_rows():
    """Of a slice of 64 x 64, one in 16: every column and every row is seen about as often."""
    places = np.tile(np.arange(64, dtype=np.float32), (1, 8, 64, 1))[..., None]
    chosen = losses._sampled(tf.constant(places), 16).numpy().astype(int).ravel()
    counts = np.bincount(chosen, minlength=64)
    assert counts.sum() == 8 * 256
    assert counts.min() > 16
    assert counts.max() < 64


def test_a_weighted_sum_of_similarities_and_its_gradient():
    fixed, warped = tf.constant(random(2, *SIZE, 1)), tf.constant(random(2, *SIZE, 1, seed=1))
    mask = tf.constant(random(2, *SIZE, 1, seed=2))
    loss = losses.similarity_loss(CascadeConfig(similarity="0.5*mi+2*ncc+lncc", window=5, bins=16))
    for masked in ({}, {"mask": mask}):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(warped)
            found = loss(fixed, warped, **masked)
            parts = [
                0.5 * losses.mutual_information_loss(fixed, warped, 16, **masked),
                2 * losses.correlation_loss(fixed, warped, **masked),
                local_correlation_loss(fixed, warped, 5, **masked),
            ]
        np.testing.assert_allclose(found, sum(parts), rtol=1e-6)
        expected = sum(tape.gradient(part, warped) for part in parts)
        np.testing.assert_allclose(tape.gradient(found, warped), expected, rtol=1e-5, atol=1e-9)


def test_mutual_information_where_no_voxel_counts_is_one_without_a_gradient():
    image = tf.constant(np.random.default_rng(0).random((1, *SIZE, 1), np.float32))
    with tf.GradientTape() as tape:
        tape.watch(image)
        loss = losses.mutual_information_loss(1.0 - image, image, mask=tf.zeros_like(image))
    assert float(loss[0]) == 1
    assert np.abs(tape.gradient(loss, image)).max() == 0


def test_mutual_information_of_few_grey_values():
    """Grey values three bins apart share no bin: every relation that is one to one leaves nothing open."""
    levels = np.random.default_rng(0).integers(0, 3, (1, *SIZE, 1))
    fixed = (levels / 2).astype(np.float32)
    remapped = np.float32([0.6, 0.0, 0.9])[levels]
    merged = np.float32([0.2, 0.9, 0.2])[levels]
    share = np.bincount(levels.ravel()) / levels.size
    entropy = -(share * np.log(share)).sum()
    told = -sum(p * np.log(p) for p in (share[1], 1 - share[1]))
    warped = np.concatenate([fixed, 1 - fixed, remapped, merged])
    values = losses.mutual_information_loss(np.repeat(fixed, 4, 0), warped)
    np.testing.assert_allclose(values, [0, 0, 0, 1 - told / entropy], atol=1e-5)
    # Independent by design: along x the one changes, along y the other.
    x, y, _ = np.indices((8, 8, 3), dtype=np.float32)[:, None, ..., None] // 4
    assert float(losses.mutual_information_loss(x, y)[0]) == pytest.approx(1, abs=1e-5)


def test_mutual_information_counts_every_voxel_of_a_large_background():
    fixed = np.zeros((1, 128, 128, 64, 1), np.float32)
    fixed[:, 30:60, 20:90, 10:40] = 1
    share = fixed.mean(dtype=np.float64)
    warped = np.where(np.arange(64)[:, None] < 32, fixed, 0).astype(np.float32)
    joint = np.array([1 - share, warped.mean(dtype=np.float64), share - warped.mean(dtype=np.float64)])
    one, two = (-(p * np.log(p)).sum() for p in (np.array([share, 1 - share]), np.array([joint[1], 1 - joint[1]])))
    expected = 1 - (one + two + (joint * np.log(joint)).sum()) / one
    assert float(losses.mutual_information_loss(fixed, warped)[0]) == pytest.approx(expected, abs=1e-4)
