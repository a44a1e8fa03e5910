"""Metrics against closed forms and independent NumPy computations."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from network import metrics
from network.label_maps import carry_labels, label_map

SIZE = (9, 7, 6)


def grid(size=SIZE):
    return np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1).astype(np.float32)


def random_flow(seed=0, size=SIZE, batch=2, scale=0.8):
    return tf.constant(np.random.default_rng(seed).normal(0, scale, (batch, *size, 3)), tf.float32)


def flow_of(*columns):
    """A flow [1, X, Y, Z, 3] from its three channels."""
    return tf.constant(np.stack(np.broadcast_arrays(*columns), -1)[None], tf.float32)


def box(low, high, value=1, size=SIZE):
    out = np.zeros(size, np.int32)
    out[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = value
    return out


def as_map(*volumes):
    return tf.constant(np.stack(volumes)[..., None], tf.int32)


# Overlap


def test_overlap_of_boxes():
    fixed, warped = box((1, 1, 1), (4, 5, 3)), box((2, 1, 1), (8, 5, 4))  # 24 and 72 voxels, 16 in both
    dice, jaccard = metrics.overlap(as_map(fixed, warped), as_map(warped, warped))
    np.testing.assert_allclose(dice, [[2 * 16 / 96], [1.0]], rtol=1e-6)
    np.testing.assert_allclose(jaccard, [[16 / 80], [1.0]], rtol=1e-6)


@pytest.mark.parametrize("high", [900, 2**31 - 1])  # within and beyond the table of labels
def test_overlap_of_labels_in_the_order_asked_for(high):
    rng = np.random.default_rng(3)
    values, labels = [-7, 0, 4, 17, 901, high], (high, 4, 5, 17)
    fixed, warped = rng.choice(values, (2, 2, *SIZE))
    dice, jaccard = metrics.overlap(as_map(*fixed), as_map(*warped), labels)
    for pair, (k, label) in itertools.product(range(2), enumerate(labels)):
        a, b = fixed[pair] == label, warped[pair] == label
        if label == 5:
            assert np.isnan(dice[pair, k])
            assert np.isnan(jaccard[pair, k])
        else:
            np.testing.assert_allclose(dice[pair, k], 2 * (a & b).sum() / (a.sum() + b.sum()), rtol=1e-6)
            np.testing.assert_allclose(jaccard[pair, k], (a & b).sum() / (a | b).sum(), rtol=1e-6)


@pytest.mark.parametrize("label", [0, 17, 2**31 - 1])
def test_overlap_of_a_single_label_however_often_asked_for(label):
    fixed, warped = np.random.default_rng(4).choice([-7, 0, 17, 2**31 - 1], (2, 2, *SIZE))
    dice, jaccard = metrics.overlap(as_map(*fixed), as_map(*warped), [label, label])
    for pair in range(2):
        a, b = fixed[pair] == label, warped[pair] == label
        np.testing.assert_allclose(dice[pair], 2 * [2 * (a & b).sum() / (a.sum() + b.sum())], rtol=1e-6)
        np.testing.assert_allclose(jaccard[pair], 2 * [(a & b).sum() / (a | b).sum()], rtol=1e-6)


def test_a_negative_label_is_not_measured():
    assert np.isnan(metrics.overlap(as_map(np.full(SIZE, -1)), as_map(np.full(SIZE, -1)), [-1])).all()
    fixed = np.where(np.arange(SIZE[2]) > 2, -1, 3) + np.zeros(SIZE, int)
    assert np.isnan(metrics.overlap(as_map(fixed), as_map(fixed), [-1])).all()


def test_overlap_is_zero_without_common_voxels_and_unmeasured_without_segmentation():
    one, other, missing = box((0, 0, 0), (2, 2, 2)), box((4, 4, 4), (6, 6, 6)), np.full(SIZE, -1)
    dice, jaccard = metrics.overlap(as_map(one, one, missing, missing), as_map(other, missing, one, missing))
    np.testing.assert_array_equal(dice, [[0], [np.nan], [np.nan], [np.nan]])
    np.testing.assert_array_equal(jaccard, [[0], [np.nan], [np.nan], [np.nan]])


def test_masks_become_label_maps_above_128():
    mask = np.zeros(SIZE, np.int32)
    mask[0, 0, :4] = [127, 128, 129, 255]
    np.testing.assert_array_equal(label_map(as_map(mask))[0, 0, 0, :4, 0], [0, 0, 1, 1])
    assert (label_map(as_map(np.full(SIZE, -1))).numpy() == -1).all()


def test_labels_are_carried_from_where_the_flow_looks():
    labels = box((2, 3, 1), (4, 5, 4), 7)
    shift = flow_of(*(np.full(SIZE, v) for v in (1.0, -2.0, 0.0)))
    carried = carry_labels(as_map(labels), shift, labels=(7,))
    np.testing.assert_array_equal(carried[0, ..., 0], box((1, 5, 1), (3, 7, 4), 7))
    carried = carry_labels(as_map(labels // 7 * 255), shift)
    np.testing.assert_array_equal(carried[0, ..., 0], box((1, 5, 1), (3, 7, 4), 1))
    assert (carry_labels(as_map(np.full(SIZE, -1)), shift).numpy() == -1).all()


# Landmarks


def test_landmark_distances_in_voxels_and_mm():
    x, y, z = np.moveaxis(grid(), -1, 0)
    flow = flow_of(0.5 + 0.1 * y, 0.2 * x - 0.3 * z, np.full(SIZE, -1.0))
    fixed = np.array([[[2.5, 3.25, 1.0], [6.0, 2.0, 4.5], [np.nan, 1, 1], [1, 1, 1]]], np.float32)
    moving = np.array([[[3.0, 3.0, 2.0], [6.0, 2.0, 4.5], [1, 1, 1], [np.nan] * 3]], np.float32)
    at = fixed[0, :2].astype(np.float64)
    moved = np.stack([0.5 + 0.1 * at[:, 1], 0.2 * at[:, 0] - 0.3 * at[:, 2], [-1, -1]], -1)
    apart = at + moved - moving[0, :2]
    expected = [*np.linalg.norm(apart, axis=-1), np.nan, np.nan]
    offsets = metrics.landmark_offsets(fixed, moving, flow)
    np.testing.assert_allclose(metrics.landmark_distances(offsets)[0], expected, rtol=1e-5)
    spacing = np.array([[0.7, 1.5, 3.0]], np.float32)
    expected = [*np.linalg.norm(apart * spacing, axis=-1), np.nan, np.nan]
    np.testing.assert_allclose(metrics.landmark_distances(offsets, spacing)[0], expected, rtol=1e-5)
    unknown = metrics.landmark_distances(offsets, np.full((1, 3), np.nan, np.float32))
    assert np.isnan(unknown).all()


# Jacobian


def numpy_determinant(flow, differences):
    """det(I + J) of flow [X, Y, Z, 3], J[i, j] = derivative of channel i along axis j by `differences`."""
    jacobian = np.stack([differences(flow, axis) for axis in range(3)], -1) + np.eye(3)
    return np.linalg.det(jacobian)


def test_jacobian_std_by_forward_differences():
    flow = random_flow()

    def forward(f, axis):
        return np.diff(f, axis=axis)[: SIZE[0] - 1, : SIZE[1] - 1, : SIZE[2] - 1]

    expected = [numpy_determinant(f.astype(np.float64), forward).std() for f in flow.numpy()]
    np.testing.assert_allclose(metrics.jacobian_std(flow), expected, rtol=1e-5)


def test_determinant_by_central_differences_is_numpys_gradient():
    flow = random_flow(1)
    expected = [
        numpy_determinant(f.astype(np.float64), lambda g, axis: np.gradient(g, axis=axis)) for f in flow.numpy()
    ]
    np.testing.assert_allclose(metrics.jacobian_determinant(flow), expected, rtol=1e-4, atol=1e-5)


def test_determinant_of_an_affine_flow():
    matrix = np.array([[0.1, 0.4, -0.2], [0.3, -0.2, 0.5], [0.0, 0.7, 0.2]])
    flow = (grid() @ matrix.T + [3, -5, 7])[None].astype(np.float32)
    expected = np.full((1, *SIZE), np.linalg.det(np.eye(3) + matrix))
    np.testing.assert_allclose(metrics.jacobian_determinant(flow), expected, rtol=1e-4)


def test_known_folding():
    # det J = (1 - x / 4.5)(1 + 0.25): folded for x = 5 and on, of the interior 1..7; sheared by a term that leaves det.
    x, y, _ = np.moveaxis(grid(), -1, 0)
    flow = flow_of(-(x**2) / 9, 0.25 * y + 3 * x, 2 * y)
    determinant = metrics.jacobian_determinant(flow)
    expected = 1.25 * (1 - np.arange(1, 8) / 4.5)
    np.testing.assert_allclose(determinant[0, 1:-1, 2, 2], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics.folding(determinant), [3 / 7], rtol=1e-6)
    logs = np.log(np.maximum(expected, 1e-9))
    np.testing.assert_allclose(metrics.sd_log_jacobian(determinant), [logs.std()], rtol=1e-4)


def test_a_determinant_of_zero_is_a_fold_and_the_edge_does_not_count():
    determinant = np.full((2, 4, 5, 6), 2.0, np.float32)
    determinant[0, 1, 1, 1] = 0.0
    determinant[:, 0], determinant[:, :, -1] = -1.0, -1.0
    np.testing.assert_allclose(metrics.folding(determinant), [1 / (2 * 3 * 4), 0], rtol=1e-6)
    np.testing.assert_allclose(metrics.sd_log_jacobian(determinant)[1], 0, atol=1e-6)


def test_folding_of_random_flows():
    flow = random_flow(5)
    inner = [numpy_determinant(f.astype(np.float64), lambda g, a: np.gradient(g, axis=a)) for f in flow.numpy()]
    inner = np.stack(inner)[:, 1:-1, 1:-1, 1:-1].reshape(2, -1)
    determinant = metrics.jacobian_determinant(flow)
    assert ((inner <= 0).mean(axis=1) > 0.01).all()
    np.testing.assert_allclose(metrics.folding(determinant), (inner <= 0).mean(axis=1), rtol=1e-6)
    expected = np.log(np.maximum(inner, 1e-9)).std(axis=1)
    np.testing.assert_allclose(metrics.sd_log_jacobian(determinant), expected, rtol=1e-4)


def test_no_displacement_has_no_fold_and_no_spread():
    determinant = metrics.jacobian_determinant(tf.zeros((1, *SIZE, 3)))
    assert metrics.folding(determinant).numpy() == [0]
    assert metrics.sd_log_jacobian(determinant).numpy() == [0]
    assert metrics.jacobian_std(tf.zeros((1, *SIZE, 3))).numpy() == [0]


def test_jacobian_of_what_is_no_number_is_unmeasured():
    flow = random_flow().numpy()
    flow[0, 4, 3, 3, 1] = np.nan
    determinant = metrics.jacobian_determinant(flow)
    for values in (metrics.folding(determinant), metrics.sd_log_jacobian(determinant), metrics.jacobian_std(flow)):
        np.testing.assert_array_equal(np.isnan(values), [True, False])
    thin = metrics.jacobian_determinant(random_flow(size=(2, 5, 5)))
    assert thin.shape == (2, 2, 5, 5)
    assert np.isnan(metrics.folding(thin)).all()
    assert np.isnan(metrics.sd_log_jacobian(thin)).all()


# Flow error


def test_flow_error_over_a_mask():
    true = random_flow(2, batch=3).numpy()
    flow = true.copy()
    mask = np.zeros((3, *SIZE, 1), bool)
    mask[:2, 1:3, 2, 4] = True
    flow[0, 1, 2, 4] += [3, 4, 0]
    flow[0, 2, 2, 4] += [0, 0, 1]
    flow[0, 5, 5, 5] += 100
    true[1] = np.nan
    np.testing.assert_allclose(metrics.flow_error(flow, true, mask), [3, np.nan, np.nan], rtol=1e-5)
    expected = np.linalg.norm(flow - true, axis=-1).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(metrics.flow_error(flow, true), expected, rtol=1e-5)


# Surfaces


def brute_force(fixed, warped, label, spacing):
    """HD95 and mean surface distance from every distance between two surfaces, each voxel looked at by itself."""

    def surface(volume):
        inside = {tuple(p) for p in np.argwhere(volume == label)}
        steps = [s * np.eye(3, dtype=int)[axis] for axis in range(3) for s in (-1, 1)]
        return np.array([p for p in inside if any(tuple(np.add(p, s)) not in inside for s in steps)])

    a, b = (surface(volume) * np.asarray(spacing) for volume in (fixed, warped))
    distances = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    there, back = np.sort(distances.min(1)), np.sort(distances.min(0))

    def percentile(sorted_values):
        place = 0.95 * (len(sorted_values) - 1)
        low = int(place)
        high = min(low + 1, len(sorted_values) - 1)
        return sorted_values[low] + (place - low) * (sorted_values[high] - sorted_values[low])

    mean = (there.sum() + back.sum()) / (len(there) + len(back))
    return max(percentile(there), percentile(back)), mean


def test_surface_distances_of_labels_with_anisotropic_spacing():
    rng = np.random.default_rng(7)
    fixed = rng.choice([0, 0, 3, 3, 3, 3, 8], SIZE)
    fixed[:4] = np.maximum(fixed[:4], box((0, 0, 0), (4, 7, 6), 3)[:4])
    warped = np.roll(fixed, (2, -1), (0, 1))
    spacing = (0.7, 1.9, 3.1)
    hd95, mean = metrics.surface_distances(fixed, warped, (8, 5, 3), spacing)
    for k, label in ((0, 8), (2, 3)):
        np.testing.assert_allclose((hd95[k], mean[k]), brute_force(fixed, warped, label, spacing), rtol=1e-6)
    assert np.isnan((hd95[1], mean[1])).all()


def test_surface_distances_of_a_box_that_touches_the_edge():
    fixed, warped = box((0, 2, 1), (5, 7, 6)), box((1, 1, 0), (7, 4, 3))
    for spacing in ((1, 1, 1), (2.5, 0.5, 1.25)):
        got = [values[0] for values in metrics.surface_distances(fixed, warped, (1,), spacing)]
        np.testing.assert_allclose(got, brute_force(fixed, warped, 1, spacing), rtol=1e-6)


def test_surface_distances_of_two_single_voxels():
    hd95, mean = metrics.surface_distances(box((1, 1, 1), (2, 2, 2)), box((4, 3, 2), (5, 4, 3)), (1,), (2, 3, 5))
    np.testing.assert_allclose([hd95[0], mean[0]], np.linalg.norm([3 * 2, 2 * 3, 1 * 5]), rtol=1e-6)


def test_hd95_is_the_larger_one_of_the_two_directions():
    fixed = box((4, 3, 3), (5, 4, 4))
    warped = fixed + box((8, 3, 3), (9, 4, 4))  # far from the fixed surface, which is all near
    hd95, mean = metrics.surface_distances(fixed, warped, (1,))
    np.testing.assert_allclose([hd95[0], mean[0]], [0.95 * 4, 4 / 3], rtol=1e-6)


@pytest.mark.parametrize("side", [0, 1])
def test_surface_distances_without_the_label_are_unmeasured(side):
    sides = [box((1, 1, 1), (3, 3, 3)), np.full(SIZE, -1 if side else 0)]
    hd95, mean = metrics.surface_distances(*sides[:: 1 - 2 * side], (1,))
    assert np.isnan(hd95).all()
    assert np.isnan(mean).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.2, 5))
def test_surface_distances_are_symmetric_scale_with_the_spacing_and_vanish_for_equal_maps(seed, scale):
    a, b = np.random.default_rng(seed).choice([0, 1], (2, 5, 4, 6))
    spacing = np.array([1.0, 0.6, 2.0])
    here = metrics.surface_distances(a, b, (1,), spacing)
    np.testing.assert_array_equal(here, metrics.surface_distances(b, a, (1,), spacing))
    np.testing.assert_allclose(np.multiply(here, scale), metrics.surface_distances(a, b, (1,), spacing * scale), 1e-5)
    np.testing.assert_array_equal(metrics.surface_distances(a, a, (1,), spacing), np.zeros((2, 1)))
